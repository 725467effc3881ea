"""Errors that a user caused and can mend. Our own broken invariants are plain assertions instead."""


class UserError(ValueError):
    """A mistake in what the user gave us.

    The message names where it is, what was got, what is allowed and what to change. The command line prints it without
    a traceback.
    """


class DataError(UserError):
    """Training or evaluation data is unreadable, empty or broken beyond the share that the plan tolerates."""


class ModelError(UserError):
    """A model configuration or a weight file does not fit together."""
