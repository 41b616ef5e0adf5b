"""The section `rl`: reinforcement learning against the reward."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from perl.recipe.reward_parts import RewardPart
from perl.recipe.rewards import EvalReward, RewardFrom, Rewards, reward_parts
from perl.recipe.sampler import SamplerFrom
from perl.recipe.section import LrSchedulerType, NonNegative, Positive, Rate, Validation, registered
from perl.rl.algorithm import Advantage, Algorithm, Average, Direction, Kl, PromptSampling, Ratio, Surrogate
from perl.rl.algorithms import ALGORITHMS
from perl.system.progress import counted

ROW_DEFAULTS = ("epochs", "samples_per_prompt")
"""Keys whose default is the algorithm's and is written into the resolved recipe."""
DOCUMENTED_UNSET = Field(json_schema_extra={"default": None})
"""Marks a key whose default depends on other keys and is described in words."""
CELLS = tuple(
    field.name for field in fields(Algorithm) if field.name not in (*ROW_DEFAULTS, "value_baseline", "rate_factor")
)
"""Keys that are null unless they override the row, so that another `algorithm` uses its own values."""


class Rl(Validation):
    """Reinforcement learning against the reward."""

    algorithm: Annotated[str, registered(ALGORITHMS)] = "ppo"
    """A row of the table in perl/rl/algorithms.py, to which a plugin may add. The default learned every kind of
    reward that was tried, including rare ones, from as few completions as any other (docs/experiments.md)."""
    adapter: str | None = None
    """A folder with an adapter trained elsewhere, from which policy and reference start. With a section `sft` they
    start from what SFT trains: use `sft.adapter` instead."""
    critic: Literal["shared", "adapter", "none"] | None = None
    """shared: a head on the policy's trunk; adapter: its own adapter, or under full tuning its own model; none.
    Unset: none if the algorithm has no critic; else shared under LoRA, adapter under full tuning."""
    advantage: Advantage | None = None
    """How advantages are computed. This and the keys below down to `trust_region` override a cell or a constant of
    the algorithm's row; see `Algorithm` in perl/rl/algorithm.py. Unset: the row's own value."""
    surrogate: Surrogate | None = None
    """The policy loss: -A log π; -ρ A; PPO's clipped surrogate; CISPO's clipped weight; Kimi's mirror descent."""
    ratio: Ratio | None = None
    """Whether the ratio to the probability before the update is taken per token or per completion."""
    average: Average | None = None
    """How the loss is averaged: over tokens; over completions; or summed over tokens and divided by their largest
    possible number."""
    kl: Kl | None = None
    """Where β KL(π‖reference) is applied: in each token's reward, in the loss with the estimator k2 or k3, or
    nowhere."""
    whiten: bool | None = None
    """Whether advantages are normalized to mean 0 and variance 1 over the rollout."""
    normalize_rewards: bool | None = None
    """Whether to train on (reward - mean) / std, over all rewards of the run so far, so that rewards of any scale
    work; reported rewards stay raw. Unset: true for all rows except maxrl."""
    drop_equal_groups: bool | None = None
    """Whether groups whose rewards are all equal are left out of the averages."""
    redraws: Annotated[int, Field(ge=0)] | None = None
    """Largest number of times that other prompts are drawn to replace dropped groups."""
    reset_optimizer: bool | None = None
    """Whether the optimizer's state is reset for each rollout."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] | None = None
    """λ of GAE: 1 uses the whole return, lower values rely more on the critic."""
    clip: Annotated[float, Field(gt=0, le=1)] | None = None
    """How far the ratio of new to old probability may fall below 1 in one step, and rise above it if `clip_high`
    is unset in the row too."""
    clip_high: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How far the ratio may rise above 1."""
    dual_clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Ratio above which a negative advantage has no gradient; 0: no such limit."""
    tau: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """τ of mirror descent: at 1, an advantage of 1 pulls a completion's log-prob up by one nat."""
    value_clip: NonNegative | None = None
    """How far a value may move in one step if the surrogate is clip, in standard deviations of the reward; 0: no
    limit."""
    value_coef: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the critic's gradient that reaches a trunk shared with the policy; 0: only the head is trained."""
    entropy_coef: NonNegative | None = None
    """Weight of the entropy bonus in the loss, a mean over tokens."""
    direction: Direction | None = None
    """Direction of the policy's update: Adam's, or the natural gradient over the adapter's weights (TRPO)."""
    trust_region: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """δ: a step that changes the policy by a larger mean KL than this, in nats per token, is shortened until it
    does not."""
    reward: Annotated[Rewards, DOCUMENTED_UNSET] = RewardFrom()
    """The reward to train on, or a list of several; see perl/recipe/rewards.py. Unset: the reward stage's
    model."""
    anyway: bool = False
    """Train against a reward model even if its card says that it is not fit for RL."""
    sampler: SamplerFrom = SamplerFrom()
    sampler_correction: Literal["truncate", "none"] = "truncate"
    """truncate: weight each token's advantage by the policy's probability over the sampler's, at most 2. This has
    no effect if the sampler's probabilities equal the policy's."""
    prompt_sampling: PromptSampling = "uniform"
    """Which prompts a step takes. uniform: all in turn; prioritised: in proportion to 1 - success rate so far;
    curriculum: easy ones first, by the column `difficulty` or by the success rate at the start, later
    prioritised."""
    success_reward: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    """A completion with at least this reward counts as correct, for success rates and `length_reward`."""
    steps: Positive = 100
    """Number of rollouts, each trained on for `epochs` passes."""
    prompts_per_step: Positive = 16
    """Prompts per rollout, over all processes."""
    samples_per_prompt: Annotated[Positive, DOCUMENTED_UNSET] = 1
    """Completions per prompt. Unset: 4 if the algorithm compares them, else 1."""
    minibatches: Positive = 1
    """Minibatches per rollout; in each of the `epochs`, each has its own update."""
    epochs: Annotated[Positive, DOCUMENTED_UNSET] = 1
    """Passes over each rollout, with one update per minibatch. Unset: 2; 1 for reinforce and trpo."""
    micro_batch_size: Positive = 4
    """Completions per forward and backward pass: a larger value is faster and takes more memory; results do not
    change."""
    max_prompt_length: Positive | None = None
    """Cut off older context so that prompts have at most this many tokens. Unset: a prompt that is too long is
    refused."""
    max_new_tokens: Positive = 64
    """Longest completion, in tokens."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Sampling temperature, by which logits are divided. Outside the bounds, log-probs of samples are numerically
    unusable."""
    learning_rate: Rate | Literal["auto"] = "auto"
    """Peak learning rate. auto: twice that of the stages before, divided by the number of updates per rollout;
    half of that for cispo."""
    head_learning_rate: Rate | Literal["auto"] = "auto"
    """Learning rate of the critic's head. auto: chosen by the width and magnitude of the base's hidden states."""
    lr_scheduler_type: LrSchedulerType = "cosine"
    """Learning rate schedule, by transformers' names."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps over which the learning rate rises to its peak."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight decay, as in AdamW."""
    kl_coef: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """β of the objective (1-β) r - β KL(π‖reference), where r is the normalized reward. If `kl` puts the KL into
    the loss, β is its weight there and r keeps its weight; if `kl` is none, β has no effect."""
    kl_target: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Target KL in nats per completion: β starts at `kl_coef`, rises by up to 2 % per step while the KL is above
    the target, and falls while it is below (Ziegler et al. 2019). Unset: β is constant."""
    length_reward: NonNegative = 0.0
    """Weight of Kimi's length reward, in standard deviations of the reward: of a prompt's correct completions, the
    shortest gains half of it and the longest loses half of it."""
    length_reward_delay: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the steps before the length reward starts."""
    overlong_penalty: NonNegative = 0.0
    """Penalty on the reward of a completion of max_new_tokens, in standard deviations of the reward; one that ends
    in the last overlong_buffer tokens before that has a smaller penalty, by DAPO's ramp."""
    overlong_buffer: Positive | None = None
    """Length of DAPO's ramp in tokens. Unset: a fifth of max_new_tokens, as in DAPO."""
    missing_end_penalty: NonNegative | None = None
    """Penalty on the reward of a completion that was cut off before its end, in standard deviations of the reward.
    Unset: 0.5 for chat turns, 0 for plain text."""
    eval_reward: EvalReward | None = None
    """What chooses between the policies at `eval_steps`: gold, the data's gold judge, or a reward as in `reward`
    that is not trained on, such as a rule or a member of the reward model that `reward` leaves out. Unset: the
    reward that is trained on, minus β KL."""
    eval_prompts: Positive = 128
    """Held-out prompts on which the policy is evaluated before and after."""
    eval_samples: Positive | None = None
    """Completions of each of these prompts; pass@k is measured up to this k. Unset: enough for 256 in all, at
    most 32."""
    sample_every: Positive = 50
    """Steps between samples: completions of a few held-out prompts for people to read."""
    best_of_n: Annotated[int, Field(ge=0, le=64)] = 8
    """Compare the policy with the best of 2, 4, ... up to this many completions of the policy before RL; 0: do
    not. The comparison costs 256 completions, or those of 16 prompts if that is more."""
    guard: Literal["stop", "warn", "off"] = "stop"
    """What to do when training goes wrong (perl/rl/checks/guards.py): stop at the last good step, warn, or do not
    check."""
    kl_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 50.0
    """Largest KL from the policy to its reference that `guard` allows, in nats per completion."""

    @property
    def reward_parts(self) -> list[RewardPart]:
        """The reward in its long form."""
        return reward_parts(self.reward)

    @property
    def eval_reward_parts(self) -> list[RewardPart]:
        """What chooses between policies, if it is a separate reward."""
        given = self.eval_reward
        return [] if given is None or given == "gold" else reward_parts(given)

    @property
    def row(self) -> Algorithm:
        """The algorithm's row, with the recipe's overrides."""
        said: dict[str, Any] = {
            key: value for key in (*ROW_DEFAULTS, *CELLS) if (value := getattr(self, key)) is not None
        }
        if self.critic is not None:
            said["value_baseline"] = self.critic != "none"
        return replace(ALGORITHMS[self.algorithm], **said)

    @field_validator("guard", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        return "off" if value is False else value  # in YAML 1.1 a bare off is false

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_algorithm(cls, given: Any) -> Any:
        name = given.get("algorithm", "ppo") if isinstance(given, dict) else None
        row = ALGORITHMS.get(name) if isinstance(name, str) else None
        if row is None:
            return given
        said = {key: value for key, value in given.items() if key not in CELLS or value != getattr(row, key)}
        return {key: getattr(row, key) for key in ROW_DEFAULTS} | said

    @model_validator(mode="after")
    def _fits_together(self) -> "Rl":
        row = self.row
        if self.critic not in (None, "none") and not row.needs_critic:
            never = f"{self.algorithm} has no critic, so critic {self.critic!r} would never be used"
            raise ValueError(f"{never}: leave it out, or set it to none")
        if self.critic == "none" and row.needs_critic:
            raise ValueError(f"advantage {row.advantage} needs a critic: set critic to shared or adapter")
        for conflict in (*_conflicts(row), *self._conflicts_beside(row), *self._without_use(row)):
            raise ValueError(conflict)
        if self.prompts_per_step * self.samples_per_prompt < 2:  # whitened, or against its own mean, it is zero
            raise ValueError("one completion per step has no other to be compared with: raise prompts_per_step")
        return self

    def _conflicts_beside(self, row: Algorithm) -> Iterator[str]:
        """Yield the conflicts of a row with other keys, in the form of `_conflicts`."""
        completions = self.prompts_per_step * self.samples_per_prompt
        if self.minibatches > 1 and row.on_policy:
            yield "surrogate plain is on-policy: set minibatches to 1, or surrogate to clip"
        if self.minibatches > 1 and row.direction == "natural":
            yield "direction natural takes one step from a rollout: set minibatches to 1"
        if self.minibatches > completions:
            made = counted(completions, "completion")
            yield f"{made} per step cannot make {self.minibatches} minibatches: lower minibatches"
        if self.kl_target is not None and row.kl == "none":
            yield "kl none has no coefficient that kl_target could change: set kl, or leave kl_target out"
        if self.kl_target is not None and self.kl_coef == 0:
            yield "a kl_coef of 0 stays 0 whatever kl_target is: raise kl_coef"
        if self.length_reward and self.samples_per_prompt < 2:
            yield "length_reward compares completions of one prompt: set samples_per_prompt to at least 2"
        if self.length_reward and round(self.length_reward_delay * self.steps) >= self.steps:
            yield "length_reward_delay leaves no step with a length reward: lower it"
        if self.eval_reward is not None and self.eval_steps is None:
            yield "eval_reward is used at every eval_steps, but there are none: set eval_steps"
        if self.overlong_buffer is not None and not self.overlong_penalty:
            yield "overlong_buffer has no effect without overlong_penalty: set overlong_penalty, such as to 1"
        if self.overlong_buffer is not None and self.overlong_buffer > self.max_new_tokens:
            yield f"overlong_buffer is longer than the {self.max_new_tokens} tokens of a completion: lower it"

    def _without_use(self, row: Algorithm) -> Iterator[str]:
        """Yield, in the form of `_conflicts`, keys that were set but have no effect."""
        default = type(self).model_fields
        remembers = self.prompt_sampling != "uniform" or self.length_reward > 0
        uses: list[tuple[str, bool, tuple[str, ...]]] = [
            ("surrogate clip or clip-weight", row.clips_ratio, ("clip", "clip_high")),
            ("surrogate clip", row.surrogate == "clip", ("dual_clip",)),
            ("surrogate mirror", row.surrogate == "mirror", ("tau",)),
            ("advantage gae", row.advantage == "gae", ("gae_lambda",)),
            ("a critic", row.needs_critic, ("value_coef",)),
            ("a critic and surrogate clip", row.needs_critic and row.surrogate == "clip", ("value_clip",)),
            ("length_reward", self.length_reward > 0, ("length_reward_delay",)),
            ("length_reward or another prompt_sampling", remembers, ("success_reward",)),
        ]
        for what, is_there, keys in uses:
            for key in keys:
                if not is_there and getattr(self, key) != default[key].default:
                    yield f"{key} has no effect without {what}: leave it out"


def _conflicts(row: Algorithm) -> Iterator[str]:
    """Yield what is inconsistent in a row and, after a colon, what to do."""
    advantage = f"advantage {row.advantage}"
    if row.compares_groups and row.samples_per_prompt < 2:
        yield f"{advantage} compares completions of one prompt: set samples_per_prompt to at least 2"
    if row.on_policy and row.epochs > 1:
        yield "surrogate plain is on-policy: set epochs to 1, or surrogate to clip"
    if row.ratio == "answer" and not row.clips_ratio:
        yield f"surrogate {row.surrogate} has no ratio per completion: set ratio to token, or surrogate to clip"
    if row.surrogate == "mirror" and row.average != "answers":
        yield "surrogate mirror is for whole completions: set average to answers"
    if row.surrogate == "mirror" and row.kl_in_loss:
        yield "surrogate mirror limits the policy by tau, not by a KL in the loss: set kl to none or reward-k1"
    if row.advantage in ("group-std", "group-relative") and row.kl == "reward-k1":
        # Where rewards are equal, differences in the KL alone would be scaled up to full size.
        yield f"{advantage} would divide the KL in the reward too: set kl to loss-k2, loss-k3 or none"
    if row.advantage == "group-relative" and row.normalize_rewards:
        yield f"{advantage} divides by the mean of raw rewards: set normalize_rewards to false"
    if 0 < row.dual_clip <= 1:
        yield "dual_clip of at most 1 removes the gradient of everything worse than expected: raise it"
    if row.direction == "natural" and row.trust_region is None:
        yield "direction natural has no step length without trust_region: set trust_region, such as to 0.01"
    if row.direction == "natural" and row.epochs > 1:
        yield "direction natural takes one step from a rollout: set epochs to 1, or direction to adam"
    if row.direction == "natural" and row.value_coef > 0:
        yield "direction natural is for the policy's loss only: set value_coef to 0"
    if row.redraws and not row.drop_equal_groups:
        yield "redraws replaces groups that drop_equal_groups leaves out: set that to true, or redraws to 0"
    if row.drop_equal_groups and not row.compares_groups:
        yield f"{advantage} has no groups to drop: set drop_equal_groups to false"
