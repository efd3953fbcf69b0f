"""Request admission, limits, errors and metrics in front of vLLM's API."""
