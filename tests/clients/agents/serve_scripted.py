"""Serves a model that follows a script: ``serve_scripted.py FOLDER``, by the server's Python."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers import Tokenizer

sys.path.insert(1, str(Path(__file__).parents[1]))
from scripted_model import TEMPLATE, write_scripted_model
from serve_tiny import serve, tiny

LENGTH = 16384  # agents' prompts are long


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    tiny().write_tokenizer(folder, vocab_size=320, max_length=LENGTH)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    write_scripted_model(folder, tokenizer, max_length=LENGTH)
    settings = folder / "tokenizer_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    serve(folder, "--response-store", str(folder / "responses.db"))


if __name__ == "__main__":
    main()
