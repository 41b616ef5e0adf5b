"""The joint cost of several processes."""

from dataclasses import replace

from perl.measure.cost import Cost
from perl.measure.probe import PhaseMemory

MINE = Cost(
    seconds=2.0,
    tokens_per_second=10.0,
    peak_memory_bytes=100,
    peak_rss_bytes=500,
    memory={"load": PhaseMemory(100, {"adapters": 100})},
    phase_seconds={"update": 2.0},
    flops=7,
    useful_flops_share=0.5,
)


def test_work_is_added_up_and_the_peak_is_the_highest() -> None:
    other = replace(MINE, tokens_per_second=5.0, peak_memory_bytes=300, flops=3, seconds=9.0)
    assert MINE.of_all([MINE, other]) == replace(MINE, tokens_per_second=15.0, peak_memory_bytes=300, flops=10)


def test_without_operations_there_is_no_sum_of_them() -> None:
    uncounted = replace(MINE, flops=None, useful_flops_share=None)
    assert uncounted.of_all([uncounted, uncounted]).flops is None
