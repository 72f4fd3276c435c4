"""Ways to start a run's processes: here on this machine."""
