"""The frozen base: what is known of it, and the hash that tells it from others."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perl.adapters.lora import name_without_lora
from perl.backbones.chat import ChatFormat
from perl.backbones.four_bit import scales


@dataclass(frozen=True)
class Base:
    """What is known of the base besides its weights, and how it writes dialogues."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    sha256: str
    """Of the weights as loaded; see `weights_sha256`."""
    parameters: int
    context_length: int
    """The longest sequence the base takes, in tokens."""
    load: Callable[[], PreTrainedModel]
    """Loads (or draws) the same weights once more."""


def weights_sha256(model: nn.Module, whole: Callable[[Tensor], Tensor] = Tensor.detach) -> str:
    """SHA-256 over name, dtype, shape and bytes of every weight of the base, adapters left out.

    Args:
        whole: gives all of a weight that may be spread over processes.
    """
    digest = hashlib.sha256()
    for name, weight in _base_weights(model):
        tensor = whole(weight)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _base_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights by the names they have without LoRA."""
    named: dict[str, Tensor] = {
        name_without_lora(name): tensor
        for name, tensor in (*model.named_parameters(), *scales(model))
        if "lora_" not in name
    }
    yield from sorted(named.items())
