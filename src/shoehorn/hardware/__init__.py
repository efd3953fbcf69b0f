"""The machine: GPUs, host, specifications, requirements, bandwidth probes.

May import: common.
"""
