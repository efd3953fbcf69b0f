"""Patches of vLLM and its plugins, each with the defect that it answers, for the versions that `plugin` names."""
