"""Chat templates are untrusted code from checkpoints: a separate process renders them."""

from nybble.loaders.templates.renderer import (
    TemplateFailedError,
    TemplateInvalidError,
    TemplateRefusedError,
    TemplateRenderer,
)

__all__ = [
    "TemplateFailedError",
    "TemplateInvalidError",
    "TemplateRefusedError",
    "TemplateRenderer",
]
