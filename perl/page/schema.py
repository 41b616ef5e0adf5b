"""report.json and samples.jsonl as types: what design.md promises is required, all else optional."""

from typing import Literal

from pydantic import BaseModel, ConfigDict

Interval = tuple[float, float]


class Part(BaseModel):
    """A part of report.json: typed, frozen, further keys ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class PhaseMemory(Part):
    """Peak memory of one phase, in bytes, and what it consisted of."""

    peak: float
    kinds: dict[str, float] = {}


class Stage(Part):
    """What a stage cost."""

    trainable_parameters: int
    seconds: float
    tokens_per_second: float | None
    peak_memory_bytes: float | None
    peak_rss_bytes: float | None = None
    memory: dict[str, PhaseMemory] | None = None
    phase_seconds: dict[str, float] | None = None
    flops: float | None = None
    useful_flops_share: float | None = None
    predicted_memory: dict[str, PhaseMemory] | None = None


class SftEval(Part):
    """Loss on held-out answers, before and after."""

    n: int | None = None
    loss_before: float
    loss_after: float


class SftStage(Stage):
    """Supervised fine-tuning."""

    eval: SftEval


class ReliabilityBin(Part):
    """Answers of like predicted probability: the mean predicted, the share observed up, and how many."""

    probability: float
    share: float
    n: int


class ScoreHistogram(Part):
    """Counts of scores between edges, of answers rated up and of those rated down."""

    edges: list[float]
    up: list[float]
    down: list[float]


class Calibration(Part):
    """Probabilities before and after scaling, p = σ(slope · score + intercept), on dialogues not fitted to."""

    of: str
    slope: float
    intercept: float
    ece_before: float
    ece_temperature: float | None = None
    ece_after: float | None = None
    reliability_before: list[ReliabilityBin] = []
    reliability_after: list[ReliabilityBin] | None = None


class Slice(Part):
    """Answers of one kind; those too few to be judged are only counted."""

    by: str
    name: str
    n: int
    share_up: float
    auroc: float | None = None
    interval: Interval | None = None
    ece: float | None = None


class Length(Part):
    """How scores go with length, and the AUROC among answers of like length."""

    correlation: float | None = None
    auroc_of_length: float | None = None
    auroc_within: float | None = None
    auroc_within_interval: Interval | None = None


class Floor(Part):
    """What counting words comes to, and by how much the model is ahead."""

    figure: str
    value: float | None = None
    value_interval: Interval | None = None
    ahead: float | None = None
    ahead_interval: Interval | None = None
    rows: int
    of_rows: int


class Mistake(Part):
    """An answer that was scored wrongly."""

    context: str
    answer: str
    score: float
    probability: float


class Mistakes(Part):
    """The downs that score highest and the ups that score lowest."""

    downs_scored_high: list[Mistake] = []
    ups_scored_low: list[Mistake] = []


class Fitness(Part):
    """Whether the model is fit for RL, and why."""

    fit: bool
    reasons: list[str]


class RewardEval(Part):
    """The reward model's card."""

    n: int
    auroc: float | None
    balanced_accuracy: float
    accuracy: float
    majority_accuracy: float
    ece: float
    pairwise_accuracy: float | None = None
    against: Literal["gold", "labels"] | None = None
    auroc_labels: float | None = None
    intervals: dict[str, Interval | None] | None = None
    reliability: list[ReliabilityBin] | None = None
    score_histogram: ScoreHistogram | None = None
    compared: bool = False
    calibration: Calibration | None = None
    slices: list[Slice] = []
    length: Length | None = None
    floor: Floor | None = None
    mistakes: Mistakes | None = None
    verdict: Fitness | None = None


class RewardStage(Stage):
    """Reward modelling."""

    eval: RewardEval


class RlEval(Part):
    """The policy before and after RL, on the same held-out prompts."""

    algorithm: str
    critic: str | None = None
    steps: int
    n: int
    reward_before: float
    reward_after: float
    kl: float
    gold_before: float | None = None
    gold_after: float | None = None
    reward_before_interval: Interval | None = None
    reward_after_interval: Interval | None = None
    gold_before_interval: Interval | None = None
    gold_after_interval: Interval | None = None
    reward_change_interval: Interval | None = None
    gold_change_interval: Interval | None = None
    answer_tokens_before: float | None = None
    answer_tokens_after: float | None = None
    ended_before: float | None = None
    ended_after: float | None = None


class Incident(Part):
    """An alarm of a guard, and what it led to."""

    name: str
    step: int
    since: int
    what: str
    causes: str
    remedy: str
    action: Literal["stopped", "warned"]
    remains: int | None = None
    """Updates that the policy which remains has seen, where the run was stopped."""


class Finding(Part):
    """A check before the first update: its figure, and what it may be at most."""

    words: str
    figure: float
    limit: float


class RlStage(Stage):
    """Reinforcement learning."""

    eval: RlEval
    incidents: list[Incident] = []
    preflight: list[Finding] = []
    liveness: list[Finding] = []
    """As `preflight`, after the first update."""


class Stages(Part):
    """The stages that were run."""

    sft: SftStage | None = None
    reward: RewardStage | None = None
    rl: RlStage | None = None


class Hardware(Part):
    """The machine."""

    device: str
    name: str
    cores: int | None = None
    memory_bytes: float | None = None


class Base(Part):
    """The base, and its hash before and after."""

    model: str
    parameters: int
    dtype: str
    sha256_before: str | None = None
    sha256_after: str | None = None


class Report(Part):
    """report.json."""

    name: str
    seed: int
    tuning: Literal["lora", "full"]
    versions: dict[str, str] = {}
    hardware: Hardware
    base: Base
    stages: Stages


class Answer(Part):
    """An answer and its scores."""

    text: str
    reward: float | None = None
    gold: float | None = None


class Turn(Part):
    """A turn of a prompt."""

    role: str
    content: str


class Sample(Part):
    """A prompt and the answers to it, by role."""

    prompt: str | list[Turn]
    answers: dict[str, Answer]
