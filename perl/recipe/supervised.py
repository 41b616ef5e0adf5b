"""The sections `sft` and `reward`: training on what people wrote and rated."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from perl.recipe.section import LrSchedulerType, Positive, Rate, Section, Validation


class Supervised(Validation):
    """What SFT and reward training have in common."""

    from_: Annotated[str | None, Field(alias="from")] = None
    """A run folder whose finished stage is taken as it is; keys of the section that are unset are as there."""
    adapter: str | None = None
    """A folder with an adapter that was trained elsewhere, by peft or another run: the stage goes on from it, a
    reward model from its head too, if it has one. Its kind and shape are the whole run's."""
    epochs: Positive = 1
    """Passes over the training rows."""
    batch_size: Positive = 16
    """Rows a step, over all processes."""
    learning_rate: Rate | Literal["auto"] = "auto"
    """At its highest. auto: by the width of the base, its kind, and the kind of adapters or full tuning, see
    perl/stages/auto_rates.py."""
    lr_scheduler_type: LrSchedulerType = "cosine"
    """How the learning rate goes over the stage, by transformers' names."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the learning rate rises from 0, rounded down; `constant` has none."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """As in AdamW: this share of the learning rate is taken off every weight at each step."""
    max_length: Positive = 512
    """Longest sequence, in tokens; older context is cut off first."""


FULL_SHARE = 0.1
"""Of LoRA's learning rate, whose best one is about ten times full tuning's (Schulman et al. 2025, "LoRA Without
Regret"): what full tuning has where nothing was searched."""


class FullTuning(Section):
    """How SFT and reward training treat whole models: as ULMFiT (Howard and Ruder 2018, arXiv 1801.06146) does."""

    layer_decay: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Each layer learns at the rate of the one above it divided by this; the paper takes 2.6."""
    schedule: Literal["slanted_triangular"] | None = None
    """In the place of the stage's own: up to its learning rate over a tenth of the steps, then down to a 32nd."""
    gradual_unfreezing: bool = False
    """In the first epoch only the topmost layer learns (the head and the last norm), in each further epoch one
    more; with fewer epochs than layers the lowest never learn."""


class Sft(Supervised):
    """Supervised fine-tuning on demonstrations."""


class Reward(Supervised):
    """The reward model."""

    loss: Literal["thumbs", "pairs", "both"] = "thumbs"
    """Learn from ratings, from comparisons, or from both in one training. Comparisons may be made from ratings."""
    epochs: Positive = 2
    """Passes over the training rows."""
    members: Annotated[int, Field(ge=1, le=8)] = 1
    """How many reward models are trained, each an adapter with a beginning and an order of rows of its own; how RL
    combines them, `rl.reward` says."""
    likelihood: bool = False
    """Whether the score also depends on how likely the reward model's own language model finds the answer: for
    bases that know good answers better than ratings can teach it."""
    tfidf: bool = False
    """Whether the score is blended, half and half, with what the tokens alone say (TF-IDF with logistic
    regression): for ratings by people that words tell as well as a small model does. Needs `eval_steps`."""
    bootstrap: bool = False
    """Whether each of several members learns from its own draw of the dialogues, with replacement."""

    @model_validator(mode="after")
    def _bootstraps_several(self) -> "Reward":
        if self.bootstrap and self.members == 1:
            raise ValueError("bootstrap makes members differ, and there is one: raise members, or leave it out")
        return self

    @model_validator(mode="after")
    def _blends_by_validation(self) -> "Reward":
        if self.tfidf and self.eval_steps is None:
            raise ValueError(
                "tfidf takes its scale from validation rows, and there are none: set eval_steps to 50, say"
            )
        return self

    @property
    def score_terms(self) -> tuple[str, ...]:
        """What a score depends on besides the state at an answer's last token (`perl.roles.score_terms`)."""
        return tuple(name for name in ("likelihood", "tfidf") if getattr(self, name))
