"""Learning rates for `auto` in a recipe, with one rule for all stages.

    rate = AT_WIDTH · (WIDTH / width)^WIDTH_POWER · factor / updates

`width` is the base's hidden size. The factor is the adapter kind's `rate_factor_at` its settings, or `FULL_SHARE`
under full tuning, times the `rate_factor` of the kind of model and, in RL, of the algorithm (docs/sweeps.md and
docs/experiments.md). In RL, the rate is divided by the number of `updates` per rollout.
"""

from transformers import PreTrainedConfig

from perl.adapters import ADAPTERS
from perl.backbones import backbone_of
from perl.recipe import Recipe, StageName
from perl.recipe.supervised import FULL_SHARE

AT_WIDTH: dict[StageName, float] = {"sft": 2e-3, "reward": 2e-3, "rl": 4e-3}
"""LoRA's measured rates for a base of `WIDTH`."""
WIDTH = 128
WIDTH_POWER = 0.8
"""How the best rate decreases with width: Schulman et al. 2025 (LoRA Without Regret,
thinkingmachines.ai/blog/lora) fit 0.781 for Llama models."""
HEAD_STEP = 0.2
"""Maximum change of a value in one update of Adam, in standard deviations of the reward.

Adam changes each weight by at most the rate, so a value by rate × width × mean |hidden state|. Measured on returns
of TinyStories-656K: a linear head's best explained variance is 0.11; this step reached 0.09 in 30 steps, a quarter
of it 0.03, four times it 0.05."""


def learning_rate(recipe: Recipe, stage: StageName, config: PreTrainedConfig) -> float:
    """Return a stage's peak learning rate: the recipe's own, or the value of `auto` for this base."""
    own = recipe.section(stage).learning_rate
    if own != "auto":
        return own
    kind, settings = ADAPTERS[recipe.adapter_kind], recipe.adapter_settings
    factor = FULL_SHARE if recipe.tuning == "full" else kind.rate_factor_at(settings)
    factor *= backbone_of(config).rate_factor
    if stage == "rl" and recipe.rl is not None:
        factor *= recipe.rl.row.rate_factor / (recipe.rl.epochs * recipe.rl.minibatches)
    rate = AT_WIDTH[stage] * (WIDTH / config.get_text_config().hidden_size) ** WIDTH_POWER * factor
    return min(1.0, float(f"{rate:.2g}"))


def auto_head_learning_rate(width: int, size: float) -> float:
    """Return the rate of a linear head that starts at zero, for hidden states of this width and mean |value|."""
    return float(f"{HEAD_STEP / (width * size):.2g}")
