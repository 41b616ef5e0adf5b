"""The losses against numbers worked by hand; `test_oracles` compares them with TRL and torchrl."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from perl.rl import losses
from perl.rl.losses import AVERAGES, SURROGATES, Constants, Sizes, Tokens

NAN = math.nan
MASK_BT = torch.tensor([[True, True, True, False], [True, False, False, False]])
FOUR = Sizes(4.0, 2.0, 8)


def close(actual: Tensor, expected: object) -> None:
    torch.testing.assert_close(actual.detach(), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def one_row(ratios: list[float], advantages: list[float]) -> Tokens:
    """Return tokens with these ratios and π_old = ½, and a NaN in the padding."""
    log_probs_BT = (torch.tensor([[*ratios, NAN]]) * 0.5).log().requires_grad_()
    old_BT = torch.full_like(log_probs_BT, math.log(0.5)).detach()
    mask_BT = torch.arange(len(ratios) + 1)[None] < len(ratios)
    return Tokens(log_probs_BT, old_BT, torch.tensor([[*advantages, NAN]]), mask_BT)


def gradient(tokens: Tokens, terms_BT: Tensor) -> Tensor:
    return torch.autograd.grad(terms_BT.sum(), tokens.log_probs_BT)[0]


def test_plain() -> None:
    tokens = one_row([1.0, 2.0], [2.0, -3.0])
    terms_BT, clipped_BT = losses.plain(tokens, Constants())
    close(terms_BT, [[2 * math.log(2), 0.0, 0.0]])  # -2 log ½ and 3 log 1
    close(gradient(tokens, terms_BT), [[-2.0, 3.0, 0.0]])
    assert clipped_BT is None


def test_clip() -> None:
    # 0.2 below, 0.5 above. ρ = 2, A = 1: min(2, 1.5), clipped. ρ = ½, A = 1: min(0.5, 0.8).
    # ρ = ½, A = -1: min(-0.5, -0.8), clipped. ρ = 2, A = -1: min(-2, -1.5). ρ = 1.4: within.
    tokens = one_row([2.0, 0.5, 0.5, 2.0, 1.4], [1.0, 1.0, -1.0, -1.0, 1.0])
    terms_BT, clipped_BT = losses.clip(tokens, Constants(low=0.2, high=0.5))
    close(terms_BT, [[-1.5, -0.5, 0.8, 2.0, -1.4, 0.0]])
    assert clipped_BT is not None
    assert clipped_BT.tolist() == [[True, False, True, False, False, False]]
    close(gradient(tokens, terms_BT), [[0.0, -0.5, 0.0, 2.0, -1.4, 0.0]])  # -ρ A where not clipped


def test_dual_clip() -> None:
    """From a ratio of 3 on, a negative advantage has no gradient; a positive one is not affected."""
    tokens = one_row([2.0, 4.0, 4.0], [-1.0, -1.0, 1.0])
    terms_BT, clipped_BT = losses.clip(tokens, Constants(dual=3.0))
    close(terms_BT, [[2.0, 3.0, -1.2, 0.0]])
    assert clipped_BT is not None
    assert clipped_BT.tolist() == [[False, True, True, False]]
    close(gradient(tokens, terms_BT), [[2.0, 0.0, 0.0, 0.0]])


def test_clip_weight() -> None:
    """Clipped tokens keep a gradient: -sg[w] A."""
    tokens = one_row([8.0, 0.5, 1.0], [1.0, -2.0, 3.0])
    terms_BT, _ = losses.clip_weight(tokens, Constants(low=1.0, high=4.0))
    close(gradient(tokens, terms_BT), [[-5.0, 1.0, -3.0, 0.0]])
    close(terms_BT, [[-5 * math.log(4), math.log(0.25), -3 * math.log(0.5), 0.0]])


def test_the_ratio_of_an_answer() -> None:
    """ρ = 2 and ½: their geometric mean is 1 and within the clip; the gradient of each is that of its token."""
    tokens = one_row([2.0, 0.5], [1.0, 1.0])
    terms_BT, clipped_BT = losses.clip(tokens, Constants(answer=True))
    close(terms_BT, [[-1.0, -1.0, 0.0]])
    close(gradient(tokens, terms_BT), [[-1.0, -1.0, 0.0]])
    assert clipped_BT is not None
    assert not clipped_BT.any()
    tokens = one_row([2.0, 2.0], [1.0, 1.0])
    close(losses.clip(tokens, Constants(answer=True)).loss_BT, [[-1.2, -1.2, 0.0]])


def test_mirror() -> None:
    # log ρ: ln 2 and ln 4, in all 3 ln 2. τ/2 (3 ln 2)² - A Σ log π, A = 2 and log π = 0 and ln 2;
    # the gradient of each token: τ 3 ln 2 - A.
    tokens = one_row([2.0, 4.0], [2.0, 2.0])
    terms_BT, _ = losses.mirror(tokens, Constants(tau=0.5))
    expected = 0.25 * (3 * math.log(2)) ** 2 - 2 * math.log(2)
    close(terms_BT, [[expected, expected, 0.0]])
    loss = losses.mean_of_answers(terms_BT, tokens.mask_BT, Sizes(2.0, 1.0, 8))
    close(loss, expected)
    slope = 0.5 * 3 * math.log(2) - 2
    close(gradient(tokens, loss), [[slope, slope, 0.0]])


def test_averages() -> None:
    """Completions of three and one tokens: by tokens (6 + 4) / 4, by completions (6/3 + 4) / 2, over 2 · 8."""
    terms_BT = torch.tensor([[1.0, 2.0, 3.0, 0.0], [4.0, 0.0, 0.0, 0.0]])
    found = {name: float(average(terms_BT, MASK_BT, FOUR)) for name, average in AVERAGES.items()}
    assert found == {"tokens": 2.5, "answers": 3.0, "constant": 0.625}


def test_a_surrogate_refuses_other_shapes() -> None:
    with pytest.raises(AssertionError, match="several shapes"):
        Tokens(torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2), MASK_BT)


def test_at_ratio_one_all_clips_have_the_policy_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs_BT = -torch.rand(2, 4, generator=generator).requires_grad_()
    advantages_BT = torch.randn(2, 4, generator=generator)
    tokens = Tokens(log_probs_BT, log_probs_BT.detach(), advantages_BT, MASK_BT)
    expected_BT = gradient(tokens, losses.plain(tokens, Constants()).loss_BT)
    assert expected_BT[MASK_BT].all()
    for surrogate in SURROGATES.values():
        terms_BT, clipped_BT = surrogate(tokens, Constants())
        if surrogate is losses.mirror:  # each token bears the whole completion's
            terms_BT = terms_BT / MASK_BT.sum(1, keepdim=True)
        torch.testing.assert_close(gradient(tokens, terms_BT), expected_BT)
        assert clipped_BT is None or not clipped_BT.any()


def test_value_loss() -> None:
    # V_old = 0, V = 1, c = ½. R = 2: max((1-2)², (0.5-2)²) = 2.25. R = -1: max((1+1)², (0.5+1)²) = 4.
    # Clipped: ½ (2.25 + 4) / 2 = 1.5625. Plain: ½ (1 + 4) / 2 = 1.25.
    values_BT = torch.tensor([[1.0, 1.0, NAN]])
    old_values_BT = torch.tensor([[0.0, 0.0, NAN]])
    returns_BT = torch.tensor([[2.0, -1.0, NAN]])
    mask_BT = torch.tensor([[True, True, False]])
    close(losses.value_loss(values_BT, old_values_BT, returns_BT, mask_BT, 0.5, 2.0), 1.5625)
    close(losses.value_loss(values_BT, old_values_BT, returns_BT, mask_BT, None, 2.0), 1.25)


# Each loss of one learned tensor, the advantages or returns, what the old policy or critic gave, and the sizes.
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, Sizes], Tensor]


def _policy(surrogate: str, average: str, **constants: Any) -> Loss:
    def loss(x_BT: Tensor, target_BT: Tensor, old_BT: Tensor, mask_BT: Tensor, sizes: Sizes) -> Tensor:
        terms_BT, _ = SURROGATES[surrogate](Tokens(x_BT, old_BT, target_BT, mask_BT), Constants(**constants))
        return AVERAGES[average](terms_BT, mask_BT, sizes)

    return loss


LOSSES: dict[str, Loss] = {
    "plain": _policy("plain", "tokens"),
    "clip": _policy("clip", "tokens"),
    "clip, by answers": _policy("clip", "answers", dual=3.0),
    "clip of answers": _policy("clip", "answers", answer=True),
    "clip over a constant": _policy("clip", "constant"),
    "clip weight": _policy("clip-weight", "tokens"),
    "mirror": _policy("mirror", "answers"),
    "value": lambda x, target, old, mask, sizes: losses.value_loss(x, old, target, mask, None, sizes.tokens),
    "clipped value": lambda x, target, old, mask, sizes: losses.value_loss(
        x, old, target, mask, 0.2, sizes.tokens
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_add_up(name: str) -> None:
    """Completions have unequal lengths, so averaging per micro-batch would give another gradient."""
    generator = torch.Generator().manual_seed(0)
    x_BT, target_BT, noise_BT = torch.randn(3, 6, 5, generator=generator)
    x_BT.requires_grad_()
    old_BT = x_BT.detach() + 0.3 * noise_BT
    mask_BT = torch.arange(5)[None, :] < torch.tensor([5, 1, 2, 5, 3, 1])[:, None]
    sizes = Sizes(float(mask_BT.sum()), 6.0, 7)

    def of_parts(micro_batch: int) -> Tensor:
        total_BT = torch.zeros_like(x_BT)
        for start in range(0, 6, micro_batch):
            rows = slice(start, start + micro_batch)
            loss = LOSSES[name](x_BT[rows], target_BT[rows], old_BT[rows], mask_BT[rows], sizes)
            total_BT += torch.autograd.grad(loss, x_BT)[0]
        return total_BT

    whole_BT = of_parts(6)
    assert whole_BT.abs().sum() > 0.1
    torch.testing.assert_close(of_parts(2), whole_BT)
    torch.testing.assert_close(of_parts(1), whole_BT)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("rubbish", [NAN, math.inf, 1e30])
def test_padding_gets_no_gradient(name: str, rubbish: float) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(3, 2, 4, generator=generator)
    results = []
    for padding in (0.0, rubbish):
        x_BT, target_BT, old_BT = clean.masked_fill(~MASK_BT, padding).unbind()
        x_BT = x_BT.clone().requires_grad_()
        loss = LOSSES[name](x_BT, target_BT, old_BT, MASK_BT, FOUR)
        results.append((loss.detach(), *torch.autograd.grad(loss, x_BT)))
    (clean_loss, clean_gradient_BT), (loss, gradient_BT) = results
    assert not gradient_BT[~MASK_BT].any()
    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient_BT, clean_gradient_BT)
