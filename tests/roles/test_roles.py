"""One base, four roles: shared and separate parts, and exact switching."""

import copy
from functools import partial

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

from perl.backbones.base import weights_sha256
from perl.errors import UserError
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase
from tests.tiny import lora, random_llama

TRAINED = (Role.POLICY, Role.REWARD, Role.CRITIC)
llama = partial(random_llama, vocab_size=50)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    )


def roles_on(lm: LlamaForCausalLM | GPT2LMHeadModel) -> Roles:
    roles = SharedBase(lora(lm, 4, 8))
    roles.add(Role.SFT)
    roles.add(Role.POLICY, copy_of=Role.SFT)
    roles.add(Role.REWARD, head=True)
    roles.add(Role.CRITIC, copy_of=Role.REWARD, head=True)
    return roles


def randomize(roles: Roles, *which: Role) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.parameters_of(*which):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def batch() -> tuple[Tensor, Tensor]:
    """Return three rows, with prompts padded on the left and answers (the last 4 columns) on the right."""
    torch.manual_seed(2)
    ids_BL = torch.randint(3, 50, (3, 10))
    mask_BL = torch.ones(3, 10, dtype=torch.bool)
    mask_BL[1, :3] = mask_BL[2, :5] = False
    mask_BL[0, 9:] = mask_BL[2, 8:] = False
    return ids_BL, mask_BL


def loss_of(roles: Roles, role: Role) -> Tensor:
    ids_BL, mask_BL = batch()
    if role is Role.POLICY:
        return roles(role, ids_BL, mask_BL, completion_length=4, temperature=0.7).log_probs_BT.sum()
    if role is Role.CRITIC:
        return roles(role, ids_BL, mask_BL, completion_length=4, head=role).values_BT[mask_BL[:, -4:]].sum()
    return roles(role, ids_BL, mask_BL, head=role).scores_B.sum()


def gradients(roles: Roles, role: Role) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in roles.parameters_of(role)]


def test_all_roles_compute_on_one_storage_of_the_base() -> None:
    lm = llama()
    before = {name: parameter.data_ptr() for name, parameter in lm.named_parameters()}
    roles = roles_on(lm)
    base = {n.replace(".base_layer", ""): p.data_ptr() for n, p in roles.lm.named_parameters() if "lora_" not in n}
    assert base == before
    learned = {p.data_ptr() for role in (Role.SFT, *TRAINED) for p in roles.parameters_of(role)}
    assert not learned & set(before.values())
    assert len(learned) == 4 * 2 * 14 + 2  # four adapters, A and B on 14 linear layers; two heads


def test_the_base_is_the_same_to_the_byte_after_training() -> None:
    lm = llama(torch.bfloat16)
    before = weights_sha256(lm)
    roles = roles_on(lm)
    assert roles.base_sha256() == before
    optimizer = torch.optim.AdamW(roles.train_only(*TRAINED), lr=0.1)
    randomize(roles, *TRAINED)
    for _ in range(3):
        sum(loss_of(roles, role) for role in TRAINED).backward()
        optimizer.step()
    assert roles.base_sha256() == before
    lm.model.layers[0].mlp.up_proj.base_layer.weight.data[0, 0] += 1
    assert roles.base_sha256() != before


def test_a_new_adapter_is_the_identity_and_a_new_head_scores_nothing() -> None:
    roles = roles_on(llama())
    ids_BL, mask_BL = batch()
    base = roles(Role.BASE, ids_BL, mask_BL, completion_length=4, temperature=1.0).log_probs_BT
    for role in (Role.SFT, *TRAINED):
        assert torch.equal(roles(role, ids_BL, mask_BL, completion_length=4, temperature=1.0).log_probs_BT, base)
    assert roles(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD).scores_B.tolist() == [0, 0, 0]


def test_a_copy_begins_as_what_it_copies_and_then_goes_its_own_way() -> None:
    roles = SharedBase(lora(llama(), 4, 8))
    roles.add(Role.SFT)
    randomize(roles, Role.SFT)
    roles.add(Role.POLICY, copy_of=Role.SFT)
    ids_BL, mask_BL = batch()
    read = {"completion_length": 4, "temperature": 1.0}
    sft = roles(Role.SFT, ids_BL, mask_BL, **read).log_probs_BT
    assert torch.equal(roles(Role.POLICY, ids_BL, mask_BL, **read).log_probs_BT, sft)
    assert not torch.equal(roles(Role.BASE, ids_BL, mask_BL, **read).log_probs_BT, sft)
    randomize(roles, Role.POLICY)
    roles.parameters_of(Role.POLICY)[0].data += 1
    assert torch.equal(roles(Role.SFT, ids_BL, mask_BL, **read).log_probs_BT, sft)


def test_the_switch_puts_everything_back_after_an_exception_and_when_nested() -> None:
    roles = roles_on(llama())
    roles.train_only(Role.POLICY)
    found = {name: parameter.requires_grad for name, parameter in roles.named_parameters()}

    def fail() -> None:
        with roles.role(Role.REWARD):
            assert roles.active is Role.REWARD
            with roles.role(Role.CRITIC):
                assert roles.active is Role.CRITIC
                raise RuntimeError("in the middle")

    with roles.role(Role.POLICY):
        with pytest.raises(RuntimeError, match="in the middle"):
            fail()
        assert roles.active is Role.POLICY
        assert all(layer.active_adapters == ["policy"] for layer in roles.adapter._layers)
    assert roles.active is Role.BASE
    assert all(layer.active_adapters == [] for layer in roles.adapter._layers)
    assert {name: parameter.requires_grad for name, parameter in roles.named_parameters()} == found


def test_a_switch_that_is_interrupted_half_way_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = roles_on(llama())
    layers = roles.adapter._layers
    with roles.role(Role.POLICY):

        def half_way(role: str | None) -> None:
            layers[0]._active_adapter = [role]
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(roles.adapter, "activate", half_way)
        with pytest.raises(KeyboardInterrupt), roles.role(Role.REWARD):
            pass
        assert roles.active is Role.POLICY
        assert all(layer.active_adapters == ["policy"] for layer in layers)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("role", TRAINED)
def test_gradients_are_those_of_a_model_that_holds_the_adapter_alone(role: Role, checkpointed: bool) -> None:
    """All roles' forward passes come before their backward passes, the order that is easiest to get wrong."""
    roles = roles_on(llama())
    randomize(roles, *TRAINED)
    roles.train_only(*TRAINED)
    with roles.checkpointed(checkpointed):
        losses = [loss_of(roles, each) for each in TRAINED]
        for loss in reversed(losses):
            loss.backward()
    actual = gradients(roles, role)

    alone = alone_with(roles, role)
    ids_BL, mask_BL = batch()
    hidden_BLD = alone.trunk(ids_BL, mask_BL)
    if role is Role.POLICY:
        log_probs = (alone.peft.get_output_embeddings()(hidden_BLD[:, 5:9]) / 0.7).log_softmax(-1)
        chosen = log_probs.gather(-1, ids_BL[:, 6:, None])[..., 0]
        chosen[mask_BL[:, 6:]].sum().backward()
    elif role is Role.CRITIC:
        alone.head(hidden_BLD[:, 5:9])[..., 0][mask_BL[:, 6:]].sum().backward()
    else:
        last = torch.tensor([8, 9, 7])
        alone.head(hidden_BLD[torch.arange(3), last]).sum().backward()
    expected = [p.grad for n, p in alone.peft.named_parameters() if "lora_" in n]
    expected += [] if role is Role.POLICY else [alone.head.weight.grad]
    assert len(actual) == len(expected)
    for got, want in zip(actual, expected, strict=True):
        # Without AVX-512 rounding reaches 1.8e-6; a gradient taken as another role is off by its own size.
        torch.testing.assert_close(got, want, rtol=1e-4, atol=2e-6)
    assert sum(float(gradient.abs().sum()) for gradient in actual) > 0


class alone_with(nn.Module):  # noqa: N801  reads as a function
    """A plain PeftModel with one adapter, and a head."""

    def __init__(self, roles: Roles, role: Role) -> None:
        super().__init__()
        lm = llama()
        self.peft = get_peft_model(lm, copy.deepcopy(roles.adapter.config), adapter_name=role)
        weights = roles.weights(role)
        for name, parameter in self.peft.named_parameters():
            if "lora_" in name:
                own = name.removeprefix("base_model.model.").replace(f".{role}.", ".")
                parameter.data.copy_(weights[own].data)
        self.head = nn.Linear(32, 1, bias=False)
        if role in roles.heads:
            self.head.weight.data.copy_(roles.head(role).weight.data)

    def trunk(self, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        positions = (mask_BL.long().cumsum(1) - 1).clamp(min=0)
        return self.peft.base_model.model.base_model(
            ids_BL, attention_mask=mask_BL.long(), position_ids=positions
        )[0]


def test_checkpointing_really_computes_blocks_again() -> None:
    roles = roles_on(llama())
    roles.train_only(Role.POLICY)
    calls = []
    roles.lm.model.layers[0].mlp.act_fn.register_forward_hook(lambda *_: calls.append(roles.active))
    with roles.checkpointed():
        loss_of(roles, Role.POLICY).backward()
    assert calls == [Role.POLICY, Role.POLICY]
    calls.clear()
    loss_of(roles, Role.POLICY).backward()
    assert calls == [Role.POLICY]


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_log_probs_do_not_depend_on_the_padding_side(build) -> None:
    roles = roles_on(build())
    randomize(roles, Role.POLICY)
    torch.manual_seed(3)
    row = torch.randint(3, 50, (1, 8))
    plain = torch.ones(1, 8, dtype=torch.bool)
    expected = roles(Role.POLICY, row, plain, completion_length=3, temperature=1.0).log_probs_BT
    left = torch.cat([torch.zeros(1, 5, dtype=torch.long), row], 1), torch.cat([plain.new_zeros(1, 5), plain], 1)
    actual = roles(Role.POLICY, *left, completion_length=3, temperature=1.0).log_probs_BT
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    right = torch.cat([row, torch.zeros(1, 5, dtype=torch.long)], 1), torch.cat([plain, plain.new_zeros(1, 5)], 1)
    actual = roles(Role.POLICY, *right, completion_length=8, temperature=1.0).log_probs_BT
    torch.testing.assert_close(actual[:, :3], expected, rtol=1e-5, atol=1e-5)
    assert actual[:, 3:].eq(0).all()


def test_padding_gets_no_gradient() -> None:
    roles = roles_on(llama())
    embedding = roles.lm.get_input_embeddings()
    ids_BL, mask_BL = batch()
    ids_BL = ids_BL.masked_fill(~mask_BL, 2)  # a token that occurs nowhere else
    embedding.weight.requires_grad_(True)
    roles(Role.POLICY, ids_BL, mask_BL, completion_length=4, temperature=1.0).log_probs_BT.sum().backward()
    assert embedding.weight.grad[2].abs().sum() == 0
    assert embedding.weight.grad.abs().sum() > 0


def test_dropout_of_the_base_stays_off_and_loras_own_is_switched() -> None:
    lm = gpt2()
    roles = SharedBase(lora(lm, 4, 8, dropout=0.5))
    roles.add(Role.POLICY)
    randomize(roles, Role.POLICY)
    ids_BL, mask_BL = batch()

    def read(role: Role) -> Tensor:
        return roles(role, ids_BL, mask_BL, completion_length=4, temperature=1.0).log_probs_BT

    roles.train()
    assert torch.equal(read(Role.BASE), read(Role.BASE))
    assert not torch.equal(read(Role.POLICY), read(Role.POLICY))
    roles.eval()
    assert torch.equal(read(Role.POLICY), read(Role.POLICY))


def test_scores_equal_a_sequence_classifier_of_transformers() -> None:
    roles = roles_on(llama())
    roles.head(Role.REWARD).weight.data.normal_()
    config = copy.deepcopy(roles.lm.config)
    config.num_labels, config.pad_token_id = 1, 0
    classifier = AutoModelForSequenceClassification.from_config(config)
    state = {n.replace(".base_layer", ""): p for n, p in roles.lm.state_dict().items() if "lora_" not in n}
    classifier.load_state_dict(state | {"score.weight": roles.head(Role.REWARD).weight}, strict=False)
    row = torch.randint(3, 50, (1, 8))
    expected = classifier(row).logits[:, 0]
    actual = roles(Role.REWARD, row, torch.ones(1, 8, dtype=torch.bool), head=Role.REWARD).scores_B
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_targets_and_layers() -> None:
    lm = llama()
    assert len(lora(lm).config.target_modules) == 14
    attention = lora(lm, 4, 8, targets="attention", layers="top-half").config.target_modules
    assert attention == {f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"}
    assert len(lora(lm, 4, 8, targets=["q_proj"], layers=[0]).config.target_modules) == 1
    with pytest.raises(UserError, match="no layer 2"):
        lora(lm, 4, 8, targets="attention", layers=[2])
    with pytest.raises(UserError, match="query"):
        lora(lm, 4, 8, targets=["query"])
