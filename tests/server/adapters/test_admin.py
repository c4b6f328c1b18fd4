"""Adapters over HTTP: chosen by name, administered with a key of their own, from allowed roots."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from aiohttp import FormData
from openai import OpenAI
from typer.testing import CliRunner, Result
from yarl import URL

from nybble.engine import AdapterConfig, Engine, Request, RequestOutput
from nybble.loaders import open_checkpoint
from nybble.server.adapters.admin import restore, restore_mixtures
from nybble.server.adapters.names import RULE
from nybble.server.cli.main import app
from nybble.server.lifecycle.named_adapters import named_adapters
from nybble.server.lifecycle.options import AdapterOptions
from nybble.server.tenancy.tenants import Tenants, new_key

from ..client import CHAT, COMPLETIONS, Client, refused, run
from ..conftest import CONFIG, running_server

README = Path(__file__).parents[3] / "README.md"
ADMIN = {"Authorization": "Bearer admin-secret"}
LOAD, UNLOAD, LIST = "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/lora_adapters"
ASK: dict[str, Any] = {
    "prompt": "the quick brown",
    "max_tokens": 12,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture
def root(tiny_adapter: Callable[..., Path], tmp_path: Path) -> Path:
    """A root with two adapters that fit and one that does not."""
    shutil.copytree(tiny_adapter(seed=1), tmp_path / "root" / "one")
    shutil.copytree(tiny_adapter(seed=2), tmp_path / "root" / "two")
    shutil.copytree(tiny_adapter(r=16), tmp_path / "root" / "wide")
    return tmp_path / "root"


@pytest.fixture
def engine(tiny_model: Callable[..., Path]) -> Iterator[Engine]:
    config = replace(CONFIG, adapters=AdapterConfig(slots=2, max_rank=8))
    engine = Engine.load(open_checkpoint(tiny_model()), config, progress=False)
    engine.start()
    yield engine
    engine.stop()


def serve(engine: Engine, root: Path, scenario: Callable[[Client], Any], **options: Any) -> None:
    run(engine, scenario, **{"admin_keys": ["admin-secret"], "adapter_roots": [root], **options})


async def admin(client: Client, path: str, body: Any, status: int = 200) -> dict[str, Any]:
    async with client.post(path, json=body, headers=ADMIN) as response:
        answer = await response.json()
        assert response.status == status, answer
        return dict(answer if status == 200 else answer["error"])


async def load(client: Client, name: str, path: str, **more: Any) -> dict[str, Any]:
    return await admin(client, LOAD, {"lora_name": name, "lora_path": path, **more})


async def text(client: Client, headers: dict[str, str] | None = None, **more: Any) -> str:
    async with client.post(COMPLETIONS, json={**ASK, **more}, headers=headers) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return str(answer["choices"][0]["text"])


def test_an_adapter_is_chosen_by_model_field_or_header(engine: Engine, root: Path) -> None:
    async def scenario(client: Client) -> None:
        base = await text(client, model="tiny")
        await load(client, "one", "one")
        await load(client, "two", str(root / "two"))
        one, two = await text(client, model="one"), await text(client, model="two")
        assert len({base, one, two}) == 3
        assert await text(client, model="tiny") == base
        assert await text(client, model="tiny", adapter="one") == one
        assert await text(client, {"X-LoRA-Adapter": "two"}, model="tiny") == two
        assert await text(client, {"X-LoRA-Adapter": "one"}, model="one", adapter="one") == one
        error = await refused(client, COMPLETIONS, {**ASK, "model": "one", "adapter": "two"})
        assert error["param"] == "adapter"
        assert "model 'one', adapter 'two'" in error["message"]

    serve(engine, root, scenario)


def test_adapters_are_mixed_by_request_and_under_a_name(engine: Engine, root: Path) -> None:
    half = {"one": 0.5, "two": 0.5}

    async def scenario(client: Client) -> None:
        for name in ("one", "two"):
            await load(client, name, name)
        mixed = await text(client, adapter=half)
        assert mixed not in [await text(client), await text(client, adapter="one")]
        assert await text(client, adapter={"two": 1.0}) == await text(client, model="two")
        chat = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "temperature": 0}
        answers = []
        for path, body in (
            ("/v1/chat/completions", chat),
            ("/v1/messages", {**chat, "model": "tiny"}),
            ("/v1/responses", {"input": "hi", "max_output_tokens": 6, "temperature": 0}),
        ):
            for adapter in (None, half):
                async with client.post(path, json={**body, "adapter": adapter}) as response:
                    assert response.status == 200, await response.text()
                    answers.append(await response.json())
        assert answers[0]["choices"] != answers[1]["choices"]
        assert answers[2]["content"] != answers[3]["content"]
        assert answers[4]["output"][0]["content"] != answers[5]["output"][0]["content"]
        stored = {"lora_name": "half", "mixture": half}
        info = await admin(client, LOAD, stored)
        assert (info["mixture"], info["path"], info["rank"]) == (half, "", 8)
        assert await text(client, model="half") == mixed
        for body, message in (
            ({"lora_name": "one", "mixture": half, "load_inplace": True}, "cannot have the name"),
            ({"lora_name": "x", "mixture": {"one": 1, "nobody": 1}}, "'nobody' is not loaded"),
            ({"lora_name": "x", "mixture": {}}, "at least 1"),
            ({"lora_name": "x", "mixture": half, "lora_path": "one"}, "either lora_path or"),
            ({"lora_name": "x"}, "either lora_path or"),
        ):
            assert message in (await admin(client, LOAD, body, 400))["message"]
        for adapter, message in (
            ({"one": 1, "nobody": 1}, "the adapter 'nobody' does not exist"),
            ({"one": "much"}, "adapter"),
        ):
            async with client.post(COMPLETIONS, json={**ASK, "adapter": adapter}) as response:
                assert response.status in (400, 404)
                assert message in (await response.json())["error"]["message"]
        async with client.post(COMPLETIONS, json={**ASK, "model": "one", "adapter": half}) as found:
            error = (await found.json())["error"]
            assert "different adapters are named: model 'one', adapter '0.5*one" in error["message"]

    serve(engine, root, scenario)


def test_a_stored_mixture_outlives_the_server_with_its_adapters(
    engine: Engine, root: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state.json"

    async def scenario(client: Client) -> None:
        await load(client, "one", "one")
        await load(client, "two", "two")
        again = {"lora_name": "again", "load_inplace": True}
        await admin(client, LOAD, {**again, "mixture": {"one": 1}})
        await admin(client, LOAD, {"lora_name": "mix", "mixture": {"one": 1, "two": -0.5}})
        # Its place in the file is before what it is made of now.
        await admin(client, LOAD, {**again, "mixture": {"mix": 0.5}})

    serve(engine, root, scenario, adapter_state=state)
    version = {info.name: info.version for info in engine.adapters()}
    for name in version:
        engine.unload_adapter(name)
    restore(engine, [], [root], state)
    assert {info.name for info in engine.adapters()} == {"one", "two"}
    restore_mixtures(engine, [], state)
    assert {info.name: info.version for info in engine.adapters()} == version


def test_a_tenant_mixes_only_the_adapters_that_are_its_own(
    engine: Engine, root: Path, tmp_path: Path
) -> None:
    tenants = tmp_path / "tenants.toml"
    key, hashed = new_key()
    tenants.write_text(f'[tenants.acme]\nkeys = ["{hashed}"]\nadapters = ["on*"]\n')

    async def scenario(client: Client) -> None:
        await load(client, "one", "one")
        await load(client, "two", "two")
        headers = {"Authorization": f"Bearer {key}"}
        assert await text(client, headers, adapter={"one": 0.5})
        body = {**ASK, "adapter": {"one": 0.5, "two": 0.5}}
        async with client.post(COMPLETIONS, json=body, headers=headers) as response:
            error = (await response.json())["error"]
            assert (response.status, error["param"]) == (404, "adapter")
            assert error["message"] == "the adapter 'two' does not exist; this server has one"

    serve(engine, root, scenario, tenants=Tenants(tenants))


def test_adapters_are_listed_as_models_with_their_parent(engine: Engine, root: Path) -> None:
    async def scenario(client: Client) -> None:
        await load(client, "one", "one")
        models = (await (await client.get("/v1/models")).json())["data"]
        assert [(model["id"], model.get("parent")) for model in models] == [
            ("tiny", None),
            ("one", "tiny"),
        ]
        one = await (await client.get("/v1/models/one")).json()
        assert one == models[1]

    serve(engine, root, scenario)


def test_an_unknown_name_is_refused_with_those_there_are(engine: Engine, root: Path) -> None:
    async def scenario(client: Client) -> None:
        await load(client, "one", "one")
        error = await refused(client, COMPLETIONS, {**ASK, "model": "three"}, 404)
        assert error["code"] == "model_not_found"
        assert "this server has tiny, one" in error["message"]
        body = {**ASK, "model": "tiny", "adapter": "three"}
        error = await refused(client, COMPLETIONS, body, 404)
        assert (error["param"], error["code"]) == ("adapter", "model_not_found")
        assert "this server has one" in error["message"]

    serve(engine, root, scenario)


def test_an_adapter_that_goes_while_its_request_is_read_does_not_exist(
    engine: Engine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = engine.generate

    def unload_first(request: Request) -> AsyncGenerator[RequestOutput]:
        engine.unload_adapter("one")
        return generate(request)

    async def scenario(client: Client) -> None:
        await load(client, "one", "one")
        monkeypatch.setattr(engine, "generate", unload_first)
        error = await refused(client, COMPLETIONS, {**ASK, "model": "one"}, 404)
        assert error["code"] == "model_not_found"
        assert error["message"] == "adapter 'one' is not loaded; loaded: none"

    serve(engine, root, scenario)


@pytest.mark.parametrize("moment", ["check", "_new_sequence"])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (COMPLETIONS, ASK),
        (CHAT, {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}),
        ("/v1/embeddings", {"input": "hello"}),
    ],
    ids=["completion", "chat", "embedding"],
)
def test_an_adapter_that_gets_other_tokens_while_its_request_is_read_is_asked_for_again(
    engine: Engine,
    root: Path,
    tiny_token_adapter: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    asked: dict[str, Any],
    moment: str,
) -> None:
    """Its tokens are those of the adapter that was: clients send it again after a 503."""
    read = getattr(engine, moment)

    def read_then_replace(*args: Any) -> Any:
        found = read(*args)
        engine.load_adapter("one", str(tiny_token_adapter()))
        return found

    async def scenario(client: Client) -> None:
        await load(client, "one", "one")
        with monkeypatch.context() as patch:
            patch.setattr(engine, moment, read_then_replace)
            error = await refused(client, path, {**asked, "model": "one"}, 503)
        assert (error["code"], error["param"]) == ("adapter_replaced", None)
        answer = await client.post(path, json={**asked, "model": "one"})
        assert answer.status == 200

    serve(engine, root, scenario)


def test_loading_replacing_and_unloading(engine: Engine, root: Path) -> None:
    async def scenario(client: Client) -> None:
        info = await load(client, "a", "one")
        assert (info["name"], info["rank"]) == ("a", 4)
        # A thread reads it ahead, so it may be in memory before the answer is written.
        assert info["residency"] in ("disk", "host")
        first = await text(client, model="a")
        again = {"lora_name": "a", "lora_path": "two"}
        error = await admin(client, LOAD, again, 400)
        assert (error["param"], error["code"]) == ("lora_name", "adapter_exists")
        replaced = await load(client, "a", "two", load_inplace=True)
        assert replaced["version"] != info["version"]
        assert await text(client, model="a") != first
        listed = await (await client.get(LIST, headers=ADMIN)).json()
        assert [(one["name"], one["hits"]) for one in listed["data"]] == [("a", 2)]
        one = await (await client.get(LIST + "/a", headers=ADMIN)).json()
        assert one["residency"] == "device"
        await admin(client, UNLOAD, {"lora_name": "a"})
        assert (await admin(client, UNLOAD, {"lora_name": "a"}, 404))["code"] == "not_found"
        assert (await client.get(LIST + "/a", headers=ADMIN)).status == 404
        await refused(client, COMPLETIONS, {**ASK, "model": "a"}, 404)
        metrics = await (await client.get("/metrics")).text()
        assert 'nybble_adapter_sequences_total{adapter="a"} 2.0' in metrics
        assert 'nybble_adapter_generation_tokens_total{adapter="a"} 24.0' in metrics

    serve(engine, root, scenario)


def test_an_adapter_that_does_not_fit_is_a_client_s_error(engine: Engine, root: Path) -> None:
    async def scenario(client: Client) -> None:
        body = {"lora_name": "wide", "lora_path": "wide"}
        error = await admin(client, LOAD, body, 400)
        assert error["code"] == "invalid_adapter"
        told = error["message"].partition("has rank 16, but this server holds adapters up to ")[2]
        assert told == "rank 8: raise --max-lora-rank"
        error = await admin(client, LOAD, {"lora_name": "tiny", "lora_path": "one"}, 400)
        assert "is the name of the base model" in error["message"]

    serve(engine, root, scenario)


def test_only_folders_below_a_root_can_be_loaded(
    engine: Engine, root: Path, tiny_adapter: Callable[..., Path]
) -> None:
    outside = Path(shutil.copytree(tiny_adapter(seed=1), root.parent / "outside"))
    (root / "link").symlink_to(outside)
    (root / "inside").symlink_to(root / "one")
    (root / "loop").symlink_to(root / "loop")
    shutil.copytree(outside, root / "file link")
    (root / "file link" / "adapter_model.safetensors").unlink()
    (root / "file link" / "adapter_model.safetensors").symlink_to(
        outside / "adapter_model.safetensors"
    )
    (root.parent / "root-sibling").mkdir()
    paths = [
        *("../outside", str(outside), "link", "file link", "one/../../outside", "nothing"),
        *("loop", "one\0", "x" * 5000, "../root-sibling", "/etc", "~", "one/adapter_config.json"),
    ]

    async def scenario(client: Client) -> None:
        for path in paths:
            error = await admin(client, LOAD, {"lora_name": "a", "lora_path": path}, 404)
            assert "is not a folder below an allowed root" in error["message"], path
            assert error["param"] == "lora_path"
        await load(client, "a", "inside")

    serve(engine, root, scenario)


@pytest.mark.parametrize(
    "name",
    ["", "../x", "a/../b", "/abs", "a/", ".hidden", "a/b/c", "a\0b", "a b", "é", "a" * 201],
    ids=repr,
)
def test_names_that_no_adapter_may_have_are_refused_with_the_rule_whoever_gives_them(
    engine: Engine, root: Path, name: str
) -> None:
    quoted = "/".join((LIST, quote(name, safe=""))) if name else None

    async def scenario(client: Client) -> None:
        await load(client, "one", "one")
        source: Iterable[dict[str, Any]] = ({"lora_path": "one"}, {"mixture": {"one": 0.5}})
        for path, more in (*((LOAD, each) for each in source), (UNLOAD, {})):
            error = await admin(client, path, {"lora_name": name, **more}, 400)
            assert (error["param"], error["code"]) == ("lora_name", "invalid_value")
            assert RULE in error["message"]
            assert len(error["message"]) < 600
        form = FormData({"lora_name": name})
        form.add_field("file", b"{}", filename="adapter_config.json")
        async with client.post(LIST, data=form, headers=ADMIN) as response:
            assert (response.status, RULE in await response.text()) == (400, True)
        asks = [("get", ""), ("patch", ""), ("delete", ""), ("get", "/versions")]
        asks += [("post", "/rollback"), ("post", "/prefetch")]
        for method, after in asks if quoted else []:
            url = URL(f"{quoted}{after}", encoded=True)
            body = {"json": {"pinned": True}} if method == "patch" else {}
            async with getattr(client, method)(url, headers=ADMIN, **body) as response:
                assert response.status == 400, (method, after, await response.text())
                assert (await response.json())["error"]["param"] == "lora_name"
        assert [info.name for info in engine.adapters()] == ["one"]

    serve(engine, root, scenario)
    with pytest.raises(ValueError, match="--lora-modules"):
        named_adapters(AdapterOptions(lora_modules=[f"{name}=/path"]), ["base"])


def test_a_name_may_have_one_slash_as_on_the_hub(engine: Engine, root: Path) -> None:
    async def scenario(client: Client) -> None:
        info = await load(client, "org/captain", "one")
        assert info["name"] == "org/captain"
        assert await text(client, model="org/captain") != await text(client, model="tiny")
        url = URL(f"{LIST}/org%2Fcaptain", encoded=True)
        async with client.get(url, headers=ADMIN) as response:
            assert (await response.json())["version"] == info["version"]
        await admin(client, UNLOAD, {"lora_name": "org/captain"})

    serve(engine, root, scenario)


def test_administration_needs_its_own_key(engine: Engine, root: Path) -> None:
    body = {"lora_name": "one", "lora_path": "one"}
    user = {"Authorization": "Bearer user-secret"}

    async def scenario(client: Client) -> None:
        for headers in ({}, user, {"Authorization": "Bearer admin-secre"}):
            for method, path in (("POST", LOAD), ("POST", UNLOAD), ("GET", LIST)):
                response = await client.request(method, path, json=body, headers=headers)
                assert response.status == 401, (method, path)
        # However the path is spelled.
        assert (await client.post("/v1/load%5Flora_adapter", json=body, headers=user)).status == 401
        await load(client, "one", "one")
        assert (await client.post(COMPLETIONS, json={**ASK, "model": "one"})).status == 401
        assert (await client.get("/v1/models", headers=ADMIN)).status == 401
        assert await text(client, user, model="one")

    serve(engine, root, scenario, api_keys=["user-secret"])


def test_without_an_admin_key_or_a_root_administration_is_closed(
    engine: Engine, root: Path
) -> None:
    async def no_key(client: Client) -> None:
        for method, path in (("POST", LOAD), ("POST", UNLOAD), ("GET", LIST)):
            response = await client.request(method, path, json={}, headers=ADMIN)
            assert response.status == 403
            assert "without --admin-key" in (await response.json())["error"]["message"]

    async def no_root(client: Client) -> None:
        error = await admin(client, LOAD, {"lora_name": "a", "lora_path": str(root / "one")}, 403)
        assert "without --lora-root" in error["message"]

    serve(engine, root, no_key, admin_keys=[])
    serve(engine, root, no_root, adapter_roots=[])


def test_adapters_change_under_traffic_without_a_failed_request(engine: Engine, root: Path) -> None:
    async def scenario(client: Client) -> None:
        await load(client, "one", "one")
        base, one = await text(client, model="tiny"), await text(client, model="one")
        done = asyncio.Event()

        async def traffic(model: str, expected: str) -> int:
            turns = 0
            while not done.is_set():
                assert await text(client, model=model) == expected
                turns += 1
            return turns

        tasks = [asyncio.create_task(traffic(m, e)) for m, e in (("tiny", base), ("one", one))]
        for _ in range(10):
            await load(client, "two", "two")
            await text(client, model="two")
            await admin(client, UNLOAD, {"lora_name": "two"})
        done.set()
        assert min(await asyncio.gather(*tasks)) > 3

    serve(engine, root, scenario)


def test_the_command_serves_adapters_named_at_the_start(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    adapter = f"poet={tiny_adapter(seed=1)}"
    options = ("--lora-modules", adapter, "--max-lora-rank", "8", "--max-loras", "2")
    with running_server(tiny_model(), *options) as server:
        client = OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny", "poet"]

        def answer(model: str) -> str:
            completion = client.completions.create(
                model=model, prompt="the quick", max_tokens=8, temperature=0
            )
            return completion.choices[0].text

        assert answer("tiny") != answer("poet")


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def test_the_command_refuses_adapters_in_one_line(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    folder = str(tiny_model())
    for option, message in (
        ("poet", "--lora-modules 'poet': expected NAME=PATH"),
        (f"poet={tmp_path}", "has no adapter_config.json"),
        (f"poet={tiny_adapter(r=65)}", "up to rank 64: raise --max-lora-rank"),
    ):
        done = command("serve", "--model", folder, "--port", "0", "--lora-modules", option)
        assert done.exit_code == 1
        assert message in done.stderr.splitlines()[-1]


def test_the_merge_command_reports_what_rounding_cost(
    tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    sample = tmp_path / "sample.txt"
    sample.write_text("the quick brown fox jumps over the lazy dog")
    target = tmp_path / "merged"
    adapters = [str(tiny_adapter(seed=1)), str(tiny_adapter(seed=2))]
    done = command(
        *("merge", str(tiny_model()), *adapters, str(target)),
        *("--out", "nf4", "--weights", "0.5,0.5", "--text", str(sample)),
        *("--calibration", str(README), "--samples", "4"),
    )
    assert done.exit_code == 0, done.stderr
    assert f"{target}: 14 layers merged" in done.stdout
    assert "KL(unmerged ‖ merged) on" in done.stdout
    assert open_checkpoint(target).format == "nf4"
    done = command("merge", str(tiny_model()), *adapters, str(target))
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == f"error: {target} is not empty"


def test_an_adapter_changes_embeddings_too(engine: Engine, root: Path) -> None:
    async def scenario(client: Client) -> None:
        body = {"lora_name": "one", "lora_path": str(root / "one")}
        async with client.post(LOAD, json=body, headers=ADMIN) as response:
            assert response.status == 200

        async def vector(**fields: Any) -> list[float]:
            body = {"model": "tiny", "input": "the quick brown", **fields}
            async with client.post("/v1/embeddings", json=body) as response:
                answer = await response.json()
                assert response.status == 200, answer
                return list(answer["data"][0]["embedding"])

        plain, adapted = await vector(), await vector(model="one")
        assert await vector(adapter="one") == pytest.approx(adapted, abs=1e-6)
        cosine = sum(a * b for a, b in zip(plain, adapted, strict=True))
        assert cosine < 0.99

    serve(engine, root, scenario)


def test_adapters_are_named_as_vllms_users_name_them() -> None:
    written = ['{"name": "poet", "path": "/adapters/a=b", "base_model_name": "x"}', "judge=/j=k"]
    options = AdapterOptions(lora_modules=written)
    assert named_adapters(options, ["base"]) == {"poet": "/adapters/a=b", "judge": "/j=k"}
    for wrong, message in (
        ('{"name": "poet"}', "expected a JSON object with name and path"),
        ('{"name": "poet", "path": ', "expected a JSON object with name and path"),
        ('{"name": "poet", "path": 3}', "expected NAME=PATH"),
    ):
        with pytest.raises(ValueError, match=message):
            named_adapters(AdapterOptions(lora_modules=[wrong]), ["base"])
