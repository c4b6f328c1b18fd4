"""Serves a tiny random model that knows tools: ``serve_tiny.py FOLDER``, by the server's Python."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }} <tool_call>{% endif %}"
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ call.function | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def tiny() -> ModuleType:
    """``tests/tiny.py``."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).parents[1] / "tiny.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_model(folder: Path, *, max_length: int = 4096) -> None:
    tiny().write_tiny_model(folder, max_length=max_length)
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"chat_template": TEMPLATE}))


def serve(folder: Path, *options: str) -> None:
    from nybble.server.cli.main import main as nybble

    common = ["--served-model-name", "tiny", "--port", "0", "--kv-cache-memory", "64MiB"]
    sys.argv = ["nybble", "serve", "--model", str(folder), *common, *options]
    nybble()


def main() -> None:
    folder = Path(sys.argv[1])
    write_model(folder)
    serve(folder, "--speculate", "ngram")  # so that clients meet the fields which count drafts


if __name__ == "__main__":
    main()
