"""What can be wrong with a checkpoint or an adapter."""


class CheckpointError(ValueError):
    """A checkpoint cannot be read: the message names the file or tensor and what was expected."""


class AdapterError(CheckpointError):
    """An adapter cannot be used with this base: the message names the setting or tensor."""
