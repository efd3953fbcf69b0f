"""A stand-in for vLLM on a GPU, which cannot be had here: it says what vLLM says, and fails as vLLM fails."""
