"""Metrics: the exporter and what it reads.

May import: runtime, config, common.
"""
