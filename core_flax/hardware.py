"""What accelerators can do at best, to say what share of it a run uses."""

import re

import jax
import jax.numpy as jnp

TERA = 1e12

PEAKS: tuple[tuple[str, float], ...] = (
    (r"TPU v2$", 22.5),
    (r"TPU v3$", 61.5),
    (r"TPU v4$", 275),
    (r"TPU v5( lite|e)$", 197),
    (r"TPU v5p?$", 459),
    (r"TPU v6( lite|e)$", 918),
    (r"TPU7x$", 1153.5),
    (r"\bV100S?\b", 125),
    (r"\bT4\b", 65),
    (r"\bA100\b", 312),
    (r"\bA10G\b", 70),
    (r"\bA10\b", 125),
    (r"\bL4\b", 121),
    (r"\bL40S\b", 362),
    (r"\bH100 PCIe\b", 756),
    (r"\bH100 NVL\b", 835),
    (r"\b(H100|H200|GH200|H800)\b", 989),
    (r"\bB200\b", 2250),
)
"""Pattern in ``jax.Device.device_kind`` -> 10^12 operations a second; the first that is found counts."""


def peak_flops(device_kind: str) -> float | None:
    """Floating point operations a second of one device in dense bfloat16 matrix products.

    One device is what JAX counts as one: a whole chip, but for TPU v2, v3 and v7x half a chip (one of its two cores or
    chiplets). V100 and T4, which have no bfloat16, are given with their float16 peak.

    Sources: docs.cloud.google.com/tpu, one page per version, "peak compute per chip" (and tpu7x, "dual-chiplet
    architecture"); NVIDIA's data sheets, tensor cores without sparsity (half the figure where only the sparse one is
    printed).

    Args:
        device_kind: As ``jax.devices()[0].device_kind`` has it.

    Returns:
        None for a CPU and for what the table does not know.
    """
    for pattern, peak in PEAKS:
        if re.search(pattern, device_kind):
            return peak * TERA
    return None


def platform() -> str:
    """Where the program that is being traced will run: on the mesh's devices, which need not be this machine's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def compute_capability() -> float:
    """That of this machine's NVIDIA GPUs: 8.0 is Ampere's; 0 where there are none."""
    try:
        return float(getattr(jax.local_devices()[0], "compute_capability", 0))
    except ValueError:  # AMD's are names
        return 0.0


def compute_dtype(name: str) -> jnp.dtype:
    """The type of TrainConfig.compute_dtype: "auto" is bfloat16 where matrix units have it.

    That is neither on a CPU nor on GPUs before Ampere (V100, T4): there it is float32.
    """
    if name == "auto":
        without = jax.default_backend() == "cpu" or 0 < compute_capability() < 8
        name = "float32" if without else "bfloat16"
    return jnp.dtype(name)
