"""Rank 0's side of tensor parallelism: the processes of the other ranks, and what they are told.

Rank 0 is the process that serves. It schedules and samples; the others hold their parts of weights,
KV cache and adapters, and compute what they are told (:mod:`nybble.engine.rank_worker`). They are
told through pipes, which may be silent for as long as nothing is to be computed, and which end with
the process at either end. Outputs are gathered by ``torch.distributed``.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing

from nybble.engine.adapter_slots import AdapterSlots, StagedAdapter
from nybble.engine.config import EngineConfig, resolve_device
from nybble.engine.failure import describe
from nybble.engine.inputs import StepItem
from nybble.engine.parallel import ALONE, PeerLostError, TensorParallel
from nybble.engine.rank_worker import Answer, Failed, Lost, Place, main
from nybble.engine.request import EngineFailedError
from nybble.engine.runner import ModelRunner
from nybble.kernels.progress import Progress
from nybble.models import Architecture

logger = logging.getLogger(__name__)

# Ranks say every half a second that they are alive. One that is silent for so long hangs.
_SILENCE = 5.0
# A machine that sleeps, or a process that is stopped, is not taken for a rank that hangs: of the
# time between two looks no more than this counts.
_LONGEST_LOOK = 1.0
_LOOK_SECONDS = 0.5
# Time for the first report of a failure to be followed by its cause.
_CAUSE_SECONDS = 0.5
_END_SECONDS = 5.0
# What ranks answer when they have done it.
_ANSWERED = ("load", "begin")


class RankFailedError(EngineFailedError):
    """A rank ended, hangs or failed; the message names it and says how."""


def devices_of(config: EngineConfig) -> list[torch.device]:
    """The device of each rank. Raises ValueError if the machine has too few GPUs."""
    first, size = resolve_device(config.device), config.tensor_parallel_size
    if first.type == "cpu":
        return [first] * size
    index, count = first.index or 0, torch.cuda.device_count()
    if index + size > count:
        behind = f" from {first} on" if index else ""
        raise ValueError(
            f"tensor_parallel_size is {size}, but this machine has {count - index} GPU(s){behind}: "
            "each rank needs one of its own"
        )
    return [torch.device("cuda", index + rank) for rank in range(size)]


def check_ranks(architecture: Architecture, config: EngineConfig) -> None:
    """Raises ValueError for a model that so many ranks, or this machine, cannot compute."""
    if config.tensor_parallel_size > 1:
        TensorParallel(0, config.tensor_parallel_size).check(architecture)
        devices_of(config)


class NoRanks:
    """No other ranks: whoever asks for something of them asks nobody.

    group: rank 0's place among them.
    """

    group = ALONE

    def tell(self, what: str, *arguments: Any) -> None:
        """Have every rank call its method ``what``; see :mod:`nybble.engine.rank_worker`."""

    def answers(self) -> list[Any]:
        """The next answer of every rank. Raises RankFailedError."""
        return []

    def forget(self) -> None:
        """Wait for an answer that nobody reads any more: the next question is to get its own."""

    def new_slots(self, *arguments: Any, **options: Any) -> AdapterSlots:
        """Adapter slots of all ranks."""
        return AdapterSlots(*arguments, **options)

    def new_runner(self, *arguments: Any) -> ModelRunner:
        """A runner of all ranks."""
        return ModelRunner(*arguments)

    def serve(self, on_failure: Callable[[RankFailedError], None]) -> None:
        """Call ``on_failure``, on a thread of its own, if a rank fails or hangs from now on."""

    def close(self) -> None:
        """End the ranks and wait for them."""


class Ranks(NoRanks):
    """The processes of ranks 1 to n − 1. One set of them in a process at a time.

    failure: which rank failed and how; None while all are well.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        """Start a process for each device but the first, which is this process's.

        Raises RankFailedError if one does not start, and ValueError if this process has others.
        """
        if torch.distributed.is_initialized():
            raise ValueError(
                "tensor_parallel_size is above 1 for another model of this process: close that "
                "one first, or use another process"
            )
        self.failure: str | None = None
        self._changed = threading.Condition()
        self._on_failure: Callable[[RankFailedError], None] = lambda error: None
        self._serving = self._closing = False
        # A file without a name: nothing is left of it, however the processes end. It stays open,
        # for PyTorch writes to this path once more when it lets go of the group, and no other file
        # may have the number then.
        store = Path(f"/proc/{os.getpid()}/fd/{os.memfd_create('nybble-ranks')}")
        places = [Place.of(rank, devices, store) for rank in range(len(devices))]
        context = torch.multiprocessing.get_context("spawn")
        self._processes: list[BaseProcess] = []
        self._commands: list[Connection] = []
        self._reports: list[Connection] = []
        self._answers: list[list[Any]] = [[] for _ in places[1:]]
        self._unread = False  # whether an answer comes that nobody has read
        atexit.register(self.kill)
        for place in places[1:]:
            theirs, commands = context.Pipe(duplex=False)
            reports, said = context.Pipe(duplex=False)
            process = context.Process(
                target=main, args=(place, theirs, said), name=f"nybble-rank-{place.rank}"
            )
            process.daemon = True
            process.start()
            theirs.close()
            said.close()
            self._processes.append(process)
            self._commands.append(commands)
            self._reports.append(reports)
        self._watcher = threading.Thread(target=self._watch, name="nybble-ranks", daemon=True)
        self._watcher.start()
        try:
            self.answers()
            self.group = places[0].join()
        except BaseException:
            self.close()
            raise
        self.threads = places[0].threads

    def tell(self, what: str, *arguments: Any) -> None:
        if what in _ANSWERED:
            self._unread = True
        try:
            for commands in self._commands:
                commands.send((what, arguments))
        except OSError as error:
            raise PeerLostError(str(error)) from error

    def answers(self) -> list[Any]:
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or all(self._answers))
            if self.failure is not None:
                raise RankFailedError(self.failure)
            self._unread = False
            return [answers.pop(0) for answers in self._answers]

    def forget(self) -> None:
        if self._unread:
            with suppress(RankFailedError):
                self.answers()

    def new_slots(self, *arguments: Any, **options: Any) -> AdapterSlots:
        return LeadingSlots(self, *arguments, **options)

    def new_runner(self, *arguments: Any) -> ModelRunner:
        return LeadingRunner(self, *arguments)

    def serve(self, on_failure: Callable[[RankFailedError], None]) -> None:
        with self._changed:
            self._on_failure, self._serving = on_failure, True
            if self.failure is None:
                return
        threading.Thread(target=on_failure, args=(RankFailedError(self.failure),)).start()

    def cause(self, error: Exception) -> RankFailedError:
        """Why rank 0 could not go on; no rank runs any more."""
        if isinstance(error, PeerLostError):
            with self._changed:
                self._changed.wait_for(lambda: self.failure is not None, _END_SECONDS)
        failure = self.failure or f"rank 0: {describe(error)}"
        self.kill()
        return RankFailedError(failure)

    def close(self) -> None:
        self._closing = True
        for commands in self._commands:
            commands.close()  # which they take for the end
        end = time.monotonic() + (_END_SECONDS if self.failure is None else 0)
        for process in self._processes:
            process.join(max(0.0, end - time.monotonic()))
        self.kill()
        if torch.distributed.is_initialized() and self.failure is None:
            torch.distributed.destroy_process_group()

    def kill(self) -> None:
        """End the ranks at once."""
        self._closing = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_END_SECONDS)
        atexit.unregister(self.kill)

    def _watch(self) -> None:
        silent = [0.0] * len(self._processes)
        before = time.monotonic()
        while not self._closing:
            wait(self._reports, _LOOK_SECONDS)
            now = time.monotonic()
            passed, before = min(now - before, _LONGEST_LOOK), now
            found: list[Failed | Lost] = []
            for index, reports in enumerate(self._reports):
                silent[index] += passed
                for report in _received(reports):
                    silent[index] = 0.0
                    if isinstance(report, Answer):
                        with self._changed:
                            self._answers[index].append(report.value)
                            self._changed.notify_all()
                    elif report is not None:
                        found.append(report)
                if self._serving and silent[index] > _SILENCE:
                    found.append(Failed(f"rank {index + 1} does not answer", ""))
            if found and not self._closing:
                self._fail(found)
                return

    def _fail(self, found: list[Failed | Lost]) -> None:
        """Tell what has failed first: those that wait for it fail too."""
        end = time.monotonic() + _CAUSE_SECONDS
        while time.monotonic() < end and not any(isinstance(each, Failed) for each in found):
            wait(self._reports, 0.1)
            for reports in self._reports:
                found += [each for each in _received(reports) if isinstance(each, Failed | Lost)]
        found += [each for each in map(_ending, self._processes) if each is not None]
        failed = [each for each in found if isinstance(each, Failed)]
        seen = next((each.text for each in found if isinstance(each, Lost) and each.text), "")
        lost = Failed("a rank has lost the others" + (seen and f"; {seen}"), "")
        # Killed processes leave no report: theirs come last and are the cause.
        cause = next((each for each in failed if each.killed), (failed or [lost])[0])
        if cause.traceback:
            logger.error("%s\n%s", cause.text, cause.traceback)
        for process in self._processes:
            process.kill()
        with self._changed:
            self.failure = cause.text
            self._changed.notify_all()
            told = self._on_failure
        told(RankFailedError(cause.text))


def _received(reports: Connection) -> list[Any]:
    """What a rank has reported; at its end :class:`Lost`, for the cause is known otherwise."""
    found = []
    try:
        while not reports.closed and reports.poll():
            found.append(reports.recv())
    except (EOFError, OSError):
        found.append(Lost())
    return found


def _ending(process: BaseProcess) -> Failed | None:
    """How a rank's process has ended; None if it runs, or ended by itself."""
    code = process.exitcode
    rank = process.name.rpartition("-")[2]
    if code is None or code == 0:
        return None
    if code > 0:
        guard = 'a script that starts ranks needs `if __name__ == "__main__":`'
        return Failed(f"rank {rank} ended with exit code {code} ({guard})", "")
    with suppress(ValueError):
        return Failed(f"rank {rank} was ended by {signal.Signals(-code).name}", "", killed=True)
    return Failed(f"rank {rank} was ended by signal {-code}", "", killed=True)


def start_ranks(config: EngineConfig) -> NoRanks:
    """The other ranks that the config asks for."""
    return NoRanks() if config.tensor_parallel_size == 1 else Ranks(devices_of(config))


class LeadingRunner(ModelRunner):
    """The runner of rank 0, which tells the others what it computes."""

    def __init__(self, ranks: Ranks, *arguments: Any) -> None:
        """arguments: those of :class:`nybble.engine.runner.ModelRunner`."""
        super().__init__(*arguments)
        self._inputs.tell = lambda message: ranks.tell("follow", message)
        self._ranks = ranks
        self._threads = ranks.threads

    def run(self, batch: Sequence[StepItem]) -> torch.Tensor:
        if self._threads is not None:
            torch.set_num_threads(self._threads)  # of this thread, which is the engine's
            self._threads = None
        try:
            return super().run(batch)
        except Exception as error:
            raise self._ranks.cause(error) from error

    def warm_up(self, progress: Progress = True) -> None:
        self._ranks.tell("warm_up")
        super().warm_up(progress)


class LeadingSlots(AdapterSlots):
    """Rank 0's adapter slots: what they are filled with, the others get too."""

    def __init__(self, ranks: Ranks, *arguments: Any, **options: Any) -> None:
        """arguments, options: those of :class:`nybble.engine.adapter_slots.AdapterSlots`."""
        super().__init__(*arguments, **options, group=ranks.group)
        self._leading = ranks

    def fill(self, slot: int, staged: StagedAdapter) -> None:
        try:
            whole = None if staged.ends is None else staged.ends.whole
            about = None if whole is None else whole.map(lambda tensor: tensor.to("meta"))
            self._leading.tell("fill", slot, staged.ranks, list(staged.outputs), about)
            memory = staged.memory.to(self.device, non_blocking=True)
            self._leading.group.broadcast(memory)
            for vectors in staged.outputs.values():
                self._leading.group.broadcast(vectors)
            if whole is not None:
                whole.map(self._leading.group.broadcast)
        except Exception as error:
            raise self._leading.cause(error) from error
        super().fill(slot, replace(staged, memory=memory))

    def clear(self, slot: int) -> None:
        try:
            self._leading.tell("clear", slot)
        except Exception as error:
            raise self._leading.cause(error) from error
        super().clear(slot)
