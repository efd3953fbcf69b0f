"""The gateway: nginx configuration, routes, TLS, API keys.

May import: runtime, config, common.
"""
