"""What a checkpoint is: its files, safetensors headers and shape.

May import: common.
"""
