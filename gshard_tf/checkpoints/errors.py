"""What can be wrong with a checkpoint."""

import errno as numbers

# What this process has too much or too little of: no fault of a file.
_OWN_TROUBLE = (numbers.EMFILE, numbers.ENFILE, numbers.ENOMEM)


class CorruptCheckpointError(ValueError):
    """A checkpoint cannot be read, or is not what was written.

    Attributes:
        errno: The system's number of what kept it from being read; None: it was read,
            and its checksums, sizes or contents do not match.
    """

    def __init__(self, message: str, errno: int | None = None):
        super().__init__(message)
        self.errno = errno


class CheckpointMismatchError(ValueError):
    """A checkpoint does not fit the model that it is to be restored into."""


def os_error(message: str, errno: int | None) -> OSError:
    """An error of the system, with its number where that is known."""
    return OSError(message) if errno is None else OSError(errno, message)


def unreadable(
    what: str, name: str, error: OSError
) -> CorruptCheckpointError | OSError:
    """What to raise where a file of a checkpoint cannot be read.

    Args:
        what: The checkpoint.
        name: Which part of it.
        error: What the system says.

    Returns:
        A `CorruptCheckpointError`; or an `OSError`, where it is not for the file: too
        many are open, say. Both have the number of `error`.
    """
    reason = error.strerror or str(error)
    if error.errno in _OWN_TROUBLE:
        return OSError(error.errno, f"{what} could not be read: {name} ({reason})")
    text = f"{what} is damaged: {name} cannot be read ({reason})"
    return CorruptCheckpointError(text, error.errno)
