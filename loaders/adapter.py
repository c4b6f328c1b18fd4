"""LoRA adapters in PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

Per module: ``base_model.model.<module>.lora_A.weight`` ``(rank, in)`` and ``lora_B.weight``
``(out, rank)``; for stacked experts see :mod:`nybble.loaders.adapter_experts`. Some versions put
the adapter's name before ``weight``. Some leave out ``base_model.model``, or, if the model was
trained without its head, the base's ``model.``. Training the text part of a multimodal model adds
that model's prefixes (``model.language_model.layers…``).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from nybble.kernels.progress import Bar
from nybble.loaders.adapter_config import CONFIG_FILE, MAX_RANK, AdapterSettings
from nybble.loaders.adapter_experts import expert_changes, is_of_stacked_experts
from nybble.loaders.errors import AdapterError
from nybble.models import Architecture

__all__ = [
    "MAX_RANK",
    "LoRAAdapter",
    "LoRAModule",
    "load_adapter",
    "resolve_adapter",
]

logger = logging.getLogger(__name__)

_SAFETENSORS = "adapter_model.safetensors"
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<name>[^.]+))?\.weight")
_INDEX = re.compile(r"[0-9]{1,9}")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_PREFIXES = ("base_model.model.", "_orig_mod.", "module.")
# Prefixes of the text model's layers inside larger models.
_AROUND = re.compile(r"((model|language_model|text_model|llm|thinker|module|_orig_mod)\.)*")
# Files that training may save with an adapter. The base model's own are used instead.
_NOT_USED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class LoRAModule:
    """One projection's change, ``scale · b @ a``: a ``(rank, in)``, b ``(out, rank)``."""

    a: Tensor
    b: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


@dataclass(frozen=True)
class LoRAAdapter:
    """An adapter that fits its base.

    modules: by the name of the base's linear layer in transformers.
    digest: 16 bytes that differ if the files' content differs.
    """

    modules: Mapping[str, LoRAModule]
    digest: bytes

    @property
    def rank(self) -> int:
        """The highest rank of any module."""
        return max(module.rank for module in self.modules.values())


def resolve_adapter(name: str) -> Path:
    """The folder of an adapter given as a folder or a hub name ``org/name``.

    Raises AdapterError saying what was tried.
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return folder
    reason = f"the folder {folder} has no {CONFIG_FILE}" if folder.is_dir() else "no such folder"
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        files = [CONFIG_FILE, _SAFETENSORS]
        try:
            return Path(snapshot_download(name, allow_patterns=files, tqdm_class=Bar))
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
            reason += f"; not had from the hub: {str(error).splitlines()[0]}"
    raise AdapterError(
        f"adapter {name!r} was not found ({reason}); a folder written by PEFT or a hub name "
        "org/name would work"
    )


def load_adapter(folder: Path, architecture: Architecture) -> LoRAAdapter:
    """Read an adapter for a base of this architecture.

    Raises AdapterError naming the first setting or tensor that is unsupported, missing, or does not
    fit the base.
    """
    shapes = {name: (each.out, each.inputs) for name, each in architecture.linears.items()}
    settings = AdapterSettings.read(folder)
    path, content, tensors = _read(folder)
    digest = blake2b((folder / CONFIG_FILE).read_bytes(), digest_size=16)
    digest.update(content)
    names = _Names(path, shapes)
    sides: dict[str, dict[str, Tensor]] = {}
    stacked = {key: tensor for key, tensor in tensors.items() if is_of_stacked_experts(key)}
    for key in sorted(tensors.keys() - stacked.keys(), key=_natural):
        module, side = names.parse(key)
        rank = settings.rank(names.trained(module))
        _check(path, key, tensors[key], side, rank, shapes[module])
        if side in sides.setdefault(module, {}):
            raise AdapterError(f"{path} has more than one lora_{side} for {module}, e.g. {key}")
        sides[module][side] = tensors[key]
    for module in sides:
        if not settings.selects(names.trained(module)):
            raise AdapterError(f"{path} has tensors for {module}, not one of its target_modules")
    # Experts that were stacked in training were no modules, whatever target_modules say.
    separate = any(module not in architecture.dense_linears for module in sides)
    for module in shapes if separate else architecture.dense_linears:
        missing = {"A", "B"} - sides.get(module, {}).keys()
        if missing and (settings.selects(names.trained(module)) or module in sides):
            raise AdapterError(
                f"{path} has no lora_{min(missing)} for {module}, which its target_modules select; "
                "is it for another base model?"
            )
    modules = {
        module: LoRAModule(pair["A"], pair["B"], settings.scale(names.trained(module)))
        for module, pair in sides.items()
    }
    for key, tensor in stacked.items():
        _check_values(path, key, tensor)
    for change in expert_changes(path, settings, stacked, architecture):
        if change.module in modules:
            raise AdapterError(f"{path} adapts {change.module} twice: also in {change.parameter}")
        modules[change.module] = LoRAModule(change.a, change.b, settings.scale(change.parameter))
    if not modules:
        raise AdapterError(f"{path}: its target_modules select nothing of the base model")
    if unused := [name for name in _NOT_USED if (folder / name).is_file()]:
        logger.info("%s: %s not used, but the base model's own", folder, ", ".join(unused))
    return LoRAAdapter(modules, digest.digest())


def _read(folder: Path) -> tuple[Path, bytes, dict[str, Tensor]]:
    path = folder / _SAFETENSORS
    if path.is_file():
        content = path.read_bytes()
        try:
            return path, content, load_safetensors(content)
        except SafetensorError as error:
            raise AdapterError(f"{path} is truncated or not safetensors: {error}") from error
    raise AdapterError(
        f"{folder} has no {_SAFETENSORS}. Pickled adapters (adapter_model.bin) can run code and "
        "are not read; peft converts one: PeftModel.from_pretrained(base, FOLDER).save_pretrained("
        "FOLDER)"
    )


def _natural(key: str) -> list[tuple[int, str]]:
    """A sort key with layer 2 before layer 10, so that errors name the first bad layer."""
    parts = key.split(".")
    return [(int(part), "") if _INDEX.fullmatch(part) else (-1, part) for part in parts]


class _Names:
    """Maps module names between the base and the model that was trained."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
        self._path = path
        self._shapes = shapes
        self._by_layer = {_in_layer(name): name for name in shapes}
        # The prefix which training put before every layer, once known.
        self._around: str | None = None

    def parse(self, key: str) -> tuple[str, str]:
        """The base's module and the side (A or B) that the tensor ``key`` belongs to."""
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{self._path}: {key} is not supported; supported are lora_A.weight and "
                "lora_B.weight of attention and MLP projections"
            )
        trained = match["module"]
        while prefix := next((each for each in _PREFIXES if trained.startswith(each)), None):
            trained = trained.removeprefix(prefix)
        inside = _in_layer(trained)
        around = trained.removesuffix(inside)
        module = self._by_layer.get(inside)
        if module is None or not _AROUND.fullmatch(around):
            raise AdapterError(
                f"{self._path}: {key} is for {trained}, {_unknown(trained, self._shapes)}"
            )
        if self._around is None:
            self._around = around
        return module, match["side"]

    def trained(self, module: str) -> str:
        """The name of a base module in training, as adapter_config.json uses it."""
        inside = _in_layer(module)
        return module if self._around is None or inside == module else self._around + inside


def _in_layer(module: str) -> str:
    """A module's name from ``layers`` on; the whole name if it is not in a layer."""
    found = re.search(r"(?:^|\.)(layers\.[0-9]+\..+)", module)
    return found[1] if found else module


def _unknown(module: str, shapes: Mapping[str, tuple[int, int]]) -> str:
    known = {name.rpartition(".")[2] for name in shapes}
    layer = re.search(rf"\blayers\.({_INDEX.pattern})\.", module)
    layers = len({name.split(".layers.")[-1].split(".")[0] for name in shapes})
    if module.rpartition(".")[2] not in known:
        return f"which cannot have an adapter here; {', '.join(sorted(known))} can"
    if layer and int(layer[1]) >= layers:
        return f"but the base model has {layers} layers"
    return f"which the base model does not have; it has e.g. {next(iter(shapes))}"


def _check(
    path: Path, key: str, tensor: Tensor, side: str, rank: int, shape: tuple[int, int]
) -> None:
    expected = (rank, shape[1]) if side == "A" else (shape[0], rank)
    if tuple(tensor.shape) != expected:
        raise AdapterError(
            f"{path}: {key} has shape {tuple(tensor.shape)}, expected {expected} for this base "
            f"model and rank {rank}"
        )
    _check_values(path, key, tensor)


def _check_values(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise AdapterError(
            f"{path}: {key} is {tensor.dtype}, expected float32, float16 or bfloat16"
        )
    if not tensor.isfinite().all():
        raise AdapterError(f"{path}: {key} has values that are not finite")
