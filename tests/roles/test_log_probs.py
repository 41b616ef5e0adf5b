"""Chunked log-probs: values and gradients equal to those with full logits, in less memory."""

import math

import pytest
import torch
from torch import Tensor

from perl.backbones.logits import PLAIN, LogitsTransform
from perl.measure.memory import LiveBytes
from perl.roles import log_probs
from perl.roles.log_probs import completion_log_probs, log_probs_and_entropy


def full_logits(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    temperature: float,
    transform: LogitsTransform,
) -> tuple[Tensor, Tensor]:
    logits_NV = transform.scale * torch.nn.functional.linear(hidden_ND, weight_VD, bias_V)
    if transform.cap is not None:
        logits_NV = transform.cap * (logits_NV / transform.cap).tanh()
    logits_NV = logits_NV / temperature
    log_probs_N = logits_NV.log_softmax(-1)[torch.arange(len(targets_N)), targets_N]
    return log_probs_N, torch.special.entr(logits_NV.softmax(-1)).sum(-1)


def problem(n: int, v: int, d: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(n, d, generator=generator).requires_grad_()
    weight_VD = torch.randn(v, d, generator=generator) / math.sqrt(d)
    bias_V = torch.randn(v, generator=generator)
    return hidden_ND, weight_VD, bias_V, torch.randint(v, (n,), generator=generator)


def test_by_hand() -> None:
    # Logits (ln 3, 0) / temperature 1: p = ¾, ¼; H = ¾ ln(4/3) + ¼ ln 4.
    # At temperature ½ the logits are 2 ln 3 = ln 9, 0: p = 0.9, 0.1.
    hidden_ND, weight_VD = torch.tensor([[math.log(3.0)]]), torch.tensor([[1.0], [0.0]])
    log_probs_N, entropies_N = log_probs_and_entropy(hidden_ND, weight_VD, None, torch.tensor([1]), 1.0, 8)
    torch.testing.assert_close(log_probs_N, torch.tensor([math.log(0.25)]))
    torch.testing.assert_close(entropies_N, torch.tensor([0.75 * math.log(4 / 3) + 0.25 * math.log(4)]))
    sharper_N, _ = log_probs_and_entropy(hidden_ND, weight_VD, None, torch.tensor([0]), 0.5, 8)
    torch.testing.assert_close(sharper_N, torch.tensor([math.log(0.9)]))


@pytest.mark.parametrize("chunk", [1, 4, 11, 64])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "transform", [PLAIN, LogitsTransform(scale=0.125), LogitsTransform(cap=1.5), LogitsTransform(2.0, cap=3.0)]
)
def test_equals_full_logits_with_equal_gradients(chunk: int, with_bias: bool, transform: LogitsTransform) -> None:
    hidden_ND, weight_VD, bias_V, targets_N = problem(11, 37, 8)
    weight_VD.requires_grad_()
    learned = [hidden_ND, weight_VD, *([bias_V.requires_grad_()] if with_bias else [])]
    bias = bias_V if with_bias else None
    results = []
    for log_probs_N, entropies_N in (
        full_logits(hidden_ND, weight_VD, bias, targets_N, 0.7, transform),
        log_probs_and_entropy(hidden_ND, weight_VD, bias, targets_N, 0.7, chunk, transform),
    ):
        weights_N = torch.linspace(-1.0, 1.0, 11)  # each token its own, so that none can stand for another
        loss = (weights_N * log_probs_N + weights_N.flip(0).exp() * entropies_N).sum()
        gradients = torch.autograd.grad(loss, learned)
        results.append((log_probs_N.detach(), entropies_N.detach(), *gradients))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-6)


def test_frozen_head_gets_no_gradient() -> None:
    hidden_ND, weight_VD, _, targets_N = problem(6, 20, 4)
    log_probs_N, _ = log_probs_and_entropy(hidden_ND, weight_VD, None, targets_N, 1.0, 2)
    torch.autograd.backward(log_probs_N.sum())
    assert weight_VD.grad is None
    assert hidden_ND.grad is not None
    assert hidden_ND.grad.abs().sum() > 0


def test_bf16_head_gives_fp32_of_its_own_logits() -> None:
    """A bf16 model samples from logits rounded to bf16, with the softmax in fp32."""
    hidden_ND, weight_VD, _, targets_N = problem(6, 200, 16)
    hidden_ND, weight_VD = hidden_ND.detach().bfloat16(), weight_VD.bfloat16()
    log_probs_N, entropies_N = log_probs_and_entropy(hidden_ND, weight_VD, None, targets_N, 1.0, 64)
    logits_NV = torch.nn.functional.linear(hidden_ND, weight_VD).float()
    assert log_probs_N.dtype == entropies_N.dtype == torch.float32
    torch.testing.assert_close(log_probs_N, logits_NV.log_softmax(-1)[torch.arange(6), targets_N])


def peak_of_forward_and_backward(n: int, chunk: int) -> int:
    hidden_ND, weight_VD, _, targets_N = problem(n, 2000, 8)
    with LiveBytes() as live:
        log_probs_N, entropies_N = log_probs_and_entropy(hidden_ND, weight_VD, None, targets_N, 1.0, chunk)
        torch.autograd.backward(log_probs_N.sum() + entropies_N.sum())
    return live.peak


def test_memory_does_not_grow_with_tokens_times_vocabulary() -> None:
    few, many = 64, 512
    logits_bytes = (many - few) * 2000 * 4
    growth = peak_of_forward_and_backward(many, 16) - peak_of_forward_and_backward(few, 16)
    assert growth < 0.05 * logits_bytes  # N x D and the results grow, and nothing else
    # In one chunk it does grow: the tracker sees what the chunks save.
    unchunked = peak_of_forward_and_backward(many, many) - peak_of_forward_and_backward(few, few)
    assert unchunked > logits_bytes


def test_a_trained_heads_gradient_in_bf16_keeps_its_small_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added up in bf16 token by token, the gradient of 2,048 tokens would be wrong by more than a tenth."""
    monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", 1)
    torch.manual_seed(0)
    states_BTD, ids_BT = torch.randn(4, 512, 8), torch.randint(16, (4, 512))
    head = torch.nn.Linear(8, 16, bias=False)

    def gradient(dtype: torch.dtype) -> Tensor:
        trained = torch.nn.Linear(8, 16, bias=False, dtype=dtype)
        trained.load_state_dict(head.bfloat16().state_dict())
        mask_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        states = states_BTD.bfloat16().to(dtype)
        completion_log_probs(states, trained, ids_BT, mask_BT, 1.0, PLAIN)[0].sum().backward()
        assert trained.weight.grad is not None
        return trained.weight.grad.double()

    exact = gradient(torch.float64)
    assert (gradient(torch.bfloat16) - exact).norm() < 0.02 * exact.norm()
