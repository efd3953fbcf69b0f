"""Reports of the engine's memory."""
