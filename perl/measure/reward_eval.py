"""The reward model card as types: what `perl.measure.reward_model_card.reward_card` finds."""

from dataclasses import dataclass
from typing import Literal

from perl.measure.bootstrap import Interval
from perl.measure.verdict import Verdict


@dataclass(frozen=True, kw_only=True)
class ReliabilityBin:
    """Completions of like predicted probability: the mean predicted, the share observed up, and how many."""

    probability: float
    share: float
    n: int


@dataclass(frozen=True, kw_only=True)
class ScoreHistogram:
    """Counts of scores between `edges`, of completions rated up and of those rated down."""

    edges: list[float]
    up: list[int]
    down: list[int]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Probabilities before and after scaling, p = σ(slope · score + intercept), on dialogues not fitted to."""

    of: str
    n: int
    slope: float
    intercept: float
    temperature: float | None
    ece_before: float
    ece_temperature: float | None
    ece_after: float | None
    ece_by_chance: float | None
    reliability_before: list[ReliabilityBin]
    reliability_after: list[ReliabilityBin] | None


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Completions of one kind; those too few to be judged are only counted."""

    by: str
    name: str
    n: int
    share_up: float
    auroc: float | None = None
    interval: Interval | None = None
    ece: float | None = None


@dataclass(frozen=True, kw_only=True)
class Length:
    """How scores go with length, and the AUROC among completions of like length."""

    correlation: float | None
    auroc_of_length: float | None
    auroc_within: float | None
    auroc_within_interval: Interval | None
    ahead: float | None
    ahead_interval: Interval | None


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What TF-IDF with logistic regression comes to, and by how much the model is ahead of it."""

    figure: Literal["auroc", "pairwise_accuracy"]
    value: float | None
    value_interval: Interval | None
    ahead: float | None
    ahead_interval: Interval | None
    rows: int
    of_rows: int


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A completion that was scored wrongly."""

    context: str
    answer: str
    score: float
    probability: float


@dataclass(frozen=True, kw_only=True)
class Mistakes:
    """The downs that score highest and the ups that score lowest."""

    downs_scored_high: list[Mistake]
    ups_scored_low: list[Mistake]


@dataclass(frozen=True, kw_only=True)
class RewardEval:
    """The reward model card: `perl.measure.reward_model_card.reward_card`."""

    n: int
    up: int
    dialogues: int
    seen_in_training: int
    against: Literal["gold", "labels"]
    auroc: float | None
    auroc_labels: float | None = None
    pairwise_accuracy: float | None = None
    balanced_accuracy: float
    accuracy: float
    majority_accuracy: float
    ece: float
    compared: bool
    pairs: int
    intervals: dict[str, Interval | None]
    reliability: list[ReliabilityBin]
    score_histogram: ScoreHistogram
    calibration: Calibration
    slices: list[Slice]
    length: Length
    floor: Floor
    mistakes: Mistakes
    verdict: Verdict
