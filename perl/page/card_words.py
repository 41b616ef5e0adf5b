"""Whether the reward model is fit for RL, over the seeds of one recipe."""

from collections.abc import Sequence
from dataclasses import dataclass

from perl.page.schema import RewardEval


@dataclass(frozen=True)
class Finding:
    """The verdict in a few words, why, and its kind: good, bad or open."""

    headline: str
    reasons: list[str]
    kind: str


def fitness(cards: Sequence[RewardEval]) -> Finding | None:
    """Fit in all seeds, in some or in none; None of cards without a verdict.

    The reasons are those of the first seed that is not fit; where all are fit, of the first.
    """
    verdicts = [card.verdict for card in cards if card.verdict is not None]
    if not verdicts or len(verdicts) < len(cards):
        return None
    count, fit = len(verdicts), sum(verdict.fit for verdict in verdicts)
    reasons = next((verdict.reasons for verdict in verdicts if not verdict.fit), verdicts[0].reasons)
    kind = "good" if fit == count else "open" if fit else "bad"
    seeds = "" if count == 1 else f" in {'all' if fit == count else f'{fit} of'} {count} seeds"
    return Finding(f"{'Fit' if fit else 'Not fit'} for RL{seeds if fit else ''}.", reasons, kind)
