"""What lives at once in a computation, measured without running it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_DEVICE = torch.ops.prim.device.default


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive at once, also of tensors on the meta device.

    What a kernel takes for itself while it runs is not seen. `device`: the type of those that count; all without it.
    """

    def __init__(self, *known: Tensor, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in known:
            self._note(tensor)
        self.before = self.live

    @property
    def added(self) -> int:
        """The peak, less what was there before."""
        return self.peak - self.before

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to see to that at every operation takes time

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation and look at what it made."""
        if func is _DEVICE:  # PyTorch asks at every operation, and would ask all modes
            return _device(args[0])
        result = func(*args, **(kwargs or {}))
        for leaf in [result] if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._storages or self.device not in (None, _device(tensor).type):
            return
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        key, count = id(storage), storage.nbytes()

        def forget(_gone: object) -> None:
            del self._storages[key]
            self.live -= count

        self._storages[key] = weakref.ref(storage, forget)


def _device(tensor: Tensor) -> torch.device:
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def flash_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, _start: int) -> Tensor:
    """The shape of attention's result, without the scores that only the meta device would keep."""
    return q.new_empty(q.shape[0], q.shape[2], heads * q.shape[3])
