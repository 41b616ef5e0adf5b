"""A role's adapter as plain LoRA: of each change of a weight, the nearest one of a given rank.

Δ = U S Vᵀ, and B A = U_R S_R V_Rᵀ: no matrix of rank R is nearer to Δ (Eckart and Young 1936). With alpha = R what
LoRA adds is B A itself. Letters: I inputs and O outputs of a layer, R rank.
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
"""The relative error of the rank that is named as enough."""


@dataclass(frozen=True)
class Truncation:
    """What the rank costs.

    Attributes:
        error: ‖Δ - B A‖ / ‖Δ‖ by Frobenius' norm, over all layers.
        enough: the lowest rank whose error is at most `ENOUGH`.
        biases: whether biases change too; LoRA then has biases, which are exact.
    """

    rank: int
    error: float
    enough: int
    biases: bool


def check_convertible(adapter: AdapterKind, rank: int) -> None:
    """Refuse adapters that are no LoRA of any rank, and ranks that no layer has; before anything is injected.

    Raises:
        UserError: saying what can be done instead.
    """
    if type(adapter).deltas is AdapterKind.deltas:
        raise UserError(
            f"{adapter} are no LoRA of any rank: what they compute is not a change of weights",
            where="--as-lora",
            remedy="Use the run folder: perl-rlhf chat, perl-rlhf evaluate, perl.load_run; or train kind lora.",
        )
    linear = {f"{name}.weight": shape for name, shape in adaptable(adapter.lm).items()}
    if of_experts := sorted(adapter.adapted - linear.keys()):
        raise UserError(
            f"it is for linear layers, and {of_experts[0]} is of experts",
            where="--as-lora",
            remedy="Export the adapter as it is, or the whole model: --merge.",
        )
    lowest = min(min(linear[name]) for name in adapter.adapted)
    if rank > lowest:
        raise UserError(
            f"a layer that has an adapter has a rank of {lowest}, which is less than {rank}",
            where="--as-lora",
            remedy=f"Give at most {lowest}; 8 to 64 is common.",
        )


@torch.no_grad()
def as_lora(roles: SharedBase, trunk: Role, rank: int) -> tuple[SharedBase, Truncation]:
    """Roles on the same base, with LoRA in the place of a role's adapter, and the heads that there are.

    The adapters are taken out of the base, so that `roles` is of no use afterwards.

    Args:
        trunk: whose adapter it is.
        rank: as `check_convertible` allows it.
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
    """Of the singular values of all layers."""
    squares = torch.zeros(max(map(len, singular)) + 1, dtype=torch.float64)
    for s_K in singular:
        squares[: len(s_K)] += s_K.square()
    left = squares.flip(0).cumsum(0).flip(0)  # at R: what a rank of R leaves out
    errors = (left / left[0].clamp(min=torch.finfo(left.dtype).tiny)).sqrt()
    return Truncation(rank, float(errors[rank]), int((errors > ENOUGH).sum()), biases)
