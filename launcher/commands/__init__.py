"""The commands of ``omnivl``, one file each."""
