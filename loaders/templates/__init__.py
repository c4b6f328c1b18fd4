"""Chat templates come with checkpoints, whose authors are not trusted: a process renders them."""

from nybble.loaders.templates.renderer import (
    TemplateFailedError,
    TemplateRefusedError,
    TemplateRenderer,
)

__all__ = ["TemplateFailedError", "TemplateRefusedError", "TemplateRenderer"]
