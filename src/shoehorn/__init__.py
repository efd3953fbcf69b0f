"""Shoehorn fits big language models onto small GPUs. This package imports neither vLLM nor torch."""

__version__ = "0.1.0"
