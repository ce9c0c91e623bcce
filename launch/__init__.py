"""Planning runs for devices that are not here, and running them on several hosts."""
