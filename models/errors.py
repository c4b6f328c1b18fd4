"""Why a model is refused."""


class UnsupportedModelError(ValueError):
    """The model's family, or a setting in its config.json, is not supported."""
