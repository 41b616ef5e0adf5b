"""Log-probs and entropies from hidden states, without holding the logits of all tokens at once.

Axis letters: `perl.roles`; the N tokens are those of the completions in a batch.

The LM head runs on `chunk` tokens at a time, whose logits are recomputed in the backward pass. So memory is a few
chunk × V floats instead of N × V, at the cost of one more product with the head. Callers leave out the positions
of prompts.

The gradient is explicit, which saves two tensors of chunk × V that autograd would need: with p = softmax(z),
z = (W h + b) / temperature, and a token y,

    ∂ log p(y) / ∂z = 1[y] - p        ∂ H(p) / ∂z = -p (log p + H)

The model's transform of its logits (`perl.backbones.logits`) is applied before the temperature, and its derivative
after these.

Precision: the product with the head runs in the head's dtype, as in sampling; temperature, softmax and entropy are
computed in fp32. So a bf16 base gives the log-probs that it sampled with, without an fp32 copy of the head.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from perl.backbones.logits import PLAIN, LogitsTransform

LOGITS_AT_ONCE = 2**23
"""Maximum number of logits held at a time."""


CHUNKS_OF_A_SUM = 32
"""Maximum number of chunks whose gradients are added up in 16 bits. Its relative error is then 0.6 % or less; with
126 chunks it was 1.8 %, with 512 it was 13 % (8,192 tokens)."""


def tokens_at_once(vocabulary: int) -> int:
    """Return the number of tokens per chunk: 1,024 for a vocabulary of 8,192, 65 for one of 128,256."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def logits(
    hidden_nD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, temperature: float, transform: LogitsTransform
) -> Tensor:
    """Compute the logits z (n, V), fp32, of a chunk of n tokens."""
    return transform.apply_(F.linear(hidden_nD.to(weight_VD.dtype), weight_VD, bias_V).float(), temperature)


class _InChunks(torch.autograd.Function):
    """`log_probs_and_entropy`, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        chunk: int,
        transform: LogitsTransform,
    ) -> tuple[Tensor, Tensor]:
        log_probs_N = hidden_ND.new_empty(len(hidden_ND), dtype=torch.float32)
        entropies_N = torch.empty_like(log_probs_N)
        for start in range(0, len(hidden_ND), chunk):
            part = slice(start, start + chunk)
            logits_nV = logits(hidden_ND[part], weight_VD, bias_V, temperature, transform)
            all_log_probs_nV = logits_nV.log_softmax(-1)
            log_probs_N[part] = all_log_probs_nV.gather(1, targets_N[part, None])[:, 0]
            # softmax, not the exponential of the log-probs, which takes ten times as long on a CPU
            entropies_N[part] = -logits_nV.softmax(-1).mul_(all_log_probs_nV).sum(-1)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, targets_N, entropies_N)
        ctx.temperature, ctx.chunk, ctx.transform = temperature, chunk, transform
        ctx.set_materialize_grads(False)
        return log_probs_N, entropies_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor | None, grad_H_N: Tensor | None) -> Any:
        hidden_ND, weight_VD, bias_V, targets_N, entropies_N = ctx.saved_tensors
        inputs = zip((hidden_ND, weight_VD, bias_V), ctx.needs_input_grad[:3], strict=True)
        gradients = [torch.zeros_like(one) if needed else None for one, needed in inputs]
        of_hidden, of_weight, of_bias = gradients
        # The scale of the logits, applied to rows instead of n × V elements.
        factor = ctx.transform.scale / ctx.temperature
        down_N, down_H_N = (None if one is None else one * factor for one in (grad_N, grad_H_N))
        for start in range(0, len(hidden_ND), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits_nV = logits(hidden_ND[part], weight_VD, bias_V, ctx.temperature, ctx.transform)
            grad_nV = logits_nV.softmax(-1)
            if down_H_N is not None:
                weights_nV = logits_nV.log_softmax(-1).add_(entropies_N[part, None])
                weights_nV.mul_(down_H_N[part, None])
                grad_nV.mul_(weights_nV if down_N is None else weights_nV.add_(down_N[part, None])).neg_()
            elif down_N is not None:
                grad_nV.mul_(-down_N[part, None])
            if down_N is not None:
                grad_nV.scatter_add_(1, targets_N[part, None], down_N[part, None])
            if (slope_nV := ctx.transform.slope_(logits_nV, ctx.temperature)) is not None:
                grad_nV.mul_(slope_nV)
            grad_nV = grad_nV.to(weight_VD.dtype)
            if of_hidden is not None:
                of_hidden[part] = grad_nV @ weight_VD
            if of_weight is not None:
                of_weight.addmm_(grad_nV.T, hidden_ND[part].to(weight_VD.dtype))
            if of_bias is not None:
                of_bias += grad_nV.sum(0)
        return *gradients, None, None, None, None


def log_probs_and_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    temperature: float,
    chunk: int,
    transform: LogitsTransform = PLAIN,
) -> tuple[Tensor, Tensor]:
    """Compute log p(target) and the entropy H(p) = -Σ_v p log p, with p = softmax((W h + b) / temperature).

    Gradients flow from both to the hidden states, and to the head's weight and bias if they require gradients.

    Args:
        hidden_ND: the trunk's last hidden states, any float dtype.
        weight_VD, bias_V: of the LM head, any float dtype.
        targets_N: the next tokens, int64.
        temperature: the sampler's temperature, above 0.
        chunk: number of tokens whose logits are held at a time, at least 1.
        transform: the model's transform of W h + b before the temperature.

    Returns:
        log-probs and entropies, fp32 (N).
    """
    assert temperature > 0, temperature
    assert chunk >= 1, chunk
    log_probs_N, entropies_N = _InChunks.apply(  # type: ignore[no-untyped-call]
        hidden_ND, weight_VD, bias_V, targets_N, temperature, chunk, transform
    )
    return log_probs_N, entropies_N


def completion_log_probs(
    states_BTD: Tensor,
    embedding: Any,
    ids_BT: Tensor,
    mask_BT: Tensor,
    temperature: float,
    transform: LogitsTransform,
    lengths: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `log_probs_and_entropy` of completions, (B, T) each; 0 in the padding.

    Args:
        states_BTD: hidden states that predict the tokens.
        embedding: the output embedding, a linear layer.
        ids_BT: the tokens, int64.
        mask_BT: True for real tokens, bool.
        lengths: of the completions, if known on the host, which otherwise waits for the device to count the mask.
    """
    at_N = mask_BT.nonzero(as_tuple=True) if lengths is None else places(lengths, mask_BT.device)
    weight_VD, chunk = embedding.weight, tokens_at_once(len(embedding.weight))
    if weight_VD.requires_grad and weight_VD.itemsize < 4:
        chunk = max(chunk, -(-len(at_N[0]) // CHUNKS_OF_A_SUM))
    log_probs_N, entropies_N = log_probs_and_entropy(
        states_BTD[at_N], weight_VD, embedding.bias, ids_BT[at_N], temperature, chunk, transform
    )
    zeros_BT = log_probs_N.new_zeros(mask_BT.shape)
    return zeros_BT.index_put(at_N, log_probs_N), zeros_BT.index_put(at_N, entropies_N)


def places(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows and columns (N each) of the tokens of completions of these lengths, in the order of a mask."""
    mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    rows_N, columns_N = mask_BT.nonzero().to(device, non_blocking=True).unbind(1)
    return rows_N, columns_N


def scaled_gradient(states: Tensor, share: float) -> Tensor:
    """Return the same states, with their gradient multiplied by a factor in [0, 1]."""
    if share == 1.0:
        return states
    constant = states.detach()
    return constant if share == 0.0 else constant + share * (states - constant)
