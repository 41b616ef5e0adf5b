"""The interface of samplers, and their results.

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
"""Maps the hidden states (B, D) from which tokens are sampled to one number each, (B, 1)."""

ALL = slice(None)


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling from softmax(logits / temperature)."""

    max_new_tokens: int
    """T; completions without an end token are cut at this length."""
    temperature: float
    end_ids: tuple[int, ...]
    """Tokens that end a completion and are part of it. Empty: all completions have T tokens."""
    pad_id: int
    prompts_at_once: int
    """Number of different prompts in one prefill, which limits the memory of activations."""


class Share(NamedTuple):
    """The rows of a larger batch that are sampled here, with the same random numbers as in the whole batch."""

    rows: list[int]
    of: int


@dataclass(frozen=True)
class Samples:
    """Prompts and their sampled completions: prompts padded on the left, completions on the right.

    The names of tensors end with their axes, on which the methods rely: subclasses may add fields.
    """

    ids_BL: Tensor
    """Token ids of prompt and completion, int64."""
    mask_BL: Tensor
    """True for real tokens, bool."""
    prompt_lengths: list[int]
    completion_lengths: list[int]
    """The lengths are on the host as well, so that cutting and batching by length need not wait for the device."""
    ended_B: Tensor
    """Whether the completion ended by itself, bool."""
    sampler_log_probs_BT: Tensor
    """Log-prob with which each token was sampled, fp32; 0 in the padding."""
    read_BT: Tensor | None = None
    """Result of `read` on the hidden state before each token, fp32; None: not computed."""
    lower_hidden_BLD: Tensor | None = None
    """Output of the base's shared blocks at each position; None: not computed, or there are no such blocks."""
    groups: list[int] | None = None
    """Group number of each completion, equal for completions of one prompt; None: unknown."""
    versions: list[str] | None = None
    """Name of the weights with which each completion was sampled; None: the weights in memory."""

    @property
    def completion_length(self) -> int:
        """T."""
        return self.sampler_log_probs_BT.shape[1]

    @property
    def completion_mask_BT(self) -> Tensor:
        """True for the completions' tokens, (B, T)."""
        return self.mask_BL[:, -self.completion_length :]

    @property
    def answers_BL(self) -> Tensor:
        """True for the completions' tokens, (B, L)."""
        return F.pad(self.completion_mask_BT, (self.mask_BL.shape[1] - self.completion_length, 0))

    @property
    def shared_prompts(self) -> SharedPrompts | None:
        """The shared prompts, if the groups are known."""
        return None if self.groups is None else SharedPrompts.of(self.groups, self.completion_length)

    def prompt_ids(self) -> list[list[int]]:
        """Return each prompt's tokens."""
        width = self.ids_BL.shape[1] - self.completion_length
        rows = self.ids_BL[:, :width].tolist()
        return [row[width - length :] for row, length in zip(rows, self.prompt_lengths, strict=True)]

    def completions(self) -> list[list[int]]:
        """Return each completion's tokens, including its end token if there is one."""
        rows = self.ids_BL[:, -self.completion_length :].tolist()
        return [row[:length] for row, length in zip(rows, self.completion_lengths, strict=True)]

    def take(self, rows: Sequence[int], columns: slice = ALL, length: int | None = None) -> Self:
        """Return these rows.

        Args:
            columns: the positions out of L that are kept.
            length: the number of completion positions that are kept, the last ones of the columns.
        """
        rows, places = list(rows), {"BL": columns, "BLD": columns, "BT": slice(length)}
        rows_B = to_device(rows, self.ids_BL.device)
        taken: dict[int, Any] = {}  # a tensor that is in two fields remains one tensor
        for field in fields(self):
            value = getattr(self, field.name)
            if id(value) not in taken:
                taken[id(value)] = _rows_of(value, rows, rows_B, places.get(field.name.rpartition("_")[2]))
        return replace(self, **{field.name: taken[id(getattr(self, field.name))] for field in fields(self)})


def _rows_of(value: Any, rows: list[int], rows_B: Tensor, columns: slice | None) -> Any:
    """Return rows of a field: of a tensor, a list, or all values of a dictionary."""
    if isinstance(value, Tensor):
        return value[rows_B] if columns is None else value[rows_B, columns]
    if isinstance(value, dict):
        return {key: _rows_of(one, rows, rows_B, columns) for key, one in value.items()}
    return None if value is None else [value[row] for row in rows]


class Sampler(ABC):
    """Samples completions as a role. A run creates one sampler: `SAMPLERS[kind](roles, settings)`."""

    exact: ClassVar[bool] = False
    """Whether its log-probs equal those of a forward pass, so that no pass is needed for the policy's
    log-probs."""

    def __init__(self, roles: Roles, settings: SamplerSettings | None = None) -> None:
        self.roles, self.settings = roles, settings or SamplerSettings()

    @property
    def lags(self) -> bool:
        """Whether it may sample a step's completions with the weights from before the last update."""
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
        """Sample one completion for each prompt, as one role.

        Args:
            prompts: token ids, not empty.
            generator: on the base's device; all random numbers are derived from it.
            share: the rows of these prompts in the batch of all processes; None: they are the whole batch.
            read: called on the hidden states from which tokens are sampled. A sampler without access to them
                leaves `read_BT` None, and the values are computed by a forward pass.
        """

    def begin(  # noqa: B027  samplers need not work ahead
        self,
        role: Role,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> None:
        """Start the next call of `draw`, which will have equal arguments, if it can run during an update."""

    @abstractmethod
    def sync(self, role: Role) -> None:
        """Load a role's weights: called before the first sampling as this role, and when they have changed."""
