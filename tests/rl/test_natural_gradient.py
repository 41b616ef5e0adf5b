"""Fisher-vector products and conjugate gradients against matrices that are written out."""

import torch
from torch import Tensor, nn

from perl.rl.natural_gradient import conjugate_gradients, fisher_product, take_gradient

torch.manual_seed(0)
X_ND = torch.randn(7, 3, dtype=torch.float64)
WEIGHT_VD = torch.randn(4, 3, dtype=torch.float64)
P_NV = (X_ND @ WEIGHT_VD.T).softmax(1)
VECTORS = torch.randn(3, 12, dtype=torch.float64)


def explicit_fisher() -> Tensor:
    """1/N Σ (diag(p) - p pᵀ) ⊗ x xᵀ, of a softmax of linear logits."""
    parts = [torch.kron(p.diag() - torch.outer(p, p), torch.outer(x, x)) for p, x in zip(P_NV, X_ND, strict=True)]
    return torch.stack(parts).mean(0)


def test_the_fisher_vector_product_is_that_of_the_explicit_matrix() -> None:
    weight = nn.Parameter(WEIGHT_VD.clone())

    def kl_gradient() -> Tensor:
        log_q_NV = (X_ND @ weight.T).log_softmax(1)
        (P_NV * (P_NV.log() - log_q_NV)).sum(1).mean().backward()
        return take_gradient([weight])

    for vector in VECTORS:
        product = fisher_product([weight], kl_gradient, vector, precision=torch.finfo(torch.float64).eps)
        torch.testing.assert_close(product, explicit_fisher() @ vector, rtol=1e-6, atol=1e-7)
    assert torch.equal(weight, WEIGHT_VD)
    assert weight.grad is None


def test_conjugate_gradients_solve_the_damped_system() -> None:
    fisher, gradient = explicit_fisher(), VECTORS[0]
    x, curvature = conjugate_gradients(lambda v: fisher @ v, gradient, iterations=12, damping=0.1)
    added = 0.1 * gradient @ fisher @ gradient / (gradient @ gradient)
    expected = torch.linalg.solve(fisher + added * torch.eye(12), gradient)
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(curvature, float(x @ fisher @ x), rtol=1e-6, atol=0.0)


def test_no_curvature_gives_no_step() -> None:
    x, curvature = conjugate_gradients(torch.zeros_like, VECTORS[0], iterations=3, damping=0.1)
    assert curvature == 0.0
    assert not x.any()
