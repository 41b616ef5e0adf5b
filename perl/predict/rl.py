"""The cost of an RL step: real steps on the longest prompts and completions possible.

On fake tensors we compute only what determines a step's peak memory: in sampling the last prompts, and some tokens
in the middle and at the end, and then two micro-batches. Their tensors are views of the whole batch's, which stay
in memory as in a real step; what a real step computes later for other rows, some numbers per token, is omitted.
The computed operations are counted as often as they occur in the whole step.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from perl.predict.counting import CountingMeter
from perl.predict.trial import TrialSession, Tried
from perl.recipe.reward_parts import LengthPart, ServerPart
from perl.rl import trust_region
from perl.rl.evaluate import describe
from perl.rl.loop import Loop, collect, estimate, update
from perl.rl.rollout import EncodedPrompts
from perl.rl.samplers.base import Read, Samples, Sampling, Share
from perl.rl.samplers.local import Drawing, Groups, LocalSampler
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.stages.rl_setup import eval_prompts, setup
from perl.system.progress import track

MICRO_BATCHES = 2
"""Micro-batches per rollout on fake tensors: during the second, everything from the first is in memory."""
HEAD_RATE = 1e-3
"""Replaces `auto`, which is computed from hidden states, since fake ones have no values."""


def try_rl(session: TrialSession) -> Tried:
    """Take the trial's steps, without checks, evaluation or saving.

    Every rollout is trained on, with or without a signal, and no completion ends early.
    """
    held_out = eval_prompts(session)
    loop = setup(_for_trial(session), held_out)
    sampling = replace(loop.collector.sampling, end_ids=())
    prompts = longest_prompts(loop)
    sampler = loop.collector.sampler
    if session.trial.abridged:
        assert isinstance(loop.meter, CountingMeter)
        sampler, count = AbridgedSampler(session.roles, prompts.ids, loop.meter), len(prompts)
        prompts = prompts.take(range(_first_completion(loop), count))
        _scale_counts(loop, loop.meter, count / len(prompts))
    loop.collector = replace(loop.collector, sampling=sampling, sampler=sampler)
    steps = session.trial.steps
    with session.folder.metrics(Role.POLICY) as log, track("rl", steps) as bar:
        for step in range(steps):
            with loop.meter.step(loop.learner.optimizer):
                local, rollout = collect(loop, step, prompts)
                targets = estimate(loop, rollout, loop.objective.normalized(step, rollout, loop.reward_scale))
                metrics = update(loop, step, local, rollout, targets)
            log.write(step + 1, describe(rollout, session.train.judge) | metrics)
            bar()
    return session.tried(loop.meter)


def _scale_counts(loop: Loop, meter: CountingMeter, share: float) -> None:
    """Count the operations on the trial's rows `share` times, but those of optimizer steps only once."""
    meter.repeats = {"score": share, "update": share}
    optimizer, inside = loop.learner.optimizer, contextlib.ExitStack()
    optimizer.register_step_pre_hook(lambda *_: inside.enter_context(meter.once()))
    optimizer.register_step_post_hook(lambda *_: inside.close())


def _first_completion(loop: Loop) -> int:
    """Return the index of the first completion in the trial: whole groups, since completions are compared."""
    size, each = loop.learner.micro_batch_size, loop.samples_per_prompt
    if size % each and each % size:
        return 0  # micro-batches split groups at different places, and have different numbers of prompts
    kept = MICRO_BATCHES * size
    if loop.algorithm.trust_region is not None:
        kept = max(kept, trust_region.COMPLETIONS)  # the probe needs all of its completions
    first = max(0, loop.prompts_per_step * each - kept)
    return first - first % each


def longest_prompts(loop: Loop) -> EncodedPrompts:
    """Return the longest prompts for one step, the longest last."""
    longest = sorted(range(len(loop.prompts)), key=lambda place: -len(loop.prompts.ids[place]))
    chosen = [longest[place % len(longest)] for place in range(loop.prompts_per_step)]
    chosen.sort(key=lambda place: len(loop.prompts.ids[place]))
    return loop.prompts.take(chosen).repeat(loop.samples_per_prompt)


def _for_trial(session: TrialSession) -> TrialSession:
    settings = session.recipe.rl
    assert settings is not None
    steps = max(settings.steps, session.trial.steps)  # the learning-rate schedule needs as many
    changes: dict[str, object] = {"eval_steps": None, "steps": steps}  # validation needs less memory than a step
    if any(isinstance(part, ServerPart) for part in settings.reward_parts):  # which costs nothing here
        length = LengthPart(kind="length")
        changes["reward"] = [length if isinstance(part, ServerPart) else part for part in settings.reward_parts]
    settings = settings.model_copy(update=changes)
    if settings.head_learning_rate == "auto":
        settings = settings.model_copy(update={"head_learning_rate": HEAD_RATE})
    return replace(session, recipe=session.recipe.model_copy(update={"rl": settings}))


class AbridgedSampler(LocalSampler):
    """Samples a whole batch, but computes only a few tokens, and returns the last rows.

    Args:
        batch: the tokens of all its prompts.
        meter: gets the number of times that the computed operations occur in a real batch.
    """

    def __init__(self, roles: Roles, batch: Sequence[Sequence[int]], meter: CountingMeter) -> None:
        super().__init__(roles)
        self._batch, self._meter = batch, meter

    def draw(
        self,
        role: Role,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
        read: Read | None = None,
    ) -> Samples:
        """Return samples for the last prompts of the batch."""
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
        drawing = _AbridgedDrawing(self.roles, prompts, sampling, uniform_BT, read, seen)
        drawing.meter = self._meter
        return drawing


class _AbridgedDrawing(Drawing):
    meter: CountingMeter

    def steps(self) -> Iterator[int]:
        """Yield the first step, two in the middle and the last two.

        In the first, the attention kernel is tested; in the second, the cache grows to its current size; the third
        also counts for all omitted steps.
        """
        middle = self.length // 2 | 1  # odd, so that the cache does not grow in the next one
        tried = [0, middle, middle + 1, self.length - 2, self.length - 1]
        if self.length < 2 * len(tried):
            tried = list(range(self.length))
        filled = 0
        for step in tried:
            self.mask_BL = F.pad(self.mask_BL, (0, step - filled), value=1)
            self.cache.skip(step - filled)
            counts = self.length - len(tried) + 1 if step == tried[2] else 1
            self.meter.repeats["generate"] = counts
            yield step
            filled = step + 1
        self.meter.repeats["generate"] = 1

    def prefill_groups(self, groups: Groups, rows: slice) -> Tensor:
        """Prefill only the last groups, which are the longest."""
        if rows.stop == len(self.prompts):
            different = len(set(map(tuple, self.prompts)))
            self.meter.repeats["generate"] = -(-different // self.sampling.prompts_at_once)
            hidden_BD = super().prefill_groups(groups, rows)
            self.meter.repeats["generate"] = 1
            return hidden_BD
        weight_VD: Tensor = self.model.get_output_embeddings().weight
        return weight_VD.new_zeros(rows.stop - rows.start, weight_VD.shape[1])
