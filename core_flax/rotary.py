"""Rotary position embedding: queries and keys turned by angles that grow with the position."""

import jax.numpy as jnp

from core_flax.types import Array

Rotation = tuple[Array, Array]
"""Cosine and sine of the angles, each [B, L, 1, K / 2], float32."""


def rotation(positions_BL: Array, head_width: int, theta: float = 10_000.0) -> Rotation:
    """The angles of positions (Su et al. 2021, arXiv 2104.09864, section 3.2.2).

    Args:
      positions_BL: each token's place in its sequence; [1, L] serves every row.
      head_width: K, even.
      theta: the slowest pair of elements turns by 1 / theta^(1 - 2 / K) radians a position, the fastest by 1.
    """
    assert head_width % 2 == 0, f"heads of width {head_width} have no pairs to turn"
    speeds = theta ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * speeds
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x_BLHK: Array, rotation: Rotation) -> Array:
    """Turns each pair of elements by its angle; a product of a query with a key then depends on their distance.

    Element i is paired with element i + K / 2, as in transformers (the paper pairs neighbours: the same up to the order
    of a head's elements, which is the initialiser's to choose).
    """
    cos, sin = rotation
    first, second = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BLHK.dtype)
