"""Conversion of an adapter to plain LoRA: the best approximation of each weight's change at a given rank.

Δ = U S Vᵀ, and B A = U_R S_R V_Rᵀ: no matrix of rank R is nearer to Δ (Eckart and Young 1936). With alpha = R,
LoRA adds exactly B A. Letters: I inputs and O outputs of a layer, R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from perl.adapters import AdapterKind
from perl.adapters.lora import Lora
from perl.adapters.targets import adaptable, has_transposed_weights
from perl.errors import UserError
from perl.recipe.adapter import LoraSettings
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.system.progress import track

ENOUGH = 0.01
"""Maximum relative error of the rank that is reported as sufficient."""


@dataclass(frozen=True)
class Truncation:
    """The error of the approximation.

    Attributes:
        error: ‖Δ - B A‖ / ‖Δ‖ in the Frobenius norm, over all layers.
        enough: the lowest rank whose error is at most `ENOUGH`.
        most: the highest rank that `check_convertible` accepts.
        biases: whether biases change too; LoRA then gets biases, which are exact.
    """

    rank: int
    error: float
    enough: int
    most: int
    biases: bool


def check_convertible(adapter: AdapterKind, rank: int) -> None:
    """Refuse adapters that no LoRA can express, and ranks above a layer's; called before injection.

    Raises:
        UserError: the adapter cannot be converted to this rank; the remedy names an alternative.
    """
    if type(adapter).deltas is AdapterKind.deltas:
        raise UserError(
            f"{adapter} are not equivalent to LoRA of any rank: they do not amount to a change of weights",
            where="--as-lora",
            remedy="Use the run folder: perl-rlhf chat, perl-rlhf evaluate, perl.load_run; or train kind lora.",
        )
    linear = {f"{name}.weight": shape for name, shape in adaptable(adapter.lm).items()}
    if of_experts := sorted(adapter.adapted - linear.keys()):
        raise UserError(
            f"the conversion supports linear layers only, and {of_experts[0]} belongs to experts",
            where="--as-lora",
            remedy="Export the adapter as it is, or the whole model: --merge.",
        )
    lowest = min(min(linear[name]) for name in adapter.adapted)
    if rank > lowest:
        raise UserError(
            f"rank {rank} is above that of a layer with an adapter: the lowest is {lowest}",
            where="--as-lora",
            remedy=f"Give at most {lowest}; 8 to 64 is common.",
        )


@torch.no_grad()
def as_lora(roles: SharedBase, trunk: Role, rank: int) -> tuple[SharedBase, Truncation]:
    """Return roles on the same base with LoRA in place of a role's adapter, and with the existing heads.

    The adapters are removed from the base, so `roles` cannot be used afterwards.

    Args:
        trunk: the role whose adapter is converted.
        rank: a rank that passes `check_convertible`.
    """
    transposed = has_transposed_weights(roles.lm)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    singular: list[Tensor] = []
    with track("decomposing", len(roles.adapter.adapted)) as bar:
        for name, delta in roles.adapter.deltas(trunk):
            module, _, own = name.rpartition(".")
            if own == "bias":
                biases[module] = delta
                continue
            u_OK, s_K, v_KI = torch.linalg.svd(delta.T if transposed else delta, full_matrices=False)
            root_R = s_K[:rank].sqrt()
            factors[module] = root_R[:, None] * v_KI[:rank], u_OK[:, :rank] * root_R
            singular.append(s_K.double().cpu())
            bar()
    roles.adapter.remove()
    adapter = Lora(roles.lm, LoraSettings(rank=rank, alpha=rank, targets=list(factors)))
    if biases:
        adapter.add_biases()
    converted = SharedBase(adapter, roles.engine)
    converted.add(trunk)
    converted.heads = roles.heads
    adapter.set_factors(trunk, factors, biases)
    return converted.eval(), _truncation(singular, rank, bool(biases))


def _truncation(singular: list[Tensor], rank: int, biases: bool) -> Truncation:
    """Compute the error from the singular values of all layers."""
    squares = torch.zeros(max(map(len, singular)) + 1, dtype=torch.float64)
    for s_K in singular:
        squares[: len(s_K)] += s_K.square()
    left = squares.flip(0).cumsum(0).flip(0)  # at R: what rank R drops
    errors = (left / left[0].clamp(min=torch.finfo(left.dtype).tiny)).sqrt()
    enough, most = int((errors > ENOUGH).sum()), min(map(len, singular))
    return Truncation(rank, float(errors[rank]), enough, most, biases)
