"""Encoder-decoder translation: not here yet."""
