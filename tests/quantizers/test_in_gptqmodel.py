"""GPTQ and AWQ checkpoints in transformers with GPTQModel: `make test-peers` installs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, GPTQConfig

from nybble.loaders import load_adapter, open_checkpoint
from nybble.models import architecture_of
from nybble.quantizers import GptqSettings, merge_adapter, quantize_checkpoint
from nybble.quantizers.packed_model import load_packed_model

pytest.importorskip("gptqmodel", reason="make test-peers runs these")


@pytest.mark.parametrize(
    "options",
    [
        {"format": "gptq"},
        {"format": "gptq", "sym": True},
        {"format": "gptq", "settings": GptqSettings(desc_act=True)},
        {"format": "gptq", "settings": GptqSettings(desc_act=True, static_groups=True)},
        *({"format": "gptq", "bits": bits} for bits in (2, 3, 8)),
        {"format": "awq"},
    ],
    ids=str,
)
def test_it_finds_the_logits_we_find(
    tmp_path: Path, tiny_model: Callable[..., Path], options: dict[str, Any]
) -> None:
    tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(0))
    quantize_checkpoint(
        tiny_model(), tmp_path / "q", group_size=32, calibration=tokens, progress=False, **options
    )
    # Its plain PyTorch back ends: the others are compiled at the first call, for minutes.
    settings = (
        GPTQConfig(bits=options.get("bits", 4), backend="gptq_torch")
        if options["format"] == "gptq"
        else AwqConfig(bits=4, group_size=32, backend="torch_awq")
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "q", quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    ours = load_packed_model(
        open_checkpoint(tmp_path / "q"), device=torch.device("cpu"), dtype=torch.float32
    )
    assert sum(hasattr(module, "qweight") for module in theirs.modules()) == 14
    with torch.no_grad():
        found, expected = ours(tokens[:1]).logits, theirs(tokens[:1]).logits
    # Theirs computes the weights in float16.
    assert float((found - expected).abs().max()) < 0.02 * float(expected.std())


@pytest.mark.parametrize("keep_16_bits", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"format": "gptq"}, {"format": "gptq", "sym": True, "bits": 8}, {"format": "awq"}],
    ids=str,
)
def test_it_finds_the_logits_of_a_merged_model(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    options: dict[str, Any],
    keep_16_bits: bool,
) -> None:
    """Layers left in 16 bits are named in config.json, and the rest is as the base was."""
    base, merged = tmp_path / "base", tmp_path / "merged"
    quantize_checkpoint(tiny_model(), base, group_size=32, progress=False, **options)
    architecture = architecture_of(AutoConfig.from_pretrained(tiny_model()))
    adapter = load_adapter(tiny_adapter(target_modules=["q_proj", "up_proj"]), architecture)
    merge_adapter(base, adapter, merged, keep_16_bits=keep_16_bits, progress=False)
    settings = (
        GPTQConfig(bits=options.get("bits", 4), backend="gptq_torch")
        if options["format"] == "gptq"
        else AwqConfig(bits=4, group_size=32, backend="torch_awq")
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        merged, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    ours = load_packed_model(
        open_checkpoint(merged), device=torch.device("cpu"), dtype=torch.float32
    )
    quantized = sum(hasattr(module, "qweight") for module in theirs.modules())
    assert quantized == (10 if keep_16_bits else 14)
    tokens = torch.randint(0, 256, (1, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours(tokens).logits, theirs(tokens).logits
    assert float((found - expected).abs().max()) < 0.02 * float(expected.std())
