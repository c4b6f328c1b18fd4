"""The process that renders chat templates. It runs as a file and imports nothing of nybble.

A line of JSON in, a line of JSON out. jinja2's sandbox, as transformers sets it up, keeps templates
from Python's internals. The operating system enforces the other limits: a rendering that takes too
long ends the process, one that takes too much memory fails, and no file can grow.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

CPU_SECONDS = 2.0
MEMORY_BYTES = 512 << 20
OUTPUT_CHARACTERS = 32 << 20


def _answer(request: dict[str, Any]) -> dict[str, str]:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            [request["messages"]],
            tools=request["tools"],
            chat_template=request["template"],
            **{"add_generation_prompt": True, **request["variables"]},
        )
    except MemoryError:
        return {"failed": f"it needs more than {MEMORY_BYTES >> 20} MiB"}
    except TemplateSyntaxError as error:
        return {"invalid": f"line {error.lineno}: {error.message}"}
    except Exception as error:
        return {"refused": str(error) or type(error).__name__}
    text = rendered[0][0]  # for one conversation; the annotation in transformers is wrong
    if len(text) > OUTPUT_CHARACTERS:
        return {"failed": f"it makes more than {OUTPUT_CHARACTERS:,} characters"}
    return {"text": text}


def main() -> None:
    """Answer until stdin closes, which happens when the parent process ends."""
    gc.disable()  # importing makes no garbage, and to look for it takes a sixth of the time
    import transformers.utils.chat_template_utils  # noqa: F401  before memory is limited

    gc.enable()

    for number in (signal.SIGINT, signal.SIGHUP):  # meant for the process that started this one
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    sys.stdout = sys.stderr
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, used + MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        # Processor time, so that a busy machine ends nothing; the signal also ends C code.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        try:
            answer = json.dumps(_answer(json.loads(line)))
        except MemoryError:
            answer = json.dumps({"failed": f"it needs more than {MEMORY_BYTES >> 20} MiB"})
        answers.write(answer + "\n")
        answers.flush()
        signal.setitimer(signal.ITIMER_PROF, 0)


if __name__ == "__main__":
    main()
