"""Chat templates are untrusted code from checkpoints: a separate process renders them."""

from nybble.loaders.templates.renderer import (
    TemplateFailedError,
    TemplateRefusedError,
    TemplateRenderer,
)
from nybble.loaders.templates.turns import as_turn

__all__ = ["TemplateFailedError", "TemplateRefusedError", "TemplateRenderer", "as_turn"]
