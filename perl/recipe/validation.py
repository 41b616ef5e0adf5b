"""The keys by which a stage keeps its best weights instead of its last."""

from typing import Annotated

from pydantic import Field, model_validator

from perl.recipe.section import Positive, Section


class Validation(Section):
    """What all stages say about validation."""

    eval_steps: Positive | None = None
    """Steps from one validation to the next, on rows split off the training rows by dialogue, never those held
    out: by the loss (of reward models at the temperature that suits their scores best), and in RL as `eval_reward`
    says. The best weights are kept. Unset: none; the last are."""
    early_stopping_patience: Positive | None = None
    """So many validations in a row without a better one end the stage. Unset: it takes all its steps."""
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the training dialogues, where there are `eval_steps`."""

    @model_validator(mode="after")
    def _validates(self) -> "Validation":
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError("early_stopping_patience counts validations, and there are none: set eval_steps")
        return self
