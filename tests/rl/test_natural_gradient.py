"""Fisher-vector products and conjugate gradients against explicit matrices."""

import pytest
import torch
from torch import Tensor, nn

from perl.rl.natural_gradient import Fisher, adams_moments, conjugate_gradients, natural_direction, take_gradient

torch.manual_seed(0)
X_ND = torch.randn(7, 3, dtype=torch.float64)
WEIGHT_VD = torch.randn(4, 3, dtype=torch.float64)
P_NV = (X_ND @ WEIGHT_VD.T).softmax(1)
VECTORS = torch.randn(3, 12, dtype=torch.float64)


def explicit_fisher(p_NV: Tensor = P_NV) -> Tensor:
    """Return 1/N Σ (diag(p) - p pᵀ) ⊗ x xᵀ for a softmax of linear logits."""
    parts = [torch.kron(p.diag() - torch.outer(p, p), torch.outer(x, x)) for p, x in zip(p_NV, X_ND, strict=True)]
    return torch.stack(parts).mean(0)


def test_the_fisher_vector_product_is_that_of_the_explicit_matrix() -> None:
    weight = nn.Parameter(WEIGHT_VD.clone())

    kls = []

    def kl_gradient() -> tuple[float, Tensor]:
        log_q_NV = (X_ND @ weight.T).log_softmax(1)
        kl = (P_NV * (P_NV.log() - log_q_NV)).sum(1).mean()
        kl.backward()
        kls.append(float(kl.detach()))
        return kls[-1], take_gradient([weight])

    fisher = Fisher([weight], kl_gradient, kl=1e-14)
    for vector in VECTORS:
        torch.testing.assert_close(fisher.product(vector), explicit_fisher() @ vector, rtol=1e-6, atol=1e-7)
        assert 0.25e-14 <= kls[-1] <= 4e-14
    assert len(kls) < 4 * len(VECTORS)  # the length of a difference is that of the last
    assert torch.equal(weight, WEIGHT_VD)
    assert weight.grad is None


def test_weights_that_begin_at_zero_have_curvature_too() -> None:
    weight, p_NV = nn.Parameter(torch.zeros_like(WEIGHT_VD)), torch.full_like(P_NV, 0.25)

    def kl_gradient() -> tuple[float, Tensor]:
        kl = (p_NV * (p_NV.log() - (X_ND @ weight.T).log_softmax(1))).sum(1).mean()
        kl.backward()
        return float(kl.detach()), take_gradient([weight])

    product = Fisher([weight], kl_gradient, kl=1e-14).product(VECTORS[0])
    torch.testing.assert_close(product, explicit_fisher(p_NV) @ VECTORS[0], rtol=1e-6, atol=1e-7)


def test_conjugate_gradients_solve_the_damped_system() -> None:
    fisher, gradient = explicit_fisher(), VECTORS[0]
    x = conjugate_gradients(lambda v: fisher @ v, gradient, iterations=12, damping=0.1)
    added = 0.1 * gradient @ fisher @ gradient / (gradient @ gradient)
    expected = torch.linalg.solve(fisher + added * torch.eye(12), gradient)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)


def test_no_curvature_gives_no_step() -> None:
    assert not conjugate_gradients(torch.zeros_like, VECTORS[0], iterations=3, damping=0.1).any()


def test_the_preconditioned_system_is_damped_in_proportion_to_the_sizes() -> None:
    fisher, gradient, sizes = explicit_fisher(), VECTORS[0], torch.logspace(-3, 2, 12, dtype=torch.float64)
    x = natural_direction(lambda v: fisher @ v, gradient, sizes, iterations=60, damping=0.1)
    first = gradient / sizes
    added = 0.1 * first @ fisher @ first / (first @ gradient)
    torch.testing.assert_close((fisher + added * sizes.diag()) @ x, gradient, rtol=1e-6, atol=1e-6)


def test_where_the_fisher_matrix_is_silent_the_direction_is_adams() -> None:
    sizes = torch.logspace(-3, 2, 12, dtype=torch.float64)
    x = natural_direction(fisher_of_last, VECTORS[0], sizes, iterations=20, damping=0.1)
    adam = VECTORS[0] / sizes
    times = x / adam
    torch.testing.assert_close(times[:11], times[0].expand(11))
    assert 0 < times[11] < 0.5 * times[0]  # curvature shortens the step


def fisher_of_last(vector: Tensor) -> Tensor:
    """Return F v where only the last weight has curvature."""
    return torch.cat([torch.zeros(11, dtype=torch.float64), vector[11:]])


def test_a_weight_that_never_had_a_gradient_stays() -> None:
    weight = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.tensor([1.0, 0.0, -2.0])
    optimizer.step()
    moments = adams_moments(optimizer, [weight])
    curvature = torch.diag(torch.tensor([1.0, 0.0, 2.0])) + 0.1  # noise of a finite difference
    x = natural_direction(lambda v: curvature @ v, moments.mean, moments.sizes, iterations=5, damping=1.0)
    assert x.isfinite().all()
    assert (x == 0).tolist() == [False, True, False]


def test_the_moments_are_those_of_adams_steps() -> None:
    weights = [nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.zeros(4))]
    optimizer = torch.optim.AdamW(weights, lr=0.5, weight_decay=0.0)
    for step in range(1, 4):
        before = torch.cat([weight.detach().flatten() for weight in weights])
        for weight in weights:
            weight.grad = torch.randn(weight.shape)
        optimizer.step()
        mean, size, weight_so_far = adams_moments(optimizer, weights)
        after = torch.cat([weight.detach().flatten() for weight in weights])
        torch.testing.assert_close(before - after, 0.5 * mean / size)
        assert weight_so_far == pytest.approx(1 - 0.9**step)
