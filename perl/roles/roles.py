"""The roles of alignment, and one module that computes as any of them.

    reference = base + `sft`      policy = base + `policy`      reward = base + `reward` + head
    critic    = base + `critic` + head, or only a head on the policy's trunk

Where their weights are is said by two subclasses: `SharedBase`, adapters on one frozen base, and
`SeparateModels`, the conventional side with a whole model for each.

Switching. A forward whose backward runs as another role is silently wrong (with activation checkpointing the
layers are computed again as whoever computes by then). So the two are kept apart: `role()` only says who
computes, and puts back what it found; `train_only()` says which parameters learn; and checkpointed layers enter
the role they were first computed as before they are computed again.

Axis letters: B rows, L positions of prompt and answer, T positions of the answer, D hidden.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from perl.backbones.encoder import EncoderHead, is_encoder
from perl.backbones.logits import logits_transform
from perl.errors import UserError
from perl.measure.probe import recomputing
from perl.parallel.engine import Engine
from perl.parallel.processes import ALONE
from perl.roles.log_probs import log_probs_and_entropy, tokens_at_once
from perl.roles.packed import packed
from perl.roles.split_layers import lower, positions, upper, watched


class Role(StrEnum):
    """Who computes. The value is the name of the role's folder and adapter; `BASE` has none."""

    BASE = "base"
    SFT = "sft"
    POLICY = "policy"
    REWARD = "reward"
    CRITIC = "critic"


class Outputs(NamedTuple):
    """What a role says of a batch; None where it was not asked."""

    log_probs_BT: Tensor | None = None
    """Log-probability of each answer token, fp32; 0 where there is no token."""
    entropy_BT: Tensor | None = None
    """Entropy of the distribution each answer token was drawn from, in nats, fp32; 0 where no token."""
    values_BT: Tensor | None = None
    """The head's value of the state before each answer token, fp32."""
    scores_B: Tensor | None = None
    """The head's score of the whole row, read at its last token, fp32."""


class Roles(nn.Module, ABC):
    """All roles in one module.

    Args:
        engine: how the processes that run together hold the weights.
    """

    prefix: ClassVar[str]
    """Stands before the names of weights on disk, as the library that reads them expects."""
    folder: ClassVar[str]
    """The folder of a role's weights on disk, inside the role's own."""
    weights_file: ClassVar[str]
    """The file of the weights there."""

    def __init__(self, engine: Engine | None = None) -> None:
        super().__init__()
        self.engine = engine or Engine(ALONE)
        self.heads = nn.ModuleDict()
        self._active = Role.BASE
        self._checkpointed: list[GradientCheckpointingLayer] = []

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

    @abstractmethod
    def weights(self, role: Role) -> dict[str, nn.Parameter]:
        """What a role has of its own besides its head, by names that do not contain the role's."""

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

    @property
    def shared_blocks(self) -> int:
        """How many of the lowest blocks compute alike for all roles, and need computing once only; 0: none."""
        return 0

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
        """The role that computes now."""
        return self._active

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def add(self, role: Role, copy_of: Role = Role.BASE, *, weights: bool = True, head: bool = False) -> None:
        """Give a role its weights and its head; it starts as the role it is a copy of, a new head scores 0.

        Args:
            role: whose; it must be new.
            copy_of: the role whose weights (and head, if it has one) it starts from.
            weights: False for a critic that is only a head on the policy's trunk.
            head: whether it scores.
        """
        assert role not in self.roles - {Role.BASE}, f"{role} exists"
        if weights:
            self._add_weights(role, copy_of)
        if head and self.encoder:
            self.heads[role] = EncoderHead(self.models()[0])
        elif head:
            width = self.models()[0].get_output_embeddings().weight.shape[1]
            self.heads[role] = nn.Linear(width, 1, bias=False, device=self.device, dtype=torch.float32)
            with torch.no_grad():
                if copy_of in self.heads:
                    self.head(role).weight.copy_(self.head(copy_of).weight)
                else:
                    self.head(role).weight.zero_()

    @property
    def encoder(self) -> bool:
        """Whether the base is an encoder: then the only role on it is the reward."""
        return is_encoder(self.models()[0].config)

    def head_weights(self, role: Role) -> dict[str, nn.Parameter]:
        """The parameters of a role's head, by the names that they have in a classifier of transformers."""
        head = self.heads[role]
        if isinstance(head, EncoderHead):
            return head.weights()
        return {f"score.{name}": parameter for name, parameter in self.head(role).named_parameters()}

    def head(self, role: Role) -> nn.Linear:
        """The scalar head of a role that scores, on a decoder."""
        head = self.heads[role]
        assert isinstance(head, nn.Linear)
        return head

    def parameters_of(self, *roles: Role) -> list[nn.Parameter]:
        """All that the roles learn: their weights and heads."""
        found = []
        for role in roles:
            found += [*self.weights(role).values()]
            found += [*self.heads[role].parameters()] if role in self.heads else []
        return found

    def train_only(self, *roles: Role) -> list[nn.Parameter]:
        """Make the parameters of these roles learn, and no others; return them."""
        self.requires_grad_(False)
        parameters = self.parameters_of(*roles)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    def together(self, number: int) -> int:
        """The largest of the processes' numbers where all must compute as many passes, else this one's."""
        return self.engine.together(number)

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Compute as this role; whatever happens inside, the role found is put back."""
        before = self._active
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    @contextlib.contextmanager
    def sampling(self, role: Role) -> Iterator[list[Tensor]]:
        """Compute as this role many times over, without gradients; inside, it cannot learn.

        Yields a list in which each forward leaves what the shared blocks made of it, (B, N, D), as its only
        element; it stays empty where there are no such blocks.
        """
        with self.role(role), packed(self.model()), watched(self.model(), self.shared_blocks) as seen:
            yield seen

    @contextlib.contextmanager
    def checkpointed(self, enabled: bool = True) -> Iterator[None]:
        """Inside, keep only each block's input for the backward pass and compute the rest again."""
        if not enabled:
            yield
            return
        # On the blocks themselves: the model's own method for it changes its name between versions.
        self._checkpointed = [block for block in self.modules() if isinstance(block, GradientCheckpointingLayer)]
        for block in self._checkpointed:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(
                self._checkpoint,
                block,
                use_reentrant=False,
                context_fn=self._same_role_again,
                # DeepSpeed's weights are of another shape when a block's input is kept than when it is read again.
                determinism_check="none" if self.engine.hooks_layers else "default",
            )
        self.train(self.training)
        try:
            yield
        finally:
            for block in self._checkpointed:
                block.gradient_checkpointing = False
            self._checkpointed = []
            self.train(self.training)

    def _checkpoint(self, block: nn.Module, compute: Callable[..., Any], *inputs: Any, **settings: Any) -> Any:
        """Checkpoint a block, which says that it is training only until then: see `train`."""

        def in_eval_mode(*given: Any) -> Any:
            block.training = False
            try:
                return compute(*given)
            finally:
                block.training = True

        return checkpoint(in_eval_mode, *inputs, **settings)

    def _same_role_again(self) -> tuple[Any, Any]:
        """The contexts of a checkpointed block: when it is first computed, and when again."""

        @contextlib.contextmanager
        def again(role: Role) -> Iterator[None]:
            with self.role(role), recomputing():
                yield

        return contextlib.nullcontext(), again(self._active)

    def train(self, mode: bool = True) -> "Roles":
        """Note whether LoRA's dropout is on. The base stays in eval mode: its own dropout is off in every stage.

        One rule for all stages: what samples, what is trained and what is judged are then one model.
        """
        super().train(False)
        self.training = mode
        for block in self._checkpointed:  # transformers checkpoints a block only if it says it is training
            block.training = True
        return self

    def lower_hidden(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """What the shared blocks make of a batch, (B, L, D) in the base's dtype, for `forward` to go on from."""
        return lower(self.model(), self.shared_blocks, ids_BL, mask_BL.long())

    def trunk(self, ids_BL: Tensor, mask_BL: Tensor, lower_hidden_BLD: Tensor | None = None) -> Tensor:
        """Hidden states (B, L, D) after the last norm, under the active role.

        Positions are counted over real tokens, so the padding side does not matter (GPT-2 needs telling).
        """
        model = self.model()
        if lower_hidden_BLD is not None:
            return upper(model, self.shared_blocks, lower_hidden_BLD, mask_BL.long())
        hidden: Tensor = model.base_model(
            input_ids=ids_BL, attention_mask=mask_BL.long(), position_ids=positions(mask_BL), use_cache=False
        ).last_hidden_state
        return hidden

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
    ) -> Outputs:
        """Log-probabilities of answers, values of their states, or scores of whole rows, as one role.

        Args:
            role: whose adapter computes.
            ids_BL: token ids, int64.
            mask_BL: True for real tokens, bool.
            completion_length: T, the columns at the right end that hold answers (padded on their right); with 0
                the head scores whole rows.
            temperature: divides the logits; None leaves the language-model head out.
            head: the role whose head reads the trunk; None for no head.
            trunk_gradient: share of the gradient of values that goes on into the trunk, in [0, 1].
            lower_hidden_BLD: what `below` said of this batch; None: compute all blocks.
        """
        if head is not None and isinstance(classifier := self.heads[head], EncoderHead):
            with self.role(role):
                return Outputs(scores_B=classifier.scores(self.model(), ids_BL, mask_BL))
        with self.role(role):
            hidden_BLD = self.trunk(ids_BL, mask_BL, lower_hidden_BLD)
            embedding, transform = self.model().get_output_embeddings(), logits_transform(self.model().config)
        log_probs_BT = entropy_BT = values_BT = scores_B = None
        if completion_length == 0 and head is not None:
            last_B = mask_BL.long().cumsum(1).argmax(1)
            last_BD = hidden_BLD[torch.arange(len(last_B), device=last_B.device), last_B]
            scores_B = self.head(head)(last_BD.float()).squeeze(-1)
        elif head is not None:
            states_BTD = _scaled_gradient(hidden_BLD[:, -completion_length - 1 : -1], trunk_gradient)
            values_BT = self.head(head)(states_BTD.float()).squeeze(-1)
        if temperature is not None:
            rows_N, columns_N = mask_BL[:, -completion_length:].nonzero(as_tuple=True)
            log_probs_N, entropy_N = log_probs_and_entropy(
                hidden_BLD[:, -completion_length - 1 : -1][rows_N, columns_N],
                embedding.weight,
                embedding.bias,
                ids_BL[:, -completion_length:][rows_N, columns_N],
                temperature,
                tokens_at_once(len(embedding.weight)),
                transform,
            )
            nothing_BT = log_probs_N.new_zeros(len(ids_BL), completion_length)
            log_probs_BT = nothing_BT.index_put((rows_N, columns_N), log_probs_N)
            entropy_BT = nothing_BT.index_put((rows_N, columns_N), entropy_N)
        return Outputs(log_probs_BT, entropy_BT, values_BT, scores_B)


def _scaled_gradient(states: Tensor, share: float) -> Tensor:
    """The same states, of whose gradient only a share goes on."""
    if share == 1.0:
        return states
    known = states.detach()
    return known if share == 0.0 else known + share * (states - known)


@torch.no_grad()
def check_logits(lm: PreTrainedModel) -> None:
    """Some models change their logits in ways not known here; all that is computed would be silently wrong."""
    embedding = lm.get_output_embeddings()
    if embedding is None:
        raise UserError("the model has no language-model head", where=lm.name_or_path, remedy="Use a causal LM.")
    ids_BL = torch.tensor([[1, 2, 3]], device=embedding.weight.device)
    expected = lm(input_ids=ids_BL).logits.float()
    product = embedding(lm.base_model(input_ids=ids_BL).last_hidden_state).float()
    actual = logits_transform(lm.config).apply_(product, temperature=1.0)
    if not torch.allclose(actual, expected, rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{type(lm).__name__} changes its logits after the output embedding in a way that is not known",
            where=lm.name_or_path,
            remedy="This architecture is not supported yet.",
        )
