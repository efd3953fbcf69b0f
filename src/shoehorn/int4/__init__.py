"""Conversion of a checkpoint to INT4.

May import: store, hub, model, config, common.
"""
