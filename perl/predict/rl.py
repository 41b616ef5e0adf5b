"""What a step of RL costs: the real steps, on the longest prompts and completions there can be.

On fake tensors only what decides a step's peak memory is computed: of the batch that is sampled the last prompts
and the first and the last token, and two micro-batches of it. Their tensors are views of the whole batch's, which
stay in memory as in a real step; what is computed later of other rows, some numbers a token, is left out.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perl.predict.trial import TrialSession, Tried
from perl.recipe.rewards import LengthPart, ServerPart
from perl.rl import trust_region
from perl.rl.evaluate import describe
from perl.rl.loop import Loop, collect, estimate, update
from perl.rl.rollout import EncodedPrompts
from perl.rl.samplers.base import Read, Samples, Sampling, Share
from perl.rl.samplers.local import Drawing, Groups, LocalSampler
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.stages.rl_setup import eval_prompts, setup

MICRO_BATCHES = 2
"""Of a rollout on fake tensors: in the second, all that the first has made is in memory."""
HEAD_RATE = 1e-3
"""Stands for `auto`, which is computed from hidden states: fake ones have no values."""


def try_rl(session: TrialSession) -> Tried:
    """Take the trial's steps; nothing is checked, evaluated or saved.

    Every rollout is learned from, with or without a signal, and no completion ends early.
    """
    held_out = eval_prompts(session)
    loop = setup(_as_tried(session), held_out)
    sampling = replace(loop.collector.sampling, end_ids=())
    prompts = longest_prompts(loop)
    sampler = loop.collector.sampler
    if session.trial.abridged:
        sampler = AbridgedSampler(session.roles, prompts.ids)
        prompts = prompts.take(range(_first_tried(loop), len(prompts)))
    loop.collector = replace(loop.collector, sampling=sampling, sampler=sampler)
    with session.folder.metrics(Role.POLICY) as log:
        for step in range(session.trial.steps):
            with loop.meter.step(loop.learner.optimizer):
                local, rollout = collect(loop, step, prompts)
                targets = estimate(loop, rollout, loop.objective.normalized(step, rollout, loop.reward_scale))
                metrics = update(loop, step, local, rollout, targets)
            log.write(step + 1, describe(rollout, session.train.judge) | metrics)
    return session.tried(loop.meter, session.roles.parameters_of(*loop.learner.trained))


def _first_tried(loop: Loop) -> int:
    """The first completion of those that are tried: whole groups, since they are compared."""
    size, each = loop.learner.micro_batch_size, loop.samples_per_prompt
    if size % each and each % size:
        return 0  # micro-batches cut groups in various places, and have various numbers of prompts
    kept = MICRO_BATCHES * size
    if loop.algorithm.trust_region is not None:
        kept = max(kept, trust_region.COMPLETIONS)  # the probe is whole
    first = max(0, loop.prompts_per_step * each - kept)
    return first - first % each


def longest_prompts(loop: Loop) -> EncodedPrompts:
    """A step's worth of the longest prompts, the longest last."""
    longest = sorted(range(len(loop.prompts)), key=lambda place: -len(loop.prompts.ids[place]))
    chosen = [longest[place % len(longest)] for place in range(loop.prompts_per_step)]
    chosen.sort(key=lambda place: len(loop.prompts.ids[place]))
    return loop.prompts.take(chosen).repeat(loop.samples_per_prompt)


def _as_tried(session: TrialSession) -> TrialSession:
    settings = session.recipe.rl
    assert settings is not None
    steps = max(settings.steps, session.trial.steps)  # of fewer there is no learning rate
    changes: dict[str, Any] = {"eval_steps": None, "steps": steps}  # validation takes less than a step
    if any(isinstance(part, ServerPart) for part in settings.reward_parts):  # which takes nothing here
        length = LengthPart(kind="length")
        changes["reward"] = [length if isinstance(part, ServerPart) else part for part in settings.reward_parts]
    settings = settings.model_copy(update=changes)
    if settings.head_learning_rate == "auto":
        settings = settings.model_copy(update={"head_learning_rate": HEAD_RATE})
    return replace(session, recipe=session.recipe.model_copy(update={"rl": settings}))


class AbridgedSampler(LocalSampler):
    """Draws a whole batch, of which the first and the last token are computed, and returns its last rows.

    Args:
        batch: the tokens of all its prompts.
    """

    def __init__(self, roles: Roles, batch: Sequence[Sequence[int]]) -> None:
        super().__init__(roles)
        self._batch = batch

    def draw(
        self,
        role: Role,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
        read: Read | None = None,
    ) -> Samples:
        """For the last prompts of the batch."""
        samples, first = super().draw(role, self._batch, sampling, generator, None, read), -len(prompts)
        # Slices, unlike `take`, are views of the whole batch's tensors.
        kept: dict[str, Any] = {
            name: None if rows is None else rows[first:] for name, rows in vars(samples).items()
        }
        return Samples(**kept)

    def drawing(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        uniform_BT: Tensor,
        read: Read | None,
        seen: list[Tensor],
    ) -> Drawing:
        return _AbridgedDrawing(self.roles, prompts, sampling, uniform_BT, read, seen)


class _AbridgedDrawing(Drawing):
    def steps(self) -> Iterable[int]:
        """The last two positions; computed is the last token."""
        left_out = max(0, self.length - 2)
        self.mask_BL = F.pad(self.mask_BL, (0, left_out), value=1)
        self.cache.skip(left_out)
        return range(left_out, self.length)

    def prefill_groups(self, groups: Groups, rows: slice) -> Tensor:
        """The last, which are the longest."""
        if rows.stop == len(self.prompts):
            return super().prefill_groups(groups, rows)
        weight_VD: Tensor = self.model.get_output_embeddings().weight
        return weight_VD.new_zeros(rows.stop - rows.start, weight_VD.shape[1])
