"""The results of the stages: what they return, what result.json and report.json contain and the page reads.

In JSON (`perl.system.typed_json`) an optional field without a value is left out; a required field that may be
unknown, such as the AUROC of a single class, is null. Unknown keys, as newer versions may write, are ignored.
"""

from dataclasses import dataclass
from typing import Literal

from perl.measure.bootstrap import Interval
from perl.measure.cost import Cost
from perl.measure.probe import Phase, PhaseMemory
from perl.measure.reward_model_card import RewardModelCard
from perl.recipe import StageName
from perl.rl.algorithm import Algorithm
from perl.rl.checks.alarms import Alarm
from perl.rl.results import RlEval
from perl.runs.validation import Kept


@dataclass(frozen=True, kw_only=True)
class Start:
    """An adapter trained elsewhere: its folder, and the SHA-256 of its weights file."""

    folder: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Stage(Cost):
    """The result and the cost of a stage.

    Attributes:
        learning_rate: the peak learning rate; None: not recorded, or none, as for a policy's natural gradient.
        kept: for each training, which weights were kept and why, if they were chosen by validation.
        rows: number of training and held-out rows.
        rows_cut: number of these rows that were cut to the maximum length.
        data_sha256: SHA-256 of the rows of its kinds and of their split.
        predicted_memory: prediction of `perl-rlhf estimate`, if `compare` made one.
        waited_seconds: from the command, or the end of the previous stage, to its end, including loading and
            evaluations; for an interrupted stage, up to its last checkpoint and from there on. None: not recorded.
        started_from: the adapter that it continued from; None: the base, or the result of an earlier stage.
    """

    trainable_parameters: int
    learning_rate: float | None = None
    rows: int | None = None
    rows_cut: int | None = None
    data_sha256: str | None = None
    waited_seconds: float | None = None
    predicted_memory: dict[Phase, PhaseMemory] | None = None
    kept: list[Kept] | None = None
    started_from: Start | None = None
    reused_from: str | None = None

    @property
    def notes(self) -> list[str]:
        """Notes for readers on the trainings: which weights each kept, and why."""
        return _by_member([one.words for one in self.kept or ()])


def _by_member(sentences: list[str]) -> list[str]:
    """Prefix sentences with the member's number, if there are several."""
    return [f"member {number}: {one}" for number, one in enumerate(sentences, 1)] if sentences[1:] else sentences


@dataclass(frozen=True, kw_only=True)
class SftEval:
    """Mean loss on the tokens of held-out completions of `n` rows, and the 95 % interval of its change.

    The interval is paired by row and resamples whole dialogues; there is none if all rows are from one dialogue.
    """

    n: int
    loss_before: float
    loss_after: float
    loss_interval: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class SftStage(Stage):
    """Supervised fine-tuning."""

    eval: SftEval


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Score of a held-out row and a checksum of its tokens, to verify exports."""

    row: int
    score: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Parts of a blended score: model · the model's score + words · TF-IDF's log-odds + intercept.

    Attributes:
        rows: number of validation rows over which both parts have the same spread.
    """

    model: float
    words: float
    intercept: float
    rows: int

    @property
    def sentence(self) -> str:
        return (
            "Scores are the sum of the model's score and a TF-IDF score, each in units of its spread over "
            f"{self.rows:,} validation rows."
        )


@dataclass(frozen=True, kw_only=True)
class RewardStage(Stage):
    """Reward modelling.

    Attributes:
        kept_below_bytes: size on disk of the lower layers' activations, if stored.
        blends: one per member, if scores are blended with TF-IDF.
    """

    kept_below_bytes: int | None = None
    blends: list[Blend] | None = None

    @property
    def notes(self) -> list[str]:
        return super().notes + _by_member([one.sentence for one in self.blends or ()])

    recorded: list[Recorded]
    eval: RewardModelCard


@dataclass(frozen=True, kw_only=True)
class Incident(Alarm):
    """An alarm of a guard; if it stopped the run, `remains` is the number of updates of the policy it kept."""

    action: Literal["stopped", "warned"]
    remains: int | None = None


@dataclass(frozen=True)
class Check:
    """A check of RL: its value (`figure`) and the highest value allowed."""

    name: str
    words: str
    figure: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class RlStage(Stage):
    """Reinforcement learning: checks before and after the first update, and alarms."""

    algorithm_row: Algorithm | None = None
    """The algorithm's row with the recipe's overrides."""
    preflight: list[Check]
    liveness: list[Check]
    incidents: list[Incident]
    eval: RlEval


StageResult = SftStage | RewardStage | RlStage
RESULTS: dict[StageName, type[SftStage] | type[RewardStage] | type[RlStage]] = {
    "sft": SftStage,
    "reward": RewardStage,
    "rl": RlStage,
}


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The finished stages."""

    sft: SftStage | None = None
    reward: RewardStage | None = None
    rl: RlStage | None = None

    @property
    def finished(self) -> dict[StageName, StageResult]:
        """The finished stages, in order."""
        stages: dict[StageName, StageResult | None] = {"sft": self.sft, "reward": self.reward, "rl": self.rl}
        return {name: stage for name, stage in stages.items() if stage is not None}


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The machine."""

    device: str
    name: str
    cores: int | None
    memory_bytes: int
    processes: int
    engine: str


@dataclass(frozen=True, kw_only=True)
class ReportBase:
    """The base, and the SHA-256 of its weights before and after; None after if there is no shared base.

    Attributes:
        coverage: share of the weights of the blocks' matrices that are in matrices with an adapter.
        without_adapter: the other matrices, by their names within a block.
    """

    model: str
    parameters: int
    dtype: str
    sha256_before: str
    sha256_after: str | None
    coverage: float | None = None
    without_adapter: list[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """report.json, or progress.json of an unfinished run, where `unfinished` is the stage in training."""

    name: str
    seed: int
    tuning: Literal["lora", "full"]
    versions: dict[str, str]
    hardware: Hardware
    base: ReportBase
    stages: Stages
    unfinished: StageName | None = None


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a policy generated, its reward, and the gold judge's score if there is one."""

    text: str
    reward: float
    gold: float | None = None


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A turn of a prompt."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A line of samples.jsonl: a prompt and its completions by role; `step` is set if sampled during training."""

    prompt: str | list[Turn]
    answers: dict[str, Completion]
    step: int | None = None
