"""Trials that measure a stage's cost: its own setup and a few of its steps on the longest rows.

Nothing is evaluated or saved: the folder is temporary, and the roles of earlier stages have new weights.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from transformers.trainer_utils import SaveStrategy

from perl.data.pairs import to_compare
from perl.data.records import Rating, Records, Turn
from perl.measure.cost import Cost
from perl.measure.meter import MEASURED_STEPS, Meter
from perl.measure.probe import Phase, PhaseMemory
from perl.predict.counting import CountingMeter, Work
from perl.recipe import Recipe
from perl.roles.role import Role
from perl.roles.saved import Stamp, stamp_for
from perl.stages.opening import open_session
from perl.stages.session import Session
from perl.stages.training import ResumableTrainer
from perl.system.seeds import seed_everything

T = TypeVar("T")
ROWS = 128
"""Number of the longest records of each kind that are kept; more if the steps need more."""


@dataclass(frozen=True)
class Trial:
    """Settings of a trial."""

    steps: int
    abridged: bool = False
    """Whether it runs on fake tensors and computes only what determines a step's peak memory."""
    measured: bool = True
    """Whether memory and operations are measured, which slows down small models."""


@dataclass(frozen=True, kw_only=True)
class Tried(Cost):
    """The result of a trial: the cost of its steps, and the seconds of each by phase."""

    step_seconds: list[dict[Phase, float]]
    work: dict[Phase, Work]
    """Operations of a step, on fake tensors."""
    around_gradients: tuple[dict[Phase, PhaseMemory], dict[Phase, PhaseMemory]]
    """See `Timeline`; on fake tensors."""


@dataclass
class TrialSession(Session):
    """A session for the trial of one stage."""

    trial: Trial = Trial(2)

    def meter(self) -> Meter:
        """Return the meter for this kind of trial."""
        if self.trial.abridged:
            return CountingMeter(self.device, self.resident(), [], self.trial.steps)
        return Meter(
            self.device, self.resident(), self.roles.trunks(), MEASURED_STEPS if self.trial.measured else 0
        )

    @property
    def report_to(self) -> Sequence[str]:
        """No trackers: nothing is reported."""
        return ()

    def start(self, role: Role, *, quiet: bool = False) -> None:
        """Do nothing: new weights cost as much as trained ones."""

    def load(self, role: Role) -> None:
        """Add a role with new weights in place of trained ones."""
        if role not in self.roles.roles:
            self.roles.add(role, head=role.has_head)

    def stamp(self, role: Role) -> Stamp:
        return stamp_for(role, self.base)

    def take_steps(self, trainer: ResumableTrainer) -> Tried:
        """Train for the trainer's number of steps, and return their cost."""
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.resume()
        return self.tried(trainer.run.meter)

    def tried(self, meter: Meter) -> Tried:
        """Return the cost of the steps."""
        counted = meter if isinstance(meter, CountingMeter) else None
        return Tried(
            **vars(meter.cost()),
            step_seconds=meter.step_seconds,
            work=counted.work() if counted else {},
            around_gradients=counted.around_gradients() if counted else ({}, {}),
        )


@contextlib.contextmanager
def trial_session(recipe: Recipe, trial: Trial) -> Iterator[TrialSession]:
    """Open a session on the recipe's base in a temporary folder, seeded like a run's stages.

    Raises:
        UserError: as in `open_session`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        opened = vars(open_session(recipe, Path(scratch)))
        session = TrialSession(**opened | {"train": longest(opened["train"], recipe, trial.steps), "trial": trial})
        seed_everything(recipe.seed)
        yield session


def longest(records: Records, recipe: Recipe, steps: int) -> Records:
    """Return the longest records, in characters, which determine the peak: enough for `steps` of every stage.

    Pairs are made first, because the longest ratings need not have contexts in common.
    """
    sizes = [section.batch_size for section in (recipe.sft, recipe.reward) if section is not None]
    count = max(ROWS, steps * max([*sizes, recipe.rl.prompts_per_step if recipe.rl is not None else 0]))

    comparisons = records.comparisons if recipe.reward is None else to_compare(records, recipe.reward.loss)

    def size(turns: Sequence[Turn]) -> int:
        return sum(len(turn.text) for turn in turns)

    def top(rows: Iterable[T], key: Callable[[T], int]) -> list[T]:
        return sorted(rows, key=key, reverse=True)[:count]

    def rated(label: bool) -> list[Rating]:
        return top(
            (one for one in records.ratings if one.label is label), lambda one: size((*one.context, one.answer))
        )

    return replace(
        records,
        demonstrations=top(records.demonstrations, lambda one: size((*one.context, *one.answer))),
        ratings=[*rated(True), *rated(False)],  # a reward model needs both
        comparisons=top(
            comparisons, lambda one: size(one.context) + max(len(one.better.text), len(one.worse.text))
        ),
        prompts=top(records.prompts, lambda one: size(one.context)),
        corpus=None,
    )
