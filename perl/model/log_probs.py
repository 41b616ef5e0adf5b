"""Log-probs and entropies from hidden states, without ever holding the logits of all tokens.

Axes: N tokens (answer positions of a batch, flattened), D hidden, V vocabulary.

The LM head runs on `chunk` tokens at a time, and each chunk is checkpointed: its logits live while it is
computed and again while its gradient is, so memory is a few chunk × V floats instead of N × V, for one more
product with the head in the backward pass. Take only the answers' positions to begin with: the prompt's
need no LM head.

Precision: the product with the head runs in the head's own dtype, as it does when the model samples; the
logits are then fp32 for the temperature, the softmax and the entropy. So a bf16 base gives here the log-probs
that it sampled with, and no fp32 copy of the head is made.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS_AT_ONCE = 2**23
"""Logits held at a time."""


def tokens_at_once(vocabulary: int) -> int:
    """A chunk: 1,024 tokens for a vocabulary of 8,192, 65 for one of 128,256."""
    return max(1, LOGITS_AT_ONCE // vocabulary)


def _chunk_log_probs_and_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_N: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """`log_probs_and_entropy` with the logits of all tokens held at once."""
    logits_NV = F.linear(hidden_ND.to(weight_VD.dtype), weight_VD, bias_V).float() / temperature
    all_log_probs_NV = logits_NV.log_softmax(dim=-1)
    log_probs_N = all_log_probs_NV.gather(-1, targets_N[:, None]).squeeze(-1)
    # softmax, not the exponential of what is there: on a CPU that takes ten times as long
    entropies_N = -(logits_NV.softmax(dim=-1) * all_log_probs_NV).sum(dim=-1)
    return log_probs_N, entropies_N


def log_probs_and_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    temperature: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """The log-prob log p(target) and the entropy H(p) = -Σ_v p log p, p = softmax((W h + b) / temperature).

    Gradients flow to the hidden states, and to the head's weight and bias where they require them; from
    both results.

    Args:
        hidden_ND: the trunk's last hidden states, any float dtype.
        weight_VD: the LM head's weight, any float dtype.
        bias_V: its bias, or None.
        targets_N: int64, the tokens that follow.
        temperature: the sampler's, above 0.
        chunk: tokens whose logits are held at a time, at least 1.

    Returns:
        log-probs and entropies, fp32 (N).
    """
    assert temperature > 0, temperature
    assert chunk >= 1, chunk
    parts: list[tuple[Tensor, Tensor]] = [
        checkpoint(
            _chunk_log_probs_and_entropy,
            hidden,
            weight_VD,
            bias_V,
            targets,
            temperature,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing here is random
        )
        # split, not slices: its backward joins the chunks once, where each slice's makes zeros of N x D
        for hidden, targets in zip(torch.split(hidden_ND, chunk), torch.split(targets_N, chunk), strict=True)
    ]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)
