"""GGUF files of every family: as they were converted, and against transformers' GGUF loading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoConfig, AutoModelForCausalLM

from nybble.kernels import PackedWeight
from nybble.loaders import CheckpointError, open_checkpoint, resolve_model
from nybble.loaders.gguf.config import FAMILIES
from tests.loaders.gguf_files import (
    MODELS,
    READ_BY_TRANSFORMERS,
    SIZES,
    THETA,
    random_model,
    random_weights,
    weights_of,
    write_gguf,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("architecture", MODELS)
def test_a_file_is_the_model_that_was_converted(
    tmp_path: Path, tiny_model: Callable[..., Path], reference: Any, architecture: str
) -> None:
    model = random_model(architecture)
    file = write_gguf(tmp_path / "model.gguf", architecture, model, tiny_model())
    folder = resolve_model(str(file))
    model.save_pretrained(tmp_path / "converted")
    found, expected = weights_of(folder), weights_of(tmp_path / "converted")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    ours = reference.our_logits(open_checkpoint(folder), ids, torch.float32)
    assert (ours - logits).abs().max() < 1e-4 * logits.abs().max()


def test_olmo_3_is_olmo_2_with_windows(
    tmp_path: Path, tiny_model: Callable[..., Path], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which layers have one is in the file, layer by layer; the others scale their frequencies."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    scaled = {
        **THETA,
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.2,
    }
    config = AutoConfig.for_model(
        "olmo3",
        **SIZES,
        rms_norm_eps=1e-5,
        sliding_window=24,
        layer_types=kinds,
        rope_parameters={"full_attention": scaled, "sliding_attention": THETA},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    keys = {
        "attention.sliding_window": 24,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
        "rope.freq_base": 5000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.attn_factor": 1.2,
        "rope.scaling.original_context_length": 64,
    }
    file = write_gguf(tmp_path / "model.gguf", "olmo2", model, tiny_model(), keys=keys)
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    checkpoint = open_checkpoint(resolve_model(str(file)))
    assert checkpoint.config.model_type == "olmo3"
    ours = reference.our_logits(checkpoint, ids, torch.float32)
    assert (ours - logits).abs().max() < 1e-4 * logits.abs().max()


def test_mixtral_is_llama_with_experts(
    tmp_path: Path, tiny_model: Callable[..., Path], reference: Any
) -> None:
    """Rows of queries and keys are permuted as Llama's are."""
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = AutoConfig.for_model(
        "mixtral", **SIZES, **experts, rms_norm_eps=1e-5, sliding_window=None, rope_parameters=THETA
    )
    model = random_weights(config)
    keys = {"expert_count": 3, "expert_used_count": 2}
    file = write_gguf(tmp_path / "model.gguf", "llama", model, tiny_model(), keys=keys)
    folder = resolve_model(str(file))
    model.save_pretrained(tmp_path / "converted")
    found, expected = weights_of(folder), weights_of(tmp_path / "converted")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ids = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids[None]).logits[0]
    ours = reference.our_logits(open_checkpoint(folder), ids, torch.float32)
    assert (ours - logits).abs().max() < 1e-4 * logits.abs().max()


@pytest.mark.parametrize("kind", ["MXFP4", "Q8_0", "Q4_0"])
def test_experts_are_kept_in_blocks_and_are_what_gguf_dequantizes(
    tmp_path: Path, tiny_model: Callable[..., Path], kind: str
) -> None:
    model = random_model("gpt-oss")
    file = write_gguf(tmp_path / "model.gguf", "gpt-oss", model, tiny_model(), kind=kind)
    folder = resolve_model(str(file))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    found, total = weights_of(folder), 0
    for leaf in ("gate", "up", "down"):
        whole = stored[f"blk.1.ffn_{leaf}_exps.weight"]
        expected = torch.from_numpy(gguf.dequantize(whole.data, whole.tensor_type))
        assert whole.tensor_type.name == kind
        for expert, weight in enumerate(expected):
            name = f"model.layers.1.mlp.experts.{expert}.{leaf}_proj.weight"
            assert torch.equal(found[name], weight)
    for name, weight in open_checkpoint(folder).weights():
        assert isinstance(weight, PackedWeight) == ("proj" in name or name == "lm_head"), name
        total += 1
    assert total > 3 * 6


def test_experts_of_another_count_are_refused_by_name(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model, keys = random_model("olmoe"), {"expert_count": 4}
    file = write_gguf(tmp_path / "model.gguf", "olmoe", model, tiny_model(), keys=keys)
    reason = r"blk\.0\.ffn_gate_exps\.weight holds 3 experts, but the metadata says 4"
    with pytest.raises(CheckpointError, match=reason):
        resolve_model(str(file))


def test_experts_missing_or_also_stored_one_by_one_are_refused_by_name(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    single = {"blk.1.ffn_up.2.weight": np.zeros((32, 64), np.float32)}
    file = write_gguf(
        tmp_path / "both.gguf", "olmoe", random_model("olmoe"), tiny_model(), extra=single
    )
    with pytest.raises(CheckpointError, match=r"nothing here reads the tensor blk\.1\.ffn_up\.2"):
        resolve_model(str(file))
    add = GGUFWriter.add_tensor

    def without(self: GGUFWriter, name: str, *rest: Any, **options: Any) -> None:
        if name != "blk.1.ffn_up_exps.weight":
            add(self, name, *rest, **options)

    monkeypatch.setattr(GGUFWriter, "add_tensor", without)
    file = write_gguf(tmp_path / "less.gguf", "olmoe", random_model("olmoe"), tiny_model())
    with pytest.raises(
        CheckpointError, match=r"no tensor of model\.layers\.1\..*experts\.0\.up_proj"
    ):
        list(open_checkpoint(resolve_model(str(file))).weights())


def test_an_activation_without_its_numbers_is_refused_by_name(
    tmp_path: Path, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model("apertus")
    monkeypatch.setattr(GGUFWriter, "add_xielu_beta", lambda self, numbers: None)
    file = write_gguf(tmp_path / "model.gguf", "apertus", model, tiny_model())
    with pytest.raises(CheckpointError, match=r"has no xielu\.beta of layer 0"):
        resolve_model(str(file))


def test_every_architecture_that_is_read_is_tried() -> None:
    assert MODELS.keys() == FAMILIES.keys()


@pytest.mark.parametrize("architecture", READ_BY_TRANSFORMERS)
def test_transformers_reads_the_same_model(
    tmp_path: Path, tiny_model: Callable[..., Path], architecture: str
) -> None:
    file = write_gguf(
        tmp_path / "model.gguf", architecture, random_model(architecture), tiny_model(), kind="Q8_0"
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32
    ).state_dict()
    for name, tensor in weights_of(resolve_model(str(file))).items():
        # Embeddings are kept in bfloat16.
        expected = theirs[name].bfloat16().float() if "embed_tokens" in name else theirs[name]
        assert torch.equal(tensor, expected), name
