"""LoRA on experts: y = (W_e + s B_e A_e) x for the tokens that a router sends to expert e.

transformers stores the experts of a layer in one 3-D parameter instead of linear layers. peft has adapters for
such parameters (`target_parameters`), whose forward materializes W + s B A in the base's dtype: on a bf16 base
what is learned is rounded off, and all experts are copied in every pass. We use their weights, names and shapes on
disk, but not that forward: we compute B A x next to W x, as for linear layers, and materialize nothing.

The interface of an architecture's experts is that of transformers' `use_experts_implementation`; experts without
it get no adapter. Tests compare with merged weights.

Axis letters: N tokens, K experts per token, S = N K pairs of both, sorted by expert; E experts, I inputs and
O outputs of a product, R rank, D hidden.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.adapters.low_rank import compute_as
from perl.private.peft import ParamWrapper, transformers_weight_conversion
from perl.private.transformers import gated


@contextlib.contextmanager
def targets_as_named() -> Iterator[None]:
    """Make peft inject adapters exactly where the configuration says.

    In some architectures it mistakes linear layers with names of former experts (such as `gate_proj`) for experts:
    it would leave out the shared experts and dense blocks, and double the rank of all experts instead.
    """
    with mock.patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers"):
        yield


def is_read_as_named(lora: LoraConfig, lm: PreTrainedModel) -> bool:
    """Return whether unpatched peft injects where this configuration says: see `targets_as_named`."""
    read = copy.deepcopy(lora)
    try:
        transformers_weight_conversion.convert_peft_config_for_transformers(read, lm, None)
    except ValueError:  # it mistakes some of the names for half of an expert
        return False
    return set(read.target_modules or ()) == set(lora.target_modules or ())


def expert_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's parameters that are experts' matrices, (E, I, O) or (E, O, I)."""
    if not all(hasattr(module, name) for name in ("is_transposed", "has_gate", "has_bias", "_apply_gate")):
        return []
    names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    return [name for name in names if isinstance(p := getattr(module, name, None), nn.Parameter) and p.dim() == 3]


class _Factors(NamedTuple):
    """An adapter's factors of one parameter, for all experts."""

    a_EIR: Tensor
    b_ERO: Tensor
    scale: float


def _factors(layer: Any, name: str) -> _Factors:
    """Reshape peft's factors: A is (E R, I), grouped by expert, and B (O, R E), grouped by rank."""
    a, b, experts = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.num_experts
    a_EIR = a.view(experts, -1, a.shape[1]).transpose(1, 2)
    b_ERO = b.view(b.shape[0], -1, experts).permute(2, 1, 0)
    return _Factors(a_EIR, b_ERO, layer.scaling[name])


@torch.no_grad()
def expert_delta(layer: ParamWrapper, name: str) -> Tensor:
    """Return the product s B A of every expert, fp32, in the layout of the layer's parameter."""
    a_EIR, b_ERO, scale = _factors(layer, name)
    delta_EIO = scale * (a_EIR.float() @ b_ERO.float())
    return delta_EIO if layer.get_base_layer().is_transposed else delta_EIO.transpose(1, 2)


def _grouped(x_SI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Multiply each row of x by its expert's matrix; (S, O)."""
    width = 16 // w_EIO.element_size()  # torch's kernel needs rows that are multiples of 16 bytes
    if hasattr(F, "grouped_mm") and w_EIO.shape[1] % width == w_EIO.shape[2] % width == 0:
        product: Tensor = F.grouped_mm(x_SI, w_EIO, offs=ends_E)
        return product
    parts = x_SI.tensor_split(ends_E[:-1].tolist())
    return torch.cat([x @ w_IO for x, w_IO in zip(parts, w_EIO.unbind(), strict=True)])


def _adapted(x_SI: Tensor, w_EIO: Tensor, factors: _Factors | None, ends_E: Tensor) -> Tensor:
    y_SO = _grouped(x_SI, w_EIO, ends_E)
    if factors is None:
        return y_SO
    a_EIR, b_ERO, scale = factors
    more = -a_EIR.shape[2] % (16 // x_SI.element_size())  # zero ranks, for the kernel
    a_EIR = F.pad(a_EIR.to(x_SI.dtype), (0, more))
    b_ERO = F.pad(b_ERO.to(x_SI.dtype), (0, 0, 0, more))
    h_SR = _grouped(x_SI, a_EIR.contiguous(), ends_E)
    return y_SO + scale * _grouped(h_SR, b_ERO.contiguous(), ends_E)


def _forward(
    experts: Any, hidden_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor, factors: dict[str, _Factors]
) -> Tensor:
    """Compute transformers' `grouped_mm_experts_forward` with an adapter on each product."""
    expert_S, order_S = experts_NK.reshape(-1).sort(stable=True)
    every_E = torch.arange(experts.num_experts, device=expert_S.device)
    ends_E = torch.searchsorted(expert_S, every_E, right=True, out_int32=True)

    def product(x_SI: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)
        w_EIO = weight if experts.is_transposed else weight.transpose(1, 2)
        y_SO = _adapted(x_SI, w_EIO, factors.get(name), ends_E)
        return y_SO + getattr(experts, f"{name}_bias")[expert_S] if experts.has_bias else y_SO

    x_SD = hidden_ND[order_S // experts_NK.shape[1]]
    if experts.has_gate:
        inner = gated(experts, product(x_SD, "gate_up_proj"))
    else:
        inner = experts.act_fn(product(x_SD, "up_proj"))
    y_SD = product(inner, "down_proj")
    if getattr(experts, "has_post_expert_norm", False):
        y_SD = experts.post_expert_norm(y_SD)
    y_SD = y_SD * weights_NK.reshape(-1)[order_S][:, None]
    y_NKD = y_SD[order_S.argsort()].view(*experts_NK.shape, -1)
    return y_NKD.sum(1).to(hidden_ND.dtype)


class _OneAdapter:
    """The forward of peft's layers on experts' parameters, which are nested."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        experts = self.get_base_layer()
        if not self.active_adapters:
            return experts(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        (name,) = self.active_adapters
        factors = {layer.parameter_name: _factors(layer, name) for layer in _nested(self)}
        return _forward(experts, hidden_states, top_k_index, top_k_weights, factors)


def _nested(layer: Any) -> Iterator[Any]:
    while isinstance(layer, ParamWrapper):
        yield layer
        layer = layer.base_layer


def compute_with_one_adapter(layer: ParamWrapper) -> None:
    """Replace the forward of peft's layer on experts with this module's."""
    compute_as(layer, _OneAdapter)
