"""The private interfaces of torch that this package uses."""

import torch
from torch import _subclasses, nn
from torch.utils import _python_dispatch

from perl.private.checked import need

need(_subclasses, "FakeTensor", "FakeTensorMode")
need(_python_dispatch, "TorchDispatchMode")
need(nn.Module(), "_apply", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks")

FakeTensor = _subclasses.FakeTensor
"""A tensor without contents."""
FakeTensorMode = _subclasses.FakeTensorMode
"""Inside, operations make fake tensors."""


class TorchDispatchMode(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Inside, every operation can be watched. Torch's guard against dynamo, slow in each, is left out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


HAS_PACKED_LINEAR = hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""Whether this build of torch multiplies with oneDNN's packed weights; not every one does."""
if HAS_PACKED_LINEAR:
    need(torch.ops.mkldnn, "_reorder_linear_weight", "_is_mkldnn_bf16_supported")

need(torch._C, "_current_graph_task_id")


def in_backward() -> bool:
    """Whether autograd's engine runs a backward pass in this thread."""
    return torch._C._current_graph_task_id() != -1
