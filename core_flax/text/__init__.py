"""Tokenizers and sentence splitting: no jax."""
