"""Checkpoints: files, safetensors headers, and the shape of the model.

May import: common.
"""
