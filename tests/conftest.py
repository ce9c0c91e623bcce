"""Four fake CPU devices for every test; set before anything imports jax."""

import os

# With fewer than the devices' threads, XLA's collectives on a small machine can miss their rendezvous and abort.
os.environ["NPROC"] = "16"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_PLATFORMS"] = "cpu"
