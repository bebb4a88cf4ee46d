"""The engines, which write completions."""
