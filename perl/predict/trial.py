"""A stage tried for what it costs: its own setup and a few of its steps on the longest rows there are.

Nothing is evaluated or kept: the folder is temporary, and the roles of earlier stages are new.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from transformers.trainer_utils import SaveStrategy

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
"""Records of each kind that are kept, the longest; more where the steps take more."""


@dataclass(frozen=True)
class Trial:
    """How a stage is tried."""

    steps: int
    abridged: bool = False
    """On fake tensors: no more is computed of a step than decides its peak memory."""
    measured: bool = True
    """Whether memory and operations are measured, which slows small models."""


@dataclass(frozen=True, kw_only=True)
class Tried(Cost):
    """What a trial found: the cost of its steps, and the seconds of each by phase."""

    step_seconds: list[dict[Phase, float]]
    work: dict[Phase, Work]
    """Of a step, on fake tensors."""
    around_gradients: tuple[dict[Phase, PhaseMemory], dict[Phase, PhaseMemory]]
    """See `Timeline`; on fake tensors."""


@dataclass
class TrialSession(Session):
    """A session to try one stage in."""

    trial: Trial = Trial(2)

    def meter(self) -> Meter:
        """A meter of what the trial is for."""
        if self.trial.abridged:
            return CountingMeter(self.device, self.resident(), [], self.trial.steps)
        return Meter(
            self.device, self.resident(), self.roles.trunks(), MEASURED_STEPS if self.trial.measured else 0
        )

    @property
    def report_to(self) -> Sequence[str]:
        """Nothing is sent."""
        return ()

    def start(self, role: Role, *, quiet: bool = False) -> None:
        """Nothing: what is new costs as much as what was trained."""

    def load(self, role: Role) -> None:
        """Add a role with new weights in the place of trained ones."""
        if role not in self.roles.roles:
            self.roles.add(role, head=role.has_head)

    def stamp(self, role: Role) -> Stamp:
        return stamp_for(role, self.base)

    def take_steps(self, trainer: ResumableTrainer) -> Tried:
        """Train for the steps that the trainer was made for; what they cost."""
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.resume()
        return self.tried(trainer.run.meter)

    def tried(self, meter: Meter) -> Tried:
        """What its steps cost."""
        counted = meter if isinstance(meter, CountingMeter) else None
        return Tried(
            **vars(meter.cost()),
            step_seconds=meter.step_seconds,
            work=counted.work() if counted else {},
            around_gradients=counted.around_gradients() if counted else ({}, {}),
        )


@contextlib.contextmanager
def trial_session(recipe: Recipe, trial: Trial) -> Iterator[TrialSession]:
    """A session on the recipe's base in a temporary folder, seeded as a run's stages are.

    Raises:
        UserError: as `open_session`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        opened = vars(open_session(recipe, Path(scratch)))
        session = TrialSession(**opened | {"train": longest(opened["train"], recipe, trial.steps), "trial": trial})
        seed_everything(recipe.seed)
        yield session


def longest(records: Records, recipe: Recipe, steps: int) -> Records:
    """The records that decide the peak, in characters: enough for so many steps of every stage."""
    sizes = [section.batch_size for section in (recipe.sft, recipe.reward) if section is not None]
    count = max(ROWS, steps * max([*sizes, recipe.rl.prompts_per_step if recipe.rl is not None else 0]))

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
            records.comparisons, lambda one: size(one.context) + max(len(one.better.text), len(one.worse.text))
        ),
        prompts=top(records.prompts, lambda one: size(one.context)),
        corpus=[],
    )
