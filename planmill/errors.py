"""Errors that are a user's to mend: one clear line, exit code 2, never a traceback."""


class PlanmillError(Exception):
    """A mistake in what was asked for, or a file that cannot be used; the message says what to do."""
