"""The emulated device refuses and reveals what a GPU would trip over."""

from __future__ import annotations

import pytest
import torch

from nybble.kernels.triton import norm

from .device import CUDA, Device


def test_tensors_say_where_they_are_and_compute(gpu: Device) -> None:
    x = torch.arange(6, device=CUDA).view(2, 3).float()
    assert x.is_cuda
    assert x.device == CUDA
    assert (x[1] @ x.T).cpu().tolist() == [14.0, 50.0]


def test_tensors_of_two_devices_do_not_mix(gpu: Device) -> None:
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        torch.ones(3, device=CUDA) + torch.ones(3)


def test_fresh_memory_holds_rubbish(gpu: Device) -> None:
    assert torch.empty(4, device=CUDA).isnan().all()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: x[0].item(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: bool((x > 0).all()),
        lambda x: torch.empty(3).copy_(x, non_blocking=True),  # not pinned
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_what_makes_the_host_wait_is_written_down(gpu: Device, read: object) -> None:
    x = torch.ones(3, device=CUDA)
    gpu.waits.clear()
    read(x + 1)  # type: ignore[operator]
    assert len(gpu.waits) == 1


def test_waiting_for_what_is_done_takes_no_time(gpu: Device) -> None:
    x = torch.ones(3, device=CUDA) + 1
    event = torch.cuda.Event()
    event.record()
    x += 1
    torch.cuda.synchronize()
    gpu.waits.clear()
    event.synchronize()
    torch.cuda.synchronize()
    assert gpu.waits == []


def test_a_copy_to_pinned_memory_is_there_once_it_was_waited_for(gpu: Device) -> None:
    x = torch.full((3,), 7.0, device=CUDA)
    host = torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
    assert host.isnan().all()
    x.zero_()  # after the copy
    torch.cuda.current_stream().synchronize()
    assert host.tolist() == [7.0, 7.0, 7.0]


def test_pinned_memory_must_stay_as_it_is_until_a_copy_has_left_it(gpu: Device) -> None:
    host = torch.zeros(3, pin_memory=True)
    host.to(CUDA, non_blocking=True)
    sent = torch.cuda.Event()
    sent.record()
    sent.synchronize()
    host += 1  # the copy has left
    host.to(CUDA, non_blocking=True)
    host += 1
    with pytest.raises(RuntimeError, match="while a copy from it to the device was in flight"):
        torch.cuda.synchronize()


def test_memory_is_counted_and_runs_out(gpu: Device) -> None:
    before = gpu.allocated
    x = torch.zeros(1 << 20, device=CUDA)
    assert gpu.allocated - before == 4 << 20
    assert torch.cuda.mem_get_info() == (gpu.total - gpu.allocated, gpu.total)
    view = x[5:9]
    del x
    assert gpu.allocated - before == 4 << 20
    del view
    assert gpu.allocated == before
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(gpu.total, device=CUDA)


def capture(function: object) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        function()  # type: ignore[operator]
    return graph


def test_a_graph_computes_again_from_what_now_lies_in_its_inputs(gpu: Device) -> None:
    x, out = torch.ones(2, device=CUDA), torch.zeros(2, device=CUDA)
    graph = capture(lambda: out.copy_(x * 2 + 1))
    x.fill_(5)
    graph.replay()
    assert out.tolist() == [11.0, 11.0]


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x.item(),
        lambda x: x.copy_(torch.zeros(1).pin_memory(), non_blocking=True),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_a_captured_step_neither_waits_nor_copies_from_the_host(gpu: Device, step: object) -> None:
    x = torch.ones(1, device=CUDA)
    with pytest.raises(RuntimeError):
        capture(lambda: step(x))  # type: ignore[operator]


def test_a_capture_that_other_threads_could_end_is_refused(gpu: Device) -> None:
    with (
        pytest.raises(RuntimeError, match="another thread"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        pass


def test_what_a_graph_reads_must_stay_allocated(gpu: Device) -> None:
    out, inputs = torch.zeros(2, device=CUDA), [torch.ones(2, device=CUDA)]
    graph = capture(lambda: out.add_(inputs[0]))
    graph.replay()
    inputs.clear()
    with pytest.raises(RuntimeError, match="memory that has been freed"):
        graph.replay()


def test_graphs_of_one_pool_overwrite_each_other(gpu: Device) -> None:
    pool, x = torch.cuda.graph_pool_handle(), torch.ones(2, device=CUDA)
    graphs, outs = [], []
    for _ in range(2):
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1], pool=pool, capture_error_mode="thread_local"):
            outs.append(x + 1)
    graphs[0].replay()
    assert outs[0].tolist() == [2.0, 2.0]
    graphs[1].replay()
    assert outs[0].isnan().all()


def test_kernels_are_launched_on_the_device_of_their_tensors(gpu: Device) -> None:
    x, weight = torch.ones(2, 64, device=CUDA).half(), torch.ones(64, device=CUDA).half()
    assert norm.rms_norm(x, weight, 0.0).tolist() == [[1.0] * 64] * 2
    with pytest.raises(ValueError, match="of the host's memory"):
        norm.rms_norm(x, weight.cpu(), 0.0)
    torch.cuda.set_device(0)
    with pytest.raises(RuntimeError, match="launched on cuda:0"):
        norm.rms_norm(x, weight, 0.0)


def test_a_kernel_that_no_one_has_run_before_is_not_captured(gpu: Device) -> None:
    x, weight = torch.ones(2, 64, device=CUDA).half(), torch.ones(64, device=CUDA).half()
    with pytest.raises(RuntimeError, match="would be compiled while a stream is capturing"):
        capture(lambda: norm.rms_norm(x, weight, 0.0))
    norm.rms_norm(x, weight, 0.0)
    capture(lambda: norm.rms_norm(x, weight, 0.0))
