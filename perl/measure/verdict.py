"""Verdict whether a reward model is fit for RL: the criteria that it has to meet, each with its value."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from perl.measure.bootstrap import Interval
from perl.measure.calibration import Calibration
from perl.measure.change import fixed
from perl.measure.length import LengthBias
from perl.measure.tfidf_baseline import TfidfBaseline
from perl.system.progress import counted

if TYPE_CHECKING:
    from perl.measure.reward_model_card import RewardMetrics

MIN_OF_A_CLASS = 30
MIN_DIALOGUES = 10
"""Smallest number of dialogues; with fewer, the intervals over dialogues are meaningless."""
MAX_ECE = 0.05
MAX_SEEN = 0.01
"""Allowed share of seen completions: published test splits repeat a few training rows, and so few change no metric
by more."""
MOSTLY_LENGTH = 0.8
"""Spearman's correlation with length from which a scorer is said to count length only."""


@dataclass(frozen=True)
class Verdict:
    """Whether to train a policy against the model, and why: the criteria not met, or all of them if met."""

    fit: bool
    reasons: list[str]


_Criterion = tuple[bool, str]
"""Whether a criterion is met, and the reason."""


def verdict(metrics: "RewardMetrics") -> Verdict:
    """Return the verdict on a reward model.

    Fit means shown to be fit on these completions: each 95 % interval must lie on the right side. A model is not
    fit if the interval of its difference from TF-IDF with logistic regression includes 0: it may read only single
    words, which a policy exploits first. More held-out completions may show that it is better.

    Accuracy is not a criterion: with 86 % thumbs up, a constant has 86 %. AUROC and its differences do not depend
    on the share of ups.
    """
    criteria, unseen = list(_enough(metrics)), _unseen(metrics)
    if all(met for met, _ in criteria):
        criteria = [unseen, *_ranks(metrics), _calibrated(metrics.calibration)]
    else:  # the metrics are also read if there are only a few completions
        criteria.append(unseen)
    failed = [reason for met, reason in criteria if not met]
    return Verdict(not failed, failed or [reason for _, reason in criteria])


def _enough(metrics: "RewardMetrics") -> Iterator[_Criterion]:
    """Check whether there are enough completions for a verdict."""
    fewer, kind = min((metrics.up, "up"), (metrics.n - metrics.up, "down"))
    rated = f"{fewer:,} of {metrics.n:,} answers {'is' if fewer == 1 else 'are'} rated {kind}"
    what = f"{rated}, and {MIN_OF_A_CLASS} of each label are needed"
    if metrics.compared:
        there = f"there {'is' if metrics.pairs == 1 else 'are'} {counted(metrics.pairs, 'pair')}"
        what = f"{there}, and {MIN_OF_A_CLASS} are needed"
    yield fewer >= MIN_OF_A_CLASS, f"Too few to tell: {what}."
    what = f"the answers are from {counted(metrics.dialogues, 'dialogue')}"
    yield metrics.dialogues >= MIN_DIALOGUES, f"Too few to tell: {what}, and {MIN_DIALOGUES} are needed."


def _unseen(metrics: "RewardMetrics") -> _Criterion:
    seen, n = metrics.seen_in_training, metrics.n
    if seen > MAX_SEEN * n:
        of_dialogues = f"{'is' if seen == 1 else 'are'} from dialogues it was trained on"
        return False, (
            f"{seen:,} of these {counted(n, 'answer')} {of_dialogues}, or nearly equal to answers it was "
            "trained on, which flatters it: evaluate it on other data (data.eval_path or --data), or set neither."
        )
    dialogues = counted(metrics.dialogues, "dialogue")
    reason = f"Evaluated on {counted(n, 'answer')} from {dialogues} it was not trained on"
    return True, f"{reason}, except for {seen:,} that it has seen, or nearly." if seen else f"{reason}."


def _ranks(metrics: "RewardMetrics") -> Iterator[_Criterion]:
    """Check that it is better than chance; if so, better than counting words and than counting characters."""
    name, (value, interval) = metrics.metric, metrics.ranked
    assert value is not None
    against = " against the gold judge" if metrics.against == "gold" else ""
    better = _above(interval, 0.5)
    how = "better" if better else "no better"
    yield better, f"It ranks {how} than chance: {name}{against} {fixed(value, 2)} ({_ends(interval)})."
    yield _beats_words(metrics.tfidf_baseline, name)
    if better:
        yield _beats_length(metrics.length, name)


def _beats_words(baseline: TfidfBaseline, name: str) -> _Criterion:
    value, ahead, interval = baseline.value, baseline.ahead, baseline.ahead_interval
    assert value is not None
    assert ahead is not None
    assert interval is not None
    if _above(interval, 0):
        how = "better"
    elif ahead > 0:
        how = "not shown to be better"
    else:
        how = "worse" if interval[1] < 0 else "no better"
    return _above(interval, 0), (
        f"It is {how} than TF-IDF with logistic regression, which has {name} {fixed(value, 2)}: the "
        f"difference is {ahead:+.2f} ({interval[0]:+.2f} to {interval[1]:+.2f})."
    )


def _beats_length(length: LengthBias, name: str) -> _Criterion:
    if length.ahead_interval is None:
        return False, "Length explains everything: no two answers of similar length are rated differently."
    more, correlation = _above(length.ahead_interval, 0), length.correlation or 0.0
    what = "It reads more than length" if more else "It is not shown to read more than length"
    if not more and abs(correlation) >= MOSTLY_LENGTH:
        what = f"It only counts length (correlation {correlation:+.2f}, Spearman)"
    assert length.auroc_within is not None
    within = f"{name} {fixed(length.auroc_within, 2)} ({_ends(length.auroc_within_interval)})"
    return more, f"{what}: among answers of similar length it has {within}."


def _calibrated(calibration: Calibration) -> _Criterion:
    error, chance = calibration.ece_after, calibration.ece_by_chance
    assert error is not None
    assert chance is not None
    off = f"after scaling its probabilities are off by {error:.3f} on average (ECE"
    if error <= MAX_ECE:
        return True, f"Calibrated: {off}; {MAX_ECE} allowed)."
    if error <= chance:
        return True, f"Calibrated as far as so few answers can tell: {off}; {chance:.3f} may be chance)."
    return False, f"Not calibrated: {off}; {MAX_ECE} allowed)."


def _above(interval: Interval | None, limit: float) -> bool:
    return interval is not None and interval[0] > limit


def _ends(interval: Interval | None) -> str:
    return "unknown" if interval is None else f"{fixed(interval[0], 2)} to {fixed(interval[1], 2)}"
