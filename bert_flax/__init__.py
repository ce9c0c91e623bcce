"""Encoder pretraining and fine-tuning (BERT) on the shared core."""
