"""Converts a role's adapter to LoRA, and measures the loss on held-out rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perl.backbones.padding import left_pad
from perl.data.records import Context, Turn
from perl.measure.length import spearman
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles.as_lora import ENOUGH, Truncation, as_lora
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.stages.session import Session
from perl.system.seeds import derived_seed

ROWS = 64
"""Maximum number of held-out rows that are scored, or prompts that are completed."""
BATCH_SIZE = 4
"""Rows per forward pass."""
MAX_NEW_TOKENS = 64
"""Maximum length of a completion if the recipe has no section rl; also used in the model card's code."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion lost.

    Attributes:
        kind: the adapter that was converted, in words.
        rescales: see `AdapterKind`.
        rows: number of completions sampled from the role for `kl`, or of scored rows.
        kl: mean KL from the role with its own adapter to the one with LoRA, in nats per token; None for scores.
        rms: RMS of the difference of scores; None for language models.
        correlation: rank correlation of both scores; None for language models, and if all scores are equal.
    """

    kind: str
    truncation: Truncation
    rescales: bool
    rows: int
    kl: float | None = None
    rms: float | None = None
    correlation: float | None = None

    def __str__(self) -> str:
        """Return the loss as one sentence."""
        cost, measured = self.truncation, f"on {self.rows} completions of held-out prompts the KL is"
        if self.kl is not None:
            measured += f" {self.kl:.2g} nats per token"
        else:
            ranks = "" if self.correlation is None else f" (rank correlation {self.correlation:.4f})"
            measured = f"the scores of {self.rows} held-out rows differ by {self.rms:.2g} (RMS){ranks}"
        added = f"the relative error of the change to the weights is {cost.error:.2g}"
        return f"at rank {cost.rank} {added}; {measured}"

    @property
    def advice(self) -> str:
        """Advice on a better conversion; empty if nothing is lost."""
        cost, lines = self.truncation, []
        if cost.error > ENOUGH:
            line = f"A relative error of {ENOUGH:g} needs rank {cost.enough}"
            above = f", more than a layer's {cost.most}: --merge loses nothing" if cost.enough > cost.most else ""
            lines.append(f"{line}{above}.")
            if self.rescales:
                lines.append("It rescales whole rows or columns of weights, which a low rank keeps only in part.")
        if cost.biases:
            lines.append("It also changes biases, so LoRA's B has biases: peft loads them, vLLM and TGI do not.")
        return " ".join(lines)


@torch.no_grad()
def convert(session: Session, role: Role, trunk: Role, rank: int) -> tuple[Session, Conversion]:
    """Return a session with LoRA instead of the role's adapter, and the loss; `session` is unusable afterwards.

    Args:
        trunk: the role that owns the adapter.
    """
    roles = session.roles
    assert isinstance(roles, SharedBase)
    roles.eval()
    scores = role in roles.heads
    rows, read = (_scored if scores else _completed)(session, role, trunk)
    kind, rescales, before = str(roles.adapter), roles.adapter.rescales, read(roles)
    lora, truncation = as_lora(roles, trunk, rank)
    conversion, after = Conversion(kind, truncation, rescales, rows), read(lora)
    if not scores:
        kl_N = lora.kl_of_states(before, after, _temperature(session))
        return replace(session, roles=lora), replace(conversion, kl=float(kl_N.mean()))
    rms = float((after - before).square().mean().sqrt())
    correlation = spearman(before.double().numpy(), after.double().numpy())
    return replace(session, roles=lora), replace(conversion, rms=rms, correlation=correlation)


Read = Callable[[SharedBase], Tensor]


def _completed(session: Session, role: Role, trunk: Role) -> tuple[int, Read]:
    """Sample completions of held-out prompts; return their number and a reader of their tokens' states (N, D)."""
    chat, rl = session.base.chat, session.recipe.rl
    length = rl.max_new_tokens if rl is not None else MAX_NEW_TOKENS
    length = min(length, session.base.context_length - 1)
    records = session.held_out.prompts or session.held_out.demonstrations
    contexts = [one.context for one in records[:ROWS]]
    prompts = [chat.context(context, session.base.context_length - length) for context in contexts]
    sampling = Sampling(length, _temperature(session), chat.ends(contexts[0]), chat.pad_id, BATCH_SIZE)
    generator = torch.Generator(session.device).manual_seed(derived_seed(session.recipe.seed, "conversion", 0))
    samples = LocalSampler(session.roles).draw(role, prompts, sampling, generator)

    def read(roles: SharedBase) -> Tensor:
        found = []
        for start in range(0, len(prompts), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            batch = samples.ids_BL[part], samples.mask_BL[part]
            states = roles(trunk, *batch, completion_length=samples.completion_length, states=True).states_BTD
            assert states is not None
            found.append(states[samples.completion_mask_BT[part]])
        return torch.cat(found)

    return len(prompts), read


def _scored(session: Session, role: Role, trunk: Role) -> tuple[int, Read]:
    """Return the number of held-out rows, and a reader of their scores (N,), fp32 on the CPU."""
    chat, longest = session.base.chat, session.base.context_length
    rows = [chat.row(context, answer, longest).ids for context, answer in answered(session)[:ROWS]]
    rows = rows or [chat.context(one.context, longest) for one in session.held_out.prompts[:ROWS]]

    def read(roles: SharedBase) -> Tensor:
        scores: list[Tensor] = []
        for ids in rows:
            found = roles(trunk, *left_pad([ids], chat.pad_id, roles.device), head=role).scores_B
            assert found is not None
            scores.append(found.cpu())
        return torch.cat(scores)

    return len(rows), read


def answered(session: Session) -> list[tuple[Context, Turn]]:
    """Return the rated held-out answers, or the better answers of the held-out comparisons."""
    records = session.held_out
    rated = [(one.context, one.answer) for one in records.ratings]
    return rated or [(one.context, one.better) for one in records.comparisons]


def _temperature(session: Session) -> float:
    return session.recipe.rl.temperature if session.recipe.rl is not None else 1.0
