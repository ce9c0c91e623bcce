"""Where compiled programs stay from one command to the next. Imports no jax, so that it can be asked before."""

import hashlib
import os
import platform
import warnings
from pathlib import Path


def keep_compiled_programs() -> None:
    """Lets JAX keep what takes it a second or more to compile, and take it from there the next time.

    So a task's second seed, a run that goes on and the next prediction start sooner; what they compute is the same.
    The folder is ``flax-pretraining`` in the user's cache folder ($XDG_CACHE_HOME, ~/.cache), unless
    JAX_COMPILATION_CACHE_DIR names another; JAX_ENABLE_COMPILATION_CACHE=false keeps nothing. It may be deleted at any
    time. Call it before jax is imported. Where the folder cannot be written, nothing is kept.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home, "flax-pretraining", "compiled", _processor())
    if not folder.is_absolute():  # by the standard of these folders it does not count
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        # A disk that is full later on is no matter either: what was to be kept is compiled again.
        warnings.filterwarnings("ignore", "Error (writing|reading) persistent compilation cache")


def _processor() -> str:
    """A name for the instructions of this machine's CPU: a home folder may be shared with machines that have others."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.exists() else []
    told = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    return hashlib.sha256("\n".join([platform.machine(), *told]).encode()).hexdigest()[:12]
