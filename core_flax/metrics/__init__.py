"""Official metrics over numpy arrays and text; imports no jax."""
