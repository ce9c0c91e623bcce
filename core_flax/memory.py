"""How the C library of a CPU deals with memory. Imports nothing, so that it can be asked before anything else is."""

import ctypes
import importlib.util
import os


def keep_freed_memory() -> None:
    """On a CPU, let the process keep memory that it frees, for a program that does nothing but train.

    XLA takes the memory of a step's intermediate values anew for every step. glibc's malloc fetches blocks of that size
    from the kernel and returns them at once, so that every page is cleared and mapped again in every step. Call it
    before jax is imported: threads that are there already keep arenas of their own, of which memory is given back. It
    does nothing where malloc is not glibc's or JAX has an accelerator.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    platforms = os.environ.get("JAX_PLATFORMS", "")
    has_accelerator = any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))
    if mallopt is None or (platforms != "cpu" if platforms else has_accelerator):
        return
    # From malloc.h. One arena, since only the first one can grow without bound; none of it by mmap; -1: nothing is ever
    # given back.
    trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8
    mallopt(arena_max, 1)
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)
    mallopt(top_pad, 2**26)
