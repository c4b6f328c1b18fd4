"""The table of a job's steps that OpenAI's clients download as its result file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

_COLUMNS = ("step", "epoch", "train_loss", "valid_loss", "learning_rate")


def results_csv(metrics: Sequence[dict[str, Any]]) -> bytes:
    """One row a step; the validation loss is empty if it was not measured."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(metrics)
    return text.getvalue().encode()
