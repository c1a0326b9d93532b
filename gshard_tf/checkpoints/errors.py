"""What can be wrong with a checkpoint."""


class DamagedError(ValueError):
    """A checkpoint is not what was written: its checksums or sizes do not match."""


class MismatchError(ValueError):
    """A checkpoint does not fit the model that it is to be restored into."""
