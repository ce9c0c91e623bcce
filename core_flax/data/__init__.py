"""Corpora, exact order, record shards and host feeding: numpy only, no jax."""
