"""The memory model: bytes of each part on each device.

May import: model, common.
"""
