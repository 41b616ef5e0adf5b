"""The roles in alignment, and one module that computes as any of them.

    reference = base + `sft`      policy = base + `policy`      reward = base + `reward` + head
    critic    = base + `critic` + head, or only a head on the policy's trunk

Two subclasses hold the weights: `SharedBase`, adapters on one frozen base, and `SeparateModels`, the conventional
setup with one model per role. The backbone defines a model's inputs and outputs.

Switching. A forward whose backward runs as another role is silently wrong: with activation checkpointing, blocks
would be recomputed as whichever role is active by then. So `role()` only sets the active role and restores the
previous one; `train_only()` sets which parameters are trained; and checkpointed blocks are recomputed as the role
that first computed them.
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
from perl.roles.transposed import transposed


class Roles(nn.Module, ABC):
    """All roles in one module; `engine` defines how the processes of a run hold the weights."""

    prefix: ClassVar[str]
    """Prefix of the names of weights on disk, as the library that reads them expects."""
    folder: ClassVar[str]
    """Subfolder of a role's folder that holds its weights."""
    weights_file: ClassVar[str]
    shared_blocks: int = 0
    """Number of lowest blocks whose output is the same for all roles, so that they are computed only once."""

    def __init__(self, engine: Engine | None = None) -> None:
        super().__init__()
        self.engine = engine or Engine(ALONE)
        self.heads = nn.ModuleDict()
        self.score_terms = nn.ModuleDict()
        """The score terms of each reward model that has any, by role."""
        self.asked_score_terms: tuple[str, ...] = ()
        """Names of the score terms that new reward models get."""
        self._active = Role.BASE
        self.shares_prompts = False
        """Whether a prompt is computed only once for all its completions in a batch."""

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone of all roles."""
        return backbone_of(self.models()[0].config)

    @property
    @abstractmethod
    def roles(self) -> frozenset[Role]:
        """The roles that have been added, and the base."""

    @abstractmethod
    def model(self) -> PreTrainedModel:
        """Return the language model of the active role."""

    @abstractmethod
    def models(self) -> list[PreTrainedModel]:
        """Return all language models in memory."""

    def trunks(self) -> list[nn.Module]:
        """Return the trunks of all models, the modules that all tokens pass through."""
        return [trunk for model in self.models() for trunk in self.backbone.trunks(model)]

    @abstractmethod
    def weights(self, role: Role) -> dict[str, nn.Parameter]:
        """Return a role's own weights without its head, by names that do not contain the role's name."""

    def by_learning_rate(self, *roles: Role) -> dict[float, list[nn.Parameter]]:
        """Return all weights of the roles, grouped by the factor on their learning rate."""
        return {1.0: [weight for role in roles for weight in self.weights(role).values()]}

    @abstractmethod
    def keep(self, *roles: Role) -> None:
        """Free all other roles that are whole models; reload the base if it was freed before."""

    @abstractmethod
    def base_sha256(self) -> str | None:
        """Return the SHA-256 of the shared base's current weights; None without a shared base."""

    def base_changed(self) -> list[str]:
        """Return the names of the shared base's tensors that have changed since loading."""
        return []

    @abstractmethod
    def write_config(self, folder: Path, base: str, *, scores: bool) -> None:
        """Write the configuration that peft or transformers need to load a role's weights, next to them."""

    @abstractmethod
    def config_fits(self, folder: Path) -> bool:
        """Return whether weights written with this configuration have the same meaning here."""

    @abstractmethod
    def _add_weights(self, role: Role, copy_of: Role) -> None:
        """Create weights for a role, as a copy of another role's."""

    @abstractmethod
    def _activate(self, role: Role) -> None:
        """Make this role the active one."""

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
        """Create a new role's weights and its head, which scores 0 unless it is a copy.

        Args:
            copy_of: the role whose weights (and head, if it has one) are copied.
            weights: False for a critic that is only a head on the policy's trunk.
            head: whether the role has a head.
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
        """Return the parameters of a role's head, by their names in transformers' classifier, and of its terms."""
        terms = self.score_terms[role].named_parameters() if role in self.score_terms else ()
        return self.backbone.head_parameters(self.heads[role]) | dict(terms)

    def head(self, role: Role) -> nn.Linear:
        """Return the linear head of a role that computes values."""
        head = self.heads[role]
        assert isinstance(head, nn.Linear)
        return head

    def parameters_of(self, *roles: Role) -> list[nn.Parameter]:
        """Return the parameters of the roles, including their heads."""
        heads = {role: self.head_weights(role) for role in roles if role in self.heads}
        return [one for role in roles for one in (self.weights(role) | heads.get(role, {})).values()]

    def train_only(self, *roles: Role) -> list[nn.Parameter]:
        """Make only the parameters of these roles require gradients, and return them."""
        self.requires_grad_(False)
        parameters = self.parameters_of(*roles)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Activate a role inside the context, and restore the previous one afterwards."""
        before = self._active
        try:
            self._activate(role)
            yield
        finally:
            self._activate(before)

    @contextlib.contextmanager
    def sampling(self, role: Role) -> Iterator[list[Tensor]]:
        """Activate a role for many forward passes, without gradients or training.

        Yields a list whose only element is the hidden states after the shared blocks in the last forward pass; it
        stays empty if there are no shared blocks, or if they are in an encoder.
        """
        watched = 0 if self.backbone.encodes_prompts else self.shared_blocks
        with self.role(role):
            model = self.model()
            with packed(model), transposed(model), self.backbone.watched(model, watched) as seen:
                yield seen

    @contextlib.contextmanager
    def checkpointed(self, enabled: bool = True) -> Iterator[None]:
        """Checkpoint activations inside the context, if enabled."""
        models = self.models() if enabled else []
        blocks = [block for model in models for block in self.backbone.blocks(model)]
        # Under DeepSpeed, weights have one shape when a block's input is saved, and another when it is recomputed.
        check_shapes = not self.engine.hooks_layers
        with checkpointed(blocks, lambda: partial(self.role, self._active), check_shapes=check_shapes):
            yield

    def train(self, mode: bool = True) -> "Roles":
        """Switch the adapters' dropout on or off; the base's own is off in every stage."""
        super().train(False)
        self.training = mode
        return self

    @torch.no_grad()
    def lower_hidden(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the hidden states (B, L, D) after the shared blocks, in the base's dtype, for `forward`."""
        return self.backbone.lower(self.model(), self.shared_blocks, ids_BL, mask_BL)

    def trunk(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the hidden states (B, L, D) after the last norm, under the active role."""
        return self.backbone.hidden(self.model(), ids_BL, mask_BL)

    @contextlib.contextmanager
    def _above(self, lower_hidden_BLD: Tensor | None) -> Iterator[PreTrainedModel]:
        """Yield the active role's model, without the shared blocks if the hidden states after them are given."""
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
        """Compute log-probs of completions, values of their states, or scores of whole rows, as one role.

        Args:
            role: the role whose adapter is active.
            ids_BL: token ids, int64.
            mask_BL: True for real tokens, bool.
            completion_length: T, the number of rightmost columns, which hold completions, padded on their right;
                with 0 the head scores whole rows.
            temperature: divides the logits; with None no log-probs are computed.
            head: the role whose head reads the trunk; None for no head.
            trunk_gradient: factor in [0, 1] on the gradient that flows from the values into the trunk.
            lower_hidden_BLD: from `lower_hidden` for this batch; None: compute all blocks.
            states: whether to return the states as well.
            prompts: which rows share a prompt; None: no rows do.
            lengths: of the completions, if known on the host, which then need not wait for the mask.
            answers_BL: True for the tokens of the scored completion, bool; for heads with score terms.
        """
        shared = prompts if self.shares_prompts else None
        with self.role(role), self._above(lower_hidden_BLD) as model, sharing(model, shared, mask_BL):
            if completion_length == 0:
                assert head is not None, "no output is requested"
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
        """Compute `perl.roles.distributions.kl_of_states` with this model's output embedding."""
        model = self.model()
        embedding, transform = model.get_output_embeddings(), logits_transform(model.config)
        return kl_of_states(old_ND, states_ND, embedding.weight, embedding.bias, temperature, transform)
