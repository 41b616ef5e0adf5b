"""The section `rl`: reinforcement learning against the reward."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from perl.recipe.rewards import RewardFrom, RewardPart, Rewards
from perl.recipe.section import LrSchedulerType, NonNegative, Positive, Rate, Section, registered
from perl.rl.algorithms import ALGORITHMS
from perl.rl.samplers import SAMPLERS

ROW_DEFAULTS = ("epochs", "samples_per_prompt")
"""Keys whose default is the algorithm's."""


class SamplerFrom(Section):
    """What draws completions."""

    kind: Annotated[str, registered(SAMPLERS)] = "local"
    """A name in perl/rl/samplers/__init__.py; a plugin may add to it."""


class Rl(Section):
    """Reinforcement learning against the reward."""

    algorithm: Annotated[str, registered(ALGORITHMS)] = "ppo"
    """A row of the table in perl/rl/algorithms.py, to which a plugin may add. The default learned every kind of
    reward that was tried, rare ones too, from as few completions as any (docs/experiments.md)."""
    critic: Literal["shared", "adapter", "none"] | None = None
    """A head on the policy's trunk, an adapter (or under full tuning a model) of its own, or none. Unset: none
    where the algorithm has none; else shared under LoRA, adapter under full tuning."""
    reward: Rewards = RewardFrom()
    """Unset: the reward stage's model. See perl/recipe/rewards.py."""
    sampler: SamplerFrom = SamplerFrom()
    steps: Positive = 100
    prompts_per_step: Positive = 16
    samples_per_prompt: Positive = 1
    """Completions of each prompt. Unset: 4 for rloo, which compares them."""
    epochs: Positive = 1
    """Updates from each rollout. Unset: 2 for ppo and rloo; reinforce is on-policy and takes 1."""
    micro_batch_size: Positive = 4
    max_prompt_length: Positive | None = None
    """Cut older context off so that prompts have at most so many tokens; unset, a longer prompt is refused."""
    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Outside these bounds logits over it, and the log-probs of what is sampled, cannot be reckoned with."""
    learning_rate: Rate | Literal["auto"] = "auto"
    """auto: by the width of the base, the tuning and the epochs, see perl/rl/schedule.py."""
    head_learning_rate: Rate | Literal["auto"] = "auto"
    """Of the critic's head. auto: by the width and the size of the base's hidden states."""
    lr_scheduler_type: LrSchedulerType = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises to its full value."""
    kl_coef: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """β of the objective (1-β) r - β KL(π‖reference), where r is the normalised reward."""
    normalize_rewards: bool = True
    """Train on (reward - mean) / std, over all rewards of the run so far: rewards of any scale work, and what is
    reported stays raw. false: train on the rewards as they are."""
    missing_end_penalty: NonNegative | None = None
    """Taken off the reward of a completion that was cut before its end, in standard deviations of the reward.
    Unset: half of one for turns of a chat, none for plain text."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0
    """λ of GAE, for ppo: 1 takes the whole return, less leans on the critic."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far ppo and rloo let the ratio of new to old probability move from 1 in one step."""
    value_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.2
    """How far ppo lets a value move in one step, in standard deviations of the reward; null: any distance."""
    value_coef: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the critic's gradient that reaches a trunk shared with the policy; 0: its head alone learns."""
    eval_prompts: Positive = 128
    """Held-out prompts on which the policy is judged before and after."""
    guard: Literal["stop", "warn", "off"] = "stop"
    """When training goes wrong (perl/rl/checks/guards.py): stop at the last good step, warn, or never look."""
    kl_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 50.0
    """Nats a completion that the policy may be away from its reference."""

    @property
    def reward_parts(self) -> list[RewardPart]:
        """The reward in its long form."""
        if isinstance(self.reward, list):
            return self.reward
        return [self.reward.part if isinstance(self.reward, RewardFrom) else self.reward]

    @field_validator("guard", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        return "off" if value is False else value  # in YAML 1.1 a bare off is false

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_algorithm(cls, given: Any) -> Any:
        name = given.get("algorithm", "ppo") if isinstance(given, dict) else None
        row = ALGORITHMS.get(name) if isinstance(name, str) else None
        return given if row is None else {key: getattr(row, key) for key in ROW_DEFAULTS} | given

    @model_validator(mode="after")
    def _fits_together(self) -> "Rl":
        name, row = self.algorithm, ALGORITHMS[self.algorithm]
        if row.compares_groups and self.samples_per_prompt < 2:
            raise ValueError(f"{name} compares completions of one prompt: set samples_per_prompt to at least 2")
        if not row.needs_critic and self.critic not in (None, "none"):
            raise ValueError(f"{name} has no critic, so critic {self.critic!r} would never be used: leave it out")
        if row.needs_critic and self.critic == "none":
            raise ValueError(f"{name} needs a critic: set critic to shared or adapter")
        if row.on_policy and self.epochs > 1:
            raise ValueError(f"{name} is on-policy: set epochs to 1, or algorithm to ppo")
        if self.prompts_per_step * self.samples_per_prompt < 2:  # whitened, or against its own mean, it is zero
            raise ValueError("one completion a step has none to compare it with: raise prompts_per_step")
        return self
