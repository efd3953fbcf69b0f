"""INT4 products of few rows on GPUs."""
