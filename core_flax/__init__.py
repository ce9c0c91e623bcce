"""What the three families share: data order, the step, the loop, checkpoints, sharding, layers. Imports third-party code only."""
