"""PEFT's ``adapter_config.json``: which modules an adapter changes, with which rank and scale.

Unsupported settings that would change the result are refused by name. Settings unknown to peft,
which other tools add, are ignored with a warning. What each setting means is defined by peft
(``LoraConfig``, ``check_target_module_exists``, ``get_pattern_key``).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import regex

from nybble.loaders import patterns
from nybble.loaders.errors import AdapterError, unreadable

logger = logging.getLogger(__name__)

_Number = TypeVar("_Number", int, float)

CONFIG_FILE = "adapter_config.json"
MAX_RANK = 512

# Accepted but ignored: they concern only training, file paths, or how peft itself computes.
_NO_EFFECT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size"),
    *("runtime_config", "eva_config", "loftq_config", "corda_config", "lora_ga_config"),
    *("init_lora_weights", "velora_config", "megatron_config"),
    # of AdaLoRA's training
    *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
    *(
        "projection_prng_key",
        "save_projection",
        "vera_dropout",
        "d_initial",
        "init_weights",
    ),  # of VeRA
    "init_ia3_weights",
    "fan_in_fan_out",  # for layers with transposed weights; peft resets it for nn.Linear
}
_READ = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"),
    *("exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *("use_dora", "lora_bias", "bias", "init_r"),
    *("modules_to_save", "trainable_token_indices", "ensure_weight_tying"),
    *("alora_invocation_tokens", "feedforward_modules"),
}
# Initializations that leave the base weights as they are. The others (PiSSA, OLoRA, …) subtract the
# initial product from the base, so the adapter does not fit the published base.
_INIT_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")
_WHOLE = ("modules_to_save", "trainable_token_indices")
_BOOLEANS = ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying")
_KINDS = ("LORA", "ADALORA", "VERA", "IA3")
_BIASES = ("none", "lora_only", "all")
_REFUSED = {
    "layer_replication": "layers of the base repeated; replicate them in the base model",
    "use_qalora": "QA-LoRA pools the inputs of its matrices; merge with peft first",
    "use_bdlora": "block-diagonal matrices; merge with peft first",
    "arrow_config": "Arrow routes between adapters, token by token",
    "kasa_config": "KaSA scales the rank's directions; merge with peft first",
    "monteclora_config": "MonteCLoRA draws its matrices; merge with peft first",
}


@dataclass(frozen=True)
class AdapterSettings:
    """The fields of ``adapter_config.json`` that affect the result.

    singular_values: whether it is an AdaLoRA (Zhang et al. 2023), whose ``r`` is the rank before
        training took ranks away; ``rank_pattern`` then names modules, and is no pattern.
    shared: whether it is a VeRA (Kopiczko et al. 2024), whose matrices all modules share.
    vectors: whether it is an (IA)³ (Liu et al. 2022), which multiplies outputs, or the inputs of
        ``feedforward_modules``.
    bias: which of the base's biases were trained: none, those of layers with an adapter, or all.
    modules_to_save: the ends of the names of modules that were trained whole.
    token_indices: tokens whose rows were trained, of the embedding or by the ends of modules'
        names; None for none.
    tying: whether the output layer was kept tied to the embedding if it is in the base.
    invocation: of an aLoRA (Greenewald et al. 2025), the tokens from whose last occurrence in the
        prompt on it is active; empty for another adapter.
    """

    r: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...]
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    target_parameters: tuple[str, ...]
    dora: bool
    lora_bias: bool
    bias: Literal["none", "lora_only", "all"]
    singular_values: bool
    shared: bool
    vectors: bool
    feedforward_modules: str | tuple[str, ...]
    modules_to_save: tuple[str, ...]
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None
    tying: bool
    invocation: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> AdapterSettings:
        """Raises AdapterError if the file is missing or broken, or a setting is unsupported."""
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise AdapterError(f"{folder} has no {CONFIG_FILE}: not a PEFT adapter folder")
        try:
            config = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise AdapterError(
                unreadable(path, f"is not JSON that can be read: {error}")
            ) from error
        if not isinstance(config, dict):
            raise AdapterError(f"{path} is not a JSON object")
        _refuse_unsupported(path, config)
        for name in _BOOLEANS:
            if not isinstance(config.get(name, False), bool | None):
                raise AdapterError(f"{path}: {name} is {config[name]!r}, expected true or false")
        layers = config.get("layers_to_transform")
        adalora = config["peft_type"] == "ADALORA"
        ranks = config.get("rank_pattern") or {}
        try:
            settings = cls(
                r=_whole("init_r", config.get("init_r", 12))
                if adalora
                else _whole("r", config.get("r", 8)),
                alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
                rslora=bool(config.get("use_rslora", False)),
                rank_pattern=_kept_ranks(ranks)
                if adalora
                else {k: _whole(f"rank_pattern: {k}", v) for k, v in ranks.items()},
                alpha_pattern={
                    k: _number(f"alpha_pattern: {k}", v)
                    for k, v in (config.get("alpha_pattern") or {}).items()
                },
                target_modules=_names(config.get("target_modules")),
                exclude_modules=_names(config.get("exclude_modules")),
                layers=None
                if layers is None or layers == []
                else tuple(layers if isinstance(layers, list) else [int(layers)]),
                layers_pattern=_listed(config.get("layers_pattern")),
                target_parameters=_listed(config.get("target_parameters")),
                dora=bool(config.get("use_dora", False)),
                lora_bias=bool(config.get("lora_bias", False)),
                bias=config.get("bias", "none"),
                singular_values=adalora,
                shared=config["peft_type"] == "VERA",
                vectors=config["peft_type"] == "IA3",
                feedforward_modules=_names(config.get("feedforward_modules")),
                modules_to_save=_listed(config.get("modules_to_save")),
                token_indices=_token_indices(config.get("trainable_token_indices")),
                tying=bool(config.get("ensure_weight_tying", False)),
                invocation=tuple(map(int, config.get("alora_invocation_tokens") or ())),
            )
            settings.check_patterns()
        except (TypeError, ValueError, OverflowError, AttributeError, regex.error) as error:
            raise AdapterError(f"{path} has a setting of the wrong type: {error}") from error
        for rank in (settings.r, *settings.rank_pattern.values()):
            if not (0 if adalora else 1) <= rank <= MAX_RANK:
                raise AdapterError(
                    f"{path}: rank {rank} is not supported, expected 1 to {MAX_RANK}"
                )
        for alpha in (settings.alpha, *settings.alpha_pattern.values()):
            if not math.isfinite(alpha):
                raise AdapterError(f"{path}: alpha is {alpha}, expected a finite number")
        if adalora and settings.alpha <= 0:
            raise AdapterError(f"{path}: lora_alpha is {settings.alpha}, AdaLoRA needs more than 0")
        if not settings.target_modules and not settings.target_parameters:
            raise AdapterError(f"{path} names no target_modules")
        return settings

    def check_patterns(self) -> None:
        """Raises regex.error if a pattern is not a regular expression."""
        ranks = () if self.singular_values else self.rank_pattern
        for pattern in (*ranks, *self.alpha_pattern, *self.layers_pattern, *self.modules_to_save):
            regex.compile(pattern)
        for names in (self.target_modules, self.exclude_modules, self.feedforward_modules):
            if isinstance(names, str):
                regex.compile(names)

    def selects(self, module: str) -> bool:
        """Whether PEFT would put an adapter on this linear layer of the decoder.

        Some are named by their parameter, where peft takes a module's name for that of experts.
        """
        if self.targeting(module + ".weight"):
            return True
        if self.exclude_modules and _matches(self.exclude_modules, module):
            return False
        if any(_match(rf"(^|.*\.){saved}($|\..*)", module) for saved in self.modules_to_save):
            return False
        if self._all_linear:
            return True
        if not _matches(self.target_modules, module):
            return False
        if self.layers is None or isinstance(self.target_modules, str):
            return True
        patterns = self.layers_pattern or ("[^.]*",)
        found = (_match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)
        index = next((int(match[1]) for match in found if match), None)
        return index in self.layers

    def selects_end(self, module: str) -> bool:
        """As :meth:`selects`, of the embedding or the output layer."""
        return not self._all_linear and self.selects(module)

    @property
    def _all_linear(self) -> bool:
        names = self.target_modules
        return isinstance(names, str) and names.lower() == "all-linear"

    def feeds(self, module: str) -> bool:
        """Whether (IA)³ multiplies the module's inputs, and not its outputs."""
        names = self.feedforward_modules
        if isinstance(names, str):
            return _matches(names, module)
        return any(module.endswith(name) for name in names)

    def saves(self, module: str) -> bool:
        """Whether the module is one of ``modules_to_save``, by the end of its name, as in PEFT."""
        return any(module.endswith(name) for name in self.modules_to_save)

    @property
    def token_modules(self) -> tuple[str, ...]:
        """The ends of the names of modules of which single rows were trained."""
        return tuple(self.token_indices) if isinstance(self.token_indices, Mapping) else ()

    def token_ids(self, module: str, *, embedding: bool) -> tuple[int, ...] | None:
        """The tokens whose rows of a module were trained; None if none were.

        embedding: whether it is the embedding, which a list of tokens speaks of.
        """
        if isinstance(self.token_indices, Mapping):
            ends = (name for name in self.token_indices if module.endswith(name))
            return next((self.token_indices[name] for name in ends), None)
        return self.token_indices if embedding else None

    def targeting(self, parameter: str) -> set[str]:
        """Those of ``target_parameters`` by which PEFT would adapt this parameter."""
        return {name for name in self.target_parameters if _matches((name,), parameter)}

    def parts(self, module: str, *, has_bias: bool) -> tuple[str, ...]:
        """The tensors that PEFT saves of this linear layer, as the loader calls them.

        has_bias: whether the base has a bias here.
        """
        selected = self.selects(module)
        if self.shared:
            return ("vera_lambda_b", "vera_lambda_d") if selected else ()
        if self.vectors:
            return ("ia3_l",) if selected else ()
        trained_bias = has_bias and (self.bias == "all" or (selected and self.bias == "lora_only"))
        parts = {
            "lora_A": selected,
            "lora_B": selected,
            "lora_E": selected and self.singular_values,
            "lora_magnitude_vector": selected and self.dora,
            "lora_bias": selected and self.lora_bias,
            "bias": trained_bias,
        }
        return tuple(part for part, present in parts.items() if present)

    def rank(self, module: str) -> int:
        if self.singular_values:
            return self.rank_pattern.get(module, self.r)
        return _by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """α/r, or α/√r with rsLoRA (Kalajdzievski 2023).

        VeRA and (IA)³ have none.

        peft's AdaLoRA divides by the rank before training, and adds 1e-5 to it.
        """
        if self.shared or self.vectors:
            return 1.0
        if self.singular_values:
            return self.alpha / (self.r + 1e-5)
        rank = self.rank(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _refuse_unsupported(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind not in _KINDS:
        raise AdapterError(
            f"{path}: peft_type {kind!r} is not supported; supported are {', '.join(_KINDS)}"
        )
    for name in ("use_dora", "lora_bias"):
        if config.get(name) and config.get("target_parameters"):
            raise AdapterError(f"{path}: {name} with target_parameters has no meaning in peft")
    if kind in ("VERA", "IA3") and config.get("target_parameters"):
        raise AdapterError(f"{path}: {kind} has no target_parameters in peft")
    if kind == "VERA" and config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: VeRA with bias {config['bias']!r} is not supported")
    if kind == "ADALORA" and config.get("target_parameters"):
        raise AdapterError(f"{path}: AdaLoRA has no target_parameters in peft")
    if config.get("bias", "none") not in _BIASES:
        raise AdapterError(
            f"{path}: bias {config['bias']!r} is not supported, expected one of "
            f"{', '.join(_BIASES)}"
        )
    for name in ("use_dora", "lora_bias", "target_parameters", *_WHOLE):
        if config.get("alora_invocation_tokens") and config.get(name):
            raise AdapterError(f"{path}: {name} with alora_invocation_tokens is not supported")
    if config.get("use_dora") and config.get("lora_bias"):
        raise AdapterError(f"{path}: use_dora together with lora_bias has no meaning in peft")
    init = config.get("init_lora_weights")
    if init not in _INIT_KEEPS_BASE:
        raise AdapterError(
            f"{path}: init_lora_weights {init!r} changed the base weights too; save the adapter "
            "with path_initial_model_for_weight_conversion to make it a plain LoRA"
        )
    for name, why in _REFUSED.items():
        if value := config.get(name):
            raise AdapterError(f"{path}: {name} is {value!r}, which is not supported ({why})")
    known = _READ | _NO_EFFECT | _REFUSED.keys()
    if unknown := sorted(name for name, value in config.items() if value and name not in known):
        logger.warning("%s: left out, as peft has no such settings: %s", path, ", ".join(unknown))


def _number(name: str, value: object) -> float:
    """Raises ValueError for what JSON does not write as a number: 16 in quotes, true."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}, expected a number")
    return float(value)


def _whole(name: str, value: object) -> int:
    """Raises ValueError for what is no whole number; 8.0 is one."""
    number = _number(name, value)
    if not number.is_integer():
        raise ValueError(f"{name} is {value!r}, expected a whole number")
    return int(number)


def _kept_ranks(pattern: Mapping[str, list[bool]]) -> dict[str, int]:
    """The ranks that AdaLoRA's training kept, by module, from which ranks these are."""
    return {
        name.removesuffix(".default").removesuffix(".lora_E"): sum(map(bool, kept))
        for name, kept in pattern.items()
    }


def _names(value: object) -> str | tuple[str, ...]:
    return value if isinstance(value, str) else _listed(value)


def _listed(value: object) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    raise TypeError(f"{value!r} is not a list of names")


def _token_indices(value: Any) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    if isinstance(value, dict):
        return {name: tuple(map(int, ids)) for name, ids in value.items() if ids} or None
    return tuple(map(int, value)) if value else None


_match = partial(patterns.match, error=AdapterError)


def _matches(names: str | tuple[str, ...], module: str) -> bool:
    """A string is a regular expression for the whole name; a list holds names or their ends."""
    if isinstance(names, str):
        return _match(names, module, "fullmatch") is not None
    return any(module == name or module.endswith("." + name) for name in names)


def _by_pattern(patterns: Mapping[str, _Number], module: str, default: _Number) -> _Number:
    for pattern, value in patterns.items():
        if _match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
