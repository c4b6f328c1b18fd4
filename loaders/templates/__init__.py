"""Chat templates are untrusted code from checkpoints: a separate process renders them."""

from nybble.loaders.templates.renderer import (
    TemplateFailedError,
    TemplateRefusedError,
    TemplateRenderer,
)

__all__ = ["TemplateFailedError", "TemplateRefusedError", "TemplateRenderer"]
