"""Limits, error forms, metrics and draining of the engine's API server."""
