"""GGUF files as models: what is read from them, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from transformers import AutoConfig, AutoTokenizer

from nybble.kernels import DenseWeight, PackedWeight
from nybble.loaders import CheckpointError, ModelNotFoundError, open_checkpoint, resolve_model
from nybble.loaders.footprint import weight_bytes
from nybble.loaders.gguf.dense import convert_gguf
from nybble.loaders.tokenizer import load_tokenizer
from nybble.quantizers.packed_cache import entries
from nybble.quantizers.prepare import prepare_checkpoint
from tests.loaders.gguf_files import SIZES, random_model, stored_tensors, weights_of, write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def llama(tmp_path: Path, tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    """Writes a file; its options are those of :func:`write_gguf`."""

    def write(name: str = "model.gguf", **options: Any) -> Path:
        return write_gguf(tmp_path / name, "llama", random_model("llama"), tiny_model(), **options)

    return write


def test_layers_stay_packed_and_the_footprint_is_known(llama: Callable[..., Path]) -> None:
    folder = resolve_model(str(llama(kind="Q8_0")))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "gguf"
    weights, total = dict(checkpoint.weights()), 0
    for weight in weights.values():
        assert not isinstance(weight, DenseWeight)
        if isinstance(weight, PackedWeight):
            total += weight.nbytes - weight.levels.nbytes
        else:
            total += weight.numel() * 2
    perms = sum(  # of q, k and v together, where the estimate counts each
        weight.perm.nbytes * (3 if "qkv" in name else 2 if "gate_up" in name else 1)
        - weight.perm.nbytes
        for name, weight in weights.items()
        if isinstance(weight, PackedWeight) and weight.perm is not None
    )
    assert weight_bytes(folder, torch.bfloat16) == total + perms


def test_tokenizer_template_and_end_tokens_come_from_the_file(
    llama: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    original = AutoTokenizer.from_pretrained(tiny_model())
    folder = resolve_model(str(llama()))
    found = load_tokenizer(folder)
    for text in ("def add(a, b):\n    return a + b", "naïve 日本語 🙂 1234", "<|im_start|>user\nx"):
        ids = original.encode(text)
        assert found.encode(text) == ids
        assert found.decode(ids) == text
    assert found.chat_template == original.chat_template
    # The file names token 0; <|im_end|> ends an answer as well.
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [0, original.convert_tokens_to_ids("<|im_end|>")]


@pytest.mark.parametrize("stated", [None, True, False])
@pytest.mark.parametrize("split", ["llama-bpe", "tekken", "qwen2"])
def test_a_file_that_does_not_say_how_texts_begin_is_read_as_llama_cpp_reads_it(
    llama: Callable[..., Path],
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    split: str,
    stated: bool | None,
) -> None:
    """Llama 3's and Mistral Nemo's begin with the BOS and have words that no merges make."""
    add_split, add_bos = GGUFWriter.add_tokenizer_pre, GGUFWriter.add_add_bos_token
    add_merges = GGUFWriter.add_token_merges
    monkeypatch.setattr(GGUFWriter, "add_tokenizer_pre", lambda self, _: add_split(self, split))
    monkeypatch.setattr(GGUFWriter, "add_token_merges", lambda self, m: add_merges(self, m[:-1]))
    monkeypatch.setattr(
        GGUFWriter,
        "add_add_bos_token",
        lambda self, _: None if stated is None else add_bos(self, stated),
    )
    vocabulary = AutoTokenizer.from_pretrained(tiny_model())
    merges = json.loads((tiny_model() / "tokenizer.json").read_text())["model"]["merges"]
    word = "".join(merges[-1])
    known = split != "qwen2"
    begins = ["<|endoftext|>"] if stated or (stated is None and known) else []
    tokenizer = load_tokenizer(resolve_model(str(llama())))
    assert tokenizer.tokenize(word, add_special_tokens=True) == [
        *begins,
        *([word] if known else merges[-1]),
    ]
    assert vocabulary.tokenize(word) == [word]


def test_what_is_rounded_is_said_in_a_line(
    llama: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    dict(open_checkpoint(resolve_model(str(llama("exact.gguf", kind="Q8_0")))).weights())
    assert "rounded to float32" not in caplog.text
    dict(open_checkpoint(resolve_model(str(llama(kind="Q5_1")))).weights())
    assert "23 Q5_1 tensors keep their minima as zero points, rounded to float32" in caplog.text


def test_the_engine_says_what_transformers_says(llama: Callable[..., Path], reference: Any) -> None:
    checkpoint = open_checkpoint(resolve_model(str(llama(kind="Q5_1"))))
    model = reference.transformers_model(checkpoint)
    prompts, expected = map(list, zip(*reference.greedy(model, (5, 40), 32), strict=True))
    engine = reference.start(checkpoint)
    try:
        assert reference.together(engine, prompts, 32) == expected
    finally:
        engine.stop()


def test_a_file_is_converted_to_16_bits(llama: Callable[..., Path], tmp_path: Path) -> None:
    file = llama(kind="Q8_0")
    convert_gguf(file, tmp_path / "dense", tied=False)
    dense, packed = weights_of(tmp_path / "dense"), weights_of(resolve_model(str(file)))
    for name, tensor in packed.items():
        assert torch.equal(dense[name], tensor.bfloat16().float())


def test_a_file_without_blocks_is_a_16_bit_model(llama: Callable[..., Path]) -> None:
    folder = resolve_model(str(llama(kind="BF16")))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.format == "none"
    prepared = prepare_checkpoint(
        str(folder), device=torch.device("cpu"), quantize="nf4", progress=False
    )
    weight = dict(prepared.weights())["model.layers.0.mlp.down_proj"]
    assert isinstance(weight, PackedWeight)


def llama3_table(factor: float) -> np.ndarray[Any, Any]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = {"rope_type": "default", "rope_theta": 5000.0}
    scaled = {
        **plain,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model("llama", **SIZES, rope_parameters=scaled)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    table: np.ndarray[Any, Any] = (
        (5000.0 ** -(torch.arange(0, 16, 2) / 16) / frequencies).float().numpy()
    )
    return table


def test_llama_3s_rotary_scaling_is_found_from_its_table(llama: Callable[..., Path]) -> None:
    table = llama3_table(32.0)
    folder = resolve_model(str(llama(extra={"rope_freqs.weight": table})))
    rope = AutoConfig.from_pretrained(folder).rope_parameters
    assert rope["rope_type"] == "llama3"
    assert rope["factor"] == pytest.approx(32)
    assert rope["original_max_position_embeddings"] == 8192
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight that is not Llama 3's"):
        resolve_model(str(llama("other.gguf", extra={"rope_freqs.weight": table**2})))


def test_a_folder_with_a_file_is_a_model(llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.move(llama(), folder / "tiny-Q8_0.gguf")
    (folder / "mmproj-tiny.gguf").write_bytes(b"the vision tower")
    (folder / "config.json").write_text("{}")  # such repositories may have one
    assert resolve_model(str(folder)) == resolve_model(str(folder / "tiny-Q8_0.gguf"))
    (folder / "tiny-Q4_0.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"one of tiny-Q4_0\.gguf, tiny-Q8_0\.gguf"):
        resolve_model(str(folder))


def test_a_split_file_is_read_from_all_its_parts(
    tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    model = random_model("qwen2")
    whole = write_gguf(tmp_path / "whole.gguf", "qwen2", model, tiny_model())
    first, second = (tmp_path / f"m-0000{part}-of-00002.gguf" for part in (1, 2))
    tensors = list(stored_tensors("qwen2", model))
    moved = {name: tensor.numpy() for name, tensor in tensors if name.startswith("blk.2.")}
    model.state_dict = lambda: {  # type: ignore[assignment]
        name: tensor
        for name, tensor in type(model).state_dict(model).items()
        if "layers.2." not in name
    }
    write_gguf(first, "qwen2", model, tiny_model())
    writer = GGUFWriter(second, "qwen2")
    for name, values in moved.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found, expected = weights_of(resolve_model(str(first))), weights_of(resolve_model(str(whole)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"there is no m-00002-of-00002\.gguf"):
        resolve_model(str(first))


def test_a_file_that_has_changed_is_read_anew(llama: Callable[..., Path]) -> None:
    file = llama()
    before = weights_of(resolve_model(str(file)))
    after = weights_of(resolve_model(str(llama(kind="Q4_0"))))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(before[name], after[name])
    file.unlink()
    folder = resolve_model(str(file)) if file.exists() else None
    assert folder is None


def test_what_is_damaged_or_not_supported_is_refused_by_name(
    llama: Callable[..., Path], tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    whole = llama()
    folder = resolve_model(str(whole))
    with whole.open("r+b") as file:
        file.truncate(whole.stat().st_size - 5000)
    with pytest.raises(CheckpointError, match="is truncated"):
        list(open_checkpoint(folder).weights())
    for reason, options in {
        "setting rope.scaling.unheard_of = 1": {"keys": {"rope.scaling.unheard_of": 1}},
        "rotary scaling of type 'new'": {"keys": {"rope.scaling.type": "new"}},
        "a window of 24 tokens": {"keys": {"attention.sliding_window": 24}},
        "nothing here reads the tensor blk.0.new.weight": {
            "extra": {"blk.0.new.weight": np.zeros(3, np.float32)}
        },
    }.items():
        with pytest.raises(CheckpointError, match=reason):
            resolve_model(str(llama(**options)))
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="truncated or not GGUF"):
        resolve_model(str(tmp_path / "other.gguf"))
    writer = GGUFWriter(tmp_path / "new.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(
        CheckpointError, match=r"architecture 'mamba'; supported are apertus, arcee, "
    ):
        resolve_model(str(tmp_path / "new.gguf"))


@pytest.mark.parametrize("kind", ["IQ2_XXS", "TQ1_0"])
def test_types_that_are_not_read_are_named(
    tmp_path: Path, llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    block, nbytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    monkeypatch.setattr(
        gguf,
        "quantize",
        lambda values, _: np.zeros((len(values), values.shape[1] * 4 // block * nbytes), np.uint8),
    )
    monkeypatch.setitem(SIZES, "hidden_size", block)
    monkeypatch.setitem(SIZES, "intermediate_size", block)
    with pytest.raises(CheckpointError, match=f"is of type {kind}, which is not supported"):
        resolve_model(str(llama(kind=kind)))


def test_an_unknown_way_to_split_texts_is_refused(
    llama: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GGUFWriter, "add_tokenizer_pre", lambda self, _: None)
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.pre is None"):
        resolve_model(str(llama()))


def test_the_packed_form_is_kept_while_the_file_is_as_it_was(llama: Callable[..., Path]) -> None:
    file, device = llama(kind="Q8_0"), torch.device("cpu")
    first = prepare_checkpoint(str(file), device=device, progress=False).folder
    assert prepare_checkpoint(str(file), device=device, progress=False).folder == first
    assert [(entry.path, entry.stale) for entry in entries()] == [(first, None)]
    llama(kind="Q4_0")
    second = prepare_checkpoint(str(file), device=device, progress=False).folder
    assert [(entry.path, entry.stale) for entry in entries()] == [(second, None)]
    assert second != first
    file.unlink()
    assert [entry.stale for entry in entries()] == ["its model has gone"]
