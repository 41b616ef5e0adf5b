"""The exact KL between two policies, against torch.distributions."""

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from perl.backbones.logits import LogitsTransform
from perl.roles import log_probs
from perl.roles.distributions import kl_of_states


@pytest.mark.parametrize("cap", [None, 2.0])
def test_kl_and_its_gradient(cap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are computed in chunks of two tokens, with a head that has a bias."""
    monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", 22)
    torch.manual_seed(0)
    old_ND, new_ND, weight_VD, bias_V = torch.randn(5, 6), torch.randn(5, 6), torch.randn(11, 6), torch.randn(11)
    transform, temperature = LogitsTransform(1.5, cap), 0.7

    def policy(states_ND: torch.Tensor) -> Categorical:
        logits_NV = 1.5 * (states_ND @ weight_VD.T + bias_V)
        return Categorical(logits=(logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)) / temperature)

    weights_N = torch.arange(5.0)
    states_ND, expected_ND = new_ND.clone().requires_grad_(), new_ND.clone().requires_grad_()
    kl_N = kl_of_states(old_ND, states_ND, weight_VD, bias_V, temperature, transform)
    expected_N = kl_divergence(policy(old_ND), policy(expected_ND))
    torch.testing.assert_close(kl_N, expected_N, rtol=1e-5, atol=1e-6)
    (kl_N * weights_N).sum().backward()  # type: ignore[no-untyped-call]
    (expected_N * weights_N).sum().backward()
    torch.testing.assert_close(states_ND.grad, expected_ND.grad, rtol=1e-4, atol=1e-6)


def test_a_policy_is_no_distance_from_itself() -> None:
    states_ND, weight_VD = torch.randn(3, 4), torch.randn(9, 4)
    assert kl_of_states(states_ND, states_ND, weight_VD, None, 1.0).tolist() == [0.0] * 3
