"""Errors that end a run."""


class RunError(ValueError):
    """What ends a run on all ranks alike, so that the first one says it for all."""
