"""Predicted seconds of a recipe's steps by phase, and of the whole recipe, from counted operations and a device.

A kernel call takes the overhead of calling it plus the roofline time of its operations and bytes. If the device
computes asynchronously, a phase takes the larger of the two sums; on a CPU it takes both.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from perl.measure.probe import Phase
from perl.predict.counting import Work
from perl.predict.device import Device
from perl.predict.subject import Rows
from perl.recipe import Recipe, Rl, StageName
from perl.recipe.supervised import Supervised
from perl.rl.evaluate import samples_per_prompt
from perl.stages.training_run import optimizer_steps

FORWARD = 1 / 3
"""Share of the forward pass in a training step: the backward pass has twice as many operations."""


@dataclass(frozen=True)
class StageTime:
    """Predicted seconds of a stage."""

    step: dict[Phase, float]
    """A step on the longest rows, with completions of maximum length, by phase."""
    steps: int
    training: float
    """All steps, on rows of the typical length."""
    evaluation: float
    """All evaluations before, between and after the steps."""
    draws_at_most: int
    """Maximum number of times that a step generates and scores if groups are redrawn; `training` includes one."""

    @property
    def total(self) -> float:
        return self.training + self.evaluation


def phase_seconds(work: Work, device: Device, share: float = 1.0) -> float:
    """Predict the seconds of a phase's work.

    Args:
        share: factor on the device's computation, for shorter rows; the number of calls stays the same.
    """
    calls = sum(count * device.call[operation.issuer] for operation, count in work.items())
    computed = share * sum(count * device.seconds(operation) for operation, count in work.items())
    return max(calls, computed) if device.asynchronous else calls + computed


def stage_time(
    recipe: Recipe, stage: StageName, work: Mapping[Phase, Work], rows: Rows, device: Device
) -> StageTime:
    """Predict the seconds of a stage.

    Args:
        work: of a step, as traced.
        rows: the stage's rows.
    """
    step = {phase: phase_seconds(one, device) for phase, one in work.items()}
    if stage == "rl":
        assert recipe.rl is not None
        return _rl_time(recipe.rl, work, rows, device, step)
    settings = recipe.section(stage)
    assert isinstance(settings, Supervised)
    share = _share(rows, settings.max_length)
    usual = sum(phase_seconds(one, device, share) for one in work.values())
    members = recipe.reward.members if stage == "reward" and recipe.reward is not None else 1
    held_back = 0 if settings.eval_steps is None else round(settings.validation_share * rows.train)
    of_member = optimizer_steps(rows.train - held_back, settings)
    judged = (2 if stage == "sft" else members) * rows.held_out
    judged += members * _validations(of_member, settings.eval_steps) * held_back
    steps = members * of_member
    return StageTime(step, steps, steps * usual, judged / settings.batch_size * usual * FORWARD, 1)


def _rl_time(
    settings: Rl, work: Mapping[Phase, Work], rows: Rows, device: Device, step: dict[Phase, float]
) -> StageTime:
    share = _share(rows, settings.max_prompt_length, settings.max_new_tokens)
    # Most of the time of generation is reading weights, whatever the rows' length.
    usual = {
        phase: phase_seconds(one, device, 1.0 if phase == "generate" else share) for phase, one in work.items()
    }
    drawn = usual.get("generate", 0.0) + usual.get("score", 0.0)
    completions = settings.prompts_per_step * settings.samples_per_prompt
    prompts = min(settings.eval_prompts, rows.held_out)
    validations = _validations(settings.steps, settings.eval_steps)
    each = settings.eval_samples or samples_per_prompt(prompts)
    judged = prompts * each * (2 + (settings.best_of_n > 1) + validations)
    return StageTime(
        step,
        settings.steps,
        settings.steps * sum(usual.values()),
        judged / completions * drawn,
        1 + settings.row.redraws,
    )


def _validations(steps: int, every: int | None) -> int:
    """Return the number of validations, one of which is after the last step."""
    return 0 if every is None else -(-steps // every)


def _share(rows: Rows, limit: int | None, extra: int = 0) -> float:
    """Return the ratio of tokens of typical to longest rows; `extra` tokens are added to both."""
    longest, usual = (min(one, limit) if limit is not None else one for one in (rows.longest, rows.usual))
    return (usual + extra) / (longest + extra)
