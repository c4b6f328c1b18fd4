"""Training jobs beside a serving engine: OpenAI's files and fine-tuning jobs, kept in a folder."""

from nybble.server.fine_tuning.service import FineTuning
from nybble.server.fine_tuning.settings import FineTuningSettings

__all__ = ["FineTuning", "FineTuningSettings"]
