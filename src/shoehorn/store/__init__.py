"""The local model store: pull, verification, manifest, inventory.

May import: hub, model, config, common.
"""
