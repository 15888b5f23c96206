"""Lets a torchvision that was built for CUDA import beside a CPU torch.

Such a torchvision can't load its compiled part and carries on without it, until it registers shape functions for two
operators that only the compiled part declares. PyTorch calls `declare` at the end of `import torch` (entry-point group
`torch.backends`, PyTorch 2.5 and newer). Only the names are declared: calling the operators still fails with an error.
The set-up installs this only where torchvision fails to import; on a GPU build of torch it does nothing.
"""


def declare() -> None:
    """Declare `torchvision::nms` and `torchvision::qnms` on a torch without CUDA and ROCm."""
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
