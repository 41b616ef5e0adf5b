"""Measurement of a stage's cost: seconds, tokens, floating-point operations, and memory by phase and kind."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from perl.measure.cost import Cost
from perl.measure.flops import Flops
from perl.measure.ledger import Allocator, Timeline
from perl.measure.memory import peak_rss_bytes
from perl.measure.probe import Kind, Phase, PhaseMemory, highest, listening, mark

MEASURED_STEPS = 2
"""First steps whose memory and operations are measured, which makes small models up to 2.4 times slower."""


@dataclass
class _Times:
    """Counts so far; `measured_…` are those of the steps whose memory is measured."""

    tokens: int = 0
    measured_tokens: int = 0
    seconds: float = 0.0
    measured_seconds: float = 0.0
    measured_flops: float = 0.0
    useful_flops: float = 0.0
    phase_seconds: dict[Phase, float] = field(default_factory=dict)
    memory: dict[Phase, PhaseMemory] = field(default_factory=dict)
    """Measured by earlier processes."""


class Meter:
    """Counts a stage's time and tokens, and measures the memory and operations of its first steps.

    Args:
        resident: the tensors that live through the whole stage, by kind.
        trunks: modules called with `attention_mask`, for `Flops`; without any, operations are not counted.
        measured_steps: number of steps whose memory and operations are measured; 0: only time is measured.

    Attributes:
        step_seconds: seconds of each step, by phase.
    """

    def __init__(
        self,
        device: torch.device,
        resident: Mapping[Kind, Iterable[Tensor]],
        trunks: Sequence[nn.Module],
        measured_steps: int = MEASURED_STEPS,
    ) -> None:
        self._device, self._measured_steps = device, measured_steps
        self._ledger = Allocator(device, resident) if device.type == "cuda" else Timeline(resident)
        self._flops = Flops(trunks) if trunks else None
        self._times = _Times()
        self._phase: Phase = "load"
        self.step_seconds: list[dict[Phase, float]] = []
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def step(self, optimizer: Any) -> Iterator[None]:
        """Measure one step, in the phase `update` unless the block enters another.

        Args:
            optimizer: its state and its parameters' gradients are distinguished from activations.
        """
        times, measured = self._times, len(self.step_seconds) < self._measured_steps
        tokens, before = times.tokens, dict(times.phase_seconds)
        with contextlib.ExitStack() as stack:
            if measured:
                stack.enter_context(self._measuring(optimizer))
            begin = self._since = time.perf_counter()  # time between steps belongs to no phase
            stack.enter_context(self.phase("update"))
            yield
        self.step_seconds.append(
            {name: total - before.get(name, 0.0) for name, total in times.phase_seconds.items() if name != "load"}
        )
        seconds = time.perf_counter() - begin
        times.seconds += seconds
        if measured:
            times.measured_seconds += seconds
            times.measured_tokens += times.tokens - tokens
            if self._flops is not None:
                times.measured_flops, times.useful_flops = self._flops.total, self._flops.useful

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Count the work inside the block to this phase, and later work to the previous one again."""
        before = self._phase
        self._enter(name)
        try:
            yield
        finally:
            # `load` ends with the first step: work between steps belongs to the previous phase.
            self._enter(name if before == "load" else before)

    def _enter(self, name: Phase) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # attributes kernels to the phase that launched them
        now, seconds = time.perf_counter(), self._times.phase_seconds
        seconds[self._phase] = seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now
        self._ledger.phase(name)

    @contextlib.contextmanager
    def _measuring(self, optimizer: Any) -> Iterator[None]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with contextlib.ExitStack() as stack:
            for parameter in (one for one in parameters if one.requires_grad):  # layers may be frozen temporarily
                stack.enter_context(
                    parameter.register_post_accumulate_grad_hook(lambda p: mark("gradients", [p.grad]))
                )
            stack.enter_context(listening(self._ledger))
            stack.enter_context(self._ledger)
            if self._flops is not None:
                stack.enter_context(listening(self._flops))
                stack.enter_context(self._flops.counting())
            yield
            state = [value for state in optimizer.state.values() for value in state.values()]
            mark("optimizer", [value for value in state if isinstance(value, Tensor)])

    def count(self, tokens: int) -> None:
        """Count real tokens of this step."""
        self._times.tokens += tokens

    def times(self) -> dict[str, object]:
        """Return seconds, tokens, operations and memory so far, for a process that resumes the stage."""
        return asdict(replace(self._times, memory=self._memory()))

    def resume_from(self, times: Mapping[str, Any]) -> None:
        """Continue from the counts of an earlier process; the next steps' memory is measured, too."""
        memory = {phase: PhaseMemory(**one) for phase, one in times.get("memory", {}).items()}
        self._times = _Times(**{**times, "memory": memory})
        if self._flops is not None:
            self._flops.total, self._flops.useful = self._times.measured_flops, self._times.useful_flops

    def _memory(self) -> dict[Phase, PhaseMemory]:
        return highest([self._times.memory, self._ledger.memory()])

    def cost(self) -> Cost:
        """Return the stage's cost so far."""
        times = self._times
        tokens, seconds = times.tokens, times.seconds
        # Speed is that of the steps without measurement, if there are any.
        if len(self.step_seconds) > self._measured_steps:
            tokens, seconds = tokens - times.measured_tokens, seconds - times.measured_seconds
        memory, flops = self._memory(), self._flops
        return Cost(
            seconds=round(times.seconds, 2),
            tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            peak_memory_bytes=max(phase.peak for phase in memory.values()),
            peak_rss_bytes=peak_rss_bytes(),
            memory=memory,
            phase_seconds={name: round(spent, 2) for name, spent in times.phase_seconds.items() if name != "load"},
            flops=None if flops is None else round(flops.total / max(times.measured_tokens, 1) * times.tokens),
            useful_flops_share=None if flops is None else round(flops.useful / max(flops.total, 1.0), 4),
        )
