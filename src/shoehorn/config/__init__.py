"""Configuration: settings, secrets, profiles, vLLM options.

May import: common.
"""
