"""Full tuning: a separate model for each role, no shared weights, and loading in transformers."""

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
)

from perl.backbones.base import Base
from perl.backbones.loading import load_base
from perl.errors import UserError
from perl.roles.role import Role
from perl.roles.saved import load_role, read_stamp, save_role, stamp_for
from perl.roles.separate_models import SeparateModels
from tests.tiny import random_llama

CPU = torch.device("cpu")
READ = {"completion_length": 4, "temperature": 0.7}


def llama(tied: bool = False) -> LlamaForCausalLM:
    return random_llama(tie_word_embeddings=tied)


def models(load: Callable[[], PreTrainedModel] = llama) -> SeparateModels:
    return SeparateModels(load(), load)


def randomize(roles: SeparateModels, *which: Role) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in roles.parameters_of(*which):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def batch() -> tuple[Tensor, Tensor]:
    """Return three rows, with prompts padded on the left and answers (the last 4 columns) on the right."""
    ids_BL = torch.randint(3, 250, (3, 10), generator=torch.Generator().manual_seed(2))
    mask_BL = torch.ones(3, 10, dtype=torch.bool)
    mask_BL[1, :3] = mask_BL[2, :5] = False
    mask_BL[0, 9:] = mask_BL[2, 8:] = False
    return ids_BL, mask_BL


def said_by(roles: SeparateModels, role: Role) -> Tensor:
    with torch.no_grad():
        return roles(role, *batch(), **READ).log_probs_BT


def test_a_new_role_computes_as_the_base_and_its_head_scores_nothing() -> None:
    roles = models()
    roles.add(Role.SFT)
    roles.add(Role.REWARD, head=True)
    assert torch.equal(said_by(roles, Role.SFT), said_by(roles, Role.BASE))
    assert said_by(roles, Role.SFT).abs().max() > 0.1
    assert roles(Role.REWARD, *batch(), head=Role.REWARD).scores_B.tolist() == [0, 0, 0]
    assert roles.roles == {Role.BASE, Role.SFT, Role.REWARD}
    assert roles.base_sha256() is None


def test_roles_share_no_storage() -> None:
    roles = models()
    roles.add(Role.SFT)
    roles.add(Role.POLICY, copy_of=Role.SFT)
    roles.add(Role.REWARD, head=True)
    roles.add(Role.CRITIC, copy_of=Role.REWARD, head=True)
    tensors = [*roles.parameters(), *roles.buffers()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    weights = len(list(llama().parameters()))
    assert len(list(roles.parameters())) == 5 * weights + 2
    assert len(roles.weights(Role.POLICY)) == weights
    assert len(roles.parameters_of(Role.CRITIC)) == weights + 1


def test_a_copy_begins_as_what_it_copies_and_then_goes_its_own_way() -> None:
    roles = models()
    roles.add(Role.REWARD, head=True)
    randomize(roles, Role.REWARD)
    roles.add(Role.CRITIC, copy_of=Role.REWARD, head=True)
    begun = said_by(roles, Role.REWARD)
    assert torch.equal(said_by(roles, Role.CRITIC), begun)
    assert not torch.equal(said_by(roles, Role.BASE), begun)
    scores = roles(Role.REWARD, *batch(), head=Role.REWARD).scores_B
    assert torch.equal(roles(Role.CRITIC, *batch(), head=Role.CRITIC).scores_B, scores)
    assert scores.abs().min() > 0
    randomize(roles, Role.CRITIC)
    assert not torch.equal(said_by(roles, Role.CRITIC), begun)
    assert torch.equal(said_by(roles, Role.REWARD), begun)


def test_learning_changes_the_learner_only() -> None:
    roles = models()
    roles.add(Role.SFT)
    roles.add(Role.POLICY, copy_of=Role.SFT)
    learned = roles.train_only(Role.POLICY)
    assert {id(p) for p in roles.parameters() if p.requires_grad} == {id(p) for p in learned}
    base, sft = said_by(roles, Role.BASE), said_by(roles, Role.SFT)
    optimizer = torch.optim.SGD(learned, lr=1.0)
    roles(Role.POLICY, *batch(), **READ).log_probs_BT.sum().backward()
    optimizer.step()
    assert torch.equal(said_by(roles, Role.BASE), base)
    assert torch.equal(said_by(roles, Role.SFT), sft)
    assert not torch.allclose(said_by(roles, Role.POLICY), base)
    assert all(parameter.grad is None for parameter in roles.parameters_of(Role.SFT))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_are_those_of_a_plain_model(checkpointed: bool) -> None:
    """Both roles' forward passes come before their backward passes."""
    roles = models()
    roles.add(Role.POLICY)
    roles.add(Role.CRITIC, head=True)
    randomize(roles, Role.POLICY, Role.CRITIC)
    roles.train_only(Role.POLICY, Role.CRITIC)
    ids_BL, mask_BL = batch()
    with roles.checkpointed(checkpointed):
        policy = roles(Role.POLICY, ids_BL, mask_BL, **READ).log_probs_BT.sum()
        critic = roles(Role.CRITIC, ids_BL, mask_BL, completion_length=4, head=Role.CRITIC).values_BT
        critic[mask_BL[:, 6:]].sum().backward()
        policy.backward()

    positions = (mask_BL.long().cumsum(1) - 1).clamp(min=0)
    given = {"input_ids": ids_BL, "attention_mask": mask_BL.long(), "position_ids": positions}
    plain = llama()
    plain.load_state_dict({name: p.data for name, p in roles.weights(Role.POLICY).items()})
    log_probs = (plain(**given).logits[:, 5:9] / 0.7).log_softmax(-1).gather(-1, ids_BL[:, 6:, None])[..., 0]
    log_probs[mask_BL[:, 6:]].sum().backward()
    for name, parameter in plain.named_parameters():
        got = roles.weights(Role.POLICY)[name].grad
        torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)
        assert got.abs().sum() > 0

    plain = llama()
    plain.load_state_dict({name: p.data for name, p in roles.weights(Role.CRITIC).items()})
    head = copy.deepcopy(roles.head(Role.CRITIC))
    head.zero_grad()
    head(plain.model(**given).last_hidden_state[:, 5:9])[..., 0][mask_BL[:, 6:]].sum().backward()
    torch.testing.assert_close(roles.head(Role.CRITIC).weight.grad, head.weight.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in plain.named_parameters():
        got = roles.weights(Role.CRITIC)[name].grad
        if name == "lm_head.weight":
            assert got is None
        else:
            torch.testing.assert_close(got, parameter.grad, rtol=1e-4, atol=1e-5)


def test_what_is_not_kept_is_freed() -> None:
    roles = models()
    roles.add(Role.SFT)
    roles.add(Role.REWARD, head=True)
    gone = [weakref.ref(p) for p in (*roles.weights(Role.BASE).values(), *roles.parameters_of(Role.REWARD))]
    stays = weakref.ref(roles.weights(Role.SFT)["model.norm.weight"])
    roles.keep(Role.SFT)
    gc.collect()
    assert [reference() for reference in gone] == [None] * len(gone)
    assert stays() is not None
    assert roles.roles == {Role.SFT}
    assert len(list(roles.parameters())) == len(list(llama().parameters()))
    assert roles.reference is Role.SFT


def test_a_role_added_after_the_base_was_freed_starts_from_it_all_the_same() -> None:
    loads: list[int] = []

    def load() -> PreTrainedModel:
        loads.append(1)
        return llama()

    roles = SeparateModels(llama(), load)
    base = said_by(roles, Role.BASE)
    roles.add(Role.SFT)
    assert not loads  # it was in memory
    randomize(roles, Role.SFT)
    roles.keep(Role.SFT)
    roles.add(Role.REWARD, head=True)
    assert len(loads) == 1
    assert torch.equal(said_by(roles, Role.REWARD), base)
    assert not torch.equal(said_by(roles, Role.SFT), base)
    assert not any(parameter.requires_grad for parameter in roles.weights(Role.REWARD).values())
    with pytest.raises(AssertionError, match="no policy to copy"):
        roles.add(Role.CRITIC, copy_of=Role.POLICY)


def test_a_critic_may_be_only_a_head() -> None:
    roles = models()
    roles.add(Role.POLICY)
    roles.add(Role.CRITIC, weights=False, head=True)
    assert roles.weights(Role.CRITIC) == {}
    assert [tuple(parameter.shape) for parameter in roles.parameters_of(Role.CRITIC)] == [(1, 32)]
    roles.keep(Role.POLICY, Role.CRITIC)
    assert roles.roles == {Role.POLICY, Role.CRITIC}


# On disk.


def saved_base(folder: Path, tokenizer: Path, tied: bool = False) -> Path:
    """Write a folder with this file's weights and another tiny base's tokenizer."""
    llama(tied).save_pretrained(folder)
    for file in tokenizer.glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    for file in tokenizer.glob("*.jinja"):
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Base, SeparateModels]:
    base, lm = load_base(str(folder), dtype, CPU)
    return base, SeparateModels(lm, base.load)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_role_and_its_head_come_back_as_they_were(
    dtype: torch.dtype, tied: bool, tmp_path: Path, tiny_llama: Path
) -> None:
    base, roles = opened(saved_base(tmp_path / "base", tiny_llama, tied), dtype)
    roles.add(Role.REWARD, head=True)
    randomize(roles, Role.REWARD)
    expected = roles(Role.REWARD, *batch(), head=Role.REWARD, **READ)
    scores = roles(Role.REWARD, *batch(), head=Role.REWARD).scores_B
    save_role(roles, Role.REWARD, tmp_path / "saved", stamp_for(Role.REWARD, base, reward_mean=0.5))
    assert {"config.json", "model.safetensors", "perl.json"} == {f.name for f in (tmp_path / "saved").iterdir()}

    base, again = opened(tmp_path / "base", dtype)
    again.keep()  # as in a run whose stages before freed everything
    load_role(again, Role.REWARD, tmp_path / "saved", base)
    assert read_stamp(tmp_path / "saved").reward_mean == 0.5
    assert again.roles == {Role.REWARD}
    assert again.head(Role.REWARD).weight.dtype == torch.float32
    actual = again(Role.REWARD, *batch(), head=Role.REWARD, **READ)
    assert torch.equal(actual.log_probs_BT, expected.log_probs_BT)
    assert torch.equal(actual.values_BT, expected.values_BT)
    assert torch.equal(again(Role.REWARD, *batch(), head=Role.REWARD).scores_B, scores)
    assert scores.abs().max() > 0.1
    model = again._models[Role.REWARD]
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared is tied


def test_tied_embeddings_stay_tied_in_every_role_and_learn_once() -> None:
    roles = models(lambda: llama(tied=True))
    roles.add(Role.SFT)
    roles.add(Role.POLICY, copy_of=Role.SFT)
    roles.keep(Role.SFT, Role.POLICY)
    roles.add(Role.CRITIC, head=True)
    for model in roles.models():
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert "lm_head.weight" not in roles.weights(Role.POLICY)
    assert len(roles.train_only(Role.POLICY)) == len(list(llama(tied=True).parameters()))


@pytest.mark.parametrize("tied", [False, True])
def test_a_policy_is_a_model_of_transformers(tied: bool, tmp_path: Path, tiny_llama: Path) -> None:
    base, roles = opened(saved_base(tmp_path / "base", tiny_llama, tied))
    roles.add(Role.POLICY)
    randomize(roles, Role.POLICY)
    save_role(roles, Role.POLICY, tmp_path / "policy", stamp_for(Role.POLICY, base))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids_BL, mask_BL = torch.randint(3, 250, (2, 9)), torch.ones(2, 9, dtype=torch.bool)
    log_probs = theirs.eval()(ids_BL).logits[:, 4:8].log_softmax(-1).gather(-1, ids_BL[:, 5:, None])[..., 0]
    actual = roles(Role.POLICY, ids_BL, mask_BL, completion_length=4, temperature=1.0).log_probs_BT
    torch.testing.assert_close(actual, log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_a_reward_model_is_a_sequence_classifier_of_transformers(
    tied: bool, tmp_path: Path, tiny_llama: Path
) -> None:
    base, roles = opened(saved_base(tmp_path / "base", tiny_llama, tied))
    roles.add(Role.REWARD, head=True)
    randomize(roles, Role.REWARD)
    save_role(roles, Role.REWARD, tmp_path / "reward", stamp_for(Role.REWARD, base))
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", pad_token_id=base.tokenizer.pad_token_id, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert theirs.config.num_labels == 1
    row = torch.randint(3, 250, (1, 8))
    longer = torch.cat([row, torch.full((1, 3), base.tokenizer.pad_token_id)], 1)
    mask = torch.tensor([[1] * 8 + [0] * 3])
    actual = roles(Role.REWARD, longer, mask.bool(), head=Role.REWARD).scores_B
    with torch.no_grad():
        alone = theirs.eval()(row).logits[:, 0]
        padded = theirs(longer, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(actual, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual, padded, rtol=1e-5, atol=1e-5)
    assert actual.abs() > 1e-3


def test_another_base_or_shape_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    base, roles = opened(saved_base(tmp_path / "base", tiny_llama))
    roles.add(Role.SFT)
    save_role(roles, Role.SFT, tmp_path / "sft", stamp_for(Role.SFT, base))
    other, others = opened(tiny_llama)
    with pytest.raises(UserError, match="belongs to another base"):
        load_role(others, Role.SFT, tmp_path / "sft", other)
    (tmp_path / "sft" / "config.json").unlink()
    with pytest.raises(UserError, match="configuration cannot be read"):
        load_role(roles, Role.SFT, tmp_path / "sft", base)
