"""Choice of a step's prompts, including Kimi k1.5's curriculum and prioritised sampling.

Kimi Team 2025, arXiv 2501.12599, section 2.3.4. The state consists of counts; the choice is a function of them,
the seed and the step number.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perl.data.records import Prompt
from perl.errors import UserError
from perl.rl.algorithm import PromptSampling
from perl.rl.prompts import prompts_of
from perl.system.progress import counted
from perl.system.seeds import derived_seed

CURRICULUM = 0.5
"""Share of the steps after which the hardest prompts are included."""


@dataclass
class PromptChoice:
    """Chooses among `count` prompts.

    Attributes:
        easiest_first: the prompts in order of difficulty, for a curriculum once the difficulty is known.
        tries: number of completions of each prompt so far, without prompts that have none.
        successes: number of correct completions among them.
    """

    kind: PromptSampling
    count: int
    per_step: int
    steps: int
    seed: int
    easiest_first: list[int] | None = None
    tries: dict[int, int] = field(default_factory=dict)
    successes: dict[int, int] = field(default_factory=dict)

    @property
    def must_measure(self) -> bool:
        """Whether the difficulty of the prompts must be measured first."""
        return self.kind == "curriculum" and self.easiest_first is None

    def success_rate(self, prompt: int) -> float:
        """Return a prompt's success rate so far; 0 if it was never completed."""
        return self.successes.get(prompt, 0) / max(1, self.tries.get(prompt, 0))

    def of_step(self, step: int, draw: int = 0) -> list[int]:
        """Return the prompts of a step.

        uniform: all are seen once before any is seen again. prioritised: in proportion to 1 - success rate.
        curriculum: uniformly from the easiest, more of them with each step until all are included; then
            prioritised.

        Args:
            draw: 0, or the number of a redraw that replaces prompts without a signal.
        """
        if self.kind == "uniform" and draw == 0:
            return prompts_of(step, self.per_step, self.count, self.seed)
        pool, weights = list(range(self.count)), [1.0] * self.count
        opened = (step + 1) / (CURRICULUM * self.steps)
        if self.kind == "curriculum" and opened < 1:
            assert self.easiest_first is not None
            pool = self.easiest_first[: max(self.per_step, round(opened * self.count))]
            weights = [1.0] * len(pool)
        elif self.kind != "uniform":
            weights = [1.0 - self.success_rate(prompt) for prompt in pool]
        return _drawn(
            pool, weights, self.per_step, random.Random(derived_seed(self.seed, f"prompts {draw}", step))
        )

    def learn(self, prompts: Sequence[int], right: Sequence[bool]) -> None:
        """Count completions, given the prompt of each and whether it is correct."""
        if self.kind == "uniform":
            return
        for prompt, is_right in zip(prompts, right, strict=True):
            self.tries[prompt] = self.tries.get(prompt, 0) + 1
            self.successes[prompt] = self.successes.get(prompt, 0) + is_right

    def state_dict(self) -> dict[str, object]:
        """Return the whole state, as JSON."""
        return {
            "easiest_first": self.easiest_first,
            "tries": list(self.tries.items()),
            "successes": list(self.successes.items()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by `state_dict`."""
        self.easiest_first = state["easiest_first"]
        self.tries, self.successes = (
            {prompt: count for prompt, count in state[name]} for name in ("tries", "successes")
        )


def _drawn(pool: Sequence[int], weights: Sequence[float], count: int, generator: random.Random) -> list[int]:
    """Draw `count` items in proportion to their weights, none twice before all others are drawn.

    The keys are those of Efraimidis and Spirakis (2006), u^(1/w), largest first; items of weight 0 come last.
    """
    drawn: list[int] = []
    while len(drawn) < count:
        keys = [
            (weight > 0, generator.random() ** (1.0 / weight) if weight > 0 else generator.random(), prompt)
            for prompt, weight in zip(pool, weights, strict=True)
        ]
        drawn += [prompt for *_, prompt in sorted(keys, reverse=True)]
    return drawn[:count]


def easiest_first(prompts: Sequence[Prompt], where: str) -> list[int] | None:
    """Return the prompts sorted by their column `difficulty`; None if none has one.

    Raises:
        UserError: only some prompts have one, or it is not a number.
    """
    found = [prompt.columns.get("difficulty") for prompt in prompts]
    if all(one is None for one in found):
        return None
    numbers = [one for one in found if isinstance(one, int | float)]
    if len(numbers) < len(found):
        raise UserError(
            f"{len(found) - len(numbers):,} of {counted(len(found), 'prompt')} have no number as difficulty",
            where=where,
            remedy="Give all prompts a difficulty, or none: then the initial success rate is measured instead.",
        )
    return sorted(range(len(numbers)), key=numbers.__getitem__)
