"""Several machines that serve one model: secret, network, node reports, agreement, and the program `ray`.

May import: hardware, model, runtime, config, common.
"""
