"""NF4 and FP4 bit for bit as bitsandbytes has them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map, get_4bit_type, quantize_4bit
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.formats.codebook import LEVELS, NestedAbsmax
from nybble.quantizers import quantize_checkpoint
from nybble.quantizers.codebook import dynamic_map, quantize_codebook


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_tables_are_its_own(kind: str) -> None:
    assert torch.equal(LEVELS[kind], get_4bit_type(kind, "cpu"))  # type: ignore[index]
    assert torch.equal(dynamic_map(), create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_and_absmax_equal_its_own(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(512, 192) * 0.02).to(dtype)
    weight[3] = 0
    weight[4, :64] = weight[4, 0]  # a block of one value
    packed, state = quantize_4bit(weight, quant_type=kind)
    ours = quantize_codebook(weight, kind)  # type: ignore[arg-type]
    pairs = ours.codes.view(-1, 2)
    assert torch.equal((pairs[:, :1] << 4) | pairs[:, 1:], packed)
    assert isinstance(ours.absmax, Tensor)
    assert torch.equal(ours.absmax, state.absmax)


@pytest.mark.parametrize("rows", [1, 100, 1024])
def test_the_second_quantization_equals_its_own(rows: int) -> None:
    torch.manual_seed(rows)
    weight = torch.randn(rows, 128) * torch.rand(rows, 1)
    _, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = quantize_codebook(weight, "nf4", double_quant=True).absmax
    assert isinstance(ours, NestedAbsmax)
    assert torch.equal(ours.codes, state.absmax)
    assert torch.equal(ours.absmax, state.state2.absmax)
    assert ours.offset == state.offset.item()


def test_absmax_all_alike_leaves_a_second_level_of_zero() -> None:
    weight = torch.ones(4, 64)
    _, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = quantize_codebook(weight, "nf4", double_quant=True)
    assert isinstance(ours.absmax, NestedAbsmax)
    assert torch.equal(ours.absmax.codes, state.absmax)
    assert torch.equal(ours.dequantize(), weight)


@pytest.mark.parametrize(
    ("nested", "field", "change", "message"),
    [
        (False, "absmax", lambda t: t[:-1], r"absmax has the shape \(511,\), expected \(512,\)"),
        (False, "absmax", lambda t: t.repeat(2), "absmax has the shape"),
        (True, "absmax", lambda t: t[:-1], "absmax has the shape"),
        (True, "nested_absmax", lambda t: t.repeat(2), "nested_absmax has the shape"),
    ],
)
def test_scales_that_are_not_of_the_blocks_are_named(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    nested: bool,
    field: str,
    change: Callable[[Tensor], Tensor],
    message: str,
) -> None:
    quantize_checkpoint(
        tiny_model(), tmp_path / "q", format="nf4", double_quant=nested, progress=False
    )
    file, name = tmp_path / "q" / "model.safetensors", f"model.layers.0.mlp.up_proj.weight.{field}"
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name]).clone()}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"mlp.up_proj: {message}"):
        dict(open_checkpoint(tmp_path / "q").weights())


def test_blocks_of_scales_take_no_memory_beyond_their_number() -> None:
    codes, levels = torch.zeros(4, dtype=torch.uint8), torch.ones(256)
    scales = NestedAbsmax(codes, torch.tensor([2.0]), levels, 0.5, blocksize=1 << 40)
    assert scales.dequantize().tolist() == [2.5] * 4


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_transformers_loads_the_checkpoint_as_if_it_had_made_it(
    tmp_path: Path, tiny_model: Callable[..., Path], kind: str, nested: bool
) -> None:
    quantize_checkpoint(
        tiny_model(),
        tmp_path / "q",
        format=kind,  # type: ignore[arg-type]
        double_quant=nested,
        progress=False,
    )
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "q", device_map="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(
        tiny_model(),
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    tokens = torch.arange(40)[None]
    layer, other = (m.model.layers[1].mlp.down_proj.weight for m in (ours, theirs))
    assert torch.equal(layer.data, other.data)
    assert layer.quant_state.nested == nested
    with torch.no_grad():
        assert torch.equal(ours(tokens).logits, theirs(tokens).logits)


def test_sizes_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="30 elements are not a multiple of blocks of 64"):
        quantize_codebook(torch.randn(5, 6), "nf4")
