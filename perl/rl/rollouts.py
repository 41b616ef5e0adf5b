"""Rollouts of several processes: each answers its share of the prompts, and all learn what came of all of them.

Axis letters: B answers, T answer positions.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from perl.measure.probe import Phase
from perl.rl.algorithms import Scored
from perl.rl.rewards.combination import CombinedReward
from perl.rl.rollout import Answers, EncodedPrompts, answer, read_answers, score, scored
from perl.rl.samplers.local import Samples, Sampling, Share
from perl.roles.roles import Role
from perl.stages.session import Session

Phases = Callable[[Phase], AbstractContextManager[None]]
"""Measures what is done inside as a phase."""


class Rollout(NamedTuple):
    """Answers, and what is known of them before the policy learns."""

    answers: Answers
    scored: Scored


def _unmeasured(name: Phase) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


def roll_out(
    session: Session,
    reward: CombinedReward,
    role: Role,
    prompts: EncodedPrompts,
    sampling: Sampling,
    generator: torch.Generator,
    *,
    shared: Role | None = None,
    critic: Role | None = None,
    phase: Phases = _unmeasured,
) -> Rollout:
    """Sample and score this process's share: answers of a role, their rewards, reference and values.

    Args:
        prompts: of all processes.
        shared: the role whose head reads values on the sampling role's trunk.
        critic: the role that reads values as itself.
    """
    roles, settings = session.roles, session.recipe.rl
    assert settings is not None
    rows = session.processes.shard(len(prompts))
    mine, at_once = prompts.take(rows), settings.micro_batch_size
    with phase("generate"):
        samples, texts = answer(
            roles, role, session.base.chat, mine, sampling, generator, shared, Share(rows, len(prompts))
        )
    with phase("score"):
        answers = score(reward, mine, samples, texts)
        reference_BT, _ = read_answers(
            roles, roles.reference, samples, at_once, temperature=settings.temperature, head=None
        )
        values_BT = samples.values_BT
        if critic is not None:
            _, values_BT = read_answers(roles, critic, samples, at_once, temperature=None, head=critic)
    assert reference_BT is not None
    return Rollout(answers, scored(answers, reference_BT, values_BT))


def everyones(session: Session, prompts: EncodedPrompts, mine: Rollout) -> Rollout:
    """The rollout of all processes in the order of the prompts, the shared blocks' states left out."""
    processes, (answers, found) = session.processes, mine
    if processes.count == 1:
        return mine
    samples = answers.samples
    columns = samples.ids_BL.shape[1]
    samples = _wider(samples, processes.all_reduce_max(columns) - columns)._replace(lower_hidden_BLD=None)
    parts_B = tuple(answers.reward_parts.values())
    parts = processes.all_gather(_on_host((answers.texts, samples, answers.rewards_B, parts_B, found)))
    texts, samples, rewards_B, parts_B, found = _joined(parts, len(prompts), session.device)
    return Rollout(
        Answers(prompts.prompts, texts, samples, rewards_B, dict(zip(answers.reward_parts, parts_B, strict=True))),
        found,
    )


def _wider(samples: Samples, columns: int) -> Samples:
    """So many more columns of padding on the left."""
    ids_BL, mask_BL = (F.pad(tensor, (columns, 0)) for tensor in (samples.ids_BL, samples.mask_BL))
    return samples._replace(ids_BL=ids_BL, mask_BL=mask_BL)


def _on_host(value: Any) -> Any:
    """The same with its tensors on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, tuple):
        parts = [_on_host(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _joined(parts: list[Any], total: int, device: torch.device) -> Any:
    """Values that each has rows, as one that has the first `total` rows of all."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)[:total].to(device)
    if isinstance(first, list):
        return [row for part in parts for row in part][:total]
    if isinstance(first, tuple):
        joined = [_joined(list(part), total, device) for part in zip(*parts, strict=True)]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    return first
