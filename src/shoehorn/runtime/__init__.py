"""Processes of one appliance: RUN_DIR, state, child processes, supervisord.

May import: config, common.
"""
