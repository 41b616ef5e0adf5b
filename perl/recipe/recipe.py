"""The whole recipe."""

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, model_validator

from perl.plugins import load_plugins
from perl.recipe.adapter import LORA, Adapter, LoraSettings, PrefixSettings, one_section
from perl.recipe.base import Base
from perl.recipe.data import Data
from perl.recipe.reward_parts import ModelPart, ServerPart
from perl.recipe.rl import Rl
from perl.recipe.section import Positive, Section
from perl.recipe.supervised import FullTuning, Reward, Sft

StageName = Literal["sft", "reward", "rl"]
STAGES: tuple[StageName, ...] = ("sft", "reward", "rl")
CHANGE_NOTHING = (
    "sft.from",
    "reward.from",
    "rl.anyway",
    *(f"{stage}.adapter" for stage in STAGES),
    "rl.sample_every",
    "report_to",
)
_OF_SERVERS = re.compile(
    r"rl\.(sampler|(eval_)?reward(\.\d+)?)\.(url|adapter_dir|time_limit|patience|in_flight|mismatch_limit)(\.\d+)?"
)


def changes_nothing(key: str) -> bool:
    """Return whether a key affects no result: it only concerns permissions, display, locations or speed."""
    return key in CHANGE_NOTHING or _OF_SERVERS.fullmatch(key) is not None


SERVED = (LORA, "rslora")
"""Kinds of adapters that vLLM serves."""


class Recipe(Section):
    """A complete run. A stage runs if its section is there."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    """Name of the run and of its folder under runs/."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random: adapter initialization, order of rows, completions."""
    tuning: Literal["lora", "full"] = "lora"
    """lora: adapters on one shared base. full: a separate model for each role, fully trained: the conventional
    way."""
    checkpoint_activations: bool = False
    """Keep only each block's input for the backward pass and recompute the rest: less memory, more time."""
    checkpoint_every: Positive = 20
    """Steps between checkpoints of a stage; an interrupted run resumes from the newest."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default=[])
    """Where to send each step's metrics in addition to metrics.jsonl; the package of that name must be
    installed."""
    plugins: list[str] = Field(default=[])
    """Python files that add rows to the registries of `perl.plugins`, such as your own kinds of reward."""
    base: Base
    lora: LoraSettings | None = LoraSettings()
    """LoRA adapters; short for `adapter: {kind: lora, ...}`, and absent if the adapters are of another kind."""
    adapter: Adapter | None = None
    """Adapters of a kind other than LoRA."""
    full: FullTuning = FullTuning()
    """How whole models are trained; only used with `tuning: full`."""
    data: Data = Data()
    sft: Sft | None = None
    reward: Reward | None = None
    rl: Rl | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_kind_of_adapter(cls, content: Any) -> Any:
        return one_section(content)

    @model_validator(mode="after")
    def _runs_something(self) -> "Recipe":
        if not self.stages:
            raise ValueError("no stage to run: add a section sft, reward or rl")
        if self.rl:
            self._check_reward_models(self.rl)
        for conflict in self._conflicts_of_starts():
            raise ValueError(conflict)
        if self.tuning == "full" and self.base.quantization != "none":
            raise ValueError(
                "full tuning cannot train 4-bit weights: set base.quantization: none, or tuning: lora"
            )
        if self.tuning == "full" and self.base.dtype == "float16":
            raise ValueError(
                "full tuning cannot train float16 weights, because the squares of small gradients, by which AdamW "
                "divides, are zero in float16: set base.dtype: bfloat16 or float32, or tuning: lora"
            )
        why = self.adapter.four_bit_refusal if self.adapter is not None else None
        if why and self.base.quantization != "none":
            raise ValueError(
                f"adapters of kind {self.adapter_kind} need whole weights, because {why}: set base.quantization: "
                "none, or use kind lora"
            )
        if self.rl and self.rl.sampler.kind == "server" and self.adapter_kind not in SERVED:
            raise ValueError(
                f"servers do not support adapters of kind {self.adapter_kind}: use kind {' or '.join(SERVED)}, or "
                "leave rl.sampler out"
            )
        if self.rl and self.rl.sampler.kind == "server" and self.base.random_init:
            raise ValueError(
                "a server cannot have weights that are random here: leave random_init or rl.sampler out"
            )
        if self.rl and self.rl.sampler.kind == "server" and self.tuning == "full":
            raise ValueError(
                "servers need adapters, and full tuning has none: set tuning: lora, or leave rl.sampler out"
            )
        if self.tuning == "full" and self.rl and self.rl.row.trust_region is not None:
            raise ValueError(
                "rl.trust_region keeps the policy's weights from before each step, which under full tuning is "
                "another whole model: set tuning: lora, or another rl.algorithm"
            )
        return self

    def _check_reward_models(self, rl: Rl) -> None:
        """Check that the reward stage's model exists if it is used, and has the members that are used."""
        parts, count = [*rl.reward_parts, *rl.eval_reward_parts], self.reward.members if self.reward else 0
        if not self.reward and any(part.needs_model for part in parts):
            raise ValueError("rl has no reward: add a section reward, or rl.reward.function: FILE.py:NAME")
        for part in parts if self.reward else ():
            if isinstance(part, ModelPart) and (refused := part.refusal(count)):
                raise ValueError(refused)
            for term in self.reward.score_terms if isinstance(part, ServerPart) and self.reward else ():
                raise ValueError(f"servers score by the last token's state only: leave reward.{term} out")
            if isinstance(part, ServerPart) and part.probability:
                raise ValueError("the section reward says whether its scores are log-odds: leave probability out")
        trained, judging = (
            {number for part in of if isinstance(part, ModelPart) for number in part.numbers(count)}
            for of in (rl.reward_parts, rl.eval_reward_parts)
        )
        if both := trained & judging:
            raise ValueError(
                f"rl.eval_reward would choose by what rl.reward trains on (member {min(both)}): give each its own "
                "members, such as [1, 2, 3] and [4]"
            )

    def _conflicts_of_starts(self) -> Iterator[str]:
        """Yield the conflicts of other keys with adapters that stages start from, and with a prefix."""
        if self.starts and self.tuning == "full":
            yield f"full tuning has no adapters to start from: take {'.adapter, '.join(self.starts)}.adapter out"
        if "rl" in self.starts and self.sft is not None:
            yield "rl.adapter has no effect with a section sft, which trains what RL starts from: use sft.adapter"
        length = self.adapter.length if isinstance(self.adapter, PrefixSettings) else 0
        for stage, section in (("sft", self.sft), ("reward", self.reward)):
            if section is not None and length > section.max_length:
                yield (
                    f"a prefix of {length} positions is longer than the rows of {stage}.max_length, which is "
                    f"{section.max_length}: lower adapter.length, 5 to 200 are common"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self.model_dump(),)

    @property
    def adapter_kind(self) -> str:
        """Name of the adapters' kind in `perl.adapters.ADAPTERS`."""
        return LORA if self.adapter is None else self.adapter.kind

    @property
    def adapter_settings(self) -> Section:
        """Settings of the adapters' kind."""
        settings = self.lora or self.adapter
        assert settings is not None
        return settings

    @property
    def full_tuning(self) -> FullTuning:
        """The section `full` if it applies, else its defaults."""
        return self.full if self.tuning == "full" else FullTuning()

    @property
    def critic(self) -> Literal["shared", "adapter", "none"]:
        """The critic in use, with the default resolved."""
        assert self.rl is not None
        if self.rl.critic is not None:
            return self.rl.critic
        if not self.rl.row.needs_critic:
            return "none"
        return "shared" if self.tuning == "lora" else "adapter"

    def section(self, stage: StageName) -> Sft | Reward | Rl:
        """Return the section of a stage of this recipe."""
        sections: dict[StageName, Sft | Reward | Rl | None] = {
            "sft": self.sft,
            "reward": self.reward,
            "rl": self.rl,
        }
        section = sections[stage]
        assert section is not None
        return section

    @property
    def starts(self) -> dict[StageName, str]:
        """Folders of the adapters that stages start from."""
        named = ((stage, self.section(stage).adapter) for stage in self.stages)
        return {stage: folder for stage, folder in named if folder is not None}

    @property
    def has_reference(self) -> bool:
        """Whether RL starts from an adapter instead of the bare base."""
        return self.sft is not None or "rl" in self.starts

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages to run, in order."""
        return tuple(stage for stage in STAGES if getattr(self, stage) is not None)

    def to_yaml(self) -> str:
        """Return the resolved recipe as YAML, with defaults: reading it again gives an equal recipe.

        The algorithm's row is a comment: as keys, its values would override another `algorithm`'s.
        """
        text: str = yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)
        return text if self.rl is None else f"# rl.algorithm {self.rl.algorithm}: {self.rl.row.words}\n{text}"


def _received(content: dict[str, Any]) -> Recipe:
    """Build a recipe sent from another process; its plugins must be imported first."""
    load_plugins(content["plugins"], where="plugins")
    return Recipe.model_validate(content)
