"""A graphics card that isn't there: everything runs on it in an instant, and gives shapes instead of numbers.

Whatever mixes its tensors with those of main memory fails, as it would on a card.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

CARD = "card"
_aten = torch.ops.aten
_DEVICE = torch.ops.prim.device.default
_READS = (_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default)


class PretendedCard(FakeTensorMode):
    """Tensors can be made on the device CARD while this is entered; `reads` counts the numbers that were read from it.

    On a real card each of those waits until all is computed that was asked for. A number that is read is 0 where
    PyTorch doesn't know it, and a truth is `answer`.
    """

    avoid_device_init = True  # moves from main memory are noted like everything else, not carried out

    def __init__(self, *, answer: bool = False, takes_numbers: bool = False) -> None:
        """`takes_numbers`: tensors made before, with numbers in them, may be used; they are in main memory."""
        super().__init__(allow_non_fake_inputs=takes_numbers)
        self.answer, self.reads = answer, 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and to see to that at every operation takes time

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operation, or answer what can't be known."""
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # PyTorch asks at every operation
            return args[0].fake_device
        self.reads += func in _READS and args[0].device.type == CARD
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except DataDependentOutputException:
            is_truth = func is not _aten._local_scalar_dense.default or args[0].dtype == torch.bool
            return self.answer if is_truth else 0.0 if args[0].is_floating_point() else 0


def prepare_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let PyTorch know of the device; skips the test where it is too old for that."""
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register
    except ImportError:
        pytest.skip("this PyTorch can't pretend to have a device")
    if torch._C._get_privateuse1_backend_name() != CARD:
        register(CARD)
        # From now on PyTorch asks for this wherever it looks for the accelerator there is.
        getattr(torch, CARD).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    # A module's weights can't be moved while something refers to them weakly, as pretended tensors' own mode does.
    monkeypatch.setattr(torch.utils, "weakref", SimpleNamespace(getweakrefs=lambda _tensor: []))
