"""Adapters of every kind as plain LoRA: in peft they equal the role or lack only what is reported as lost."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import MixtralConfig, MixtralForCausalLM

from perl.errors import UserError
from perl.roles.as_lora import ENOUGH, as_lora, check_convertible
from perl.roles.export_formats import save_adapter
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.adapters.test_every_kind import MERGED, batch, gpt2, learned, roles_of
from tests.tiny import adapter_of_kind


def peft_logits(roles: SharedBase, fresh: torch.nn.Module, folder: Path) -> torch.Tensor:
    """Return plain peft's logits with the policy's export."""
    save_adapter(roles, Role.POLICY, Role.POLICY, "base", folder)
    loaded = PeftModel.from_pretrained(fresh, folder)  # type: ignore[arg-type]
    assert type(loaded.peft_config["default"]).__name__ == "LoraConfig"
    logits: torch.Tensor = loaded(batch()[0]).logits
    return logits


@pytest.mark.parametrize("kind", MERGED)
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but")
@torch.no_grad()
def test_at_full_rank_nothing_is_lost(kind: str, tmp_path: Path) -> None:
    roles = roles_of(kind, layers="top-half")
    check_convertible(roles.adapter, 32)
    learned(roles, Role.SFT, Role.POLICY)
    with roles.role(Role.POLICY):
        expected = roles.lm(batch()[0]).logits
    lora, truncation = as_lora(roles, Role.POLICY, 32)
    assert truncation.error < 1e-5
    assert truncation.biases == (kind == "ia3")
    assert lora.base_changed() == []
    fresh = roles_of(kind).lm
    assert (fresh(batch()[0]).logits - expected).abs().max() > 1e-2
    logits = peft_logits(lora, fresh, tmp_path)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "rank"), [("lora", 4), ("rslora", 4), ("vera", 8), ("miss", 6), ("tinylora", 2)])
def test_kinds_of_low_rank_lose_nothing_at_their_own(kind: str, rank: int) -> None:
    errors = []
    for given in (rank - 1, rank):
        _, truncation = as_lora(learned(roles_of(kind), Role.POLICY), Role.POLICY, given)
        errors.append(truncation.error)
    assert errors[0] > 0.01 > 1e-5 > errors[1]


@torch.no_grad()
def test_weights_that_stand_the_other_way_round(tmp_path: Path) -> None:
    roles = learned(SharedBase(adapter_of_kind(gpt2(), "dora")), Role.POLICY)
    with roles.role(Role.POLICY):
        expected = roles.lm(batch()[0]).logits
    lora, _ = as_lora(roles, Role.POLICY, 32)
    torch.testing.assert_close(peft_logits(lora, gpt2(), tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_that_of_the_singular_values_left_out() -> None:
    roles = learned(roles_of("dora"), Role.POLICY)
    deltas = [delta.double().numpy() for _, delta in roles.adapter.deltas("policy")]
    squares = sum(np.linalg.svd(delta, compute_uv=False)[:32] ** 2 for delta in deltas)
    errors = [float(np.sqrt(squares[rank:].sum() / squares.sum())) for rank in range(33)]
    _, truncation = as_lora(roles, Role.POLICY, 5)
    assert truncation.error == pytest.approx(errors[5], rel=1e-4)
    assert errors[truncation.enough] <= ENOUGH < errors[truncation.enough - 1]
    assert truncation.most == 32


def test_what_lora_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match=r"(?s)--as-lora: rank 33 .*the lowest is 32.*at most 32"):
        check_convertible(roles_of("vera").adapter, 33)
    for kind in ("series", "parallel", "prefix"):
        with pytest.raises(UserError, match=r"(?s)not equivalent to LoRA .* not amount to .*perl-rlhf chat"):
            check_convertible(roles_of(kind).adapter, 4)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    experts = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=1, num_local_experts=2))
    with pytest.raises(UserError, match=r"(?s)--as-lora: .* linear layers only.*belongs to experts.*--merge"):
        check_convertible(adapter_of_kind(experts, "lora"), 4)
