"""Scores that depend on an answer's likelihood, against transformers' log-probs."""

import pytest
import torch
from torch import Tensor

from perl.backbones.padding import at_the_end
from perl.backbones.tokens import Tokens
from perl.rl.rewards.model import score_rows
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora, random_llama

ROWS = [
    Tokens.joined([5, 6, 7], [8, 9]),
    Tokens.joined([5], [10, 11, 12, 13, 14]),
    Tokens.joined([40, 41, 42, 43], [44]),
]


@pytest.fixture
def roles() -> SharedBase:
    """Return roles with adapters on one of two blocks, and two members with different weights and heads."""
    roles = SharedBase(lora(random_llama(), 4, 8, layers=[1]))
    roles.asked_score_terms = ("likelihood",)
    generator = torch.Generator().manual_seed(1)
    for member in (Role.REWARD, Role.REWARD_2):
        roles.add(member, head=True)
        for weight in roles.parameters_of(member):
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return roles.eval()


def by_transformers(roles: SharedBase, role: Role, row: Tokens) -> Tensor:
    """Return the score of a single row, from logits and hidden states of the model's own forward pass."""
    ids_L = torch.tensor(row.ids)
    with roles.role(role):
        output = roles.lm(input_ids=ids_L[None], output_hidden_states=True)
    log_probs_L = output.logits[0, :-1].log_softmax(-1).gather(-1, ids_L[1:, None])[:, 0]
    own_T = log_probs_L[row.prompt_length() - 1 :]
    head = roles.score_terms[role]["likelihood"]
    features = torch.stack([own_T.mean(), own_T.min()])
    added = torch.tanh(features @ head.hidden.weight.T + head.hidden.bias) @ head.out.weight[0] + head.out.bias
    return roles.head(role)(output.hidden_states[-1][0, -1])[0] + added[0]


@torch.no_grad()
def test_each_row_is_scored_as_from_transformers_logits_whatever_is_beside_it(roles: SharedBase) -> None:
    members = [Role.REWARD, Role.REWARD_2]
    expected = torch.stack([torch.stack([by_transformers(roles, one, row) for row in ROWS]) for one in members])
    assert float((expected[0] - expected[1]).abs().min()) > 1e-3
    for at_once in (1, 3):  # alone; padded, and the shared block computed once for both members
        torch.testing.assert_close(score_rows(roles, members, ROWS, 0, at_once).float(), expected)


def test_the_gradient_goes_through_the_likelihood_into_the_adapter(roles: SharedBase) -> None:
    roles.train_only(Role.REWARD)
    torch.nn.init.zeros_(roles.head(Role.REWARD).weight)
    ids_1L = torch.tensor([ROWS[1].ids])
    mask_1L = torch.ones_like(ids_1L).bool()
    answers_1L = at_the_end([ROWS[1].completion_length()], mask_1L)
    outputs = roles(Role.REWARD, ids_1L, mask_1L, head=Role.REWARD, answers_BL=answers_1L)
    found = torch.autograd.grad(outputs.scores_B.sum(), list(roles.weights(Role.REWARD).values()))
    expected = torch.autograd.grad(
        by_transformers(roles, Role.REWARD, ROWS[1]), list(roles.weights(Role.REWARD).values())
    )
    assert max(float(one.abs().max()) for one in found) > 1e-3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_new_head_scores_0(roles: SharedBase) -> None:
    roles.add(Role.REWARD_3, head=True)
    assert score_rows(roles, [Role.REWARD_3], ROWS, 0).tolist() == [[0.0, 0.0, 0.0]]
    assert "likelihood.out.weight" in roles.head_weights(Role.REWARD_3)
    roles.add(Role.CRITIC, head=True)
    assert list(roles.head_weights(Role.CRITIC)) == ["score.weight"]
