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
"""Keys whose default is the algorithm's, and stands in the recipe as resolved."""
DOCUMENTED_UNSET = Field(json_schema_extra={"default": None})
"""Of a key whose default depends on others, and is told in words."""
CELLS = tuple(field.name for field in fields(Algorithm) if field.name not in (*ROW_DEFAULTS, "value_baseline"))
"""Keys that are null unless they override the row, so that another `algorithm` brings its own."""


class Rl(Validation):
    """Reinforcement learning against the reward."""

    algorithm: Annotated[str, registered(ALGORITHMS)] = "ppo"
    """A row of the table in perl/rl/algorithms.py, to which a plugin may add. The default learned every kind of
    reward that was tried, rare ones too, from as few completions as any (docs/experiments.md)."""
    adapter: str | None = None
    """A folder with an adapter that was trained elsewhere: policy and reference start as it. With a section `sft`
    they start from what that trains: use `sft.adapter`."""
    critic: Literal["shared", "adapter", "none"] | None = None
    """A head on the policy's trunk, an adapter (or under full tuning a model) of its own, or none. Unset: none
    where the algorithm has none; else shared under LoRA, adapter under full tuning."""
    advantage: Advantage | None = None
    """This and the keys below down to `trust_region` override a cell or a constant of the algorithm's row: see
    `Algorithm` in perl/rl/algorithms.py. Unset: the row's own."""
    surrogate: Surrogate | None = None
    """-A log π; PPO's clipped surrogate; CISPO's clipped weight; Kimi's mirror descent."""
    ratio: Ratio | None = None
    """Whose probabilities are compared with those before the update: each token's, or the whole completion's."""
    average: Average | None = None
    """What weighs alike in the loss: tokens; completions; tokens, over the most that there can be."""
    kl: Kl | None = None
    """Where β KL(π‖reference) is: in each token's reward, in the loss by the estimate k2 or k3, or nowhere."""
    whiten: bool | None = None
    """Whether advantages get mean 0 and variance 1 over the rollout."""
    normalize_rewards: bool | None = None
    """Train on (reward - mean) / std, over all rewards of the run so far: rewards of any scale work, and what is
    reported stays raw. false: train on the rewards as they are. Unset: true for all rows but maxrl."""
    drop_equal_groups: bool | None = None
    """Whether groups whose rewards are all equal are left out of the averages."""
    redraws: Annotated[int, Field(ge=0)] | None = None
    """How often at most other prompts are drawn in the place of groups that were dropped."""
    reset_optimizer: bool | None = None
    """Whether the optimizer starts anew with each rollout."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] | None = None
    """λ of GAE: 1 takes the whole return, less leans on the critic."""
    clip: Annotated[float, Field(gt=0, le=1)] | None = None
    """How far the ratio of new to old probability may fall from 1 in one step, and rise where `clip_high` is
    unset in the row too."""
    clip_high: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """How far the ratio may rise above 1."""
    dual_clip: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """At a negative advantage, the ratio from which there is no gradient; 0: none."""
    tau: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Of the mirror: at 1 an advantage of one draws a completion's log-prob up by one nat."""
    value_clip: NonNegative | None = None
    """How far a value may move in one step where the policy is clipped, in standard deviations of the reward; 0:
    any distance."""
    value_coef: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the critic's gradient that reaches a trunk shared with the policy; 0: its head alone learns."""
    entropy_coef: NonNegative | None = None
    """Weight of the entropy's mean over tokens, which the loss raises."""
    direction: Direction | None = None
    """Of the policy's step: the gradient, or the natural gradient over the adapter's weights (TRPO)."""
    trust_region: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """δ: a step that moves the policy by a larger mean KL, in nats per token, is shortened until it does not."""
    reward: Annotated[Rewards, DOCUMENTED_UNSET] = RewardFrom()
    """Unset: the reward stage's model. See perl/recipe/rewards.py."""
    anyway: bool = False
    """Train against the reward stage's model though its card says that it is not fit for that."""
    sampler: SamplerFrom = SamplerFrom()
    sampler_correction: Literal["truncate", "none"] = "truncate"
    """Weigh each token's advantage by the policy's probability over the sampler's, at most 2: of no effect where
    the sampler computes as the policy does."""
    prompt_sampling: PromptSampling = "uniform"
    """Which prompts a step takes: all in turn; in proportion to 1 - their success rate so far; or the easy ones
    first, by the prompts' column `difficulty` or by their success rate at the start, later prioritised."""
    success_reward: Annotated[float, Field(allow_inf_nan=False)] = 0.5
    """A completion with at least this reward is right, for success rates and `length_reward`."""
    steps: Positive = 100
    """Rollouts, each learned from `epochs` times."""
    prompts_per_step: Positive = 16
    """Of a rollout, over all processes."""
    samples_per_prompt: Annotated[Positive, DOCUMENTED_UNSET] = 1
    """Completions of each prompt. Unset: 4 where the algorithm compares them, else 1."""
    minibatches: Positive = 1
    """Parts of a rollout, each with an update of its own in each of the `epochs`."""
    epochs: Annotated[Positive, DOCUMENTED_UNSET] = 1
    """Passes over each rollout, with an update by each of its minibatches. Unset: 2; reinforce is on-policy and
    takes 1."""
    micro_batch_size: Positive = 4
    """Completions in one pass: more are faster and take more memory; the result is the same."""
    max_prompt_length: Positive | None = None
    """Cut older context off so that prompts have at most so many tokens; unset, a longer prompt is refused."""
    max_new_tokens: Positive = 64
    """Longest completion, in tokens."""
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Outside these bounds logits over it, and the log-probs of what is sampled, cannot be reckoned with."""
    learning_rate: Rate | Literal["auto"] = "auto"
    """auto: as in the stages before, shared by the updates from each rollout."""
    head_learning_rate: Rate | Literal["auto"] = "auto"
    """Of the critic's head. auto: by the width and the size of the base's hidden states."""
    lr_scheduler_type: LrSchedulerType = "cosine"
    """How the learning rate goes over the stage, by transformers' names."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises to its full value."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """As in AdamW: this share of the learning rate is taken off every weight at each step."""
    kl_coef: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """β of the objective (1-β) r - β KL(π‖reference), where r is the normalised reward. Where `kl` puts
    the KL into the loss, β weighs it there and r keeps its weight; where `kl` is none, β has no use."""
    kl_target: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Nats per completion: β rises by up to 2 % a step while the KL is above it, and falls below it (Ziegler
    et al. 2019); `kl_coef` is where β starts. Unset: β is constant."""
    length_reward: NonNegative = 0.0
    """Weight of Kimi's length reward, in standard deviations of the reward: among the right completions of a
    prompt the short ones gain and the long ones lose half of it."""
    length_reward_delay: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Share of the steps before there is a length reward."""
    overlong_penalty: NonNegative = 0.0
    """Taken off the reward of a completion of max_new_tokens, in standard deviations of the reward; less, by
    DAPO's ramp, off one that ends in the last overlong_buffer tokens before that."""
    overlong_buffer: Positive | None = None
    """Unset: a fifth of max_new_tokens, as in DAPO."""
    missing_end_penalty: NonNegative | None = None
    """Taken off the reward of a completion that was cut before its end, in standard deviations of the reward.
    Unset: half of one for turns of a chat, none for plain text."""
    eval_reward: EvalReward | None = None
    """What chooses between the policies of `eval_steps`: the data's gold judge, or a reward as in `reward` that is
    not trained on, such as a rule or a member of the reward model that `reward` leaves out. Unset: the reward that
    is trained on, less β KL."""
    eval_prompts: Positive = 128
    """Held-out prompts on which the policy is judged before and after."""
    eval_samples: Positive | None = None
    """Completions of each of them; pass@k is measured up to this k. Unset: so many that there are 256 in all."""
    sample_every: Positive = 50
    """Steps after which the policy completes a few held-out prompts, for people to read."""
    best_of_n: Annotated[int, Field(ge=0, le=64)] = 8
    """The best of 2, 4, ... up to so many completions by the policy before RL is measured beside RL's policy; 0:
    nothing is. It costs 256 completions, or those of 16 prompts if that is more."""
    guard: Literal["stop", "warn", "off"] = "stop"
    """When training goes wrong (perl/rl/checks/guards.py): stop at the last good step, warn, or never look."""
    kl_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 50.0
    """Nats per completion that the policy may be away from its reference."""

    @property
    def reward_parts(self) -> list[RewardPart]:
        """The reward in its long form."""
        return reward_parts(self.reward)

    @property
    def eval_reward_parts(self) -> list[RewardPart]:
        """What chooses between policies, as far as it is a reward of its own."""
        given = self.eval_reward
        return [] if given is None or given == "gold" else reward_parts(given)

    @property
    def row(self) -> Algorithm:
        """The algorithm's row, with what the recipe says instead."""
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
            raise ValueError("one completion a step has none to compare it with: raise prompts_per_step")
        return self

    def _conflicts_beside(self, row: Algorithm) -> Iterator[str]:
        """As `_conflicts`, of a row and the keys beside it."""
        completions = self.prompts_per_step * self.samples_per_prompt
        if self.minibatches > 1 and row.on_policy:
            yield "surrogate plain is on-policy: set minibatches to 1, or surrogate to clip"
        if self.minibatches > 1 and row.direction == "natural":
            yield "direction natural takes one step from a rollout: set minibatches to 1"
        if self.minibatches > completions:
            made = counted(completions, "completion")
            yield f"{made} a step cannot make {self.minibatches} minibatches: lower minibatches"
        if self.kl_target is not None and row.kl == "none":
            yield "kl none has no coefficient that kl_target could move: set kl, or leave kl_target out"
        if self.kl_target is not None and self.kl_coef == 0:
            yield "a kl_coef of 0 stays 0 whatever kl_target is: raise kl_coef"
        if self.length_reward and self.samples_per_prompt < 2:
            yield "length_reward compares completions of one prompt: set samples_per_prompt to at least 2"
        if self.length_reward and round(self.length_reward_delay * self.steps) >= self.steps:
            yield "length_reward_delay leaves no step with a length reward: lower it"
        if self.eval_reward is not None and self.eval_steps is None:
            yield "eval_reward is asked at every eval_steps, and there are none: set eval_steps"
        if self.overlong_buffer is not None and not self.overlong_penalty:
            yield "overlong_buffer has no use without overlong_penalty: set overlong_penalty, such as to 1"
        if self.overlong_buffer is not None and self.overlong_buffer > self.max_new_tokens:
            yield f"overlong_buffer is longer than the {self.max_new_tokens} tokens of a completion: lower it"

    def _without_use(self, row: Algorithm) -> Iterator[str]:
        """As `_conflicts`, of keys that were set and that nothing reads: who sets one expects that it acts."""
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
                    yield f"{key} has no use without {what}: leave it out"


def _conflicts(row: Algorithm) -> Iterator[str]:
    """What in a row makes no sense, and after a colon what to do."""
    advantage = f"advantage {row.advantage}"
    if row.compares_groups and row.samples_per_prompt < 2:
        yield f"{advantage} compares completions of one prompt: set samples_per_prompt to at least 2"
    if row.on_policy and row.epochs > 1:
        yield "surrogate plain is on-policy: set epochs to 1, or surrogate to clip"
    if row.ratio == "answer" and not row.clips_ratio:
        yield f"surrogate {row.surrogate} has no ratio of answers: set ratio to token, or surrogate to clip"
    if row.surrogate == "mirror" and row.average != "answers":
        yield "surrogate mirror is of whole completions: set average to answers"
    if row.surrogate == "mirror" and row.kl_in_loss:
        yield "surrogate mirror holds the policy by tau, not by a KL in the loss: set kl to none or reward-k1"
    if row.advantage in ("group-std", "group-relative") and row.kl == "reward-k1":
        # Where rewards are equal, what the KL differs by would be blown up to full size.
        yield f"{advantage} would divide the KL in the reward too: set kl to loss-k2, loss-k3 or none"
    if row.advantage == "group-relative" and row.normalize_rewards:
        yield f"{advantage} divides by the mean of raw rewards: set normalize_rewards to false"
    if 0 < row.dual_clip <= 1:
        yield "dual_clip takes the gradient of all that is worse than expected where it is at most 1: raise it"
    if row.direction == "natural" and row.trust_region is None:
        yield "direction natural is as long as trust_region allows: set trust_region, such as to 0.01"
    if row.direction == "natural" and row.epochs > 1:
        yield "direction natural takes one step from a rollout: set epochs to 1, or direction to adam"
    if row.direction == "natural" and row.value_coef > 0:
        yield "direction natural is of the policy's loss alone: set value_coef to 0"
    if row.redraws and not row.drop_equal_groups:
        yield "redraws replaces the groups that drop_equal_groups leaves out: set that to true, or redraws to 0"
    if row.drop_equal_groups and not row.compares_groups:
        yield f"{advantage} has no groups that could be dropped: set drop_equal_groups to false"
