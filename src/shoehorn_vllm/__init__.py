"""Code of the appliance that runs inside the engine's processes. It imports neither vLLM nor torch at its top."""
