"""Which prompts a step takes, and what is remembered of them: Kimi k1.5's curriculum and prioritised sampling.

Kimi Team 2025, arXiv 2501.12599, section 2.3.4. What is remembered are counts; what is drawn follows from them,
the seed and the step's number.
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
"""Share of the steps after which the hardest prompts are among those that are drawn."""


@dataclass
class PromptChoice:
    """Chooses among `count` prompts.

    Attributes:
        easiest_first: the prompts by their difficulty, for a curriculum that knows it.
        tries: completions of each prompt so far; those of none are left out.
        successes: of these, the right ones.
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
        """Whether nobody has said how difficult the prompts are."""
        return self.kind == "curriculum" and self.easiest_first is None

    def success_rate(self, prompt: int) -> float:
        """So far; 0 of a prompt that was never completed."""
        return self.successes.get(prompt, 0) / max(1, self.tries.get(prompt, 0))

    def of_step(self, step: int, draw: int = 0) -> list[int]:
        """The prompts of a step.

        uniform: all are seen once before any is seen again. prioritised: in proportion to 1 - success rate.
        curriculum: uniformly from the easiest, more of them with each step, until all are among them; from then on
        prioritised.

        Args:
            draw: 0, or the number of a draw that replaces prompts which taught nothing.
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
        """Count completions: of each the prompt, and whether it is right."""
        if self.kind == "uniform":
            return
        for prompt, is_right in zip(prompts, right, strict=True):
            self.tries[prompt] = self.tries.get(prompt, 0) + 1
            self.successes[prompt] = self.successes.get(prompt, 0) + is_right

    def state_dict(self) -> dict[str, object]:
        """All that is remembered, as JSON."""
        return {
            "easiest_first": self.easiest_first,
            "tries": list(self.tries.items()),
            "successes": list(self.successes.items()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.easiest_first = state["easiest_first"]
        self.tries, self.successes = (
            {prompt: count for prompt, count in state[name]} for name in ("tries", "successes")
        )


def _drawn(pool: Sequence[int], weights: Sequence[float], count: int, generator: random.Random) -> list[int]:
    """So many of the pool, each in proportion to its weight, none twice before all others are drawn.

    The keys are Efraimidis and Spirakis' (2006): u^(1/w), the largest win; those of weight 0 come last.
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
    """The prompts by their column `difficulty`; None where none has one.

    Raises:
        UserError: some have one and others have not, or it is not a number.
    """
    found = [prompt.columns.get("difficulty") for prompt in prompts]
    if all(one is None for one in found):
        return None
    numbers = [one for one in found if isinstance(one, int | float)]
    if len(numbers) < len(found):
        raise UserError(
            f"{len(found) - len(numbers):,} of {counted(len(found), 'prompt')} without a number as difficulty",
            where=where,
            remedy="Give all prompts a difficulty, or none: then the success rate at the start is measured.",
        )
    return sorted(range(len(numbers)), key=numbers.__getitem__)
