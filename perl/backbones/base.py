"""The frozen base: its properties, and the hash that identifies it."""

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
    """The properties of a base besides its weights.

    Attributes:
        sha256: of the weights as loaded (`weights_sha256`).
        context_length: length of the longest sequence, in tokens.
        load: loads (or randomly initializes) the same weights again.
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
    """Compute the SHA-256 of the name, dtype, shape and bytes of every weight of the base.

    Args:
        whole: returns the full tensor of a weight that may be sharded.
        base_name: returns a weight's name before injection of adapters; None for an adapter's weight.
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
