"""Resolves a user's name for a model to a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import model_info, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from nybble.kernels.progress import Bar
from nybble.loaders.cache import cache_folder
from nybble.loaders.demo import demo_from_packages
from nybble.loaders.gguf.names import choose, models_among, parts_of
from nybble.loaders.model_files import embedding_modules
from nybble.loaders.shards import read_index, weight_files
from nybble.model_name import (
    DEFAULT_ALIASES,
    DEMO,
    DEMO_HUB_NAME,
    ModelNotFoundError,
    dangling_link,
    may_be_on_the_hub,
    read_aliases,
)

# What is read of a repository beside weights.
_SETTINGS = ["*.json", "tokenizer.model", "*.jinja", "merges.txt"]
_ABSENT = "not on this machine"


def resolve_model(name: str, *, aliases: Path | None = None, download: bool = True) -> Path:
    """The folder of a model given as a folder, a GGUF file or a folder with one, an alias,
    ``demo``, or a hub name ``org/name``. Of a repository of GGUF files, ``org/name:Q4_K_M`` is one.

    aliases: a TOML file of ``alias = "folder or hub name"`` lines; DEFAULT_ALIASES if None.
    download: False takes only what is on this machine. Raises ModelNotFoundError.
    """
    tried: list[str] = []
    table = read_aliases(aliases)
    target = table.get(name, name)
    folder = Path(target).expanduser()
    if (file := _gguf(folder)) is not None:
        return _gguf_folder(file)
    if (folder / "config.json").is_file():
        return folder
    if (link := dangling_link(folder)) is not None:
        raise ModelNotFoundError(f"model {name!r}: {link}")
    if folder.is_file():
        raise ModelNotFoundError(_no_folder(name, folder))
    tried.append(f"the folder {folder}" + (" (no config.json in it)" if folder.is_dir() else ""))
    if name not in table and (file_of_aliases := aliases or DEFAULT_ALIASES).is_file():
        tried.append(f"an alias in {file_of_aliases}")
    if target == DEMO and (demo := _demo(download)) is not None:
        return demo
    if may_be_on_the_hub(target):
        found, reason = _from_hub(target, download)
        if found is not None:
            return found
        tried.append(f"the hub model {target} ({reason})")
    raise ModelNotFoundError.after(name, tried)


def _gguf(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or a folder's whose weights are in no other format.

    The first part of a split one; None if there is none. Raises ModelNotFoundError for a folder
    with several models.
    """
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    models = models_among([file.name for file in path.glob("*.gguf")])
    if not models or any(path.glob("*.safetensors")):
        return None
    if len(models) > 1:
        names = ", ".join(models)
        raise ModelNotFoundError(f"{path} holds several models: give the path of one of {names}")
    return path / models[0]


def _gguf_folder(file: Path) -> Path:
    # Imported here: reading GGUF needs a package that other models do not.
    from nybble.loaders.gguf.folder import gguf_folder

    return gguf_folder(file)


def _from_hub(name: str, download: bool) -> tuple[Path | None, str]:
    """The model's folder in the hub's cache, downloading it if need be; or None and the reason.

    Raises ModelNotFoundError for a repository of several GGUF files without a tag for one of them.
    """
    repository, _, tag = name.partition(":")
    found, reason = _in_cache(repository, tag)
    if found is not None or not download:
        return found, reason
    try:
        return _fetched(repository, tag)
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        _, reason = _in_cache(repository, tag)  # of which some files may have come
        said = str(error).splitlines()[0]
        return None, said if reason == _ABSENT else f"{reason}; {said}"


def _in_cache(repository: str, tag: str) -> tuple[Path | None, str]:
    """The model's folder if all of its files are in the hub's cache; or None and the reason."""
    try:
        # Without files: the hub's library would ask for all that fit, and one GGUF file is enough.
        cached = Path(snapshot_download(repository, allow_patterns=[], local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None, _ABSENT
    files = [file.relative_to(cached).as_posix() for file in cached.rglob("*") if file.is_file()]
    if not tag and (weights := weight_files(cached, files)):
        try:  # it knows what the repository has, if it has downloaded anything of it
            snapshot_download(repository, allow_patterns=_SETTINGS, local_files_only=True)
        except LocalEntryNotFoundError as error:
            return None, str(error).splitlines()[0].rstrip(".")
        if not read_index(cached):  # which may be what is missing
            weights = [part for file in weights for part in parts_of(file)]
        lacks = _lacks(cached, ["config.json", *weights])
        return (None, lacks) if lacks else (cached, "")
    chosen = choose(repository, files, tag)
    if chosen is None:
        return None, _ABSENT if tag or not files else "its copy in the cache has no weights"
    if lacks := _lacks(cached, parts_of(chosen)):
        return None, lacks
    return _gguf_folder(cached / chosen), ""


def _fetched(repository: str, tag: str) -> tuple[Path | None, str]:
    """The model's folder, with what the cache lacks from the hub; or None and the reason.

    Only what is read: repositories have the weights in other forms too, in folders of their own
    (``original``, ``metal``, ``onnx``) and beside them (``consolidated.safetensors``).
    """
    files = _files_of(repository)
    if not tag and any(file.endswith(".safetensors") and "/" not in file for file in files):
        if "config.json" not in files:
            return None, "it has no config.json"
        folder = Path(snapshot_download(repository, allow_patterns=_SETTINGS, tqdm_class=Bar))
        weights = [*weight_files(folder, files), *_of_modules(folder, files)]
        # Of the same commit, which the folder is named after.
        snapshot_download(repository, revision=folder.name, allow_patterns=weights, tqdm_class=Bar)
        lacks = _lacks(folder, weights)
        return (None, lacks) if lacks else (folder, "")
    chosen = choose(repository, files, tag)
    if chosen is None:
        there = ", ".join(models_among(files)) or "none"
        return None, f"no .gguf file is {tag}; there are {there}" if tag else "it has no weights"
    parts = parts_of(chosen)
    folder = Path(snapshot_download(repository, allow_patterns=parts, tqdm_class=Bar))
    return _gguf_folder(folder / chosen), ""


def _of_modules(folder: Path, files: Iterable[str]) -> list[str]:
    """The weights of sentence-transformers' modules, each in a folder of its own."""
    modules = {module.path for module in embedding_modules(folder) if module.path}
    return [
        file
        for file in files
        if file.endswith(".safetensors") and file.rpartition("/")[0] in modules
    ]


def _lacks(folder: Path, files: Iterable[str]) -> str:
    """What a cached folder lacks of ``files``; empty if it has them all."""
    missing = [file for file in dict.fromkeys(files) if not (folder / file).is_file()]
    named = ", ".join(missing[:3])
    more = f" and {len(missing) - 3} more files" if len(missing) > 3 else ""
    return f"its copy in the cache lacks {named}{more}" if missing else ""


def _files_of(repository: str) -> list[str]:
    """The files of a repository, asked for once. Raises OSError if the hub cannot be reached."""
    try:
        found = model_info(repository).siblings or []
    except (HfHubHTTPError, HFValidationError, OSError):
        raise
    except Exception as error:  # of its transport, another package in each version of the client
        raise OSError(f"the hub cannot be reached: {error}") from error
    return [file.rfilename for file in found]


def _demo(download: bool) -> Path | None:
    folder = cache_folder() / "models" / "demo"
    if (folder / "config.json").is_file():
        return folder
    found, _ = _from_hub(DEMO_HUB_NAME, download)
    if found is None and download:
        demo_from_packages(folder)
        return folder
    return found


def _no_folder(name: str, file: Path) -> str:
    """The hint for a user who gave a file instead of a model folder."""
    if (file.parent / "config.json").is_file():
        return f"model {name!r} is a file: give its folder, {file.parent}"
    return f"model {name!r} is a file, expected a folder with config.json, or a hub name"
