"""Tensors on the emulated device, and what PyTorch's operations do with them.

A :class:`DeviceTensor` answers that it is on the device, and every operation on it is handed to
:mod:`device`. One between tensors of the host and of the device is an error, but for copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .device import CUDA, DEVICE
from .memory import Allocation, bytes_of_storage, place, readable, spoil

aten = torch.ops.aten

# Their result lies in the host's memory, or has a shape that only the numbers tell.
_READ_BY_THE_HOST = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_FACTORIES = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
}


class DeviceTensor(Tensor):
    """A tensor on the emulated device. ``host`` has its numbers; ``memory`` is where it lies."""

    host: Tensor
    memory: Allocation

    @staticmethod
    def __new__(cls, host: Tensor, inference: bool | None = None) -> DeviceTensor:
        """inference: whether it is an inference tensor; None for what the mode says."""
        mode = torch.is_inference_mode_enabled() if inference is None else inference
        with torch.inference_mode(mode):
            like = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device="meta")
            made: DeviceTensor = torch.Tensor._make_subclass(
                cls, like, False, dispatch_device=True, device_for_backend_keys=CUDA
            )
        made.host = host
        made.memory = DEVICE.memory_of(host)
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return CUDA
        return _run(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def storage_offset(self) -> int:
        return self.host.storage_offset()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: DeviceTensor) -> None:
        torch.Tensor.data.__set__(self, value)
        self.host, self.memory = value.host, value.memory

    def __repr__(self) -> str:  # type: ignore[override]
        return f"on {CUDA}: {self.host}"

    def __format__(self, specification: str) -> str:
        return format(self.item(), specification)

    def __getitem__(self, index: Any) -> Tensor:
        """PyTorch copies lists of indices to the device past every hook."""
        parts = index if isinstance(index, tuple) else (index,)
        return super().__getitem__(
            tuple(torch.tensor(part) if isinstance(part, list | tuple) else part for part in parts)
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Saved as a tensor of the host."""
        DEVICE.wait("pickling")
        return self.host.__reduce_ex__(protocol)

    def tolist(self) -> Any:
        DEVICE.wait("tolist")
        return readable(self.host).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert a tensor on cuda to numpy: copy it to the host first")

    def data_ptr(self) -> int:
        return self.host.data_ptr()


def fresh(host: Tensor) -> DeviceTensor:
    """A tensor in new memory, with rubbish in it."""
    if DEVICE.has_numbers:
        spoil(bytes_of_storage(host))
    return DeviceTensor(host)


def _submit(work: Callable[[], Any], reads: Sequence[DeviceTensor]) -> Any:
    """Have the device compute; what comes of it lies on the device."""
    result = DEVICE.submit(work, [each.memory for each in reads])
    # A view is an inference tensor if what it views is.
    bases = {place(each.host): each.is_inference() for each in reads}

    def wrap(host: Tensor) -> DeviceTensor:
        return DeviceTensor(host.to(DEVICE.host_device), bases.get(place(host)))

    return pytree.tree_map_only(Tensor, wrap, result)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of PyTorch that a tensor of the device takes part in."""
    decomposed = func.decompose(*args, **kwargs)
    if decomposed is not NotImplemented:
        return decomposed
    if func is aten.copy_.default:
        return _copy(*args, **kwargs)
    if func is aten._to_copy.default:
        return _to(*args, **kwargs)
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    mine = [each for each in tensors if isinstance(each, DeviceTensor)]
    if any(each.ndim and not isinstance(each, DeviceTensor) for each in tensors):
        if func not in _INDEXING or not isinstance(args[0], DeviceTensor):
            raise RuntimeError(f"{func}: expected all tensors on one device, found cpu and cuda")
        DEVICE.wait("an index in the host's memory is copied to the device")
    host_args, host_kwargs = pytree.tree_map_only(DeviceTensor, lambda t: t.host, (args, kwargs))
    if kwargs.get("device") is not None:
        if torch.device(kwargs["device"]).type != "cuda":
            raise RuntimeError(f"{func}: a tensor of the device and device={kwargs['device']}")
        host_kwargs["device"] = DEVICE.host_device
    if func in _READ_BY_THE_HOST or _masks(func, args):
        DEVICE.wait(str(func))
        host_args = pytree.tree_map_only(Tensor, readable, host_args)
    if func in _FACTORIES:
        return fresh(func(*host_args, **host_kwargs))
    result = _submit(lambda: func(*host_args, **host_kwargs), mine)
    # What is computed in place is the tensor that was given.
    same = (each for each in mine if isinstance(result, DeviceTensor) and each.host is result.host)
    return next(same, result)


def _to(source: Tensor, **options: Any) -> Tensor:
    device = torch.device(options.pop("device", None) or source.device)
    non_blocking = options.pop("non_blocking", False)
    options.pop("pin_memory", None)
    if device.type == "cuda" and isinstance(source, DeviceTensor):
        host = source.host
        converted: Tensor = _submit(lambda: aten._to_copy.default(host, **options), [source])
        return converted
    dtype = options.get("dtype")
    if device.type == "cuda":
        target = fresh(torch.empty_like(source, dtype=dtype, device=DEVICE.host_device))
        return _copy(target, source, non_blocking)
    assert isinstance(source, DeviceTensor)
    return _copy(torch.empty_like(readable(source.host), dtype=dtype), source)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
        there, here = target.host, source.host
        _submit(lambda: there.copy_(here), [target, source])
    elif not isinstance(target, DeviceTensor):
        assert isinstance(source, DeviceTensor)
        DEVICE.transfer(target, source.host, to_device=False, blocks=not non_blocking)
    elif source.ndim or DEVICE.is_pinned(source):
        DEVICE.transfer(target.host, source, to_device=True, blocks=not non_blocking)
    else:  # a number, which the launch brings along
        there, number = target.host, source.clone()
        _submit(lambda: there.copy_(number), [target])
    return target


def _masks(func: Any, args: Any) -> bool:
    """Whether an index is a mask, whose set entries the host has to count."""
    masks = (torch.bool, torch.uint8)
    return func in _INDEXING and any(
        isinstance(index, Tensor) and index.dtype in masks for index in args[1]
    )
