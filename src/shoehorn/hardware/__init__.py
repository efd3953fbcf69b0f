"""The machine: GPUs, host, specifications, minimum requirements, measured bandwidths.

May import: common.
"""
