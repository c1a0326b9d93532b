"""Errors of checkpoints."""

import errno as numbers

# This process has too many open files, or too little memory: no fault of a file.
_PROCESS_LIMITS = (numbers.EMFILE, numbers.ENFILE, numbers.ENOMEM)


class CorruptCheckpointError(ValueError):
    """Raised for a checkpoint that cannot be read, or does not match its checksums.

    Attributes:
        errno: The system's number of the error that kept it from being read; None: it
            was read, and its checksums, sizes or contents do not match.
    """

    def __init__(self, message: str, errno: int | None = None):
        super().__init__(message)
        self.errno = errno


class CheckpointMismatchError(ValueError):
    """Raised for a checkpoint of which names, shapes or types are not the model's."""


def os_error(message: str, errno: int | None) -> OSError:
    """Returns an error of the system, with its number where that is known."""
    return OSError(message) if errno is None else OSError(errno, message)


def unreadable(
    checkpoint: str, name: str, error: OSError
) -> CorruptCheckpointError | OSError:
    """Returns the error to raise where a file of a checkpoint cannot be read.

    Args:
        checkpoint: The checkpoint.
        name: The file, or another part of it.
        error: The error of the system.

    Returns:
        A `CorruptCheckpointError`; or an `OSError`, where the file is not the cause:
        too many are open, for example. Both have the number of `error`.
    """
    reason = error.strerror or str(error)
    if error.errno in _PROCESS_LIMITS:
        return OSError(
            error.errno, f"{checkpoint} could not be read: {name} ({reason})"
        )
    text = f"{checkpoint} is damaged: {name} cannot be read ({reason})"
    return CorruptCheckpointError(text, error.errno)
