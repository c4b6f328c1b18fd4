"""The process of a rank above 0: it computes its part of what rank 0 computes.

It is told by name which method of :class:`Rank` to call, and reports on a pipe of its own: answers,
failures, and every half a second that it is alive. It ends when rank 0 closes its pipe, and when
rank 0's process ends, however that one ends.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from nybble.engine.adapter_ends import EndTensors
from nybble.engine.adapter_slots import AdapterSlots, StagedAdapter
from nybble.engine.config import EngineConfig
from nybble.engine.decoder import Decoder
from nybble.engine.failure import describe
from nybble.engine.graphs import cuda_capture
from nybble.engine.inputs import StepMessage
from nybble.engine.kv_cache import KVCacheLayout
from nybble.engine.parallel import PeerLostError, TensorParallel
from nybble.engine.runner import ModelRunner, free_kv_bytes
from nybble.kernels.backend import backend_for
from nybble.loaders import Checkpoint
from nybble.models import architecture_of

_BEAT_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """A rank's place among the others.

    store: a file through which they find each other.
    threads: of each rank on the CPU; None to leave what is set.
    shared: whether ranks have the same GPU, as in a test on a machine that has one.
    """

    rank: int
    size: int
    device: torch.device
    store: Path
    threads: int | None
    shared: bool

    @classmethod
    def of(cls, rank: int, devices: Sequence[torch.device], store: Path) -> Place:
        """The place of a rank among those with these devices."""
        threads = None
        if devices[rank].type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, torch.get_num_threads() // len(devices))
        on_gpu = devices[rank].type == "cuda"
        shared = on_gpu and len(set(devices)) < len(devices)
        return cls(rank, len(devices), devices[rank], store, threads, shared)

    def join(self) -> TensorParallel:
        """Meet the other ranks. Returns when all are there."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        nccl = self.device.type == "cuda" and not self.shared
        # All are on this machine: nothing listens for others.
        os.environ.setdefault("NCCL_SOCKET_IFNAME" if nccl else "GLOO_SOCKET_IFNAME", "lo")
        torch.distributed.init_process_group(
            "nccl" if nccl else "gloo",
            store=torch.distributed.FileStore(str(self.store), self.size),  # type: ignore[attr-defined]
            rank=self.rank,
            world_size=self.size,
            device_id=self.device if nccl else None,
        )
        return TensorParallel(self.rank, self.size, self.shared)


@dataclass(frozen=True)
class Answer:
    """What a command has returned."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """What has failed; killed: whether from outside."""

    text: str
    traceback: str
    killed: bool = False


@dataclass(frozen=True)
class Lost:
    """Another rank is gone, which knows why; text: what was seen of it."""

    text: str = ""


class Rank:
    """What this rank has of a model. Its public methods are rank 0's commands."""

    def __init__(self, group: TensorParallel, device: torch.device) -> None:
        self._group = group
        self._device = device

    def load(
        self, checkpoint: Checkpoint, config: EngineConfig, max_model_len: int, num_tokens: int
    ) -> Answer:
        """Load this rank's part; answers how many bytes are left for the KV cache."""
        architecture = architecture_of(checkpoint.config)
        self._config = config
        self._decoder = Decoder(
            architecture,
            checkpoint.weights(),
            device=self._device,
            dtype=config.dtype,
            max_model_len=max_model_len,
            num_tokens=num_tokens,
            backend=backend_for(
                self._device,
                config.dtype,
                deterministic=config.deterministic,
                activations=config.activations,
            ),
            group=self._group,
            folder=checkpoint.folder,
        )
        self._adapters = None
        if config.adapters is not None:
            self._adapters = AdapterSlots(
                architecture,
                count=config.adapters.slots,
                max_rank=config.adapters.max_rank,
                device_bytes=config.adapters.device_bytes,
                device=self._device,
                dtype=config.dtype,
                base=self._decoder.base,
                group=self._group,
                in_8_bits=config.adapters.dtype == "int8",
            )
        return Answer(free_kv_bytes(self._device))

    def begin(self, layout: KVCacheLayout, num_blocks: int) -> Answer:
        """Have a KV cache of so many blocks."""
        self._runner = ModelRunner(
            self._decoder, self._config, layout, num_blocks, self._adapters, device=self._device
        )
        return Answer(None)

    def warm_up(self) -> None:
        self._runner.warm_up(lambda *_: None)
        # What is there now stays: to look through it for garbage would hold up all ranks.
        gc.collect()
        gc.freeze()

    def capture(self, sizes: Sequence[int]) -> None:
        """Capture decode steps of these sizes alone."""
        self._runner.capture(cuda_capture(self._device), False, sizes)

    @torch.inference_mode()
    def follow(self, message: StepMessage) -> None:
        """Compute a step."""
        self._runner.follow(message)

    @torch.inference_mode()
    def fill(
        self, slot: int, ranks: list[int], stretched: list[int], about: EndTensors | None
    ) -> None:
        """Take an adapter, whose changes have these ranks, into a slot.

        stretched: the projections of which it has gains and shifts.
        about: its ends, without the tensors' values; None if it changes nothing there.
        """
        assert self._adapters is not None
        layout = self._adapters.layout
        memory = torch.empty(layout.size(ranks), dtype=layout.dtype, device=self._device)
        self._group.broadcast(memory)
        outputs = {
            index: self._group.broadcast(
                torch.empty(2, self._adapters.projections[index].all_offsets[-1])
            )
            for index in stretched
        }
        ends = None
        if about is not None:
            whole = about.map(
                lambda tensor: self._group.broadcast(torch.empty_like(tensor, device=self._device))
            )
            ends = self._adapters.own_ends(whole)
        self._adapters.fill(slot, StagedAdapter(memory, tuple(ranks), outputs, ends))

    def clear(self, slot: int) -> None:
        """Let go of the adapter in a slot."""
        assert self._adapters is not None
        self._adapters.clear(slot)


def main(place: Place, commands: Connection, reports: Connection) -> None:
    """Obey until rank 0 closes ``commands``; ends the process."""
    # A terminal's Ctrl-C and a supervisor's SIGTERM go to all processes. Requests in flight still
    # need this one: it ends when rank 0 does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    logging.getLogger().addHandler(logging.NullHandler())  # rank 0 has said the same
    if place.threads is not None:
        torch.set_num_threads(place.threads)
    # Two threads report.
    lock = threading.Lock()

    def report(what: Answer | Failed | Lost | None) -> None:
        with lock, suppress(OSError):
            reports.send(what)

    def beat() -> None:
        while True:
            report(None)
            time.sleep(_BEAT_SECONDS)

    threading.Thread(target=beat, daemon=True).start()
    code = 0
    try:
        report(Answer(None))
        rank = Rank(place.join(), place.device)
        while True:
            what, arguments = commands.recv()
            answer = getattr(rank, what)(*arguments)
            if answer is not None:
                report(answer)
    except EOFError:
        pass
    except PeerLostError as error:
        report(Lost(f"rank {place.rank}: {describe(error)}"))
    except BaseException as error:
        code = 1
        report(Failed(f"rank {place.rank}: {describe(error)}", traceback.format_exc()))
    os._exit(code)  # libraries' threads may still wait for ranks that are gone


def _end_with_rank_0() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
