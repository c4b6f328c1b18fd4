"""`nybble batch`: a file of requests without a server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nybble.server.batches.offline import read_requests

from ..client import CHAT, COMPLETIONS
from ..conftest import MODEL
from ..forked import ForkedServer


def request(id: str, url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": id, "method": "POST", "url": url, "body": body}


def batch(folder: Path, *files: Path) -> list[str]:
    small = ("--served-model-name", MODEL, "--kv-cache-memory", "16MiB", "--max-num-seqs", "2")
    return ["batch", *map(str, files), "--model", str(folder), *small]


def test_a_file_is_answered_and_a_second_run_adds_what_is_missing(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        *(request(f"r{i}", COMPLETIONS, prompt=f"the {i}", max_tokens=3) for i in range(6)),
        request("chat", CHAT, messages=[{"role": "user", "content": "hello"}], max_tokens=3),
        request("wrong", COMPLETIONS, prompt="x", temperature="hot"),
        request("vector", "/v1/embeddings", model=MODEL, input="a text"),
    ]
    source.write_text("\n".join(map(json.dumps, lines)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = ForkedServer(batch(tiny_model(), source, output), environment)
    assert f"{output}: 8 answered, 1 failed" in first.stderr.read()
    assert first.wait(60) == 1  # one request is wrong
    results = {line["custom_id"]: line for line in map(json.loads, output.open())}
    assert set(results) == {line["custom_id"] for line in lines}
    statuses = {id: line["response"]["status_code"] for id, line in results.items()}
    assert {id for id, status in statuses.items() if status != 200} == {"wrong"}
    assert results["wrong"]["response"]["body"]["error"]["param"] == "temperature"
    assert results["r0"]["response"]["body"]["usage"]["completion_tokens"] == 3

    kept = output.read_bytes().splitlines(keepends=True)[:7]
    output.write_bytes(b"".join(kept) + b'{"id":"batch_req_')  # as if killed while it wrote
    second = ForkedServer(batch(tiny_model(), source, output), environment)
    said = second.stderr.read()
    assert "7 had results already" in said, said
    second.wait(60)
    now = output.read_bytes().splitlines(keepends=True)
    assert now[:7] == kept
    assert sorted(json.loads(line)["custom_id"] for line in now) == sorted(results)


def test_a_wrong_line_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(request("a", COMPLETIONS)) + "\n{}\n")
    with pytest.raises(ValueError, match=r"in.jsonl:2: expected a string in custom_id"):
        read_requests(source)
