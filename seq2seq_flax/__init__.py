"""Encoder-decoder translation: trained, decoded, scored."""
