"""A model's name leads to a folder, or the error says what was tried and what would work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelInfo
from huggingface_hub.errors import LocalEntryNotFoundError

from nybble.loaders import ModelNotFoundError, resolve, resolve_model
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

    monkeypatch.setattr(resolve, "snapshot_download", snapshot_download)
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
    assert hub == [("org/cached", True)]
    hub.clear()
    assert resolve_model("org/online") == tiny_model()
    assert hub == [("org/online", True), ("org/online", False)]


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
    assert resolve_model("org/tiny-GGUF") == Path(SPLIT[0])
    assert hub.fetched == list(SPLIT)
