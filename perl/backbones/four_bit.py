"""4-bit bases, as in QLoRA (Dettmers et al. 2023, arXiv 2305.14314): bitsandbytes' NF4.

The weights of the blocks' linear layers are rounded to 16 values, times an fp32 scale for every 64; embeddings,
norms and the output embedding are not. For each product the weights are dequantized to the base's dtype.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from perl.errors import UserError


def four_bit_config(dtype: torch.dtype) -> Any:
    """Return transformers' configuration for loading a base in 4 bits.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        what = "4-bit weights need bitsandbytes, which is not installed"
        remedy = "pip install 'perl-rlhf[4bit]', or set base.quantization: none."
        raise UserError(what, where="base.quantization", remedy=remedy) from None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def keep_layout(lm: nn.Module) -> None:
    """Prevent bitsandbytes from repacking weights of layers in eval mode, as it does on CPUs with AVX-512 bf16:
    repacked weights silently block gradients, and their bytes differ.
    """
    for module in lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


@contextlib.contextmanager
def hide_quantization(lm: nn.Module) -> Iterator[None]:
    """Make a 4-bit base look like any frozen model: otherwise transformers' Trainer, which does not recognize our
    adapters, refuses to train, and TRL's trainers round the adapters to bf16.
    """
    flags = {name: True for name in ("is_quantized", "is_loaded_in_4bit") if vars(lm).get(name)}
    vars(lm).update(dict.fromkeys(flags, False))
    try:
        yield
    finally:
        vars(lm).update(flags)


def scales(lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the scales and the 16 values of 4-bit weights, which are neither parameters nor buffers, by name."""
    for name, parameter in lm.named_parameters():
        if state := getattr(parameter, "quant_state", None):
            yield from ((f"{name}.{key}", tensor) for key, tensor in state.as_dict(packed=True).items())


def weights_of(parameter: nn.Parameter) -> int:
    """Return the number of weights in a parameter: two per byte in 4 bits."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(torch.Size(state.shape).numel())
