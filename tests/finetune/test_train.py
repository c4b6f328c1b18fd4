"""Adapters are trained right: gradients, scaling, rates, resuming, and files that PEFT reads."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nybble.finetune import FinetuneSettings, LoRASettings, Progress, finetune, plot_losses
from nybble.finetune.data import Example, to_batch
from nybble.finetune.lora import (
    LoRALinear,
    adapter_tensors,
    add_lora,
    optimizer_groups,
    save_adapter,
)
from nybble.finetune.train import batch_loss, checkpoint_activations
from nybble.kernels.cpu import build
from nybble.loaders import open_checkpoint
from nybble.models import architecture_of
from nybble.quantizers import GptqSettings, quantize_checkpoint
from nybble.quantizers.packed_model import PackedLinear, load_packed_model, training_dtype

CPU = torch.device("cpu")
LORA = LoRASettings(rank=4, alpha=8)


@pytest.fixture(scope="module")
def bases(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    calibration = torch.randint(3, 300, (4, 64), generator=torch.Generator().manual_seed(0))
    options: dict[str, dict[str, Any]] = {
        "gptq": {"format": "gptq"},
        "gptq act-order": {
            "format": "gptq",
            "calibration": calibration,
            "settings": GptqSettings(desc_act=True),
        },
        "awq": {"format": "awq"},
        "nf4": {"format": "nf4"},
        "nf4 double": {"format": "nf4", "double_quant": True},
    }
    for name, more in options.items():
        quantize_checkpoint(tiny_model(), folder / name, group_size=32, progress=False, **more)
    return {"16-bit": tiny_model(), **{name: folder / name for name in options}}


BASES = ("16-bit", "gptq", "gptq act-order", "awq", "nf4", "nf4 double")


def data(folder: Path, count: int = 24) -> Path:
    """Whatever is asked, the answer is the same: easily learned."""
    path = folder / "data.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"item {index} of the list"},
                {"role": "assistant", "content": "the dog barks at the moon"},
            ]
        }
        for index in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Layers as small as these lose more to waiting for another thread than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


QUICK = FinetuneSettings(
    lora=LORA,
    learning_rate=2e-3,
    lora_plus=4,
    max_steps=12,
    accumulation=2,
    max_length=128,
    eval_every=4,
    patience=0,
)


def model_of(folder: Path) -> PreTrainedModel:
    return load_packed_model(open_checkpoint(folder), device=CPU, dtype=torch.float32)


def dense_twin(packed: PreTrainedModel, source: Path) -> PreTrainedModel:
    """transformers' model with the dequantized weights of ``packed``."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            model.get_submodule(name).weight.data = module.packed.dequantize()
    return model.requires_grad_(False)


def randomised(layers: dict[str, LoRALinear]) -> dict[str, LoRALinear]:
    for layer in layers.values():
        nn.init.normal_(layer.lora_B, std=0.05)
    return layers


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_autograd_on_the_dequantized_weights(
    bases: dict[str, Path], base: str, checkpointing: bool
) -> None:
    packed = model_of(bases[base])
    dense = dense_twin(packed, bases["16-bit"])
    torch.manual_seed(0)
    ours = randomised(add_lora(packed, LORA))
    torch.manual_seed(0)
    theirs = randomised(add_lora(dense, LORA))
    packed.train()
    if checkpointing:
        checkpoint_activations(packed)
    batch = to_batch([[Example(list(range(20, 60)), list(range(20, 60)))]])
    loss = batch_loss(packed, batch, CPU)
    loss.backward()
    expected = dense(batch.input_ids, labels=batch.input_ids).loss * batch.targets
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, layer in ours.items():
        for part in ("lora_A", "lora_B"):
            found, wanted = getattr(layer, part).grad, getattr(theirs[name], part).grad
            assert (found - wanted).norm() < 1e-3 * wanted.norm(), (name, part)
    trained = [name for name, p in packed.named_parameters() if p.grad is not None]
    assert all("lora_" in name for name in trained)
    assert len(trained) == 2 * 7 * 2  # layers, projections, A and B


def test_examples_in_one_row_do_not_see_each_other(bases: dict[str, Path]) -> None:
    model = model_of(bases["16-bit"])
    first = Example(list(range(20, 50)), list(range(20, 50)))
    second = Example(list(range(90, 130)), list(range(90, 130)))
    together = batch_loss(model, to_batch([[first, second]]), CPU)
    apart = sum(batch_loss(model, to_batch([[one]]), CPU) for one in (first, second))
    padded = batch_loss(model, to_batch([[first], [second]]), CPU)
    assert together.item() == pytest.approx(float(apart), rel=1e-4)
    assert padded.item() == pytest.approx(float(apart), rel=1e-4)


@pytest.mark.parametrize(
    ("base", "use_rslora"), [("16-bit", False), ("16-bit", True), ("nf4", False)]
)
def test_peft_loads_the_adapter_and_computes_the_same(
    tmp_path: Path, bases: dict[str, Path], base: str, use_rslora: bool
) -> None:
    settings = LoRASettings(
        rank=4, alpha=6, use_rslora=use_rslora, target_modules=("q_proj", "down_proj")
    )
    assert settings.scaling == (3 if use_rslora else 1.5)
    model = model_of(bases[base])
    dense = dense_twin(model, bases["16-bit"])
    layers = randomised(add_lora(model, settings))
    save_adapter(
        tmp_path / "a",
        adapter_tensors(layers),
        settings,
        str(bases[base]),
        architecture_of(model.config),
    )
    theirs = peft.PeftModel.from_pretrained(dense, tmp_path / "a")
    tokens = torch.arange(20, 60)[None]
    with torch.no_grad():
        found, expected = model(tokens).logits, theirs(tokens).logits
        plain = theirs.unload()(tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_a_new_adapter_changes_nothing(bases: dict[str, Path]) -> None:
    model, tokens = model_of(bases["nf4"]), torch.arange(20, 60)[None]
    with torch.no_grad():
        before = model(tokens).logits
        add_lora(model, LORA)
        assert torch.equal(model(tokens).logits, before)


def test_lora_plus_gives_b_its_own_rate(bases: dict[str, Path]) -> None:
    layers = add_lora(model_of(bases["nf4"]), LORA)
    assert FinetuneSettings().lora_plus == 16  # the paper's
    a, b = optimizer_groups(layers, 1e-4, 16)
    assert (a["lr"], b["lr"]) == (1e-4, pytest.approx(1.6e-3))
    assert {id(p) for p in a["params"]} == {id(l.lora_A) for l in layers.values()}  # type: ignore[attr-defined]  # noqa: E741
    assert {id(p) for p in b["params"]} == {id(l.lora_B) for l in layers.values()}  # type: ignore[attr-defined]  # noqa: E741


def test_an_unknown_target_is_named(bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="target module 'c_attn' is not a linear layer"):
        add_lora(model_of(bases["nf4"]), LoRASettings(target_modules=("q_proj", "c_attn")))


@pytest.mark.parametrize("base", [pytest.param("16-bit", marks=pytest.mark.slow), "nf4"])
def test_the_held_out_loss_falls_and_the_answer_is_learned(
    tmp_path: Path, bases: dict[str, Path], base: str
) -> None:
    settings = replace(QUICK, max_steps=20, eval_every=10)
    steps: list[Progress] = []
    result = finetune(
        bases[base],
        data(tmp_path),
        tmp_path / "out",
        settings=settings,
        progress=False,
        on_step=steps.append,
    )
    first, last = result.history[0].eval_loss, result.history[-1].eval_loss
    assert first is not None
    assert last is not None
    assert last < 0.01 * first
    assert result.best_eval_loss == min(p.eval_loss for p in result.history if p.eval_loss)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    # The linear layers' weights in 4 bits or as wide as the rest: embeddings and output layer.
    width = training_dtype(CPU).itemsize / 2
    expected = 800e3 * width if base == "16-bit" else 150e3 + 250e3 * width
    assert result.base_bytes == pytest.approx(expected, rel=0.3)
    assert result.peak_bytes > result.base_bytes
    assert [step.point for step in steps] == list(result.history[1:])
    plot_losses({base: result.history}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_rate_rises_to_its_height_and_falls_along_a_cosine(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    steps: list[Progress] = []
    settings = replace(QUICK, warmup=0.25, eval_every=100)
    finetune(
        *(bases["nf4"], data(tmp_path), tmp_path / "out"),
        settings=settings,
        progress=False,
        on_step=steps.append,
    )
    expected = [
        (step + 1) / 3 if step < 3 else (1 + math.cos(math.pi * (step - 3) / 9)) / 2
        for step in range(12)
    ]
    found = [step.learning_rate / settings.learning_rate for step in steps]
    assert found == pytest.approx(expected)


class Interrupted(Exception):
    pass


def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(QUICK, lora=replace(LORA, dropout=0.2))
    path = data(tmp_path)
    whole = finetune(bases["nf4"], path, tmp_path / "whole", settings=settings, progress=False)
    from nybble.finetune import train

    update, calls = train._Run._update, []

    def stop_at_the_seventh(self: train._Run, batches: object) -> float:
        calls.append(1)
        if len(calls) == 7:
            raise Interrupted
        return update(self, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(train._Run, "_update", stop_at_the_seventh)
    with pytest.raises(Interrupted):
        finetune(bases["nf4"], path, tmp_path / "parts", settings=settings, progress=False)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="is not empty; resume"):
        finetune(bases["nf4"], path, tmp_path / "parts", settings=settings, progress=False)
    resumed = finetune(
        bases["nf4"], path, tmp_path / "parts", settings=settings, resume=True, progress=False
    )
    assert resumed == whole
    for name in ("adapter_model.safetensors", "history.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_folder_that_cannot_be_written_is_told_of_before_anything_is_learned(
    tmp_path: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nybble.finetune import train

    monkeypatch.setattr(train, "_Run", None)
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "adapter"
    with pytest.raises(OSError, match=f"^{out} cannot be written: Not a directory$"):
        finetune(bases["nf4"], data(tmp_path), out, settings=QUICK, progress=False)


def test_resuming_what_was_never_begun_or_another_run_is_refused(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    path, out = data(tmp_path), tmp_path / "out"

    same, other = (Path(shutil.copytree(bases["nf4"], tmp_path / name)) for name in ("s", "o"))
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, other / "model.safetensors")

    def train(
        seed: int, on_step: Callable[[Progress], None], *, resume: bool, base: Path = bases["nf4"]
    ) -> None:
        settings = replace(QUICK, seed=seed)
        finetune(
            *(base, path, out),
            settings=settings,
            resume=resume,
            progress=False,
            on_step=on_step,
        )

    def stop(progress: Progress) -> None:
        if progress.point.step == 5:
            raise Interrupted

    with pytest.raises(FileNotFoundError, match="there is no training run to resume"):
        train(1, stop, resume=True)
    with pytest.raises(Interrupted):
        train(1, stop, resume=False)
    with pytest.raises(ValueError, match="is of another run: resume with the data and the sett"):
        train(2, stop, resume=True)
    names = f"another base model, {bases['nf4']}, than {other}: resume with the base"
    with pytest.raises(ValueError, match=re.escape(names)):
        train(1, stop, resume=True, base=other)
    steps: list[Progress] = []
    train(1, steps.append, resume=True, base=same)
    assert [one.point.step for one in steps] == list(range(1, 13))
    assert steps[-1].steps == 12
    assert steps[-1].tokens > steps[0].tokens > 0


def test_training_stops_when_the_held_out_loss_no_longer_falls(
    tmp_path: Path, bases: dict[str, Path]
) -> None:
    """A rate that ruins the model: the adapter kept is the best, not the last."""
    settings = replace(
        QUICK, learning_rate=0.5, max_steps=100, eval_every=1, patience=3, warmup=0.0
    )
    result = finetune(
        bases["nf4"], data(tmp_path), tmp_path / "out", settings=settings, progress=False
    )
    measured = [point.eval_loss for point in result.history if point.eval_loss is not None]
    assert len(measured) < 60
    assert result.best_eval_loss == min(measured)
    assert result.history[-1].step == result.best_step + 3


@pytest.mark.parametrize(
    ("steps", "expected"), [(7, 8), pytest.param(20, 11, marks=pytest.mark.slow)]
)
def test_a_run_is_measured_ten_times_unless_told_otherwise(
    tmp_path: Path, bases: dict[str, Path], steps: int, expected: int
) -> None:
    settings = replace(QUICK, max_steps=steps, eval_every=0)
    result = finetune(
        bases["nf4"], data(tmp_path), tmp_path / "out", settings=settings, progress=False
    )
    measured = [point.step for point in result.history if point.eval_loss is not None]
    assert len(measured) == expected  # the one before training among them
    assert measured[-1] == steps


def test_accumulation_weighs_every_token_alike(tmp_path: Path, bases: dict[str, Path]) -> None:
    """Two passes of unequal rows make the step that one pass of both makes."""
    losses = {}
    for batch_size, accumulation in ((1, 2), (2, 1)):
        settings = replace(
            QUICK, max_steps=2, batch_size=batch_size, accumulation=accumulation, packing=False
        )
        result = finetune(
            bases["nf4"],
            data(tmp_path),
            tmp_path / f"out{batch_size}",
            settings=settings,
            dtype=torch.float32,
            progress=False,
        )
        losses[batch_size] = [point.train_loss for point in result.history[1:]]
    assert losses[1] == pytest.approx(losses[2], rel=1e-3)


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("avx512_bf16", torch.bfloat16), ("avx2", torch.float32)],
)
def test_a_cpu_that_does_not_multiply_bfloat16_trains_in_float32(
    monkeypatch: pytest.MonkeyPatch, target: str, dtype: torch.dtype
) -> None:
    wanted = next(each for each in build.TARGETS if each.name == target)
    monkeypatch.setattr(build, "wanted_targets", lambda name: [wanted])
    assert training_dtype(CPU) == dtype
    assert training_dtype(torch.device("cuda")) == torch.bfloat16
