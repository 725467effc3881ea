"""Plans, stages, hosts, checkpoints, logs and reports. Knows nothing of Slurm or of the command line."""
