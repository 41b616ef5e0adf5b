"""Transposed products: equal to a layer's own, only where they are faster, and gone afterwards."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from perl.measure.flops import Flops
from perl.roles import transposed as module
from perl.roles.transposed import transposed


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(768, 700), nn.Linear(700, 768, bias=False), nn.Linear(768, 9))


def computed_transposed(layer: nn.Module, x: Tensor) -> bool:
    """Return whether the layer's first product has the weight on its left."""
    with torch.profiler.profile(record_shapes=True) as profile:
        layer(x)
    shapes = [event.input_shapes for event in profile.events() if event.name in ("aten::mm", "aten::addmm")]
    return [700, 768] in shapes[0]


@torch.no_grad()
@pytest.mark.parametrize("shape", [(16, 1, 768), (4, 3, 768), (8, 768)])
def test_products_are_the_same(shape: tuple[int, ...]) -> None:
    model, x = layers(), torch.randn(shape)
    plain, flops = model(x), Flops([])
    with transposed(model):
        assert computed_transposed(model[0], x)
        fast = model(x)
        torch.testing.assert_close(fast, plain)
        torch.testing.assert_close(model(x[::2]), plain[::2])  # a view
        with flops:
            model(x)
    assert fast.is_contiguous()
    assert flops.total == 2 * (x.numel() // 768) * (2 * 768 * 700 + 768 * 9)


@torch.no_grad()
def test_one_row_and_many_rows_and_one_thread_are_left_alone() -> None:
    model = layers()
    with transposed(model):
        assert not computed_transposed(model[0], torch.randn(1, 768))
        assert not computed_transposed(model[0], torch.randn(module.FEW.stop, 768))
        assert "forward" not in vars(model[2])  # small
    torch.set_num_threads(1)
    with transposed(model):
        assert not computed_transposed(model[0], torch.randn(16, 768))


def test_layers_are_as_before_even_after_an_error() -> None:
    model = layers()
    with pytest.raises(KeyboardInterrupt), transposed(model):
        raise KeyboardInterrupt
    assert all("forward" not in vars(layer) for layer in model)
    model(torch.randn(4, 768)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_leaves_alone_what_has_hooks_or_another_dtype() -> None:
    hooked, half = layers(), layers().bfloat16()
    hooked[0].register_forward_hook(lambda *_: None)
    for model in (hooked, half):
        with transposed(model):
            assert "forward" not in vars(model[0])
