"""LoRA adapters in PEFT's layout: a folder with adapter_config.json and adapter_model.safetensors.

Per module: ``base_model.model.<module>.lora_A.weight`` ``(rank, in)`` and ``lora_B.weight``
``(out, rank)``; for stacked experts see :mod:`nybble.loaders.adapter_experts`. With DoRA also
``lora_magnitude_vector`` ``(out,)``, with ``lora_bias`` ``lora_B.bias`` ``(out,)``.
VeRA's are ``vera_lambda_d`` ``(rank,)`` and ``vera_lambda_b`` ``(out,)``, beside ``vera_A`` and
``vera_B``, which all modules share. AdaLoRA's are ``lora_A``, ``lora_B`` and the singular values
``lora_E`` ``(rank, 1)``. For (IA)³ see :mod:`nybble.loaders.adapter_vectors`.
With ``bias`` there is the layer's own ``bias``, before which comes
``base_layer`` if the layer has an adapter. Some versions put the adapter's name before ``weight``.
Some leave out ``base_model.model``, or, if the model was trained without its head, the base's
``model.``. For the embedding, the output layer and norms see :mod:`nybble.loaders.adapter_ends`.
Training the text part of a multimodal model adds that model's prefixes
(``model.language_model.layers…``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from hashlib import blake2b
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from nybble.kernels.progress import Bar
from nybble.loaders.adapter_changes import LoRAAdapter, LoRAModule
from nybble.loaders.adapter_config import CONFIG_FILE, MAX_RANK, AdapterSettings
from nybble.loaders.adapter_ends import end_keys, read_ends
from nybble.loaders.adapter_experts import expert_changes, is_of_stacked_experts
from nybble.loaders.adapter_settings import SETTINGS_FILES
from nybble.loaders.adapter_tensors import (
    AROUND,
    LARGEST,
    after_prefixes,
    check_values,
    greatest,
)
from nybble.loaders.adapter_tokens import TOKEN_FILES
from nybble.loaders.adapter_vectors import vector_changes
from nybble.loaders.errors import AdapterError, unreadable
from nybble.model_name import dangling_link
from nybble.models import Architecture, Mixture

__all__ = [
    "MAX_RANK",
    "OWN_FILES",
    "LoRAAdapter",
    "LoRAModule",
    "content_digest",
    "files_stamp",
    "load_adapter",
    "own_files",
    "resolve_adapter",
]

_SAFETENSORS = "adapter_model.safetensors"
# What an adapter's folder may have beside PEFT's two files, and is read by the engine.
OWN_FILES = (*SETTINGS_FILES, *TOKEN_FILES)
_DIGEST_BYTES = 16
# What a module can have; the name of the group is the name of the tensor in errors.
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<lora_A>lora_A(?:(?:\.[^.]+)?\.weight)?)"
    r"|(?P<lora_B>lora_B(?:(?:\.[^.]+)?\.weight)?)"
    r"|(?P<lora_E>lora_E)"
    r"|(?P<vera_lambda_b>vera_lambda_b(?:\.[^.]+)?)"
    r"|(?P<vera_lambda_d>vera_lambda_d(?:\.[^.]+)?)"
    r"|(?P<ia3_l>ia3_l(?:\.[^.]+)?)"
    r"|(?P<lora_bias>lora_B(?:\.[^.]+)?\.bias)"
    r"|(?P<lora_magnitude_vector>lora_magnitude_vector(?:\.[^.]+){0,2})"
    r"|(?P<bias>(?:base_layer\.)?bias))"
)
_SIDES = {"lora_A", "lora_B", "lora_E", "vera_lambda_b", "vera_lambda_d"}
# What all modules of a VeRA share.
_SHARED = re.compile(r"(?:.*\.)?vera_(?P<side>[AB])(?:\.[^.]+)?")
_INDEX = re.compile(r"[0-9]{1,9}")


def resolve_adapter(name: str) -> Path:
    """The folder of an adapter given as a folder or a hub name ``org/name``.

    Raises AdapterError saying what was tried.
    """
    folder = Path(name).expanduser()
    if (folder / CONFIG_FILE).is_file():
        return folder
    if (link := dangling_link(folder)) is not None:
        raise AdapterError(f"adapter {name!r}: {link}")
    reason = f"the folder {folder} has no {CONFIG_FILE}" if folder.is_dir() else "no such folder"
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        files = [CONFIG_FILE, _SAFETENSORS, *OWN_FILES]
        try:
            return Path(snapshot_download(name, allow_patterns=files, tqdm_class=Bar))
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
            reason += f"; not had from the hub: {str(error).splitlines()[0]}"
    raise AdapterError(
        f"adapter {name!r} was not found ({reason}); a folder written by PEFT or a hub name "
        "org/name would work"
    )


def files_stamp(name: str) -> tuple[tuple[int, int] | None, ...]:
    """Sizes and times of change of the files of an adapter's folder, without reading them; None
    for one that is not there.

    Empty for an adapter of the hub, whose files are another folder for each version.
    """
    folder = Path(name).expanduser()
    needed = [_file_stamp(folder / file) for file in (CONFIG_FILE, _SAFETENSORS)]
    if None in needed:
        return ()
    return (*needed, *(_file_stamp(folder / file) for file in OWN_FILES))


def _file_stamp(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def content_digest(folder: Path) -> str:
    """A digest of a folder's files, in hexadecimal, without loading them: of PEFT's two files
    alone the :attr:`LoRAAdapter.digest`."""
    digest = blake2b((folder / CONFIG_FILE).read_bytes(), digest_size=_DIGEST_BYTES)
    with (folder / _SAFETENSORS).open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    for name in own_files(folder):
        content = (folder / name).read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def own_files(folder: Path) -> list[str]:
    """Those of OWN_FILES that a folder has."""
    return [name for name in OWN_FILES if (folder / name).is_file()]


def load_adapter(folder: Path, architecture: Architecture) -> LoRAAdapter:
    """Read an adapter for a base of this architecture.

    Raises AdapterError naming the first setting or tensor that is unsupported, missing, or does not
    fit the base.
    """
    shapes = {name: (each.out, each.inputs) for name, each in architecture.linears.items()}
    settings = AdapterSettings.read(folder)
    path, content, tensors = _read(folder)
    digest = blake2b((folder / CONFIG_FILE).read_bytes(), digest_size=_DIGEST_BYTES)
    digest.update(content)
    names = _Names(path, shapes, _routers(architecture))
    parts: dict[str, dict[str, Tensor]] = {}
    stacked = {key: tensor for key, tensor in tensors.items() if is_of_stacked_experts(key)}
    at_ends = end_keys(tensors, architecture)
    of_ends = {key: tensors[key] for key in at_ends}
    ends = read_ends(path, settings, of_ends, at_ends, architecture)
    selected = [shape for name, shape in shapes.items() if settings.selects(name)]
    shared = _shared(path, settings, tensors, selected or list(shapes.values()))
    inside = tensors.keys() - stacked.keys() - at_ends.keys()
    if shared is not None:
        inside = {key for key in inside if not _SHARED.fullmatch(key)}
    for key in sorted(inside, key=_natural):
        module, part = names.parse(key)
        trained = names.trained(module)
        expected = _expected(part, settings, trained, shapes[module])
        _check(path, key, tensors[key], expected, settings.rank(trained))
        if part in parts.setdefault(module, {}):
            raise AdapterError(f"{path} has more than one {part} for {module}, e.g. {key}")
        parts[module][part] = tensors[key]
    # Experts that were stacked in training were no modules, whatever target_modules say.
    separate = any(module not in architecture.dense_linears for module in parts)
    modules = {}
    for module in dict.fromkeys((*parts, *shapes)):
        if module in parts or separate or module in architecture.dense_linears:
            found = parts.get(module, {})
            has_bias = architecture.linears[module].bias or "bias" in found
            _compare(path, module, found, settings.parts(names.trained(module), has_bias=has_bias))
        if module in parts:
            if parts[module].keys() - _SIDES and module not in architecture.dense_linears:
                raise AdapterError(
                    f"{path} has a {max(parts[module].keys() - _SIDES)} for the expert {module}; "
                    "experts can have plain LoRA only: merge the adapter instead"
                )
            scale = settings.scale(names.trained(module))
            modules[module] = _module(parts[module], scale, shapes[module], shared)
    if settings.vectors:
        vectors = {module: found["ia3_l"] for module, found in parts.items()}
        feedforward = {module for module in vectors if settings.feeds(names.trained(module))}
        modules = vector_changes(path, vectors, feedforward, architecture)
    for key, tensor in stacked.items():
        check_values(path, key, tensor)
    for change in expert_changes(path, settings, stacked, architecture):
        if change.module in modules:
            raise AdapterError(f"{path} adapts {change.module} twice: also in {change.parameter}")
        modules[change.module] = LoRAModule(change.a, change.b, settings.scale(change.parameter))
    if not (modules or ends.embedding or ends.head or ends.norms):
        raise AdapterError(f"{path}: its target_modules select nothing of the base model")
    if settings.invocation and (ends.embedding or settings.bias != "none"):
        raise AdapterError(
            f"{path}: an aLoRA on the embedding or with biases has no meaning in peft, which would "
            "apply these everywhere"
        )
    for name, low_rank in modules.items():
        _require_scaled(path, name, low_rank)
    for name, end in (("the embedding", ends.embedding), ("the output layer", ends.head)):
        if end is not None and end.low_rank is not None:
            _require_scaled(path, name, end.low_rank)
    changes = ends.embedding, ends.head, ends.norms
    return LoRAAdapter(modules, digest.digest(), *changes, settings.invocation, ends.vocab)


def _read(folder: Path) -> tuple[Path, bytes, dict[str, Tensor]]:
    path = folder / _SAFETENSORS
    if path.is_file():
        content = path.read_bytes()
        try:
            return path, content, load_safetensors(content)
        except SafetensorError as error:
            raise AdapterError(
                unreadable(path, f"is truncated or not safetensors: {error}")
            ) from error
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

    def __init__(
        self, path: Path, shapes: Mapping[str, tuple[int, int]], routers: Collection[str]
    ) -> None:
        """routers: the last parts of the names of routers and of shared experts' gates."""
        self._path = path
        self._shapes = shapes
        self._routers = routers
        self._by_layer = {_in_layer(name): name for name in shapes}
        # The prefix which training put before every layer, once known.
        self._around: str | None = None

    def parse(self, key: str) -> tuple[str, str]:
        """The base's module that the tensor ``key`` belongs to, and which of its parts it is."""
        match = _KEY.fullmatch(key)
        if match is None:
            raise AdapterError(
                f"{self._path}: {key} is not supported; supported are lora_A, lora_B, "
                "lora_magnitude_vector and biases of attention and MLP projections; peft's "
                "merge_and_unload makes a model of such an adapter, which can be served"
            )
        trained = after_prefixes(match["module"])
        inside = _in_layer(trained)
        around = trained.removesuffix(inside)
        module = self._by_layer.get(inside)
        if module is None and (leaf := trained.rpartition(".")[2]) in self._routers:
            raise AdapterError(
                f"{self._path}: {key} is for {trained}, which weighs experts: adapters cannot "
                "change it here; train with target_modules (and target_parameters, for experts) "
                f"that name what to change, without {leaf}, and not with all-linear; or serve what "
                "peft's merge_and_unload makes of base and adapter"
            )
        if module is None or not AROUND.fullmatch(around):
            raise AdapterError(
                f"{self._path}: {key} is for {trained}, {_unknown(trained, self._shapes)}"
            )
        if self._around is None:
            self._around = around
        assert match.lastgroup is not None, key
        return module, match.lastgroup

    def trained(self, module: str) -> str:
        """The name of a base module in training, as adapter_config.json uses it."""
        inside = _in_layer(module)
        return module if self._around is None or inside == module else self._around + inside


def _routers(architecture: Architecture) -> set[str]:
    names = []
    for layer in architecture.layers:
        if isinstance(layer.mlp, Mixture):
            names += [layer.mlp.router.module, layer.mlp.shared_gate or ""]
            names += [name.removesuffix(".weight") for name in layer.mlp.router.aliases]
    return {name.rpartition(".")[2] for name in names if name}


def _in_layer(module: str) -> str:
    """A module's name from ``layers`` on; the whole name if it is not in a layer."""
    found = re.search(r"(?:^|\.)(layers\.[0-9]+\..+)", module)
    return found[1] if found else module


def _unknown(module: str, shapes: Mapping[str, tuple[int, int]]) -> str:
    known = {name.rpartition(".")[2] for name in shapes}
    layer = re.search(rf"\blayers\.({_INDEX.pattern})\.", module)
    layers = len({name.split(".layers.")[-1].split(".")[0] for name in shapes})
    if module.rpartition(".")[2] not in known:
        return (
            f"which cannot have an adapter here; {', '.join(sorted(known))} can; peft's "
            "merge_and_unload makes a model of such an adapter, which can be served"
        )
    if layer and int(layer[1]) >= layers:
        return f"but the base model has {layers} layers"
    return f"which the base model does not have; it has e.g. {next(iter(shapes))}"


def _expected(
    part: str, settings: AdapterSettings, trained: str, shape: tuple[int, int]
) -> tuple[int, ...]:
    """The shape of a part of a module, whose name in training is ``trained``."""
    rank, (out, inputs) = settings.rank(trained), shape
    shapes: dict[str, tuple[int, ...]]
    shapes = {"lora_A": (rank, inputs), "lora_B": (out, rank), "lora_E": (rank, 1)}
    shapes["vera_lambda_d"] = (rank,)
    shapes["ia3_l"] = (1, inputs) if settings.feeds(trained) else (out, 1)
    return shapes.get(part, (out,))


def _check(path: Path, key: str, tensor: Tensor, expected: tuple[int, ...], rank: int) -> None:
    if tuple(tensor.shape) != expected:
        raise AdapterError(
            f"{path}: {key} has shape {tuple(tensor.shape)}, expected {expected} for this base "
            f"model and rank {rank}"
        )
    check_values(path, key, tensor)


def _require_scaled(path: Path, name: str, module: LoRAModule) -> None:
    """Refuse a scale by which the change of a module is no longer a number in 16 bits."""
    for tensor in (module.b, module.added_bias):
        if tensor is not None and not abs(module.scale) * greatest(tensor) <= LARGEST:
            raise AdapterError(
                f"{path}: what it adds to {name} is scaled by {module.scale:.3g} (lora_alpha, or "
                f"its alpha_pattern, over the rank), which makes {greatest(tensor):.3g} more than "
                f"{LARGEST:.0f}, the most that a model in 16 bits computes with"
            )


def _compare(path: Path, module: str, found: Collection[str], expected: Collection[str]) -> None:
    """Refuse parts of a module that the settings do not speak of, and missing ones."""
    if found and not expected:
        raise AdapterError(f"{path} has tensors for {module}, not one of its target_modules")
    for part in found:
        if part not in expected:
            raise AdapterError(
                f"{path} has a {part} for {module}, which its {CONFIG_FILE} does not speak of"
            )
    missing = [part for part in expected if part not in found]
    if missing == ["bias"]:
        raise AdapterError(
            f"{path} has no bias for {module}, which its settings say was trained; older "
            "versions of peft leave it out: save the adapter again with a newer one"
        )
    if missing:
        raise AdapterError(
            f"{path} has no {missing[0]} for {module}, which its target_modules select; "
            "is it for another base model?"
        )


def _shared(
    path: Path,
    settings: AdapterSettings,
    tensors: Mapping[str, Tensor],
    shapes: Collection[tuple[int, int]],
) -> tuple[Tensor, Tensor] | None:
    """The matrices ``(rank, inputs)`` and ``(outputs, rank)`` that a VeRA's modules share.

    shapes: of the modules, ``(outputs, inputs)``. None for an adapter of another kind.
    """
    found = {}
    for key, tensor in tensors.items():
        if settings.shared and (match := _SHARED.fullmatch(key)):
            check_values(path, key, tensor)
            found[match["side"]] = tensor
    if not settings.shared:
        return None
    if found.keys() != {"A", "B"}:
        raise AdapterError(
            f"{path} has no vera_A and vera_B: peft would draw them at random again; save the "
            "adapter with save_projection"
        )
    a, b = found["A"], found["B"]
    inputs, outputs = (max(shape[at] for shape in shapes) for at in (1, 0))
    if a.ndim != 2 or b.ndim != 2 or len(a) != settings.r or b.shape[1] != settings.r:
        raise AdapterError(
            f"{path}: vera_A has shape {tuple(a.shape)} and vera_B {tuple(b.shape)}, expected "
            f"({settings.r}, inputs) and (outputs, {settings.r})"
        )
    if a.shape[1] < inputs or len(b) < outputs:
        raise AdapterError(
            f"{path}: vera_A and vera_B are for {a.shape[1]} inputs and {len(b)} outputs, but a "
            f"module of this base model has {inputs} or {outputs}"
        )
    return a, b


def _module(
    parts: Mapping[str, Tensor],
    scale: float,
    shape: tuple[int, int],
    shared: tuple[Tensor, Tensor] | None,
) -> LoRAModule:
    out, inputs = shape
    if shared is not None:
        # Both matrices are cut to the module's size.
        a = parts["vera_lambda_d"].float()[:, None] * shared[0][:, :inputs].float()
        b = parts["vera_lambda_b"].float()[:, None] * shared[1][:out].float()
        return LoRAModule(a, b, scale)
    a = parts.get("lora_A", torch.zeros(0, inputs))
    if "lora_E" in parts:
        a = a.float() * parts["lora_E"].float()
    return LoRAModule(
        a,
        parts.get("lora_B", torch.zeros(out, 0)),
        scale,
        magnitude=parts.get("lora_magnitude_vector"),
        added_bias=parts.get("lora_bias"),
        own_bias=parts.get("bias"),
    )
