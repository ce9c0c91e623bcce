"""Causal language models: trained, scored and generating."""
