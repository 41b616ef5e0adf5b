"""Peaks of live tensor bytes against numbers worked by hand: a float is 4 bytes."""

import gc
import resource
import sys
import weakref
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from perl.measure.memory import LiveBytes, peak_rss_bytes


def test_counts_what_is_made_and_freed() -> None:
    with LiveBytes() as live:
        a = torch.zeros(100)  # 400
        b = a + 1  # 400 more
        assert (live.current, live.peak) == (800, 800)
        del a
        assert (live.current, live.peak) == (400, 800)
        c = torch.zeros(50)  # 400 + 200
        assert (live.current, live.peak) == (600, 800)
        live.peak = live.current
        assert live.peak == 600
    del b, c
    assert (live.current, live.peak) == (0, 600)


def test_intermediate_results_count_while_they_live() -> None:
    with LiveBytes() as live:
        x = torch.ones(10)  # 40
        x = (x + 1) * 2  # x, x + 1 and the product at once: 120; then the product alone
    assert (live.current, live.peak) == (x.nbytes, 120)


def test_views_and_in_place_operators_count_once() -> None:
    with LiveBytes() as live:
        x = torch.zeros(10, 10)  # 400
        views = [x.t(), x[2:], x.view(100), x.detach(), x.reshape(4, 25), torch.split(x, 3)]
        x.add_(1).mul_(2)
        assert (live.current, live.peak) == (400, 400)
        del x
        assert live.current == 400  # the views hold the bytes
        del views
        assert live.current == 0


def test_results_in_tuples_count() -> None:
    with LiveBytes() as live:
        results = torch.zeros(10).sort()  # 40, then 10 floats and 10 int64: 40 + 80
    assert live.peak == 40 + 120
    assert live.current == sum(result.nbytes for result in results) == 120


def test_tensors_from_before_count_only_if_given() -> None:
    given, other = torch.zeros(100), torch.zeros(1000)
    with LiveBytes([given, given[5:]]) as live:
        assert (live.current, live.peak) == (400, 400)
        other.add_(1)
        kept = other[:10].t()
        torch.add(other, 1, out=other)
        assert live.current == 400
        result = other + given.sum()  # 4 for the sum, then 4000
        assert (live.current, live.peak) == (4400, 4404)
        del given
        assert live.current == 4000
    assert kept.untyped_storage() is other.untyped_storage()
    assert result.nbytes == 4000


def test_tensors_made_from_data_count() -> None:
    with LiveBytes() as live:
        tensors = [torch.tensor([1.0, 2.0]), torch.from_numpy(np.zeros(4))]  # 8 + 32
    assert live.current == sum(tensor.nbytes for tensor in tensors) == 40


def test_resized_storages() -> None:
    with LiveBytes() as live:
        x = torch.zeros(10)
        x.resize_(100)
        assert live.current == 400
        out = torch.zeros(0)
        torch.add(x, x, out=out)
        assert live.current == 800
        x.untyped_storage().resize_(0)
        x.detach()  # noticed by the next operator that returns it
        assert live.current == 400


def test_sparse_tensors_do_not_stop_it() -> None:
    with LiveBytes() as live:
        torch.eye(3).to_sparse()
    assert live.current == 0
    assert live.peak >= 36


def test_keeps_no_tensor_alive() -> None:
    before = torch.zeros(10)
    with LiveBytes([before]) as live:
        inside = torch.zeros(10)
        references = [weakref.ref(before.untyped_storage()), weakref.ref(inside.untyped_storage())]
        assert all(reference() is not None for reference in references)
        del before, inside
        assert all(reference() is None for reference in references)
    assert live.current == 0


def test_gradients_and_saved_activations_count() -> None:
    weight = torch.ones(100, requires_grad=True)  # 400, given
    with LiveBytes([weight]) as live:
        hidden = weight.exp()  # 400, saved for the backward
        loss = hidden.sum()  # 4
        del hidden
        assert live.current == 400 + 400 + 4
        torch.autograd.backward(
            loss
        )  # gradient of the loss 4, and of the weight 400, while exp's result still lives
        assert live.peak == 400 + 400 + 4 + 4 + 400
        assert live.current == 400 + 4 + 400
        weight.grad = None
        assert live.current == 404


def three_tanh(x: torch.Tensor) -> torch.Tensor:
    return x.tanh().tanh().tanh()


def layers(count: int, checkpointed: bool) -> int:
    """Return the peak of forward and backward through `count` layers of three tanh of 1000 floats each."""
    x = torch.zeros(1000, requires_grad=True)
    with LiveBytes([x]) as live:
        y = x
        for _ in range(count):
            y = checkpoint(three_tanh, y, use_reentrant=False) if checkpointed else three_tanh(y)
        torch.autograd.backward(y.sum())
    return live.peak


def test_activation_checkpointing_shows() -> None:
    # Plain, a layer saves three results of 4000 bytes; checkpointed, its input only.
    assert layers(10, checkpointed=False) - layers(5, checkpointed=False) == 5 * 3 * 4000
    assert layers(10, checkpointed=True) - layers(5, checkpointed=True) == 5 * 4000


def test_repeats_exactly() -> None:
    def step() -> tuple[int, int]:
        torch.manual_seed(0)
        model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        optimizer = torch.optim.AdamW(model.parameters())
        with LiveBytes(model.parameters()) as live:
            for _ in range(2):
                torch.autograd.backward(model(torch.randn(3, 7, 16)).square().sum())
                optimizer.step()
                optimizer.zero_grad()
        return live.peak, live.current

    peak, current = step()
    parameters = sum(p.nbytes for p in torch.nn.TransformerEncoderLayer(16, 2, 32).parameters())
    assert current >= 3 * parameters  # plus AdamW's two moments
    assert peak > current
    assert step() == (peak, current)
    assert step() == (peak, current)


def test_nested_modes_both_count() -> None:
    with LiveBytes() as outer:
        a = torch.zeros(10)
        with LiveBytes([a]) as inner:
            b = torch.zeros(100)
            del b
        with LiveBytes() as blind:
            c = a + 1
    assert (outer.peak, outer.current) == (440, 80)
    assert (inner.peak, inner.current) == (440, 40)
    assert (blind.peak, blind.current) == (40, c.nbytes)


def test_fake_tensors_count_as_the_real_ones_would() -> None:
    def peak() -> int:
        with LiveBytes() as live:
            x = torch.zeros(64, 64, requires_grad=True)
            torch.autograd.backward((x @ x).relu().sum())
        return live.peak

    with FakeTensorMode():
        fake = peak()
    assert fake == peak() > 3 * 64 * 64 * 4


def test_stops_counting_when_an_error_leaves_it() -> None:
    live = LiveBytes()
    with suppress(ZeroDivisionError), live:
        x = torch.zeros(10)
        _ = 1 / 0
    y = torch.zeros(100)
    assert (live.current, live.peak) == (x.nbytes, 40)
    assert y.nbytes == 400


def test_peak_rss_is_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_rss_bytes() > 50 * 2**20  # torch alone takes more; in kibibytes it would be far less
    usage = resource.getrusage(resource.RUSAGE_SELF)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "linux")
    linux = peak_rss_bytes()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert linux == 1024 * peak_rss_bytes()


def test_leaves_no_cycle_that_holds_tensors() -> None:
    gc.disable()
    try:
        with LiveBytes():
            x = torch.zeros(10)
            reference = weakref.ref(x.untyped_storage())
        del x
        assert reference() is None
    finally:
        gc.enable()
