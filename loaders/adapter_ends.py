"""What an adapter changes at a model's ends: the embedding and the output layer, and its norms.

In PEFT's files these are, below the module's name: ``lora_A`` and ``lora_B`` of the output layer as
of any linear layer; ``lora_embedding_A`` ``(rank, vocab)`` and ``lora_embedding_B``
``(hidden, rank)`` of the embedding; ``token_adapter.trainable_tokens_delta`` ``(tokens, hidden)``,
which are no differences but new rows; ``weight`` of what is in ``modules_to_save``. If the
embedding or the output layer has LoRA, or if the vocabulary was resized, the matrix itself is saved
too (``base_layer.weight``), and PEFT puts it in place of the base's. A resized one has as many rows
as the model had in training, more than the base or, if the base's are rounded up, fewer.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from nybble.loaders.adapter_changes import LoRAModule, MatrixChange
from nybble.loaders.adapter_config import CONFIG_FILE, AdapterSettings
from nybble.loaders.adapter_tensors import after_prefixes, check_values, inner_name
from nybble.loaders.errors import AdapterError
from nybble.models import Architecture

_NAME = r"(?:\.[^.]+)?"  # some versions put the adapter's here
_KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    rf"(?P<lora_A>lora_A{_NAME}\.weight)"
    rf"|(?P<lora_B>lora_B{_NAME}\.weight)"
    rf"|(?P<lora_bias>lora_B{_NAME}\.bias)"
    rf"|(?P<lora_magnitude_vector>lora_magnitude_vector(?:\.[^.]+){{0,2}})"
    rf"|(?P<lora_embedding_A>lora_embedding_A{_NAME})"
    rf"|(?P<lora_embedding_B>lora_embedding_B{_NAME})"
    rf"|(?P<trainable_tokens_delta>token_adapter\.trainable_tokens_delta{_NAME})"
    r"|(?P<base>(?:token_adapter\.)?(?:base_layer|original_module)\.weight)"
    rf"|(?P<weight>(?:modules_to_save{_NAME}\.)?weight)"
    rf"|(?P<bias>(?:modules_to_save{_NAME}\.|base_layer\.)?bias))"
)
_LOW_RANK = {"lora_A", "lora_B", "lora_bias", "lora_magnitude_vector"}
_MATRICES = "base", "weight"


@dataclass
class Ends:
    """What :func:`read_ends` returns; see :class:`nybble.loaders.adapter_changes.LoRAAdapter`."""

    embedding: MatrixChange | None = None
    head: MatrixChange | None = None
    norms: dict[str, Tensor] = field(default_factory=dict)
    vocab: int | None = None


@dataclass
class _Module:
    """A module at the ends. trained: its name in training. parts: its tensors, with their keys."""

    trained: str
    parts: dict[str, tuple[str, Tensor]] = field(default_factory=dict)


def end_keys(tensors: Iterable[str], architecture: Architecture) -> dict[str, str]:
    """Those of an adapter's tensors that belong to the ends, each with the base's module."""
    names = (architecture.embedding, architecture.head, *architecture.norms)
    modules = {inner_name(name): name for name in names}
    found = {}
    for key in tensors:
        match = _KEY.fullmatch(key)
        module = modules.get(inner_name(after_prefixes(match["module"]))) if match else None
        if module is not None:
            found[key] = module
    return found


def read_ends(
    path: Path,
    settings: AdapterSettings,
    tensors: Mapping[str, Tensor],
    modules: Mapping[str, str],
    architecture: Architecture,
) -> Ends:
    """The changes of the ends.

    tensors: those of ``modules``, which :func:`end_keys` has found.

    Raises AdapterError naming a tensor or a setting that has no meaning here, and a tensor that is
    missing or of another shape.
    """
    found: dict[str, _Module] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        assert match is not None, key
        assert match.lastgroup is not None, key
        module = found.setdefault(modules[key], _Module(after_prefixes(match["module"])))
        if match.lastgroup == "weight" and "weight" in module.parts:
            # Resized matrices in modules_to_save are saved twice; PEFT reads the shorter name.
            if key < module.parts["weight"][0]:
                continue
        elif match.lastgroup in module.parts:
            raise AdapterError(
                f"{path} has more than one {match.lastgroup} for {modules[key]}, e.g. {key}"
            )
        module.parts[match.lastgroup] = key, tensor
    reader = _Reader(path, settings, architecture, found)
    reader.check_names()
    vocab = None if reader.vocab == architecture.vocab else reader.vocab
    ends = Ends(reader.embedding(), reader.head(), reader.norms(), vocab)
    reader.check_rows(ends)
    return ends


@dataclass(frozen=True)
class _Reader:
    path: Path
    settings: AdapterSettings
    architecture: Architecture
    found: Mapping[str, _Module]

    def check_names(self) -> None:
        """Refuse settings that speak of anything but the ends."""
        about = self.architecture
        ends = [self._module(name).trained for name in (about.embedding, about.head)]
        norms = [self._module(name).trained for name in about.norms]
        for setting, names, modules in (
            ("modules_to_save", self.settings.modules_to_save, ends + norms),
            ("trainable_token_indices", self.settings.token_modules, ends),
        ):
            for name in names:
                if not any(module.endswith(name) for module in modules):
                    raise AdapterError(
                        f"{self.path}: {setting} has {name!r}, which is not supported; supported "
                        "are the embedding and the output layer, and in modules_to_save norms; "
                        "merge with peft's merge_and_unload and serve the merged model"
                    )

    @cached_property
    def vocab(self) -> int:
        """How many tokens the embedding and the output layer had in training."""
        about = self.architecture
        ends = self._module(about.embedding), self._module(about.head)
        saved = [
            module.parts[part] for module in ends for part in _MATRICES if part in module.parts
        ]
        rows = {len(tensor): key for key, tensor in saved if tensor.ndim == 2}
        if len(rows) > 1:
            (first, key), (second, other) = sorted(rows.items())[:2]
            raise AdapterError(
                f"{self.path}: {key} has {first} tokens and {other} {second}: expected as many"
            )
        if rows:
            return next(iter(rows))
        trained = [
            self.settings.token_ids(module.trained, embedding=not at)
            for at, module in enumerate(ends)
        ]
        return max((about.vocab, *(1 + each for ids in trained for each in ids or ())))

    def check_rows(self, ends: Ends) -> None:
        """Raises AdapterError if tokens beyond the base's have no row at one of the ends."""
        about = self.architecture
        for name, change in ((about.embedding, ends.embedding), (about.head, ends.head)):
            known = about.vocab
            if change is not None and change.matrix is not None:
                known = len(change.matrix)
            elif change is not None and change.ids is not None:
                given = set(change.ids.tolist())
                known = next(at for at in itertools.count(known) if at not in given)
            if known < self.vocab:
                raise AdapterError(
                    f"{self.path} has {self.vocab} tokens, the base model {about.vocab}, and "
                    f"nothing for {name} from token {known} on: save it again with "
                    "save_embedding_layers=True"
                )

    def embedding(self) -> MatrixChange | None:
        about = self.architecture
        module = self._module(about.embedding)
        sides = {"lora_embedding_A", "lora_embedding_B"}
        expected = sides if self.settings.selects_end(module.trained) else set()
        if expected and self.settings.dora:
            raise AdapterError(
                f"{self.path}: DoRA on {about.embedding} is not supported: train it without, or "
                "merge with peft's merge_and_unload and serve the merged model"
            )
        self._compare(about.embedding, module, expected)
        low_rank = None
        if expected:
            rank = self.settings.rank(module.trained)
            a = self._tensor(module, "lora_embedding_A", rank, self.vocab)
            b = self._tensor(module, "lora_embedding_B", about.hidden, rank)
            low_rank = LoRAModule(b.T, a.T, self.settings.scale(module.trained))
        self._share(module, self._module(about.head))
        ids = self.settings.token_ids(module.trained, embedding=True)
        return self._change(module, ids, low_rank)

    def head(self) -> MatrixChange | None:
        about = self.architecture
        module = self._module(about.head)
        # Tied by training, LoRA is on both, though its targets speak of the embedding alone.
        tied = self.settings.tying and about.tied
        tied_lora = tied and self.settings.selects_end(self._module(about.embedding).trained)
        named = self.settings.selects_end(module.trained)
        if about.head_bias and "bias" in module.parts:
            raise AdapterError(
                f"{self.path} has a bias of its own for {about.head}, {module.parts['bias'][0]}, "
                "which is not supported; merge with peft's merge_and_unload and serve the merged "
                "model"
            )
        expected = set()
        if named or tied_lora:
            expected = {"lora_A", "lora_B"}
            expected |= {"lora_bias"} if self.settings.lora_bias else set()
            expected |= {"lora_magnitude_vector"} if self.settings.dora else set()
        self._compare(about.head, module, expected)
        low_rank = None
        if expected:
            trained = module.trained if named else self._module(about.embedding).trained
            rank = self.settings.rank(trained)
            vectors = (
                self._tensor(module, part, self.vocab) if part in expected else None
                for part in ("lora_magnitude_vector", "lora_bias")
            )
            low_rank = LoRAModule(
                self._tensor(module, "lora_A", rank, about.hidden),
                self._tensor(module, "lora_B", self.vocab, rank),
                self.settings.scale(trained),
                *vectors,
            )
        embedding = self._module(about.embedding)
        self._share(module, embedding)
        ids = self.settings.token_ids(module.trained, embedding=False)
        of_embedding = self.settings.token_ids(embedding.trained, embedding=True)
        rows = "trainable_tokens_delta"
        # Of one matrix, rows of the embedding are rows of the output layer, and saved once.
        if about.tied and ids in (None, of_embedding) and rows in embedding.parts:
            ids = of_embedding
            module.parts.setdefault(rows, embedding.parts[rows])
        change = self._change(module, ids, low_rank)
        alters = change is not None and (change.matrix is not None or change.ids is not None)
        if about.head_bias and alters:
            raise AdapterError(
                f"{self.path} has rows of its own for {about.head}, which has a bias in the base; "
                "merge with peft's merge_and_unload and serve the merged model"
            )
        return change

    def norms(self) -> dict[str, Tensor]:
        found = {}
        for name in self.architecture.norms:
            module = self._module(name)
            saved = self.settings.saves(module.trained)
            allowed = {"weight", "bias"} if saved else set()
            if self.settings.bias == "all":
                allowed |= {"bias"}
            for part, (key, tensor) in module.parts.items():
                if part not in allowed:
                    raise AdapterError(
                        f"{self.path} has {key}, which its {CONFIG_FILE} does not speak of"
                    )
                check_values(self.path, key, tensor)
                found[f"{name}.{part}"] = tensor
            if saved and "weight" not in module.parts:
                raise self._missing("weight", name, "modules_to_save")
        return found

    def _share(self, module: _Module, other: _Module) -> None:
        """Of one matrix, what both were trained on is saved once."""
        if self.architecture.tied and "base" in other.parts:
            module.parts.setdefault("base", other.parts["base"])

    def _module(self, name: str) -> _Module:
        return self.found.get(name) or _Module(name)

    def _compare(self, name: str, module: _Module, low_rank: set[str]) -> None:
        """Refuse parts that the settings do not speak of, and missing ones."""
        for part, (key, _) in module.parts.items():
            if part in ("base", "weight", "trainable_tokens_delta") or part in low_rank:
                continue
            raise AdapterError(f"{self.path} has {key}, which its {CONFIG_FILE} does not speak of")
        for part in sorted(low_rank):
            if part not in module.parts:
                raise self._missing(part, name, "target_modules")
        tied = self.settings.tying and self.architecture.tied
        if (
            self.settings.saves(module.trained)
            and "weight" not in module.parts
            and not (tied and name == self.architecture.head)
        ):
            raise self._missing("weight", name, "modules_to_save")

    def _change(
        self, module: _Module, ids: tuple[int, ...] | None, low_rank: LoRAModule | None
    ) -> MatrixChange | None:
        about = self.architecture
        # A resized vocabulary is saved as if it were trained.
        base, whole = (
            self._tensor(module, part, self.vocab, about.hidden) if part in module.parts else None
            for part in _MATRICES
        )
        rows = index = None
        if ids is not None:
            if low_rank is not None or "weight" in module.parts:
                raise AdapterError(
                    f"{self.path}: {module.trained} has trainable_token_indices beside LoRA or "
                    "modules_to_save, which have no meaning together"
                )
            if "trainable_tokens_delta" not in module.parts:
                raise self._missing(
                    "trainable_tokens_delta", module.trained, "trainable_token_indices"
                )
            if len(set(ids)) != len(ids) or not all(0 <= each < self.vocab for each in ids):
                raise AdapterError(
                    f"{self.path}: trainable_token_indices of {module.trained} are not different "
                    f"tokens below {self.vocab}, the size of the vocabulary"
                )
            new = self._tensor(module, "trainable_tokens_delta", len(ids), about.hidden)
            index, order = torch.tensor(ids, dtype=torch.int64).sort()
            rows = new[order]
        elif "trainable_tokens_delta" in module.parts:
            raise AdapterError(
                f"{self.path} has {module.parts['trainable_tokens_delta'][0]}, which its "
                f"{CONFIG_FILE} does not speak of"
            )
        if base is None and whole is None and rows is None and low_rank is None:
            return None
        return MatrixChange(base, whole, index, rows, low_rank)

    def _tensor(self, module: _Module, part: str, *shape: int) -> Tensor:
        key, tensor = module.parts[part]
        if tuple(tensor.shape) != shape:
            raise AdapterError(
                f"{self.path}: {key} has shape {tuple(tensor.shape)}, expected {shape} for this "
                "base model and its settings"
            )
        check_values(self.path, key, tensor)
        return tensor

    def _missing(self, part: str, module: str, setting: str) -> AdapterError:
        return AdapterError(
            f"{self.path} has no {part} for {module}, which its {setting} select; is it for "
            "another base model?"
        )
