"""Training, data, checkpoints, profiling, hosts and the command line."""
