"""Files over HTTP: checked when they come, whole or not there, seen by their owner alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
from openai import OpenAI

from .conftest import Site, chat_lines


def upload(client: OpenAI, content: bytes, name: str = "data.jsonl") -> Any:
    return client.files.create(file=(name, content), purpose="fine-tune")


def stored(site: Site) -> set[str]:
    return {path.name for path in (site.state / "files").iterdir()}


def test_a_file_is_uploaded_listed_read_back_and_deleted(site: Site) -> None:
    content = chat_lines(3)
    file = upload(site.acme, content, "a name.jsonl")
    assert (file.object, file.bytes, file.purpose) == ("file", len(content), "fine-tune")
    assert (file.filename, file.status) == ("a name.jsonl", "processed")
    assert site.acme.files.retrieve(file.id) == file
    assert site.acme.files.content(file.id).read() == content
    assert file.id in [one.id for one in site.acme.files.list()]
    assert site.acme.files.delete(file.id).deleted
    assert file.id not in stored(site)
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        site.acme.files.retrieve(file.id)


def test_lists_page_from_the_newest(site: Site) -> None:
    before = [file.id for file in site.other.files.list()]  # of other tests
    files = [upload(site.other, chat_lines(1), f"{index}") for index in range(3)]
    page = site.other.files.list(limit=2)
    assert [file.id for file in page.data] == [files[2].id, files[1].id]
    assert page.has_more
    rest = site.other.files.list(after=files[1].id).data
    assert [file.id for file in rest] == [files[0].id, *before]
    oldest = [file.id for file in site.other.files.list(order="asc", purpose="fine-tune").data]
    assert oldest[-3:] == [file.id for file in files]
    assert set(oldest[:-3]) <= set(before)
    results = site.other.files.list(purpose="fine-tune-results").data
    assert {file.id for file in results} <= set(before)
    for wrong in ({"limit": 0}, {"limit": "9" * 4400}, {"order": "random"}):
        with pytest.raises(openai.BadRequestError, match="expected"):
            site.other.files.list(**wrong)  # type: ignore[arg-type]
    for file in files:
        site.other.files.delete(file.id)


def test_another_tenants_file_is_not_there_and_the_operator_sees_all(site: Site) -> None:
    file = upload(site.acme, chat_lines(1))
    assert file.id not in [one.id for one in site.other.files.list()]
    for action in (site.other.files.retrieve, site.other.files.content, site.other.files.delete):
        with pytest.raises(openai.NotFoundError):
            action(file.id)
    assert file.id in [one.id for one in site.admin.files.list()]
    site.admin.files.delete(file.id)


def test_a_tenant_without_the_right_and_an_unknown_key_are_refused(site: Site) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="its entry needs fine_tuning = true"):
        upload(site.guest, chat_lines(1))
    with pytest.raises(openai.AuthenticationError):
        upload(site.nobody, chat_lines(1))
    # The key of administration opens nothing else.
    with pytest.raises(openai.AuthenticationError):
        site.admin.models.list()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (chat_lines(2) + b'\n{"messages": [}', "line 3: not valid JSON: "),
        (b'{"text": "a"}\n\n[1]\n{"text": 5}', "line 3: expected an object with 'messages'"),
        (b'{"text": "a"}\n{"text": "\xff"}', "line 2: not valid JSON: 'utf-8' codec"),
        (b'{"messages": [{"role": "user", "content": "x"}]}', "line 1: there is no assistant"),
        (
            b'{"a": ' + b"[" * 100_000,
            "line 1: not valid JSON: recursion limit exceeded at column 207",
        ),
        (b'{"text": "\\ud800"}', "line 1: not valid JSON: unexpected end of hex escape"),
        (b'{"text": "' + b"a" * (5 << 20) + b'"}', "line 1: longer than"),
        (b"\n\n", "the file has no examples"),
        (b"", "the file has no examples"),
    ],
)
def test_the_first_bad_line_is_named_and_nothing_is_kept(
    site: Site, content: bytes, message: str
) -> None:
    before = stored(site)
    with pytest.raises(openai.BadRequestError) as refused:
        upload(site.acme, content)
    assert message in refused.value.message
    assert (refused.value.code, refused.value.param) == ("invalid_file", "file")
    assert stored(site) == before


def test_a_form_that_is_not_as_expected_is_refused(site: Site) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose is 'batch', expected 'fine-tune'"):
        site.acme.files.create(file=("x", chat_lines(1)), purpose="batch")
    url, key = f"{site.process.url}/v1/files", site.acme.api_key
    headers = {"Authorization": f"Bearer {key}"}

    def post(**form: Any) -> tuple[int, Any]:
        response = httpx.post(url, headers=headers, **form)
        return response.status_code, response.json()["error"]

    expected = "expected multipart/form-data, of parts named purpose, file"
    assert post(json={})[1]["message"] == expected
    one = ("data.jsonl", chat_lines(1))
    assert post(files={"file": one})[1]["param"] == "purpose"
    assert post(files={"purpose": (None, "fine-tune")})[1]["param"] == "file"
    status, error = post(files={"file": one, "expires_after[seconds]": (None, "9")})
    assert (status, error["code"]) == (400, "unknown_parameter")
    # The order of the parts is the client's choice.
    response = httpx.post(url, headers=headers, files={"file": one, "purpose": (None, "fine-tune")})
    assert response.status_code == 200
    site.acme.files.delete(response.json()["id"])


def test_names_in_latin_1_are_shown_as_far_as_they_can_be(site: Site) -> None:
    kind = "multipart/form-data; boundary=cut"
    headers = {"Authorization": f"Bearer {site.acme.api_key}", "Content-Type": kind}

    def post(name: str, filename: str) -> tuple[int, Any]:
        form = "--cut\r\nContent-Disposition: form-data; name="
        form = f'{form}"purpose"\r\n\r\nfine-tune\r\n{form}"{name}"; filename="{filename}"'
        content = form.encode("latin-1") + b"\r\n\r\n" + chat_lines(1) + b"\r\n--cut--\r\n"
        response = httpx.post(f"{site.process.url}/v1/files", headers=headers, content=content)
        return response.status_code, response.json()

    status, file = post("file", "café.jsonl")
    assert (status, file["filename"]) == (200, "caf?.jsonl")
    assert site.acme.files.retrieve(file["id"]).filename == "caf?.jsonl"
    site.acme.files.delete(file["id"])
    status, body = post("fäle", "a.jsonl")
    assert (status, body["error"]["message"]) == (400, "unknown parameter: f?le")


def test_a_file_larger_than_a_body_may_be_is_streamed_to_disk(site: Site) -> None:
    row = json.dumps({"text": "moon " * 2000}).encode() + b"\n"
    content = row * ((17 << 20) // len(row))
    file = upload(site.acme, content)
    assert file.bytes == len(content)
    assert site.acme.files.content(file.id).read() == content
    # A second one would be too much for this tenant, not for another.
    with pytest.raises(openai.APIStatusError, match="your files together would be larger") as full:
        upload(site.acme, content)
    assert (full.value.status_code, full.value.code) == (413, "storage_limit_exceeded")
    site.other.files.delete(upload(site.other, content).id)
    site.acme.files.delete(file.id)


def test_a_file_above_the_limit_is_refused_and_leaves_nothing(site: Site) -> None:
    before = stored(site)
    with pytest.raises(openai.APIStatusError, match="larger than this server's limit") as refused:
        upload(site.acme, b'{"text": "a"}\n' * (21 * (1 << 20) // 14))
    assert (refused.value.status_code, refused.value.code) == (413, "file_too_large")
    assert stored(site) == before


def test_files_survive_a_killed_server_and_what_was_half_uploaded_does_not(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    content = chat_lines(2)
    with start(tmp_path) as first:
        file = upload(first.acme, content)
        first.process.process.kill()
        first.process.process.wait()
    (tmp_path / "files" / "abc.partial").write_bytes(b"half")
    with start(tmp_path) as second:
        assert [one.id for one in second.acme.files.list()] == [file.id]
        assert second.acme.files.content(file.id).read() == content
        assert stored(second) == {file.id}


def test_one_server_at_a_time_has_the_state(site: Site, start: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match="is in use by another server"), start(site.state):
        pass
