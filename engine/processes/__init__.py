"""The processes of a run: ranks, collectives over them, their random seeds, files that they share."""
