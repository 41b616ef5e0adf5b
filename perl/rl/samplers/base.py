"""What draws completions: the seam that every sampler fills, and what it returns.

Axis letters: B completions, P prompt positions, T completion positions, L = P + T, D hidden.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from perl.backbones.shared_prompts import SharedPrompts
from perl.rl.samplers import SamplerSettings
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.system.device import to_device

Read = Callable[[Tensor], Tensor]
"""What is read from the hidden states (B, D) that tokens are drawn from: one number each, (B, 1)."""

ALL = slice(None)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: from softmax(logits / temperature)."""

    max_new_tokens: int
    """T; completions without an end are cut there."""
    temperature: float
    end_ids: tuple[int, ...]
    """Tokens that end a completion, and belong to it. Empty: completions all have T tokens."""
    pad_id: int
    prompts_at_once: int
    """Different prompts computed together before their completions are drawn: bounds their activations."""


class Share(NamedTuple):
    """Which rows of a larger batch are drawn here: they draw as they would in it."""

    rows: list[int]
    of: int


@dataclass(frozen=True)
class Samples:
    """Prompts with the completions drawn for them: prompts padded on the left, completions on the right.

    The names of tensors end with their axes, and the methods go by that: subclasses may add fields.
    """

    ids_BL: Tensor
    """Prompt and completion, int64."""
    mask_BL: Tensor
    """True for real tokens, bool."""
    prompt_lengths: list[int]
    completion_lengths: list[int]
    """The same in counts, on the host: what is cut and batched by length must not wait for the device."""
    ended_B: Tensor
    """Whether the completion ended by itself, bool."""
    sampler_log_probs_BT: Tensor
    """What each token was drawn with, fp32; 0 in the padding."""
    read_BT: Tensor | None = None
    """What the sampler was asked to read of the state before each token, fp32; None: it did not."""
    lower_hidden_BLD: Tensor | None = None
    """What the base's shared blocks make of each position; None: not computed, or there are no such blocks."""
    groups: list[int] | None = None
    """Which completions are of one prompt: these have equal numbers; None: not known."""
    versions: list[str] | None = None
    """The name of the weights that each was drawn with; None: those in memory."""

    @property
    def completion_length(self) -> int:
        """T."""
        return self.sampler_log_probs_BT.shape[1]

    @property
    def completion_mask_BT(self) -> Tensor:
        """True for the completions' tokens."""
        return self.mask_BL[:, -self.completion_length :]

    @property
    def answers_BL(self) -> Tensor:
        """The same among all columns."""
        return F.pad(self.completion_mask_BT, (self.mask_BL.shape[1] - self.completion_length, 0))

    @property
    def shared_prompts(self) -> SharedPrompts | None:
        """The prompts, where several completions have the same."""
        return None if self.groups is None else SharedPrompts.of(self.groups, self.completion_length)

    def prompt_ids(self) -> list[list[int]]:
        """Each prompt's tokens."""
        width = self.ids_BL.shape[1] - self.completion_length
        rows = self.ids_BL[:, :width].tolist()
        return [row[width - length :] for row, length in zip(rows, self.prompt_lengths, strict=True)]

    def completions(self) -> list[list[int]]:
        """Each completion's tokens, its end included where there is one."""
        rows = self.ids_BL[:, -self.completion_length :].tolist()
        return [row[:length] for row, length in zip(rows, self.completion_lengths, strict=True)]

    def take(self, rows: Sequence[int], columns: slice = ALL, length: int | None = None) -> Self:
        """These rows.

        Args:
            columns: of L, those that are kept.
            length: completion positions that are kept, the columns' last ones.
        """
        rows, places = list(rows), {"BL": columns, "BLD": columns, "BT": slice(length)}
        rows_B = to_device(rows, self.ids_BL.device)
        taken: dict[int, Any] = {}  # log-probs that are one tensor under two names stay one
        for field in fields(self):
            value = getattr(self, field.name)
            if id(value) not in taken:
                taken[id(value)] = _rows_of(value, rows, rows_B, places.get(field.name.rpartition("_")[2]))
        return replace(self, **{field.name: taken[id(getattr(self, field.name))] for field in fields(self)})


def _rows_of(value: Any, rows: list[int], rows_B: Tensor, columns: slice | None) -> Any:
    """Rows of a field: of a tensor, a list, or all values of a dictionary."""
    if isinstance(value, Tensor):
        return value[rows_B] if columns is None else value[rows_B, columns]
    if isinstance(value, dict):
        return {key: _rows_of(one, rows, rows_B, columns) for key, one in value.items()}
    return None if value is None else [value[row] for row in rows]


class Sampler(ABC):
    """Draws completions as a role. One is made for a run: `SAMPLERS[kind](roles, settings)`."""

    exact: ClassVar[bool] = False
    """Whether its log-probs are those of a forward pass, so that none is needed to know the policy's."""

    def __init__(self, roles: Roles, settings: SamplerSettings | None = None) -> None:
        self.roles, self.settings = roles, settings or SamplerSettings()

    @property
    def lags(self) -> bool:
        """Whether it may draw a step's completions with the weights before the last update."""
        return self.settings.staleness > 0

    @abstractmethod
    def draw(
        self,
        role: Role,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
        read: Read | None = None,
    ) -> Samples:
        """Draw one completion for each prompt, as one role.

        Args:
            prompts: token ids, not empty.
            generator: on the base's device; all that is random follows from it.
            share: where these prompts stand in the batch of all processes; None: they are the batch.
            read: asked of the hidden states that tokens are drawn from. A sampler that has none to show leaves
                `read_BT` None, and what is missing is computed by a forward pass.
        """

    def begin(  # noqa: B027  nothing has to be begun
        self,
        role: Role,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> None:
        """Begin what `draw` will be asked for next with equal arguments, where that goes on beside an update."""

    @abstractmethod
    def sync(self, role: Role) -> None:
        """Take over a role's weights: called before it first draws as this role, and when they have changed."""
