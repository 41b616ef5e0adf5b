"""The exact KL between two policies' distributions, over the whole vocabulary.

As in `perl.roles.log_probs`, only the logits of a chunk of tokens are held at a time, and recomputed for the
gradient. Axis letters: `perl.roles`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from perl.backbones.logits import PLAIN, LogitsTransform
from perl.roles.log_probs import logits, tokens_at_once


class _Kl(torch.autograd.Function):
    """KL(p‖q) of each token, and its gradient q - p with respect to the logits of q."""

    @staticmethod
    def forward(
        ctx: Any,
        states_ND: Tensor,
        old_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        temperature: float,
        transform: LogitsTransform,
    ) -> Tensor:
        kl_N, chunk = states_ND.new_empty(len(states_ND), dtype=torch.float32), tokens_at_once(len(weight_VD))
        for start in range(0, len(states_ND), chunk):
            part = slice(start, start + chunk)
            old_nV = logits(old_ND[part], weight_VD, bias_V, temperature, transform)
            new_nV = logits(states_ND[part], weight_VD, bias_V, temperature, transform)
            difference_nV = old_nV.log_softmax(-1).sub_(new_nV.log_softmax(-1))
            kl_N[part] = difference_nV.mul_(old_nV.softmax(-1)).sum(-1)
        ctx.save_for_backward(states_ND, old_ND, weight_VD, bias_V)
        ctx.temperature, ctx.transform, ctx.chunk = temperature, transform, chunk
        return kl_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        states_ND, old_ND, weight_VD, bias_V = ctx.saved_tensors
        down_N = grad_N * (ctx.transform.scale / ctx.temperature)
        of_states = torch.zeros_like(states_ND)
        for start in range(0, len(states_ND), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            old_nV = logits(old_ND[part], weight_VD, bias_V, ctx.temperature, ctx.transform)
            new_nV = logits(states_ND[part], weight_VD, bias_V, ctx.temperature, ctx.transform)
            grad_nV = new_nV.softmax(-1).sub_(old_nV.softmax(-1)).mul_(down_N[part, None])
            if (slope_nV := ctx.transform.slope_(new_nV, ctx.temperature)) is not None:
                grad_nV.mul_(slope_nV)
            of_states[part] = grad_nV.to(weight_VD.dtype) @ weight_VD
        return of_states, None, None, None, None, None


def kl_of_states(
    old_ND: Tensor,
    states_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    temperature: float,
    transform: LogitsTransform = PLAIN,
) -> Tensor:
    """Compute KL(p‖q) = Σ_v p log(p / q), p and q being the softmax of two states' logits over the temperature.

    Gradients flow to the states of q. Near p they are the Fisher matrix times the difference of the two.

    Args:
        old_ND: hidden states of p, any float dtype.
        states_ND: hidden states of q.
        weight_VD, bias_V: of the LM head, which is not trained.
        temperature: the sampler's temperature, above 0.
        transform: the model's transform of W h + b before the temperature.

    Returns:
        KL in nats, fp32 (N).
    """
    return _Kl.apply(states_ND, old_ND, weight_VD, bias_V, temperature, transform)  # type: ignore[no-untyped-call,no-any-return]
