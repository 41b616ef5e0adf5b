"""Bytes by kind at each phase's peak, against numbers worked by hand: a float is 4 bytes."""

from collections.abc import Iterator

import pytest
import torch

from perl.measure.ledger import Allocator, Timeline
from perl.measure.probe import PhaseMemory

CUDA = torch.device("cuda", 0)


def test_resident_tensors_are_the_phase_load() -> None:
    weights, adapters = [torch.zeros(100), torch.zeros(50)], [torch.zeros(10)]
    timeline = Timeline({"base_weights": weights, "adapters": adapters})
    assert timeline.memory() == {"load": PhaseMemory(640, {"base_weights": 600, "adapters": 40})}


def test_a_storage_counts_once_and_is_what_it_was_last_said_to_be() -> None:
    tied = torch.zeros(100)
    timeline = Timeline({"base_weights": [tied, tied[:50]], "adapters": [tied.view(10, 10)]})
    assert timeline.memory() == {"load": PhaseMemory(400, {"adapters": 400})}


def test_a_phase_begins_with_what_is_there_and_peaks_by_itself() -> None:
    weights = torch.zeros(100)  # 400
    timeline = Timeline({"base_weights": [weights]})
    with timeline:
        timeline.phase("generate")
        cache = torch.zeros(50)  # 200
        timeline.mark("kv_cache", [cache])
        drawn = cache + 1  # 200
        del cache
        timeline.phase("score")  # 400 and what was drawn
        score = drawn[:25] + 1  # 100
        timeline.phase("update")
        del drawn, score
    assert timeline.memory() == {
        "load": PhaseMemory(400, {"base_weights": 400}),
        "generate": PhaseMemory(800, {"base_weights": 400, "kv_cache": 200, "activations": 200}),
        "score": PhaseMemory(700, {"base_weights": 400, "activations": 300}),
        "update": PhaseMemory(700, {"base_weights": 400, "activations": 300}),  # it ends below its start
    }


def test_what_is_named_late_was_that_from_its_birth_on() -> None:
    """A gradient is a temporary at the time of the peak, and optimizer states are identified after the step."""
    timeline = Timeline({})
    with timeline:
        timeline.phase("update")
        gradient = torch.zeros(100)  # 400
        temporary = gradient + 1  # 400: the peak, nothing is marked yet
        del temporary
        timeline.mark("gradients", [gradient])
        moment = torch.zeros(50)  # 200
        timeline.mark("optimizer", [moment])
    assert timeline.memory()["update"] == PhaseMemory(800, {"gradients": 400, "activations": 400})
    assert timeline.current == 600


def test_what_was_freed_before_the_peak_is_not_in_it() -> None:
    timeline = Timeline({})
    with timeline:
        timeline.phase("update")
        gradient = torch.zeros(100)  # 400
        timeline.mark("gradients", [gradient])
        del gradient
        moment = torch.zeros(150)  # 600
        timeline.mark("optimizer", [moment])
    assert timeline.memory()["update"] == PhaseMemory(600, {"optimizer": 600})


def test_a_new_storage_at_a_freed_ones_place_does_not_inherit_its_kind() -> None:
    timeline = Timeline({})
    with timeline:
        timeline.phase("update")
        for _ in range(100):  # Python reuses the ids of freed storages
            gradient = torch.zeros(10)  # 40
            timeline.mark("gradients", [gradient])
            del gradient
        temporaries = [torch.zeros(10) for _ in range(20)]  # 800
    assert timeline.memory()["update"] == PhaseMemory(800, {"activations": 800})
    assert len(temporaries) == 20


def test_a_phase_that_recurs_has_its_highest_peak() -> None:
    timeline = Timeline({})
    with timeline:
        for floats in (50, 200, 100):
            timeline.phase("generate")
            cache = torch.zeros(floats)
            timeline.mark("kv_cache", [cache])
            del cache
            timeline.phase("update")
            gradient = torch.zeros(floats + 10)
            timeline.mark("gradients", [gradient])
            del gradient
    assert timeline.memory() == {
        "load": PhaseMemory(0, {}),
        "generate": PhaseMemory(800, {"kv_cache": 800}),
        "update": PhaseMemory(840, {"gradients": 840}),
    }


def test_tensors_from_before_count_from_their_mark_on() -> None:
    before = torch.zeros(100)
    timeline = Timeline({})
    with timeline:
        timeline.phase("generate")
        a = torch.zeros(10)  # 40
        timeline.mark("optimizer", [before])
        b = torch.zeros(10)
    assert timeline.memory()["generate"] == PhaseMemory(480, {"optimizer": 400, "activations": 80})
    assert timeline.memory()["load"].peak == 0
    assert (a.nbytes, b.nbytes) == (40, 40)


def test_entered_again_it_goes_on_and_sees_frees_in_between() -> None:
    timeline = Timeline({})
    with timeline:
        timeline.phase("update")
        kept, freed = torch.zeros(10), torch.zeros(100)  # 40 and 400
    del freed
    unseen = torch.zeros(1000)
    timeline.phase("generate")
    with timeline:
        more = kept + 1  # 40
    assert timeline.memory()["update"] == PhaseMemory(440, {"activations": 440})
    assert timeline.memory()["generate"] == PhaseMemory(80, {"activations": 80})
    assert unseen.nbytes + more.nbytes == 4040


def test_a_resized_storage_keeps_its_kind() -> None:
    timeline = Timeline({})
    with timeline:
        timeline.phase("update")
        x = torch.zeros(10)  # 40
        timeline.mark("optimizer", [x])
        x.resize_(100)  # 400
    assert timeline.memory()["update"] == PhaseMemory(400, {"optimizer": 400})


def training() -> Timeline:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    timeline = Timeline({"adapters": model.parameters()})
    with timeline:
        for _ in range(2):
            timeline.phase("generate")
            with torch.no_grad():
                model(torch.randn(64, 16))
            timeline.phase("update")
            torch.autograd.backward(model(torch.randn(8, 16)).square().sum())
            timeline.mark("gradients", [parameter.grad for parameter in model.parameters()])
            optimizer.step()
            state = [value for values in optimizer.state.values() for value in values.values()]
            timeline.mark("optimizer", state)
            optimizer.zero_grad()
    return timeline


def test_kinds_sum_to_the_peak_and_training_repeats_exactly() -> None:
    timeline = training()
    memory = timeline.memory()
    assert all(sum(phase.kinds.values()) == phase.peak for phase in memory.values())
    assert max(phase.peak for phase in memory.values()) == timeline.peak
    weights = 4 * (16 * 32 + 32 + 32 * 4 + 4)
    assert memory["load"] == PhaseMemory(weights, {"adapters": weights})
    kinds = memory["update"].kinds
    assert kinds["adapters"] == kinds["gradients"] == weights
    assert kinds["optimizer"] == 2 * weights + 4 * 4  # two moments, and a step count for each of four tensors
    assert "gradients" not in memory["generate"].kinds
    assert memory["generate"].kinds["optimizer"] == kinds["optimizer"]
    assert [training().memory() for _ in range(3)] == [memory] * 3


class Card:
    """A CUDA device of which only the memory statistics exist."""

    allocated = peak = 0

    def to(self, allocated: int) -> None:
        self.allocated = allocated
        self.peak = max(self.peak, allocated)

    def reset(self, device: torch.device) -> None:
        assert device == CUDA
        self.peak = self.allocated

    def max_memory_allocated(self, device: torch.device) -> int:
        assert device == CUDA
        return self.peak


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    card = Card()
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", card.reset)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", card.max_memory_allocated)
    return card


def test_the_allocators_peaks_by_phase(card: Card) -> None:
    base, adapters = torch.zeros(100), torch.zeros(10)  # 400 and 40
    card.to(500)
    allocator = Allocator(CUDA, {"base_weights": [base], "adapters": [adapters]})
    with allocator:
        allocator.phase("generate")
        cache = torch.zeros(50)  # 200
        allocator.mark("kv_cache", [cache, cache[:10]])
        card.to(900)
        card.to(550)
        allocator.phase("update")
        allocator.mark("gradients", [torch.zeros(10)])
        allocator.mark("optimizer", [torch.zeros(20)])
        card.to(700)
    resident = {"base_weights": 400, "adapters": 40}
    update = {"gradients": 40, "optimizer": 80, "activations": 140}
    assert allocator.memory() == {
        "load": PhaseMemory(500, {**resident, "activations": 60}),
        "generate": PhaseMemory(900, {**resident, "kv_cache": 200, "activations": 260}),
        "update": PhaseMemory(700, {**resident, **update}),  # its cache is freed
    }


def test_the_allocators_phases_that_recur(card: Card) -> None:
    allocator = Allocator(CUDA, {})
    for generate, update in ((100, 300), (400, 200), (50, 250)):
        allocator.phase("generate")
        card.to(generate)
        card.to(10)
        allocator.phase("update")
        card.to(update)
        card.to(10)
    memory = allocator.memory()
    assert {name: phase.peak for name, phase in memory.items()} == {"load": 0, "generate": 400, "update": 300}
    assert allocator.memory() == memory  # asking changes nothing


def test_the_allocators_activations_are_never_less_than_none(card: Card) -> None:
    card.to(100)
    memory = Allocator(CUDA, {"base_weights": [torch.zeros(100)]}).memory()  # on the simulated CPU
    assert memory["load"].kinds["activations"] == 0
