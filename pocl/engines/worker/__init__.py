"""Files that vLLM's own interpreter runs, which has no pocl: they import nothing of it."""
