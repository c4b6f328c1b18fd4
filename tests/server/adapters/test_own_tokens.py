"""Requests to an adapter with tokens of its own: its tokenizer is used at every endpoint."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llguidance
import pytest
from transformers import AutoTokenizer

from nybble.engine import AdapterConfig, Engine
from nybble.loaders import open_checkpoint
from nybble.server.adapters.archive import CONFIG as CONFIG_FILE
from nybble.server.adapters.archive import MAX_BYTES, WEIGHTS

from ..client import Client, run
from ..conftest import CONFIG
from .test_uploads import ADMIN, upload, zipped

TEXT = "the <plan> fox<|tool|>zyx"


@pytest.fixture(scope="module")
def folder(
    tiny_token_adapter: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "own"
    shutil.copytree(tiny_token_adapter(), folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|tool|>{{ m['content'] }}{{ eos_token }}{% endfor %}<plan>"
    )
    return folder


@pytest.fixture(scope="module")
def engine(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], folder: Path
) -> Iterator[Engine]:
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=8))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()
    engine.load_adapter("own", str(folder))
    engine.load_adapter("plain", str(tiny_adapter()))
    yield engine
    engine.stop()


async def answer(client: Client, path: str, expected: int = 200, **body: Any) -> Any:
    async with client.post(path, json=body) as response:
        found = await response.json()
        assert response.status == expected, found
    return found


def test_text_is_encoded_and_decoded_with_its_tokens(engine: Engine, folder: Path) -> None:
    own = AutoTokenizer.from_pretrained(folder)

    async def scenario(client: Client) -> None:
        found = await answer(client, "/tokenize", model="own", prompt=TEXT, return_token_strs=True)
        assert found["tokens"] == own(TEXT)["input_ids"]
        assert found["token_strs"] == own.convert_ids_to_tokens(found["tokens"])
        assert max(found["tokens"]) >= 320
        back = await answer(client, "/detokenize", model="own", tokens=found["tokens"])
        assert back["prompt"] == TEXT
        for model in ("tiny", "plain"):
            others = (await answer(client, "/tokenize", model=model, prompt=TEXT))["tokens"]
            assert others == engine.tokenizer(TEXT)["input_ids"]
            assert max(others) < 320
            refused = await answer(client, "/detokenize", 400, model=model, tokens=[321])
            assert "outside the vocabulary of 320" in refused["error"]["message"]
            refused = await answer(client, "/v1/completions", 400, model=model, prompt=[321])
            assert refused["error"]["param"] == "prompt"

    run(engine, scenario)


def test_a_chat_is_in_its_template_with_its_named_tokens_and_users_cannot_write_them(
    engine: Engine, folder: Path
) -> None:
    own = AutoTokenizer.from_pretrained(folder)
    tool, done, plan = own.convert_tokens_to_ids(["<|tool|>", "<|done|>", "<plan>"])

    async def scenario(client: Client) -> None:
        messages = [{"role": "user", "content": "hi<|done|>"}]
        found = await answer(client, "/tokenize", model="own", messages=messages)
        as_text = own.backend_tokenizer.encode("hi").ids
        tokens = found["tokens"]
        assert tokens[: 1 + len(as_text)] == [tool, *as_text]
        assert tokens[-2:] == [done, plan]
        assert tokens.count(done) == 1
        chat = {"model": "own", "messages": messages, "max_tokens": 3}
        said = await answer(client, "/v1/chat/completions", **chat)
        assert said["usage"]["prompt_tokens"] == len(tokens)
        counted = await answer(client, "/v1/messages/count_tokens", model="own", messages=messages)
        assert counted["input_tokens"] == len(tokens)

    run(engine, scenario)


def test_logprobs_biases_and_grammars_speak_of_its_tokens(engine: Engine) -> None:
    async def scenario(client: Client) -> None:
        body = {"model": "own", "prompt": TEXT, "max_tokens": 2, "temperature": 0}
        biased = {**body, "logit_bias": {"322": 100}, "logprobs": 1}
        said = (await answer(client, "/v1/completions", **biased))["choices"][0]
        assert said["text"] == "<plan><plan>"
        assert said["logprobs"]["tokens"] == ["<plan>", "<plan>"]
        refused = await answer(client, "/v1/completions", 400, **{**biased, "model": "plain"})
        assert refused["error"]["param"] == "logit_bias"
        ended = {**body, "logit_bias": {"320": 100}}
        choice = (await answer(client, "/v1/completions", **ended))["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("", "stop")
        guided = {**body, "max_tokens": 40, "guided_regex": "[ab]{3}"}
        for model in ("own", "plain"):
            found = await answer(client, "/v1/completions", **{**guided, "model": model})
            assert len(found["choices"][0]["text"]) == 3
        shape = {"type": "object", "properties": {"a": {"enum": ["zyx"]}}, "required": ["a"]}
        found = await answer(
            client, "/v1/completions", **{**body, "max_tokens": 60, "guided_json": shape}
        )
        assert '"zyx"' in found["choices"][0]["text"]

    run(engine, scenario)


def test_what_grammars_need_of_its_tokens_is_read_when_it_is_loaded(
    engine: Engine,
    tiny_token_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Not by the first request with a grammar, for which all streams would wait."""
    threads: list[str] = []
    read = llguidance.LLTokenizer

    def spy(*given: Any, **options: Any) -> Any:
        threads.append(threading.current_thread().name)
        return read(*given, **options)

    monkeypatch.setattr(llguidance, "LLTokenizer", spy)
    shutil.copytree(tiny_token_adapter(tokens=("<new>",)), tmp_path / "new")

    async def scenario(client: Client) -> None:
        assert len(threads) == 2, "of the base and of the adapter that is loaded already"
        body = {"lora_name": "new", "lora_path": "new"}
        async with client.post("/v1/load_lora_adapter", json=body, headers=ADMIN) as response:
            assert response.status == 200, await response.text()
        assert threads[2:] != [threading.current_thread().name]
        assert len(threads) == 3
        asked = {"prompt": "x", "max_tokens": 9, "guided_regex": "[ab]{3}"}
        for model in ("new", "own", "plain", "tiny"):
            await answer(client, "/v1/completions", model=model, **asked)
        assert len(threads) == 3

    run(engine, scenario, admin_keys=["root"], adapter_roots=[tmp_path])
    engine.unload_adapter("new")


@pytest.mark.parametrize(
    ("model", "token"), [("own", "<plan>"), ("own", "<|tool|>"), ("tiny", "<|im_start|>")]
)
def test_a_special_tokens_text_in_a_grammar_is_text(engine: Engine, model: str, token: str) -> None:
    """The tokenizer would make the token of it, which no grammar takes for its text."""
    pattern = token.replace("|", "\\|")
    guides: list[dict[str, Any]] = [
        {"guided_choice": [f"a{token}b"]},
        {"guided_regex": f"a{pattern}b"},
        {"guided_grammar": f'start: "a{token}b"'},
        {"guided_grammar": f'root ::= "a{token}b"'},
        {"guided_json": {"const": f"a{token}b"}},
        {"guided_json": {"type": "string", "pattern": f"^a{pattern}b$"}},
    ]

    async def scenario(client: Client) -> None:
        body = {"model": model, "prompt": TEXT, "max_tokens": 60, "temperature": 0}
        for guide in guides:
            found = await answer(client, "/v1/completions", **body, **guide)
            said = found["choices"][0]
            expected = f'"a{token}b"' if "guided_json" in guide else f"a{token}b"
            assert (said["text"], said["finish_reason"]) == (expected, "stop"), guide
        # A token by its name stays that token, which is not shown as text.
        named = {"guided_grammar": f'start: {token} "b"', "skip_special_tokens": False}
        found = await answer(client, "/v1/completions", **body, **named, logprobs=0)
        assert found["choices"][0]["logprobs"]["tokens"] == [token, "b"]

    run(engine, scenario)


def test_a_grammar_that_cannot_be_followed_is_the_requests_error(engine: Engine) -> None:
    """The token's text is put together of two, which is found out only while it is said."""

    async def scenario(client: Client) -> None:
        body = {"model": "own", "prompt": TEXT, "max_tokens": 60, "temperature": 0}
        refused = await answer(
            client, "/v1/completions", 400, **body, guided_grammar='start: "<pl" "an>"'
        )
        assert "guided decoding failed" in refused["error"]["message"]
        assert "[322]" in refused["error"]["message"]

    run(engine, scenario)


def test_an_upload_has_its_tokens_and_template_too(
    engine: Engine, folder: Path, tmp_path: Path
) -> None:
    """As files and in archives, in which other folders' tokenizers are left alone."""
    own = AutoTokenizer.from_pretrained(folder)
    contents = {path.name: path.read_bytes() for path in folder.iterdir()}
    wanted = {name: content for name, content in contents.items() if name in MAX_BYTES}
    assert set(contents) > set(wanted) > {CONFIG_FILE, WEIGHTS, "tokenizer.json"}
    packed = {f"run/{name}": content for name, content in contents.items()}
    packed["base/generation_config.json"] = b"{"

    async def scenario(client: Client) -> None:
        for name, files in (("files", wanted), ("archive", {"a.zip": zipped(packed)})):
            info = await upload(client, files, lora_name=name)
            assert info["own_tokens"] == 4
            found = await answer(client, "/tokenize", model=name, prompt=TEXT)
            assert found["tokens"] == own(TEXT)["input_ids"]
            (version,) = (tmp_path / "uploads" / name).iterdir()
            assert {path.name for path in version.iterdir()} == set(wanted)
            messages = [{"role": "user", "content": "hi"}]
            for model in (name, "own"):
                chat = await answer(client, "/tokenize", model=model, messages=messages)
                assert chat["tokens"][0] == own.convert_tokens_to_ids("<|tool|>")
        # A version that is served again is so with its files.
        first = info["version"]
        plain = {name: contents[name] for name in (CONFIG_FILE, WEIGHTS)}
        info = await upload(client, plain, lora_name="archive", load_inplace="true")
        assert (info["version"] != first, info["own_tokens"]) == (True, 0)
        path = "/v1/lora_adapters/archive/rollback"
        async with client.post(path, json={"version": first}, headers=ADMIN) as response:
            info = await response.json()
            assert response.status == 200, info
        assert (info["version"], info["own_tokens"]) == (first, 4)
        for name in ("files", "archive"):
            async with client.delete(f"/v1/lora_adapters/{name}", headers=ADMIN) as response:
                assert response.status == 200

    run(engine, scenario, admin_keys=["root"], adapter_roots=[tmp_path])
