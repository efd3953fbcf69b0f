"""Patches of vLLM, each guarded and pinned to the version it was tested with."""
