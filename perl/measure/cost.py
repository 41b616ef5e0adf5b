"""What a stage costs, as its result holds it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from perl.measure.probe import Phase, PhaseMemory


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Work of all processes; time and memory of one, and the peak of the process that had most."""

    seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    peak_rss_bytes: int
    memory: dict[Phase, PhaseMemory]
    phase_seconds: dict[Phase, float]
    flops: int | None = None
    useful_flops_share: float | None = None

    def of_all(self, processes: "Sequence[Cost]") -> "Cost":
        """This process's cost, with the work of all added up."""
        return replace(
            self,
            tokens_per_second=sum(cost.tokens_per_second for cost in processes),
            peak_memory_bytes=max(cost.peak_memory_bytes for cost in processes),
            flops=None if self.flops is None else sum(cost.flops or 0 for cost in processes),
        )
