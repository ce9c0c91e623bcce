"""What the three families share: data order, step, loop, checkpoints, sharding, layers. Imports no family."""
