"""Starts the processes of a run and waits for their end."""
