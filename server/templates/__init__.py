"""Chat templates come with checkpoints, whose authors are not trusted: a process renders them."""

from nybble.server.templates.renderer import (
    TemplateFailedError,
    TemplateRefusedError,
    TemplateRenderer,
)

__all__ = ["TemplateFailedError", "TemplateRefusedError", "TemplateRenderer"]
