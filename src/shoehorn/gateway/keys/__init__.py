"""API keys: their store, their sources, and the service that checks them.

May import: runtime, config, common.
"""
