"""Runs on a cluster with Slurm: writing and submitting a job, what the job does, and looking at it."""
