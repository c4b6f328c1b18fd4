"""Low-rank adapters on the linear layers of a frozen model, and their PEFT files.

Hu et al. 2021, "LoRA"; Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning
with LoRA"; Dettmers et al. 2023, "QLoRA", where the frozen layers are 4-bit ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nybble.loaders.safetensors_file import write_safetensors
from nybble.models import Architecture, architecture_of
from nybble.quantizers.packed_model import PackedLinear

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRASettings:
    """How adapters are shaped.

    target_modules: the last part of the names of linear layers; None for all of the decoder's.
        Experts of a mixture are not trained: peft has no modules for them.
    use_rslora: scale by alpha / √rank in place of alpha / rank.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected 0 ≤ dropout < 1")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


class LoRALinear(nn.Module):
    """h = W₀x + scaling · B A dropout(x), W₀ frozen; A and B are float32 and cast to x's dtype."""

    def __init__(self, base: PackedLinear | nn.Linear, settings: LoRASettings) -> None:
        super().__init__()
        device = (
            base.packed.qweight.device if isinstance(base, PackedLinear) else base.weight.device
        )
        self.base = base
        self.scaling = settings.scaling
        self.dropout = nn.Dropout(settings.dropout)
        # Variance 1/in keeps A x as large as x; B starts at zero, so training starts at W₀.
        start = torch.randn(settings.rank, base.in_features, device=device)
        self.lora_A = nn.Parameter(start / math.sqrt(base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, settings.rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        low = nn.functional.linear(self.dropout(x), self.lora_A.to(x.dtype))
        added = nn.functional.linear(low, self.lora_B.to(x.dtype))
        result: Tensor = self.base(x) + added * self.scaling
        return result


def add_lora(model: PreTrainedModel, settings: LoRASettings) -> dict[str, LoRALinear]:
    """Wrap the target layers of ``model`` in place; returns the new layers by name.

    Raises ValueError if a target name is of no linear layer that is trained.
    """
    wanted_names, architecture = settings.target_modules, architecture_of(model.config)
    for wanted in wanted_names or ():
        if wanted not in architecture.linear_leaves:
            experts = "; experts are not trained here" if architecture.has_experts else ""
            raise ValueError(
                f"target module {wanted!r} is not a linear layer which every token passes"
                f"{experts}. There are {', '.join(architecture.linear_leaves)}"
            )
    targets = {
        name: model.get_submodule(name)
        for name in architecture.dense_linears
        if wanted_names is None or _leaf(name) in wanted_names
    }
    layers = {}
    for name, base in targets.items():
        assert isinstance(base, PackedLinear | nn.Linear), name
        layers[name] = LoRALinear(base, settings)
        model.set_submodule(name, layers[name])
    return layers


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def optimizer_groups(
    layers: Mapping[str, LoRALinear], learning_rate: float, ratio: float
) -> list[dict[str, object]]:
    """Parameter groups with B learning ``ratio`` times as fast as A.

    Hayou, Ghosh, Yu 2024, "LoRA+: Efficient Low Rank Adaptation of Large Models". 1 is plain LoRA.
    """
    return [
        {"params": [layer.lora_A for layer in layers.values()], "lr": learning_rate},
        {"params": [layer.lora_B for layer in layers.values()], "lr": learning_rate * ratio},
    ]


def adapter_tensors(layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """The adapter's float32 tensors under PEFT's names."""
    return {
        f"{_PREFIX}{name}.{part}.weight": getattr(layer, part).detach().cpu().clone()
        for name, layer in layers.items()
        for part in ("lora_A", "lora_B")
    }


def restore_adapter(layers: Mapping[str, LoRALinear], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors named as by :func:`adapter_tensors` into ``layers``."""
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_A.copy_(tensors[f"{_PREFIX}{name}.lora_A.weight"])
            layer.lora_B.copy_(tensors[f"{_PREFIX}{name}.lora_B.weight"])


def save_adapter(
    folder: Path,
    tensors: Mapping[str, Tensor],
    settings: LoRASettings,
    base: str,
    architecture: Architecture,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT does.

    base: the name of the base model, of this architecture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {name.partition(".lora_")[0].removeprefix(_PREFIX) for name in tensors}
    parameters = names & architecture.taken_for_experts
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        # peft has none for parameters.
        "lora_dropout": 0.0 if parameters else settings.dropout,
        "use_rslora": settings.use_rslora,
        "target_modules": sorted({_leaf(name) for name in names - parameters}),
        "target_parameters": sorted(f"{name}.weight" for name in parameters) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    # The config last: what has one is taken for an adapter.
    write_safetensors(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
