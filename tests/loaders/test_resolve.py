"""A model's name leads to a folder, or the error says what was tried and what would work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import pytest
from huggingface_hub import ModelInfo
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load, save

from nybble.loaders import ModelNotFoundError, open_checkpoint, resolve, resolve_model
from nybble.server.cli.model_path import require_model


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]) -> list[tuple[str, bool]]:
    """A hub that holds ``org/cached`` in its cache and ``org/online`` on its server."""
    asked: list[tuple[str, bool]] = []

    def snapshot_download(name: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append((name, local_files_only))
        if name == "org/cached" or (name == "org/online" and not local_files_only):
            return str(tiny_model())
        raise LocalEntryNotFoundError("cannot find it")

    def model_info(name: str) -> ModelInfo:
        if name != "org/online":
            raise LocalEntryNotFoundError("cannot find it")
        files = [{"rfilename": file.name} for file in tiny_model().iterdir()]
        return ModelInfo(id=name, siblings=files)

    monkeypatch.setattr(resolve, "snapshot_download", snapshot_download)
    monkeypatch.setattr(resolve, "model_info", model_info)
    return asked


@pytest.fixture
def aliases(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    file = tmp_path / "models.toml"
    file.write_text(f'llama-13b-gptq = "{tiny_model()}"\nshort = "org/cached"\nlost = "/nowhere"\n')
    return file


def test_a_folder_is_itself(tiny_model: Callable[..., Path]) -> None:
    assert resolve_model(str(tiny_model())) == tiny_model()


def test_an_alias_leads_to_a_folder_or_a_hub_name(
    aliases: Path, tiny_model: Callable[..., Path]
) -> None:
    assert resolve_model("llama-13b-gptq", aliases=aliases) == tiny_model()
    assert resolve_model("short", aliases=aliases) == tiny_model()


def test_the_cache_of_the_hub_is_asked_before_its_server(
    hub: list[tuple[str, bool]], tiny_model: Callable[..., Path]
) -> None:
    assert resolve_model("org/cached") == tiny_model()
    assert hub == [("org/cached", True)] * 2
    hub.clear()
    assert resolve_model("org/online") == tiny_model()
    assert hub == [("org/online", True)] + [("org/online", False)] * 2


def test_an_unknown_name_lists_what_was_tried_and_what_would_work(aliases: Path) -> None:
    with pytest.raises(ModelNotFoundError) as error:
        resolve_model("org/nothing", aliases=aliases)
    message = str(error.value)
    for part in ("the folder org/nothing", str(aliases), "the hub model org/nothing", "'demo'"):
        assert part in message
    with pytest.raises(ModelNotFoundError, match="the folder /nowhere"):
        resolve_model("lost", aliases=aliases)


def test_a_folder_without_a_config_is_said_to_be_one(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json in it"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize("content", ["not toml", "model = 3"])
def test_an_alias_file_that_makes_no_sense_is_named(tmp_path: Path, content: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(content)
    with pytest.raises(ModelNotFoundError, match=r"bad\.toml"):
        resolve_model("anything", aliases=file)


class Repository:
    """A hub with one repository, of which the cache holds what was fetched.

    files: their contents. broken: those that it fails to give.
    """

    def __init__(self, cache: Path, files: Mapping[str, bytes]) -> None:
        self.cache, self.files = cache, files
        self.online, self.broken = True, set[str]()

    def model_info(self, name: str) -> ModelInfo:
        if not self.online:
            raise ConnectionError("offline mode is enabled")
        return ModelInfo(id=name, siblings=[{"rfilename": file} for file in self.files])

    def snapshot_download(
        self,
        name: str,
        *,
        allow_patterns: list[str],
        revision: str | None = None,
        local_files_only: bool = False,
        **_: object,
    ) -> str:
        assert revision in (None, self.cache.name)
        if local_files_only and not self.cache.exists():
            raise LocalEntryNotFoundError("cannot find it")
        if not local_files_only:
            self.put(filter_repo_objects(self.files, allow_patterns=allow_patterns))
        return str(self.cache)

    def put(self, files: Iterable[str]) -> None:
        for file in sorted(files, key=lambda file: file in self.broken):
            if file in self.broken:
                raise ConnectionError(f"no {file}")
            (self.cache / file).parent.mkdir(parents=True, exist_ok=True)
            (self.cache / file).write_bytes(self.files[file])

    def cached(self) -> set[str]:
        found = (file for file in self.cache.rglob("*") if file.is_file())
        return {file.relative_to(self.cache).as_posix() for file in found}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Repository]:
    def build(files: Mapping[str, bytes]) -> Repository:
        hub = Repository(tmp_path / "0123abc", files)
        monkeypatch.setattr(resolve, "snapshot_download", hub.snapshot_download)
        monkeypatch.setattr(resolve, "model_info", hub.model_info)
        return hub

    return build


INDEX = "model.safetensors.index.json"
SHARDS = tuple(f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3))
OTHER_FORMS = dict.fromkeys(
    (
        *("consolidated.safetensors", "original/model.safetensors", "original/tokenizer.model"),
        *("metal/model.bin", "onnx/model.safetensors", "model.fp16.gguf", "pytorch_model.bin"),
    ),
    b"",
)


@pytest.fixture
def sharded(tiny_model: Callable[..., Path]) -> Mapping[str, bytes]:
    """The files of a model in three shards, and of its other forms."""
    files = {file.name: file.read_bytes() for file in tiny_model().iterdir()}
    tensors = load(files.pop("model.safetensors"))
    weight_map = {name: SHARDS[at % 3] for at, name in enumerate(tensors)}
    for shard in SHARDS:
        files[shard] = save({n: each for n, each in tensors.items() if weight_map[n] == shard})
    return {**files, INDEX: json.dumps({"weight_map": weight_map}).encode(), **OTHER_FORMS}


@pytest.mark.parametrize(
    ("interrupted", "lacks"),
    [
        ({"config.json", INDEX, SHARDS[0]}, f"lacks {SHARDS[1]}, {SHARDS[2]}"),
        ({"config.json", INDEX, *SHARDS[:2]}, f"lacks {SHARDS[2]}"),
        ({"config.json", *SHARDS[1:]}, f"lacks {SHARDS[0]}"),  # the index comes after many shards
        ({INDEX, *SHARDS}, "lacks config.json"),
        ({"config.json", "tokenizer.json"}, "has no weights"),
    ],
    ids=lambda each: "" if isinstance(each, set) else each,
)
def test_a_download_that_was_interrupted_is_completed(
    repository: Callable[..., Repository],
    sharded: Mapping[str, bytes],
    tiny_model: Callable[..., Path],
    interrupted: set[str],
    lacks: str,
) -> None:
    hub = repository(sharded)
    hub.put(interrupted)
    told = f"the hub model org/big (its copy in the cache {lacks}"
    with pytest.raises(ModelNotFoundError, match=re.escape(f"{told})")):
        resolve_model("org/big", download=False)
    hub.online = False
    with pytest.raises(ModelNotFoundError, match=re.escape(f"{told}; offline mode is enabled)")):
        resolve_model("org/big")
    hub.online = True
    hub.broken = {SHARDS[2]}
    if SHARDS[2] not in interrupted:
        with pytest.raises(ModelNotFoundError, match=f"lacks {SHARDS[2]}; no {SHARDS[2]}"):
            resolve_model("org/big")
    hub.broken.clear()
    folder = resolve_model("org/big")
    assert hub.cached() == sharded.keys() - OTHER_FORMS.keys()
    found, expected = (dict(open_checkpoint(each).weights()) for each in (folder, tiny_model()))
    assert found.keys() == expected.keys()
    hub.online = False
    assert resolve_model("org/big") == folder


@pytest.mark.parametrize("single", ["model.safetensors", "consolidated.safetensors"])
def test_weights_that_are_not_read_are_not_downloaded(
    repository: Callable[..., Repository], single: str
) -> None:
    """As of gpt-oss, which has them in ``original`` and ``metal`` too, and of Mistral's models."""
    hub = repository(dict.fromkeys(("config.json", single, *OTHER_FORMS), b"{}"))
    assert resolve_model("org/model") == hub.cache
    assert hub.cached() == {"config.json", single}
    assert resolve_model("org/model", download=False) == hub.cache


def test_weights_of_the_modules_after_the_model_are_downloaded(
    repository: Callable[..., Repository],
) -> None:
    """sentence-transformers' dense layers, each in a folder of its own."""
    modules = [{"type": "models.Transformer", "path": ""}, {"type": "Dense", "path": "2_Dense"}]
    read = {
        "config.json": b"{}",
        "modules.json": json.dumps(modules).encode(),
        "model.safetensors": b"",
        "2_Dense/config.json": b"{}",
        "2_Dense/model.safetensors": b"",
    }
    hub = repository({**read, **OTHER_FORMS})
    resolve_model("org/model")
    assert hub.cached() == read.keys()


def test_a_repository_without_a_config_is_not_downloaded(
    repository: Callable[..., Repository],
) -> None:
    hub = repository({"params.json": b"{}", "consolidated.safetensors": b""})
    with pytest.raises(ModelNotFoundError, match=r"the hub model org/model \(it has no config"):
        resolve_model("org/model")
    assert not hub.cache.exists()


class GgufHub:
    """A hub with a repository of GGUF files, of which the cache holds those that were fetched."""

    def __init__(self, cache: Path, files: list[str], source: Path) -> None:
        self.cache, self.files, self.source = cache, files, source
        self.fetched: list[str] = []

    def model_info(self, name: str) -> ModelInfo:
        assert name == "org/tiny-GGUF"
        files = [{"rfilename": file} for file in ("README.md", *self.files)]
        return ModelInfo(id=name, siblings=files)

    def snapshot_download(
        self, name: str, *, allow_patterns: list[str], local_files_only: bool = False, **_: object
    ) -> str:
        if local_files_only:
            if not self.fetched:
                raise LocalEntryNotFoundError("cannot find it")
            return str(self.cache)
        self.cache.mkdir(exist_ok=True)
        for file in self.files:
            if (
                file in allow_patterns and file not in self.fetched
            ):  # links to blobs, as the hub's cache has them
                (self.cache / file).parent.mkdir(exist_ok=True)
                (self.cache / file).symlink_to(self.source)
                self.fetched.append(file)
        return str(self.cache)


@pytest.fixture
def gguf_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> Callable[..., GgufHub]:
    def build(*files: str) -> GgufHub:
        hub = GgufHub(tmp_path / "snapshot", list(files), tmp_path / "blob")
        hub.source.touch()
        monkeypatch.setattr(resolve, "snapshot_download", hub.snapshot_download)
        monkeypatch.setattr(resolve, "model_info", hub.model_info)
        monkeypatch.setattr(resolve, "_gguf_folder", lambda file: file.relative_to(hub.cache))
        return hub

    return build


FILES = ("mmproj-tiny-f16.gguf", "tiny-Q4_K_M.gguf", "tiny-Q4_K_S.gguf", "tiny.Q8_0.gguf")
SPLIT = tuple(f"BF16/tiny-BF16-0000{part}-of-00002.gguf" for part in (1, 2))


@pytest.mark.parametrize(
    ("tag", "file"),
    [
        ("Q4_K_M", "tiny-Q4_K_M.gguf"),
        ("q8_0", "tiny.Q8_0.gguf"),
        ("BF16", SPLIT[0]),
        ("tiny-Q4_K_S.gguf", "tiny-Q4_K_S.gguf"),
    ],
)
def test_a_tag_names_one_file_of_a_repository(
    gguf_hub: Callable[..., GgufHub], tag: str, file: str
) -> None:
    """As llama.cpp's -hf takes it. Nothing else is downloaded, and nothing twice."""
    hub = gguf_hub(*FILES, *SPLIT)
    name = f"org/tiny-GGUF:{tag}"
    require_model(name)
    assert resolve_model(name) == Path(file)
    assert hub.fetched == (list(SPLIT) if tag == "BF16" else [file])
    assert resolve_model(name, download=False) == Path(file)
    with pytest.raises(ModelNotFoundError, match=r"org/tiny-GGUF:IQ4_XS \(not on this machine\)"):
        resolve_model("org/tiny-GGUF:IQ4_XS", download=False)


def test_a_repository_with_one_file_needs_no_tag(gguf_hub: Callable[..., GgufHub]) -> None:
    gguf_hub(*FILES[:2])
    assert resolve_model("org/tiny-GGUF") == Path("tiny-Q4_K_M.gguf")


def test_a_repository_with_several_files_asks_which(gguf_hub: Callable[..., GgufHub]) -> None:
    gguf_hub(*FILES)
    with pytest.raises(ModelNotFoundError, match=r"give one of org/tiny-GGUF:Q4_K_M, .*:Q8_0$"):
        resolve_model("org/tiny-GGUF")
    with pytest.raises(ModelNotFoundError, match=r"no \.gguf file is Q4_K; there are tiny-Q4_K_M"):
        resolve_model("org/tiny-GGUF:Q4_K")


def test_a_tag_without_a_network_is_an_error_of_one_line(
    gguf_hub: Callable[..., GgufHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's client lets its transport's errors through, which have no base of their own."""

    class ConnectError(Exception):
        pass

    def unreachable(name: str) -> None:
        raise ConnectError("Name or service not known")

    gguf_hub(*FILES)
    monkeypatch.setattr(resolve, "model_info", unreachable)
    with pytest.raises(ModelNotFoundError, match="the hub cannot be reached: Name or service") as e:
        resolve_model("org/tiny-GGUF:Q4_K_M")
    assert "\n" not in str(e.value)


def test_a_split_file_of_which_a_part_is_missing_is_completed(
    gguf_hub: Callable[..., GgufHub],
) -> None:
    hub = gguf_hub(*SPLIT)
    hub.snapshot_download("org/tiny-GGUF", allow_patterns=[SPLIT[0]])
    with pytest.raises(ModelNotFoundError, match=f"its copy in the cache lacks {SPLIT[1]}"):
        resolve_model("org/tiny-GGUF", download=False)
    assert resolve_model("org/tiny-GGUF") == Path(SPLIT[0])
    assert hub.fetched == list(SPLIT)
