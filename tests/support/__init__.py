"""Helpers of the tests: starts of real processes, plans and clients."""
