"""Configuration: settings, secrets, profiles, vLLM's options.

May import: common.
"""
