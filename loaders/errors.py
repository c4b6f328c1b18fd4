"""What can be wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read: the message names the file or tensor and what was expected."""
