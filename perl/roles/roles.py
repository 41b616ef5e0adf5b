"""The roles of alignment, and one module that computes as any of them.

    reference = base + `sft`      policy = base + `policy`      reward = base + `reward` + head
    critic    = base + `critic` + head, or only a head on the policy's trunk

Two subclasses hold the weights: `SharedBase`, adapters on one frozen base, and `SeparateModels`, the conventional
side with a model for each role. The backbone knows how a model is fed and read.

Switching. A forward whose backward runs as another role is silently wrong: with activation checkpointing, blocks
would be computed again as whichever role is active by then. So `role()` only says which role computes, and puts
back the one before; `train_only()` says which parameters are trained; and checkpointed blocks are computed again
as the role that first computed them.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perl.backbones import backbone_of
from perl.backbones.backbone import Backbone
from perl.backbones.logits import logits_transform
from perl.backbones.shared_prompts import SharedPrompts, sharing
from perl.parallel.engine import Engine
from perl.parallel.processes import ALONE
from perl.roles.checkpointing import checkpointed
from perl.roles.distributions import kl_of_states
from perl.roles.log_probs import completion_log_probs, scaled_gradient
from perl.roles.outputs import Outputs
from perl.roles.packed import packed
from perl.roles.role import Role
from perl.roles.score_terms import ScoredRows, ScoreTerms


class Roles(nn.Module, ABC):
    """All roles in one module; `engine` says how the processes that run together hold the weights."""

    prefix: ClassVar[str]
    """Of the names of weights on disk, as the library that reads them expects."""
    folder: ClassVar[str]
    """Of a role's weights on disk, inside the role's own."""
    weights_file: ClassVar[str]
    shared_blocks: int = 0
    """How many of the lowest blocks compute alike for all roles, so that computing them once is enough."""

    def __init__(self, engine: Engine | None = None) -> None:
        super().__init__()
        self.engine = engine or Engine(ALONE)
        self.heads = nn.ModuleDict()
        self.score_terms = nn.ModuleDict()
        """Of each reward model that has any, by name."""
        self.asked_score_terms: tuple[str, ...] = ()
        """Names of those that new reward models get."""
        self._active = Role.BASE
        self.shares_prompts = False
        """Whether a prompt is computed once for all its completions in a batch."""

    @cached_property
    def backbone(self) -> Backbone:
        """The kind of model that all roles are on."""
        return backbone_of(self.models()[0].config)

    @property
    @abstractmethod
    def roles(self) -> frozenset[Role]:
        """The roles that exist."""

    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The language model as the active role has it."""

    @abstractmethod
    def models(self) -> list[PreTrainedModel]:
        """All language models in memory."""

    def trunks(self) -> list[nn.Module]:
        """The modules that all tokens go through, of every model."""
        return [trunk for model in self.models() for trunk in self.backbone.trunks(model)]

    @abstractmethod
    def weights(self, role: Role) -> dict[str, nn.Parameter]:
        """What a role has of its own besides its head, by names that do not contain the role's."""

    def by_learning_rate(self, *roles: Role) -> dict[float, list[nn.Parameter]]:
        """All weights of roles, by what the learning rate is multiplied by for them."""
        return {1.0: [weight for role in roles for weight in self.weights(role).values()]}

    @abstractmethod
    def keep(self, *roles: Role) -> None:
        """Free all other roles that have whole models of their own; a base freed before comes back."""

    @abstractmethod
    def base_sha256(self) -> str | None:
        """SHA-256 of the shared base's weights as they are now; None where there is no shared base."""

    def base_changed(self) -> list[str]:
        """The tensors of a shared base that are no longer as loaded."""
        return []

    @abstractmethod
    def write_config(self, folder: Path, base: str, *, scores: bool) -> None:
        """Write beside a role's weights what peft or transformers need to load them."""

    @abstractmethod
    def config_fits(self, folder: Path) -> bool:
        """Whether weights written with this configuration mean here what they meant there."""

    @abstractmethod
    def _add_weights(self, role: Role, copy_of: Role) -> None:
        """Give a role weights of its own, equal to another role's."""

    @abstractmethod
    def _activate(self, role: Role) -> None:
        """Let this role compute."""

    @property
    def reference(self) -> Role:
        """The policy that RL starts from and stays near: the SFT policy, or the bare base."""
        return Role.SFT if Role.SFT in self.roles else Role.BASE

    @property
    def active(self) -> Role:
        return self._active

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def add(self, role: Role, copy_of: Role = Role.BASE, *, weights: bool = True, head: bool = False) -> None:
        """Give a new role its weights and its head, which scores 0 if it is no copy.

        Args:
            copy_of: the role whose weights (and head, if it has one) it starts from.
            weights: False for a critic that is only a head on the policy's trunk.
            head: whether it scores.
        """
        assert role not in self.roles - {Role.BASE}, f"{role} exists"
        if weights:
            self._add_weights(role, copy_of)
        if head:
            self.heads[role] = self.backbone.new_head(self.models()[0])
            if copy_of in self.heads:
                for new, old in zip(self.heads[role].parameters(), self.heads[copy_of].parameters(), strict=True):
                    new.data.copy_(old.data)
        if head and self.asked_score_terms and role is not Role.CRITIC:
            self.score_terms[role] = ScoreTerms(self.asked_score_terms, self.models()[0])

    def head_weights(self, role: Role) -> dict[str, nn.Parameter]:
        """The parameters of a role's head, by their names in a classifier of transformers, and of its terms."""
        terms = self.score_terms[role].named_parameters() if role in self.score_terms else ()
        return self.backbone.head_parameters(self.heads[role]) | dict(terms)

    def head(self, role: Role) -> nn.Linear:
        """The linear head of a role that has values."""
        head = self.heads[role]
        assert isinstance(head, nn.Linear)
        return head

    def parameters_of(self, *roles: Role) -> list[nn.Parameter]:
        """The weights and heads of roles."""
        heads = {role: self.head_weights(role) for role in roles if role in self.heads}
        return [one for role in roles for one in (self.weights(role) | heads.get(role, {})).values()]

    def train_only(self, *roles: Role) -> list[nn.Parameter]:
        """Let the parameters of these roles alone require gradients; return them."""
        self.requires_grad_(False)
        parameters = self.parameters_of(*roles)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Inside, this role computes; afterwards, the one before."""
        before = self._active
        try:
            self._activate(role)
            yield
        finally:
            self._activate(before)

    @contextlib.contextmanager
    def sampling(self, role: Role) -> Iterator[list[Tensor]]:
        """Inside, this role computes many times over, without gradients or training.

        Yields a list whose only element is the hidden states after the shared blocks in the last forward; it stays
        empty where there are no such blocks, or an encoder has them.
        """
        watched = 0 if self.backbone.encodes_prompts else self.shared_blocks
        with self.role(role), packed(self.model()), self.backbone.watched(self.model(), watched) as seen:
            yield seen

    @contextlib.contextmanager
    def checkpointed(self, enabled: bool = True) -> Iterator[None]:
        """Inside, activations are checkpointed, if enabled."""
        models = self.models() if enabled else []
        blocks = [block for model in models for block in self.backbone.blocks(model)]
        # DeepSpeed's weights are of another shape when a block's input is kept than when it is read again.
        check_shapes = not self.engine.hooks_layers
        with checkpointed(blocks, lambda: partial(self.role, self._active), check_shapes=check_shapes):
            yield

    def train(self, mode: bool = True) -> "Roles":
        """Note whether the adapters' dropout is on; the base's own is off in every stage."""
        super().train(False)
        self.training = mode
        return self

    @torch.no_grad()
    def lower_hidden(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states (B, L, D) after the shared blocks, in the base's dtype, for `forward`."""
        return self.backbone.lower(self.model(), self.shared_blocks, ids_BL, mask_BL)

    def trunk(self, ids_BL: Tensor, mask_BL: Tensor, lower_hidden_BLD: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, D) after the last norm, under the active role."""
        with self._above(lower_hidden_BLD) as model:
            return self.backbone.hidden(model, ids_BL, mask_BL, lower_hidden_BLD)

    @contextlib.contextmanager
    def _above(self, lower_hidden_BLD: Tensor | None) -> Iterator[PreTrainedModel]:
        """The active role's model; where the hidden states after the shared blocks are known, without these."""
        model, first = self.model(), 0 if lower_hidden_BLD is None else self.shared_blocks
        with self.backbone.only(model, slice(first, None)) if first else contextlib.nullcontext():
            yield model

    def forward(
        self,
        role: Role,
        ids_BL: Tensor,
        mask_BL: Tensor,
        *,
        completion_length: int = 0,
        temperature: float | None = None,
        head: Role | None = None,
        trunk_gradient: float = 1.0,
        lower_hidden_BLD: Tensor | None = None,
        states: bool = False,
        prompts: SharedPrompts | None = None,
        lengths: Sequence[int] | None = None,
        answers_BL: Tensor | None = None,
    ) -> Outputs:
        """Log-probs of completions, values of their states, or scores of whole rows, as one role.

        Args:
            role: whose adapter computes.
            ids_BL: token ids, int64.
            mask_BL: True for real tokens, bool.
            completion_length: T, the columns at the right end that hold completions, padded on their right; with
                0 the head scores whole rows.
            temperature: divides the logits; None leaves the language-model head out.
            head: the role whose head reads the trunk; None for no head.
            trunk_gradient: share of the gradient of values that goes on into the trunk, in [0, 1].
            lower_hidden_BLD: from `lower_hidden` for this batch; None: compute all blocks.
            states: whether the states are wanted themselves.
            prompts: which rows have the same prompt; None: no two.
            lengths: of the completions, where the host knows them: it need not wait for the mask.
            answers_BL: True for the tokens of the answer that is scored, bool; for heads with terms.
        """
        shared = prompts if self.shares_prompts else None
        with self.role(role), self._above(lower_hidden_BLD) as model, sharing(model, shared, mask_BL):
            if completion_length == 0:
                assert head is not None, "nothing is asked for"
                scorer = self.heads[head]
                scores_B, hidden_BLD = self.backbone.score(model, scorer, ids_BL, mask_BL, lower_hidden_BLD)
                if head in self.score_terms:
                    assert answers_BL is not None
                    read = ScoredRows(model, hidden_BLD, ids_BL, mask_BL, answers_BL)
                    scores_B = self.score_terms[head](scores_B, read)
                return Outputs(scores_B=scores_B)
            states_BTD = self.backbone.states(model, ids_BL, mask_BL, completion_length, lower_hidden_BLD)
        log_probs_BT = entropy_BT = values_BT = None
        if head is not None:
            values_BT = self.head(head)(scaled_gradient(states_BTD, trunk_gradient).float()).squeeze(-1)
        if temperature is not None:
            log_probs_BT, entropy_BT = completion_log_probs(
                states_BTD,
                model.get_output_embeddings(),
                ids_BL[:, -completion_length:],
                mask_BL[:, -completion_length:],
                temperature,
                logits_transform(model.config),
                lengths,
            )
        return Outputs(log_probs_BT, entropy_BT, values_BT, states_BTD=states_BTD if states else None)

    def kl_of_states(self, old_ND: Tensor, states_ND: Tensor, temperature: float) -> Tensor:
        """See `perl.roles.distributions`; with this model's output embedding."""
        model = self.model()
        embedding, transform = model.get_output_embeddings(), logits_transform(model.config)
        return kl_of_states(old_ND, states_ND, embedding.weight, embedding.bias, temperature, transform)
