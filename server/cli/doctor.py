"""The checks of ``nybble doctor``: software, device, kernels, and whether a model fits.

A finding is *broken* if serving would fail, and a *warning* if it would be slower than possible.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nybble.engine import EngineConfig, resolve_device
from nybble.engine.draft_model import cached_architecture, draft_cache
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.memory import available_bytes, gib
from nybble.engine.runner import free_kv_bytes
from nybble.engine.state_cache import cache_sizes, state_bytes
from nybble.kernels.cpu.build import (
    CpuKernelsUnavailableError,
    build_fastest,
    default_compiler,
)
from nybble.loaders import Checkpoint, open_checkpoint, resolve_model
from nybble.loaders.cache import cache_folder
from nybble.loaders.checkpoint import can_be_rounded
from nybble.loaders.footprint import weight_bytes
from nybble.loaders.mtp import MtpCheckpoint, draft_bytes
from nybble.loaders.tokenizer import load_tokenizer
from nybble.models import Architecture, architecture_of
from nybble.quantizers.drafts import rounded_draft_parts, stored_draft
from nybble.quantizers.in_flight import HeadFormat, InFlightFormat
from nybble.quantizers.prepare import rounded_parts

State = Literal["ok", "warning", "broken"]
_PACKAGES = ("nybble", "torch", "transformers", "safetensors", "triton", "aiohttp", "llguidance")
_MIN_CACHE_BYTES = 1 << 30


@dataclass(frozen=True)
class Finding:
    """``subject`` is what was looked at, ``text`` what was found and, if not ok, what to do."""

    subject: str
    text: str
    state: State = "ok"


@dataclass(frozen=True)
class Plan:
    """The model to be served, and how; as the options of ``nybble serve``.

    config: max_model_len None stands for the model's own limit, or what the KV cache holds.
    needed: sequences of that length that have to fit into the KV cache at once, or serving is
        broken; None for all of the config's max_num_seqs. The others wait.
    draft: a draft model, draft_quantize: how it is rounded.
    """

    model: str
    config: EngineConfig
    aliases: Path | None = None
    quantize: InFlightFormat | None = None
    head: HeadFormat = "auto"
    needed: int | None = None
    draft: str | None = None
    draft_quantize: InFlightFormat | None = None


def examine(
    device: str, plan: Plan | None, memory: Callable[[torch.device], int] | None = None
) -> Iterator[Finding]:
    """Findings as they come. memory: gives a device's free bytes; None to measure them."""
    yield Finding("versions", _versions())
    yield Finding("CPU", f"{_cpu_name()}; {torch.get_num_threads()} threads")
    yield _gpu()
    try:
        chosen = resolve_device(device)
    except ValueError as error:
        yield Finding("device", str(error), "broken")
        return
    yield Finding("device", str(chosen))
    yield _cpu_kernels(chosen)
    if chosen.type == "cuda":
        yield _gpu_kernels()
    yield _cache()
    if plan is not None:
        yield from _model(replace(plan, config=replace(plan.config, device=str(chosen))), memory)


def print_findings(findings: Iterator[Finding]) -> bool:
    """Print the findings as a table; returns whether none is broken."""
    table = Table(show_header=False)
    signs = {"ok": "ok", "warning": "slow", "broken": "BROKEN"}
    sound = True
    for finding in findings:
        table.add_row(finding.subject, signs[finding.state], Text(finding.text))
        sound &= finding.state != "broken"
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(table)
    return sound


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _gpu() -> Finding:
    if torch.version.cuda is None:
        return Finding("GPU", f"not looked for: PyTorch {torch.__version__} is for the CPU")
    if not torch.cuda.is_available():
        return Finding("GPU", f"none that PyTorch {torch.__version__} can use")
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        capability = f"{about.major}.{about.minor}"
        found.append(f"{about.name}, {gib(about.total_memory)}, compute capability {capability}")
    return Finding("GPU", f"{'; '.join(found)}; CUDA {torch.version.cuda}")


def _cpu_kernels(device: torch.device) -> Finding:
    """Compiles the kernels if they are not cached: only that shows whether it works."""
    try:
        library = build_fastest()
    except CpuKernelsUnavailableError as error:
        reason = " ".join(str(error).split())[:300]
        text = f"none ({reason}): the CPU will use PyTorch's slower operations"
        return Finding("CPU kernels", text, "warning" if device.type == "cpu" else "ok")
    return Finding("CPU kernels", f"{library}; compiler: {_compiler(default_compiler())}")


def _gpu_kernels() -> Finding:
    """Triton compiles its launchers with a C compiler."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        return Finding("GPU kernels", "Triton is not installed: install triton", "broken")
    name = next((n for n in (os.environ.get("CC"), "gcc", "clang") if n and shutil.which(n)), None)
    if name is None:
        return Finding(
            "GPU kernels", "Triton needs a C compiler: install gcc, or set CC to one", "broken"
        )
    return Finding("GPU kernels", f"Triton {triton}; compiler: {_compiler(name)}")


def _compiler(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        return f"no {name} on the PATH"
    told = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    return told.partition("\n")[0] or path


def _cache() -> Finding:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        text = f"{folder} cannot be written ({error.strerror}): set XDG_CACHE_HOME to one that can"
        return Finding("cache", text, "broken")
    free = shutil.disk_usage(folder).free
    text = f"{folder}, {gib(free)} free on its disk"
    if free < _MIN_CACHE_BYTES:
        return Finding("cache", f"{text}: packed models need room", "broken")
    return Finding("cache", text)


def _model(plan: Plan, memory: Callable[[torch.device], int] | None) -> Iterator[Finding]:
    try:
        folder = resolve_model(plan.model, aliases=plan.aliases, download=False)
        checkpoint = open_checkpoint(folder)
        architecture = architecture_of(checkpoint.config)
        load_tokenizer(folder)
        _require_unrounded(plan, checkpoint)
        kv_dtype = plan.config.kv_dtype
        if kv_dtype == "fp8" and plan.config.device == "cpu":
            raise ValueError("--kv-cache-dtype fp8 needs a GPU; expected int8 or auto on the CPU")
        layers, head = rounded_parts(plan.model, checkpoint, plan.quantize, plan.head)
        weights = weight_bytes(folder, plan.config.dtype, layers=layers, head=head)
        draft = _draft(plan, checkpoint)
        drafts = 0
        if draft is not None:
            parts = rounded_draft_parts(
                draft, plan.model, plan.draft, plan.draft_quantize, plan.quantize
            )
            drafts = draft_bytes(draft, plan.config.dtype, layers=parts[0], head=parts[1])
    except (LookupError, ValueError, OSError) as error:
        yield Finding("model", " ".join(str(error).split()), "broken")
        return
    kind = "16 bits" if checkpoint.format == "none" else checkpoint.format
    if layers and not plan.quantize:
        kind += ", served in 4 with its output layer in 8"
    length = architecture.max_model_len
    text = f"{folder}: {architecture.family}, {kind}, up to {length:,} tokens"
    wanted = plan.config.max_model_len
    if wanted is not None and wanted > architecture.max_model_len:
        yield Finding("model", f"{text}, but --max-model-len is {wanted:,}", "broken")
        return
    yield Finding("model", text)
    if draft is not None:
        mtp = isinstance(draft, MtpCheckpoint)
        subject = "MTP head" if mtp else "draft model"
        yield Finding(subject, f"{draft.folder}: weights {gib(drafts)}")
    needed = plan.needed or plan.config.max_num_seqs
    free = memory or available_bytes
    yield _fit(_drafting(plan), architecture, draft, weights + drafts, needed, free)


def _draft(plan: Plan, checkpoint: Checkpoint) -> Checkpoint | None:
    """Raises ValueError if it cannot draft for the model."""
    if plan.draft is None:
        return stored_draft(checkpoint, plan.config, quantize=plan.draft_quantize)
    resolve_model(plan.draft, aliases=plan.aliases, download=False)
    draft = stored_draft(
        checkpoint,
        _drafting(plan),
        plan.draft,
        aliases=plan.aliases,
        quantize=plan.draft_quantize,
    )
    assert draft is not None
    if plan.draft_quantize and not can_be_rounded(draft):
        raise ValueError(
            f"{draft.folder} is quantized already ({draft.format}): leave --draft-quantize out"
        )
    return draft


def _drafting(plan: Plan) -> EngineConfig:
    """The config as `serve` would have it: a draft model implies that it drafts."""
    return plan.config if plan.draft is None else replace(plan.config, speculate="auto")


def _require_unrounded(plan: Plan, checkpoint: Checkpoint) -> None:
    if plan.quantize and not can_be_rounded(checkpoint):
        raise ValueError(
            f"{checkpoint.folder} is quantized already ({checkpoint.format}): leave --quantize out"
        )
    if plan.head == "int8" and checkpoint.format == "packed":
        raise ValueError(f"{checkpoint.folder} is packed already: leave --head out")


def _fit(
    config: EngineConfig,
    architecture: Architecture,
    draft: Checkpoint | None,
    weights: int,
    needed: int,
    memory: Callable[[torch.device], int],
) -> Finding:
    """Whether weights and KV cache fit; the cache as :meth:`Engine.load` would make it."""
    device = torch.device(config.device)
    free = memory(device)
    if weights >= free:
        text = f"weights {gib(weights)}, free {gib(free)}: does not fit, not even the weights"
        return Finding("memory", text, "broken")
    length = config.max_model_len or architecture.default_max_model_len
    layout = KVCacheLayout.of(cached_architecture(architecture, draft), config, length)
    beside = draft_cache(draft, config, length)
    # A GPU's cache takes what its weights leave.
    left = free - weights if device.type == "cuda" else free_kv_bytes(device)
    try:
        nbytes, drafts = config.kv_cache_bytes or left, 0
        if beside is not None:
            part = beside.bytes_of(nbytes, layout.sequence_bytes(length))
            nbytes -= part
            drafts = beside.blocks_in(part) * beside.layout.block_bytes
        blocks, states = cache_sizes(architecture, config, layout, length, nbytes)
    except ValueError as error:
        return Finding("memory", str(error), "broken")
    longest = layout.longest_sequence(blocks, length)
    each_state = state_bytes(architecture, config.dtype)
    kv = blocks * layout.block_bytes + states * each_state + drafts
    text = (
        f"weights {gib(weights)}, KV cache {gib(kv)} ({blocks * layout.block_size:,} tokens; a "
        f"sequence may have {longest:,}), free {gib(free)}: "
    )
    if weights + kv > free:
        least = len(layout.groups) * layout.block_bytes + 2 * each_state
        if beside is not None:
            least += len(beside.layout.groups) * beside.layout.block_bytes
        smaller = f"; --kv-cache-memory {free - weights} would" if free - weights >= least else ""
        return Finding("memory", f"{text}does not fit{smaller}", "broken")
    wanted = config.max_model_len or longest
    at_once, bytes_needed = blocks // layout.sequence_blocks(wanted), layout.sequence_bytes(wanted)
    if beside is not None:
        bytes_needed += beside.layout.sequence_bytes(min(wanted, beside.max_model_len))
    if each_state:  # states take up to half of the memory
        at_once, bytes_needed = min(at_once, states), 2 * max(bytes_needed, each_state)
    if at_once < needed:
        text += (
            f"has room for {at_once} sequences of {wanted:,} tokens; {needed} need "
            f"--kv-cache-memory {needed * bytes_needed}"
        )
        return Finding("memory", text, "broken")
    if at_once < config.max_num_seqs:
        text += f"fits; {at_once} sequences of {wanted:,} tokens at once, the others wait"
        return Finding("memory", text)
    return Finding("memory", f"{text}fits")
