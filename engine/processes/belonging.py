"""By what the processes of a run know each other, and where they meet on one machine. Launchers import it: no torch."""

import secrets

SECRET = "OMNIVL_RUN_SECRET"
"""Variable with the secret, hexadecimal: known to the processes of one start of a run, and to nobody else."""

LOOPBACK = "127.0.0.1"
"""Where the processes of one machine meet."""


def new_secret() -> str:
    """A secret for one start of a run."""
    return secrets.token_hex(32)
