"""Adapters whose matrices are rounded to 8 bits (``--lora-dtype int8``)."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nybble.engine import AdapterConfig, Engine, Request, SamplingParams
from nybble.loaders import open_checkpoint
from nybble.quantizers import quantize_checkpoint

KINDS: tuple[dict[str, Any], ...] = (
    {},
    {"use_dora": True, "target_modules": ["v_proj", "up_proj"]},
    {"target_modules": ["q_proj", "down_proj", "lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
)
PROMPT = tuple(range(5, 29))


async def logprobs(engine: Engine, adapter: str | None) -> list[float]:
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    request = Request(f"{adapter}", PROMPT, params, adapter=adapter)
    outputs = [output async for output in engine.generate(request)]
    assert outputs[0].prompt_logprobs is not None
    found: list[float] = outputs[0].prompt_logprobs.logprobs.tolist()
    return found


def test_it_says_nearly_the_same_in_half_of_the_memory(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """In bfloat16 with the compiled kernels; in any company the same to the last bit."""
    quantize_checkpoint(tiny_model(), tmp_path / "q", format="gptq", group_size=32, progress=False)
    found, sizes = {}, {}
    for dtype in ("auto", "int8"):
        engine = reference.start(
            open_checkpoint(tmp_path / "q"),
            dtype=torch.bfloat16,
            adapters=AdapterConfig(slots=3, max_rank=4, dtype=dtype),
        )

        async def together(engine: Engine = engine) -> list[list[float]]:
            names = [None, *map(str, range(len(KINDS)))]
            return await asyncio.gather(*(logprobs(engine, name) for name in names))

        try:
            sizes[dtype] = [
                engine.load_adapter(f"{number}", str(tiny_adapter(**kind))).nbytes
                for number, kind in enumerate(KINDS)
            ]
            found[dtype] = asyncio.run(together())
            for number in range(len(KINDS)):
                alone = asyncio.run(logprobs(engine, f"{number}"))
                assert alone == found[dtype][number + 1]
        finally:
            engine.stop()
    base, *exact = torch.tensor(found["auto"])
    same, *rounded = torch.tensor(found["int8"])
    assert torch.equal(same, base)
    for one, other in zip(exact, rounded, strict=True):
        assert 0 < (one - other).norm() < 0.05 * (one - base).norm()
    # A scale in 4 bytes for each row of 128 numbers and more.
    assert 0.5 < sizes["int8"][0] / sizes["auto"][0] < 0.53
    assert all(small < large for small, large in zip(sizes["int8"], sizes["auto"], strict=True))


def test_without_the_kernels_it_is_the_rounded_matrices_that_are_computed(
    reference: Any, tiny_model: Callable[..., Path], tiny_adapter: Callable[..., Path]
) -> None:
    """In float32, in which PyTorch computes."""
    found = {}
    for dtype in ("auto", "int8"):
        engine = reference.start(
            open_checkpoint(tiny_model()), adapters=AdapterConfig(1, 4, dtype=dtype)
        )
        try:
            engine.load_adapter("one", str(tiny_adapter()))
            found[dtype] = torch.tensor(asyncio.run(logprobs(engine, "one")))
            base = torch.tensor(asyncio.run(logprobs(engine, None)))
        finally:
            engine.stop()
    error = (found["auto"] - found["int8"]).norm()
    assert 0 < error < 0.05 * (found["auto"] - base).norm()


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "plain"])
def test_whole_matrices_are_rounded_row_by_row_and_group_by_group(
    reference: Any,
    tiny_model: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
    kernels: bool,
) -> None:
    """An adapter of two whole matrices says what one says that was rounded before it was saved."""
    trained = tiny_adapter(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], r=1
    )
    stored = load_file(trained / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    exact, rounded = dict(stored), dict(stored)
    for name, tensor in stored.items():
        if "lora" in name:  # what is rounded beside them is not looked at here
            exact[name] = rounded[name] = torch.zeros_like(tensor)
            continue
        # A row of the embedding that was not seen in training is the base's.
        matrix = (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).bfloat16()
        exact[name] = matrix
        if "embed_tokens" in name:
            scales = matrix.float().abs().amax(dim=1, keepdim=True) / 127
            rounded[name] = (matrix.float() / scales).round() * scales
        else:
            groups = matrix.float().view(len(matrix), -1, 128)
            scales = (groups.abs().amax(-1, keepdim=True) / 119).bfloat16().float()
            rounded[name] = ((groups / scales).round().clamp(-119, 119) * scales).flatten(1)
    folders = {"exact": exact, "rounded": rounded}
    for name, tensors in folders.items():
        shutil.copytree(trained, tmp_path / name)
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
    dtype = torch.bfloat16 if kernels else torch.float32
    found, sizes = {}, {}
    for name, kept in (("exact", "auto"), ("exact", "int8"), ("rounded", "auto")):
        engine = reference.start(
            open_checkpoint(tiny_model()),
            dtype=dtype,
            adapters=AdapterConfig(slots=1, max_rank=4, dtype=kept),
        )
        try:
            sizes[name, kept] = engine.load_adapter("a", str(tmp_path / name)).nbytes
            found[name, kept] = torch.tensor(asyncio.run(logprobs(engine, "a")))
        finally:
            engine.stop()
    error = (found["exact", "int8"] - found["exact", "auto"]).abs().max()
    assert error > 0
    tolerance = 0.1 if kernels else 1e-4
    torch.testing.assert_close(
        found["exact", "int8"], found["rounded", "auto"], rtol=0, atol=tolerance
    )
    assert sizes["exact", "int8"] < 0.6 * sizes["exact", "auto"]


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="'fp8', expected auto or int8"):
        AdapterConfig(dtype="fp8")  # type: ignore[arg-type]
