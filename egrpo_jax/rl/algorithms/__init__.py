"""One short file for each algorithm: its section of the config, and how that becomes a plan."""
