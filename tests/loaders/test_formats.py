"""Every format's weights equal what its published layout, or its own library, says they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from nybble.kernels import DenseWeight, PackedWeight
from nybble.kernels.matmul import packed_matmul
from nybble.loaders import CheckpointError, open_checkpoint
from nybble.loaders.formats import Settings
from nybble.loaders.formats.awq import Awq
from nybble.loaders.formats.gptq import Gptq
from nybble.loaders.shards import Shards
from nybble.quantizers.rtn import round_to_nearest


def one_module(folder: Path, **tensors: Tensor) -> Shards:
    save_file({f"layer.{name}": t for name, t in tensors.items()}, folder / "model.safetensors")
    return Shards(folder)


def as_int32(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value


def test_a_gptq_weight_computed_by_hand(tmp_path: Path) -> None:
    """Eight inputs, eight outputs. Output 0 has codes 0…7; stored zeros are 15, 0, 1, …, 6."""
    qweight = [as_int32(0x76543210)] + [0] * 7
    shards = one_module(
        tmp_path,
        qweight=torch.tensor([qweight], dtype=torch.int32),
        qzeros=torch.tensor([[as_int32(0x6543210F)]], dtype=torch.int32),
        scales=torch.full((1, 8), 0.5, dtype=torch.float16),
    )
    v1 = Gptq({}, group_size=-1, zeros_are_one_less=True).read(shards, "layer")
    v2 = Gptq({}, group_size=-1, zeros_are_one_less=False).read(shards, "layer")
    # v1: the stored 15 is a zero of 0, so output 0 is its codes times the scale.
    assert v1.dequantize()[0].tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5]
    assert v1.dequantize()[1].tolist() == [-0.5] * 8
    # v2: the stored 15 is a zero of 15.
    assert v2.dequantize()[0].tolist() == [-7.5, -7.0, -6.5, -6.0, -5.5, -5.0, -4.5, -4.0]
    assert v2.dequantize()[1].tolist() == [0.0] * 8


def test_an_awq_weight_computed_by_hand(tmp_path: Path) -> None:
    """One input, eight outputs: nibbles from the low one up are outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    shards = one_module(
        tmp_path,
        qweight=torch.tensor([[as_int32(0x75316420)]], dtype=torch.int32),
        qzeros=torch.tensor([[as_int32(0x00000008)]], dtype=torch.int32),
        scales=torch.ones(1, 8, dtype=torch.float16),
    )
    weight = Awq({}, group_size=-1).read(shards, "layer")
    assert weight.dequantize().flatten().tolist() == [-8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]


def unpacked(packed: Tensor, order: list[int]) -> Tensor:
    """int32 ``(rows, n)`` to codes ``(rows, 8 n)``, nibble i being column ``order[i]``."""
    codes = torch.zeros(packed.shape[0], packed.shape[1] * 8, dtype=torch.int64)
    wide = packed.long() & 0xFFFFFFFF
    for nibble, column in enumerate(order):
        codes[:, column::8] = wide >> 4 * nibble & 0xF
    return codes


def random_int32(*shape: int) -> Tensor:
    return torch.randint(-(1 << 31), 1 << 31, shape, dtype=torch.int64).int()


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, -1])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v1", [False, True])
def test_gptq_equals_the_published_formula(
    tmp_path: Path, group_size: int, act_order: bool, v1: bool
) -> None:
    torch.manual_seed(group_size)
    columns, out = 256, 24
    size = columns if group_size == -1 else group_size
    groups = columns // size
    g_idx = torch.arange(columns) // size
    if act_order:
        g_idx = g_idx[torch.randperm(columns)]
    qweight, qzeros = random_int32(columns // 8, out), random_int32(groups, out // 8)
    scales = torch.rand(groups, out).half()
    shards = one_module(tmp_path, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx.int())
    codes = unpacked(qweight.T.contiguous(), list(range(8))).T
    zeros = unpacked(qzeros, list(range(8)))
    zeros = (zeros + 1) % 16 if v1 else zeros
    expected = scales[g_idx] * (codes - zeros[g_idx]).half()  # (in, out), as AutoGPTQ computes it

    weight = Gptq({}, group_size=group_size, zeros_are_one_less=v1).read(shards, "layer")
    assert (weight.perm is not None) == (act_order and groups > 1)
    assert torch.equal(weight.dequantize(torch.float16), expected.T)


def unpacked_bits(packed: Tensor, bits: int) -> Tensor:
    """int32 ``(rows, n)`` to codes ``(rows, 32 n / bits)``, each row read as one long number."""
    rows = []
    for words in packed.tolist():
        number = sum((word & 0xFFFFFFFF) << 32 * index for index, word in enumerate(words))
        count = 32 * len(words) // bits
        rows.append([number >> bits * index & (1 << bits) - 1 for index in range(count)])
    return torch.tensor(rows)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("v1", [False, True])
def test_gptq_of_other_widths_equals_the_published_formula(
    tmp_path: Path, bits: int, act_order: bool, v1: bool
) -> None:
    torch.manual_seed(bits)
    columns, out, group_size = 128, 32, 64
    g_idx = torch.arange(columns) // group_size
    if act_order:
        g_idx = g_idx[torch.randperm(columns)]
    qweight, qzeros = random_int32(columns * bits // 32, out), random_int32(2, out * bits // 32)
    scales = torch.rand(2, out).half()
    shards = one_module(tmp_path, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx.int())
    codes, zeros = unpacked_bits(qweight.T, bits).T, unpacked_bits(qzeros, bits)
    zeros = (zeros + 1) % 2**bits if v1 else zeros
    expected = scales[g_idx].float() * (codes - zeros[g_idx])

    weight = Gptq({}, group_size=group_size, zeros_are_one_less=v1, bits=bits).read(shards, "layer")
    assert torch.equal(weight.dequantize(), expected.T)
    x = torch.randn(3, columns)
    torch.testing.assert_close(packed_matmul(x, weight), x @ expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("words", [torch.int8, torch.int16, torch.int64], ids=str)
def test_gptq_words_may_have_another_width(tmp_path: Path, bits: int, words: torch.dtype) -> None:
    """GPTQModel's ``pack_dtype``: each word has as many codes as fit, the first in its low bits."""
    torch.manual_seed(bits)
    columns, out, group_size = 128, 64, 32
    codes = torch.randint(0, 2**bits, (columns, out))
    zeros = torch.randint(1, 2**bits, (columns // group_size, out))
    scales = torch.rand(columns // group_size, out).half()
    width, count = words.itemsize * 8, words.itemsize * 8 // bits

    def packed(numbers: Tensor) -> Tensor:  # (rows, n) along n
        found = [
            [
                sum(int(code) << bits * place for place, code in enumerate(row[at : at + count]))
                for at in range(0, len(row), count)
            ]
            for row in numbers.tolist()
        ]
        signed = [[n - (1 << width) if n >> (width - 1) else n for n in row] for row in found]
        return torch.tensor(signed, dtype=words)

    name = str(words).removeprefix("torch.")
    settings = {"bits": bits, "group_size": group_size, "pack_dtype": name}
    format = Gptq.from_settings(Settings(settings, "config.json"))
    shards = one_module(
        tmp_path,
        qweight=packed(codes.T).T.contiguous(),
        qzeros=packed(zeros - 1),
        scales=scales,
    )
    weight = format.read(shards, "layer")
    group = torch.arange(columns) // group_size
    expected = scales[group].float() * (codes - zeros[group])
    assert torch.equal(weight.dequantize(), expected.T)
    for leaf, tensor in format.tensors("layer", format.quantized(shards, "layer")).items():
        if not leaf.endswith("g_idx"):
            assert torch.equal(tensor, shards.read(leaf)), leaf


def test_a_3_bit_code_lies_across_two_words(tmp_path: Path) -> None:
    """Code 10 has its low bits at the top of the first word, its high bit at the second's start."""
    shards = one_module(
        tmp_path,
        qweight=torch.tensor([[as_int32(0b01 << 30)], [1], [0]], dtype=torch.int32),
        qzeros=torch.tensor([[as_int32(0xFFFFFFFF)]], dtype=torch.int32),
        scales=torch.ones(1, 1, dtype=torch.float16),
    )
    weight = Gptq({}, group_size=-1, zeros_are_one_less=True, bits=3).read(shards, "layer")
    assert weight.dequantize()[0].tolist() == [0.0] * 10 + [5.0] + [0.0] * 21


def test_settings_of_single_modules_override_the_common_ones(tmp_path: Path) -> None:
    """GPTQModel's ``dynamic``: the first pattern that matches the beginning of a name counts."""
    format = Gptq.from_settings(
        Settings(
            {
                "bits": 4,
                "group_size": 64,
                "dynamic": {
                    r"-:.*\.skipped": {},
                    r"+:.*\.fine": {"bits": 8, "group_size": 32},
                    r".*\.(fine|coarse)": {"bits": 2, "group_size": -1, "desc_act": True},
                    r"coarse": {"bits": 3},
                },
            },
            "test",
        )
    )
    expected = {"a.fine": (8, 32), "a.coarse": (2, -1), "a.coarser": (2, -1), "a.other": (4, 64)}
    torch.manual_seed(0)
    tensors, weights = {}, {}
    for name, (bits, group_size) in expected.items():
        own = format.for_module(name)
        assert (own.bits, own.group_size) == (bits, group_size)
        weights[name] = round_to_nearest(torch.randn(32, 64), own)
        tensors |= format.tensors(name, weights[name])
    assert format.for_module("a.coarse").desc_act
    save_file(tensors, tmp_path / "model.safetensors")
    shards = Shards(tmp_path)
    for name, weight in weights.items():
        assert torch.equal(format.read(shards, name).dequantize(), weight.dequantize())  # type: ignore[union-attr]


@pytest.mark.parametrize("group_size", [16, 32, 128, -1])
def test_awq_equals_the_published_formula(tmp_path: Path, group_size: int) -> None:
    columns, out = 128, 40
    size = columns if group_size == -1 else group_size
    qweight, qzeros = random_int32(columns, out // 8), random_int32(columns // size, out // 8)
    scales = torch.rand(columns // size, out).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    group = torch.arange(columns) // size
    expected = scales[group] * (unpacked(qweight, order) - unpacked(qzeros, order)[group]).half()

    shards = one_module(tmp_path, qweight=qweight, qzeros=qzeros, scales=scales)
    weight = Awq({}, group_size=group_size).read(shards, "layer")
    assert torch.equal(weight.dequantize(torch.float16), expected.T)


def test_an_awq_gemv_weight_computed_by_hand(tmp_path: Path) -> None:
    """Eight inputs, one output: nibbles from the low one up are inputs 0, 1, …, 7."""
    shards = one_module(
        tmp_path,
        qweight=torch.tensor([[as_int32(0x76543210)]], dtype=torch.int32),
        qzeros=torch.tensor([[as_int32(0x77777772)]], dtype=torch.int32),
        scales=torch.tensor([[0.5] + [float("nan")] * 7], dtype=torch.float16),
    )
    weight = Awq({}, group_size=-1, gemv=True).read(shards, "layer")
    assert weight.dequantize().flatten().tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


@pytest.mark.parametrize(("group_size", "width"), [(32, 4), (64, 2), (128, 1)])
def test_awq_gemv_equals_the_published_formula(tmp_path: Path, group_size: int, width: int) -> None:
    columns, out = 256, 24
    qweight, qzeros = random_int32(out, columns // 8), random_int32(out, width)
    scales = torch.rand(out, width * 8).half()
    order = list(range(8))
    group = torch.arange(columns) // group_size
    centred = unpacked(qweight, order) - unpacked(qzeros, order)[:, group]
    expected = scales[:, group] * centred.half()

    shards = one_module(tmp_path, qweight=qweight, qzeros=qzeros, scales=scales)
    weight = Awq({}, group_size=group_size, gemv=True).read(shards, "layer")
    assert torch.equal(weight.dequantize(torch.float16), expected)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(
    ("nested", "storage"),
    [
        *((False, "uint8"), (True, "uint8"), (False, "int8")),
        *((True, "bfloat16"), (False, "float16"), (False, "float32"), (True, "float64")),
    ],
)
def test_bitsandbytes_checkpoints_equal_its_own_dequantization(
    tmp_path: Path, tiny_model: Callable[..., Path], kind: str, nested: bool, storage: str
) -> None:
    """Its bytes may be stored as any dtype, which shards of other software need; and one projection
    of three may be left in 16 bits."""
    from bitsandbytes.functional import dequantize_4bit

    model = AutoModelForCausalLM.from_pretrained(
        tiny_model(),
        dtype=torch.float32,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=nested,
            bnb_4bit_quant_storage=storage,
            llm_int8_skip_modules=["lm_head", "model.layers.1.self_attn.k_proj"],
        ),
    )
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    weights = dict(checkpoint.weights())
    assert checkpoint.format == kind
    assert load_file(tmp_path / "model.safetensors")[
        "model.layers.1.mlp.up_proj.weight"
    ].dtype == getattr(torch, storage)
    layer = model.model.layers[1]
    assert isinstance(weights["model.layers.1.self_attn.q_proj"], PackedWeight)
    assert isinstance(weights["model.layers.1.self_attn.k_proj"], DenseWeight)
    for name, owners in (
        ("self_attn.o_proj", [layer.self_attn.o_proj]),
        ("mlp.gate_up_proj", [layer.mlp.gate_proj, layer.mlp.up_proj]),
    ):
        found = weights["model.layers.1." + name]
        assert isinstance(found, PackedWeight)
        expected = [dequantize_4bit(owner.weight, owner.weight.quant_state) for owner in owners]
        assert torch.equal(found.dequantize(), torch.cat(expected).float())


def test_llm_int8_checkpoints_equal_bitsandbytes_own_dequantization(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    """Equal but for float32's rounding of SCB / 127 and of the two digits' products."""
    from bitsandbytes.functional import int8_vectorwise_dequant

    model = AutoModelForCausalLM.from_pretrained(
        tiny_model(),
        dtype=torch.float16,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(
            load_in_8bit=True,
            llm_int8_skip_modules=["lm_head", "model.layers.1.self_attn.k_proj"],
        ),
    )
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    weights = dict(checkpoint.weights())
    assert checkpoint.format == "LLM.int8"
    assert isinstance(weights["model.layers.1.self_attn.k_proj"], DenseWeight)
    for name in ("mlp.down_proj", "self_attn.q_proj"):
        module = f"model.layers.1.{name}"
        found = weights[module]
        assert isinstance(found, PackedWeight)
        codes, largest = stored[f"{module}.weight"], stored[f"{module}.SCB"]
        assert codes.dtype == torch.int8
        expected = int8_vectorwise_dequant(codes, largest)
        torch.testing.assert_close(found.dequantize(), expected, rtol=1e-6, atol=0)
    assert isinstance(weights["model.layers.0.mlp.gate_up_proj"], PackedWeight)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_plain_checkpoint_streams_fused_projections_with_their_biases(
    tiny_model: Callable[..., Path], family: str
) -> None:
    folder = tiny_model(family=family)
    tensors = load_file(folder / "model.safetensors")
    weights = dict(open_checkpoint(folder).weights())
    prefix = "model.layers.0.self_attn."
    qkv = weights[prefix + "qkv_proj"]
    assert isinstance(qkv, DenseWeight)
    assert torch.equal(qkv.weight, torch.cat([tensors[f"{prefix}{p}_proj.weight"] for p in "qkv"]))
    assert (qkv.bias is not None) == (family == "qwen2")
    assert isinstance(weights["model.embed_tokens.weight"], Tensor)


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target / "model"))


def test_a_truncated_file_is_named(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        dict(open_checkpoint(folder).weights())


def test_pickled_weights_are_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    folder = copied(tiny_model(), tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        dict(open_checkpoint(folder).weights())


def test_a_wrong_shape_names_tensor_expected_and_found(tmp_path: Path) -> None:
    shards = one_module(
        tmp_path,
        qweight=random_int32(8, 16),
        qzeros=random_int32(1, 2),
        scales=torch.ones(3, 16).half(),
    )
    message = r"layer\.scales has shape \(3, 16\), expected \(1, 16\)"
    with pytest.raises(CheckpointError, match=message):
        Gptq({}, group_size=64, zeros_are_one_less=True).read(shards, "layer")


def test_uneven_groups_are_refused(tmp_path: Path) -> None:
    shards = one_module(
        tmp_path,
        qweight=random_int32(8, 16),
        qzeros=random_int32(2, 2),
        scales=torch.ones(2, 16).half(),
        g_idx=torch.tensor([0] * 10 + [1] * 54, dtype=torch.int32),
    )
    with pytest.raises(CheckpointError, match=r"layer\.g_idx does not put 32 features into each"):
        Gptq({}, group_size=32, zeros_are_one_less=True).read(shards, "layer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "gptq", "bits": 5},
            "quantization_config: bits is 5, expected 2, 3, 4, 8",
        ),
        ({"quant_method": "awq", "bits": 8}, "quantization_config: bits is 8, expected 4"),
        ({"quant_method": "quip"}, "quant_method 'quip' is not supported; supported are gptq"),
        ({"quant_method": "awq", "version": "marlin"}, "version is 'marlin', expected gemm, gemv"),
        ({"quant_method": "bitsandbytes"}, "neither load_in_4bit nor load_in_8bit is true"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tmp_path: Path, tiny_model: Callable[..., Path], settings: dict[str, object], message: str
) -> None:
    folder = copied(tiny_model(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_projections_fuse_whatever_their_order_in_the_file(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    folder = copied(tiny_model(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    save_file(dict(sorted(tensors.items())), folder / "model.safetensors")
    names = {name for name, _ in open_checkpoint(folder).weights()}
    assert "model.layers.0.self_attn.qkv_proj" in names
    assert not {name for name in names if name.endswith((".q_proj", ".k_proj", ".v_proj"))}
