"""The sections `sft` and `reward`: training on demonstrations and ratings."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from perl.recipe.section import LrSchedulerType, Positive, Rate, Section, Validation


class Supervised(Validation):
    """The keys that SFT and reward training have in common."""

    from_: Annotated[str | None, Field(alias="from")] = None
    """A run folder whose finished stage is reused unchanged; unset keys of the section take the values that they
    have there."""
    adapter: str | None = None
    """A folder with an adapter trained elsewhere, by peft or another run, from which the stage continues; a reward
    model continues from its head too, if it has one. The whole run uses its kind and shape."""
    epochs: Positive = 1
    """Passes over the training rows."""
    batch_size: Positive = 16
    """Rows per step, over all processes."""
    learning_rate: Rate | Literal["auto"] = "auto"
    """Peak learning rate. auto: chosen by the base's width and architecture, and by the kind of adapter or full
    tuning; see perl/stages/auto_rates.py."""
    lr_scheduler_type: LrSchedulerType = "cosine"
    """Learning rate schedule, by transformers' names."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the learning rate rises from 0, rounded down; `constant` has no warmup."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight decay, as in AdamW."""
    max_length: Positive = 512
    """Longest sequence, in tokens; older context is cut off first."""


FULL_SHARE = 0.1
"""Full tuning's learning rate as a share of LoRA's, if none was searched for: LoRA's best one is about ten times
full tuning's (Schulman et al. 2025, "LoRA Without Regret")."""


class FullTuning(Section):
    """How SFT and reward training tune whole models, as in ULMFiT (Howard and Ruder 2018, arXiv 1801.06146)."""

    layer_decay: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0
    """Each layer's learning rate is that of the layer above divided by this factor; the paper uses 2.6."""
    schedule: Literal["slanted_triangular"] | None = None
    """Replaces the stage's schedule: up to its learning rate over a tenth of the steps, then down to a 32nd of
    it."""
    gradual_unfreezing: bool = False
    """In the first epoch only the top layer is trained (the head and the last norm), in each further epoch one
    layer more; with fewer epochs than layers, the lowest layers are never trained."""


class Sft(Supervised):
    """Supervised fine-tuning on demonstrations."""


class Reward(Supervised):
    """The reward model."""

    loss: Literal["thumbs", "pairs", "both"] = "thumbs"
    """Train on ratings, on comparisons, or on both together. Comparisons may be made from ratings."""
    epochs: Positive = 2
    """Passes over the training rows."""
    members: Annotated[int, Field(ge=1, le=8)] = 1
    """Number of reward models to train, each an adapter with its own initialization and order of rows; `rl.reward`
    says how RL combines them."""
    likelihood: bool = False
    """Whether the score also depends on the likelihood of the answer under the reward model's own language model:
    for bases that know good answers better than ratings can teach them."""
    tfidf: bool = False
    """Whether to blend the score in equal parts with logistic regression on TF-IDF of the tokens: for human
    ratings that the words alone predict as well as a small model does. Needs `eval_steps`."""
    bootstrap: bool = False
    """Whether each of several members is trained on its own sample of the dialogues, drawn with replacement."""

    @model_validator(mode="after")
    def _bootstraps_several(self) -> "Reward":
        if self.bootstrap and self.members == 1:
            raise ValueError("bootstrap makes members differ, but there is one: raise members, or leave it out")
        return self

    @model_validator(mode="after")
    def _blends_by_validation(self) -> "Reward":
        if self.tfidf and self.eval_steps is None:
            raise ValueError(
                "tfidf takes its scale from validation rows, but there are none: set eval_steps, such as to 50"
            )
        return self

    @property
    def score_terms(self) -> tuple[str, ...]:
        """Terms of the score in addition to the state at an answer's last token (`perl.roles.score_terms`)."""
        return tuple(name for name in ("likelihood", "tfidf") if getattr(self, name))
