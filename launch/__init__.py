"""Planning and launching runs on other machines: not here yet."""
