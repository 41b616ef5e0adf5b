"""The frozen base: what is known of it, and the hash that tells it from others."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perl.backbones.chat import ChatFormat
from perl.backbones.four_bit import scales


@dataclass(frozen=True)
class Base:
    """What is known of the base besides its weights.

    Attributes:
        sha256: of the weights as loaded (`weights_sha256`).
        context_length: the longest sequence, in tokens.
        load: loads (or draws) the same weights once more.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    sha256: str
    parameters: int
    context_length: int
    load: Callable[[], PreTrainedModel]


def weights_sha256(
    model: nn.Module,
    whole: Callable[[Tensor], Tensor] = Tensor.detach,
    base_name: Callable[[str], str | None] = str,
) -> str:
    """SHA-256 over name, dtype, shape and bytes of every weight of the base.

    Args:
        whole: gives all of a weight that may be spread over processes.
        base_name: a weight's name before adapters were put in; None for an adapter's.
    """
    digest = hashlib.sha256()
    named: dict[str, Tensor] = {
        own: tensor
        for name, tensor in (*model.named_parameters(), *scales(model))
        if (own := base_name(name)) is not None
    }
    for name, weight in sorted(named.items()):
        tensor = whole(weight)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()
