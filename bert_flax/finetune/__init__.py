"""Fine-tuning: task definitions, readers of the official files, heads, training, prediction."""
