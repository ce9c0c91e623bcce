"""Causal language models: not here yet."""
