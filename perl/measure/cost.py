"""The cost of a stage, as stored in its result."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perl.measure.probe import Phase, PhaseMemory, highest


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of all processes, time and memory of one, and the highest peak of all processes."""

    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    peak_rss_bytes: int
    memory: dict[Phase, PhaseMemory]
    phase_seconds: dict[Phase, float]
    flops: int | None = None
    useful_flops_share: float | None = None

    def of_all(self, processes: "Sequence[Cost]") -> "Cost":
        """Return this process's cost, with the work of all processes added up."""
        return replace(
            self,
            tokens_per_second=sum(cost.tokens_per_second for cost in processes),
            peak_memory_bytes=max(cost.peak_memory_bytes for cost in processes),
            flops=None if self.flops is None else sum(cost.flops or 0 for cost in processes),
        )


def costs_in_turn(costs: Sequence[Cost]) -> Cost:
    """Return the cost of consecutive trainings."""
    seconds = sum(cost.seconds for cost in costs)
    flops = [cost.flops for cost in costs if cost.flops is not None]
    useful = sum((cost.useful_flops_share or 0.0) * (cost.flops or 0) for cost in costs)
    spent = dict.fromkeys(phase for cost in costs for phase in cost.phase_seconds)
    return Cost(
        seconds=round(seconds, 2),
        tokens_per_second=round(sum(one.tokens_per_second * one.seconds for one in costs) / max(seconds, 1e-9), 1),
        peak_memory_bytes=max(cost.peak_memory_bytes for cost in costs),
        peak_rss_bytes=max(cost.peak_rss_bytes for cost in costs),
        memory=highest(cost.memory for cost in costs),
        phase_seconds={
            phase: round(sum(cost.phase_seconds.get(phase, 0.0) for cost in costs), 2) for phase in spent
        },
        flops=sum(flops) if flops else None,
        useful_flops_share=round(useful / max(sum(flops), 1), 4) if flops else None,
    )
