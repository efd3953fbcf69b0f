"""Stand-in for vLLM: starts within a second, writes vLLM's log lines, and fails as vLLM fails."""
