"""One frozen base, and the roles on it: each is a low-rank adapter, with a scalar head where it scores.

    reference = base + `sft`      policy = base + `policy`      reward = base + `reward` + head
    critic    = base + `critic` + head, or only a head on the policy's trunk

Switching. peft's own `set_adapter` also switches `requires_grad`, and a forward whose backward runs under
another adapter is silently wrong (with activation checkpointing the layers are computed again under whatever
adapter is active by then). So here the two are kept apart: `role()` only says which adapter computes, and
puts back what it found; `train_only()` says which parameters learn; and checkpointed layers enter the role they
were first computed under before they are computed again.

Axis letters: B rows, L positions of prompt and answer, T positions of the answer, D hidden.
"""

import contextlib
import warnings
from collections.abc import Iterator
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from perl.errors import UserError
from perl.model.log_probs import log_probs_and_entropy

CHUNK = 1024
"""Tokens whose logits are held at a time."""


class Role(StrEnum):
    """Who computes. The value is the name of the role's adapter; `BASE` has none."""

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


class Roles(nn.Module):
    """All roles on one base, in one module: the thing that DDP, DeepSpeed or FSDP wrap.

    Args:
        lm: a causal language model; it is frozen, and LoRA layers are put into it in place.
        lora: the shape of every adapter.

    Raises:
        UserError: the LoRA settings do not fit the model, or its logits are not a plain product with the
            output embedding.
    """

    def __init__(self, lm: PreTrainedModel, lora: LoraConfig) -> None:
        super().__init__()
        self.lm = lm.requires_grad_(False).eval()
        self.lora = lora
        self.heads = nn.ModuleDict()
        self._layers: list[LoraLayer] = []
        self._checkpointed: list[GradientCheckpointingLayer] = []
        self._active = Role.BASE
        _check_logits(lm)

    @property
    def roles(self) -> frozenset[Role]:
        """The roles that exist, `BASE` among them."""
        adapters = getattr(self.lm, "peft_config", {})
        return frozenset({Role.BASE, *(Role(name) for name in adapters), *(Role(name) for name in self.heads)})

    @property
    def reference(self) -> Role:
        """The policy that RL starts from and stays near: the SFT policy, or the bare base."""
        return Role.SFT if Role.SFT in self.roles else Role.BASE

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        device: torch.device = self.lm.get_output_embeddings().weight.device
        return device

    @property
    def active(self) -> Role:
        """The role that computes now."""
        return self._active

    def add(self, role: Role, copy_of: Role = Role.BASE, *, adapter: bool = True, head: bool = False) -> None:
        """Give a role its adapter and its head; a new adapter is the identity, a new head scores 0.

        Args:
            role: whose; it must be new.
            copy_of: the role whose adapter (and head, if it has one) it starts from.
            adapter: False for a critic that is only a head on the policy's trunk.
            head: whether it scores.
        """
        assert role not in self.roles, f"{role} exists"
        if adapter:
            self._add_adapter(role)
            if copy_of is not Role.BASE:
                source, target = self.adapter(copy_of), self.adapter(role)
                for name, parameter in target.items():
                    parameter.data.copy_(source[name].data)
        if head:
            width = self.lm.get_output_embeddings().weight.shape[1]
            self.heads[role] = nn.Linear(width, 1, bias=False, device=self.device, dtype=torch.float32)
            start = self.head(copy_of).weight if copy_of in self.heads else torch.zeros(1, width)
            self.head(role).weight.data.copy_(start)

    def _add_adapter(self, role: Role) -> None:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several is the point
                inject_adapter_in_model(self.lora, self.lm, adapter_name=role)
        except ValueError as error:
            raise UserError(
                f"LoRA does not fit this model: {error}",
                where="lora.targets",
                remedy="Name modules of this model, or use all-linear.",
            ) from None
        self._layers = [module for module in self.lm.modules() if isinstance(module, LoraLayer)]
        for parameter in self.adapter(role).values():
            parameter.data = parameter.data.float()  # adapters learn in fp32 on a base of any dtype
        self.lm.requires_grad_(False)
        self._activate(self._active)

    def adapter(self, role: Role) -> dict[str, nn.Parameter]:
        """The LoRA parameters of a role, by their names without the role's."""
        mark = f".{role}."
        return {
            name.replace(mark, "."): parameter
            for name, parameter in self.lm.named_parameters()
            if "lora_" in name and mark in name
        }

    def head(self, role: Role) -> nn.Linear:
        """The scalar head of a role that scores."""
        head = self.heads[role]
        assert isinstance(head, nn.Linear)
        return head

    def parameters_of(self, *roles: Role) -> list[nn.Parameter]:
        """All that the roles learn: adapters and heads."""
        found = []
        for role in roles:
            found += [*self.adapter(role).values()]
            found += [*self.heads[role].parameters()] if role in self.heads else []
        return found

    def train_only(self, *roles: Role) -> list[nn.Parameter]:
        """Make the parameters of these roles learn, and no others; return them."""
        self.requires_grad_(False)
        parameters = self.parameters_of(*roles)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return parameters

    @contextlib.contextmanager
    def role(self, role: Role) -> Iterator[None]:
        """Compute as this role; whatever happens inside, the role found is put back."""
        before = self._active
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, role: Role) -> None:
        # peft's set_adapter would also write every requires_grad; this attribute is all that its forward reads.
        adapters = getattr(self.lm, "peft_config", {})
        active = [str(role)] if role in adapters else []
        for layer in self._layers:
            layer._active_adapter = active
        self._active = role

    def train(self, mode: bool = True) -> "Roles":
        """Switch LoRA's dropout. The frozen base stays in eval mode: its own dropout is never wanted here."""
        super().train(mode)
        self.lm.eval()
        for layer in self._layers:
            layer.lora_dropout.train(mode)
        for block in self._checkpointed:  # transformers checkpoints a block only if it says it is training
            block.training = True
        return self

    @contextlib.contextmanager
    def checkpointed(self, enabled: bool = True) -> Iterator[None]:
        """Inside, keep only each block's input for the backward pass and compute the rest again."""
        if not enabled:
            yield
            return

        def same_role() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self.role(self._active)

        # On the blocks themselves: the model's own method for it changes its name between versions.
        self._checkpointed = [
            block for block in self.lm.modules() if isinstance(block, GradientCheckpointingLayer)
        ]
        for block in self._checkpointed:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=same_role)
        self.train(self.training)
        try:
            yield
        finally:
            for block in self._checkpointed:
                block.gradient_checkpointing = False
            self._checkpointed = []
            self.train(self.training)

    def trunk(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Hidden states (B, L, D) after the last norm, under the active role.

        Positions are counted over real tokens, so the padding side does not matter (GPT-2 needs telling).
        """
        positions_BL = (mask_BL.long().cumsum(1) - 1).clamp(min=0)
        hidden: Tensor = self.lm.base_model(
            input_ids=ids_BL, attention_mask=mask_BL.long(), position_ids=positions_BL, use_cache=False
        ).last_hidden_state
        return hidden

    def forward(
        self,
        role: Role,
        ids_BL: Tensor,
        mask_BL: Tensor,
        *,
        answer_length: int = 0,
        temperature: float | None = None,
        head: Role | None = None,
    ) -> Outputs:
        """Log-probabilities of answers, values of their states, or scores of whole rows, as one role.

        Args:
            role: whose adapter computes.
            ids_BL: token ids, int64.
            mask_BL: True for real tokens, bool.
            answer_length: T, the columns at the right end that hold answers (padded on their right); with 0
                the head scores whole rows.
            temperature: divides the logits; None leaves the language-model head out.
            head: the role whose head reads the trunk; None for no head.
        """
        with self.role(role):
            hidden_BLD = self.trunk(ids_BL, mask_BL)
        log_probs_BT = entropy_BT = values_BT = scores_B = None
        if answer_length == 0 and head is not None:
            last_B = mask_BL.long().cumsum(1).argmax(1)
            last_BD = hidden_BLD[torch.arange(len(last_B), device=last_B.device), last_B]
            scores_B = self.head(head)(last_BD.float()).squeeze(-1)
        elif head is not None:
            values_BT = self.head(head)(hidden_BLD[:, -answer_length - 1 : -1].float()).squeeze(-1)
        if temperature is not None:
            answer_BT = mask_BL[:, -answer_length:]
            embedding = self.lm.get_output_embeddings()
            log_probs_N, entropy_N = log_probs_and_entropy(
                hidden_BLD[:, -answer_length - 1 : -1][answer_BT],
                embedding.weight,
                embedding.bias,
                ids_BL[:, -answer_length:][answer_BT],
                temperature,
                CHUNK,
            )
            nothing_BT = torch.zeros(answer_BT.shape, device=ids_BL.device)
            log_probs_BT = nothing_BT.masked_scatter(answer_BT, log_probs_N)
            entropy_BT = nothing_BT.masked_scatter(answer_BT, entropy_N)
        return Outputs(log_probs_BT, entropy_BT, values_BT, scores_B)


@torch.no_grad()
def _check_logits(lm: PreTrainedModel) -> None:
    """Some models scale or cap their logits; reading them off the hidden states would be silently wrong."""
    embedding = lm.get_output_embeddings()
    if embedding is None:
        raise UserError("the model has no language-model head", where=lm.name_or_path, remedy="Use a causal LM.")
    ids_BL = torch.tensor([[1, 2, 3]], device=embedding.weight.device)
    expected = lm(input_ids=ids_BL).logits.float()
    actual = embedding(lm.base_model(input_ids=ids_BL).last_hidden_state).float()
    if not torch.allclose(actual, expected, rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{type(lm).__name__} changes its logits after the output embedding (a scale or a cap)",
            where=lm.name_or_path,
            remedy="This architecture is not supported yet.",
        )
