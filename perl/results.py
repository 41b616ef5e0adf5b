"""The results of the stages: what they return, result.json and report.json hold, and the page reads.

In JSON (`perl.system.typed_json`) an optional field without a value is left out; a required field that may be
unknown, such as the AUROC of one class, is null. Unknown keys, which newer versions write, are ignored in reading.
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
    """What a stage trained, and what that cost.

    Attributes:
        kept: of each training, which weights were kept and why, where validations chose.
        rows: trained on and held out.
        rows_cut: of these, rows that were cut to the longest length.
        data_sha256: of the rows of its kinds, and of how they were split.
        predicted_memory: by `perl-rlhf estimate`, where `compare` ran it.
        waited_seconds: from the command, or the end of the stage before, to its end, with loading and evaluations;
            of a stage that was interrupted up to its last checkpoint, and from there. None: not recorded.
        started_from: the adapter that it went on from; None: the base, or what an earlier stage trained.
        reused_from: the folder of the run whose finished stage this is; None: it was trained here.
    """

    trainable_parameters: int
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
        """What people are to know of the trainings: which weights each kept, and why."""
        return _by_member([one.words for one in self.kept or ()])


def _by_member(sentences: list[str]) -> list[str]:
    """With its number, where there are several trainings."""
    return [f"member {number}: {one}" for number, one in enumerate(sentences, 1)] if sentences[1:] else sentences


@dataclass(frozen=True, kw_only=True)
class SftEval:
    """Mean loss on the tokens of held-out completions, of `n` rows, and the 95 % interval of its change.

    The interval is paired by row, and of whole dialogues; there is none where all rows are of one dialogue.
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
    """The score of a held-out row and a checksum of its tokens, to check exports against."""

    row: int
    score: float
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Blend:
    """What a score is blended from: model · the model's + words · TF-IDF's log-odds + intercept.

    Attributes:
        rows: validation rows over which both parts have the same spread.
    """

    model: float
    words: float
    intercept: float
    rows: int

    @property
    def sentence(self) -> str:
        return (
            "Scores are the sum of the model's and TF-IDF's of the words, each in units of its spread over "
            f"{self.rows:,} validation rows."
        )


@dataclass(frozen=True, kw_only=True)
class RewardStage(Stage):
    """Reward modelling.

    Attributes:
        kept_below_bytes: the size on disk of the lower layers' activations, if kept.
        blends: of each member, where scores are blended with TF-IDF.
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
    """An alarm of a guard; if it stopped the run, `remains` counts the updates of the policy that remains."""

    action: Literal["stopped", "warned"]
    remains: int | None = None


@dataclass(frozen=True)
class Check:
    """A check of RL: its value (`figure`), and the highest that is allowed."""

    name: str
    words: str
    figure: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class RlStage(Stage):
    """Reinforcement learning: the peak learning rate, the checks before and after the first update, and alarms."""

    learning_rate: float
    algorithm_row: Algorithm | None = None
    """With what the recipe overrides."""
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
    """The stages that are finished."""

    sft: SftStage | None = None
    reward: RewardStage | None = None
    rl: RlStage | None = None

    @property
    def finished(self) -> dict[StageName, StageResult]:
        """Those that are there, in order."""
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
    """The base, and the SHA-256 of its weights before and after; None after where there is no shared base.

    Attributes:
        coverage: of all weights of matrices in the blocks, the share in matrices with an adapter.
        without_adapter: the other matrices, by their names in a block.
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
    """report.json, or progress.json of a run that is not finished, where `unfinished` is the stage in training."""

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
    """What a policy generated, its reward, and the gold judge's score where there is one."""

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
    """A line of samples.jsonl: a prompt and the completions of it, by role; `step`: those during training."""

    prompt: str | list[Turn]
    answers: dict[str, Completion]
    step: int | None = None
