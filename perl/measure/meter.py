"""What a stage costs: seconds, tokens, floating-point operations, and memory by phase and kind."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from perl.measure.cost import Cost
from perl.measure.flops import Flops
from perl.measure.ledger import Allocator, Timeline
from perl.measure.memory import peak_rss_bytes
from perl.measure.probe import Kind, Phase, listening, mark

MEASURED_STEPS = 2
"""Memory and operations are followed on the first steps only: it slows small models by up to 2.4 times."""


class Meter:
    """Counts a stage's time and tokens, and follows the memory and the operations of its first steps.

    Args:
        device: where the work is done.
        resident: the tensors that live through the whole stage, by what they are for.
        trunks: the modules whose `attention_mask` says how many of the computed positions are real; without
            any, operations are not counted.
        measured_steps: how many steps are followed; 0: only time is taken.
    """

    def __init__(
        self,
        device: torch.device,
        resident: Mapping[Kind, Iterable[Tensor]],
        trunks: Sequence[nn.Module],
        measured_steps: int = MEASURED_STEPS,
    ) -> None:
        self._measured_steps = measured_steps
        self._ledger = Allocator(device, resident) if device.type == "cuda" else Timeline(resident)
        self._flops = Flops(trunks) if trunks else None
        self._tokens, self._measured_tokens = 0, 0
        self._seconds, self._measured_seconds = 0.0, 0.0
        self._phase: Phase = "load"
        self._phase_seconds: dict[Phase, float] = {}
        self.step_seconds: list[dict[Phase, float]] = []
        """Of each step, by phase."""
        self._since = time.perf_counter()

    @contextlib.contextmanager
    def step(self, optimizer: Any) -> Iterator[None]:
        """Measure one step. All is `update` that is no other phase.

        Args:
            optimizer: whose parameters' gradients and whose state are told apart from activations.
        """
        tokens, measured = self._tokens, len(self.step_seconds) < self._measured_steps
        with contextlib.ExitStack() as stack:
            if measured:
                stack.enter_context(self._measuring(optimizer))
            begin = self._since = time.perf_counter()  # what lies between steps is no phase's time
            before = dict(self._phase_seconds)
            stack.enter_context(self.phase("update"))
            yield
        self.step_seconds.append(
            {name: total - before.get(name, 0.0) for name, total in self._phase_seconds.items() if name != "load"}
        )
        seconds = time.perf_counter() - begin
        self._seconds += seconds
        if measured:
            self._measured_seconds += seconds
            self._measured_tokens += self._tokens - tokens

    @contextlib.contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Inside, what is done is this; afterwards it is what it was."""
        before = self._phase
        self._enter(name)
        try:
            yield
        finally:
            # `load` is what there is before the first step: what lies between steps belongs to the one before.
            self._enter(name if before == "load" else before)

    def _enter(self, name: Phase) -> None:
        now = time.perf_counter()
        self._phase_seconds[self._phase] = self._phase_seconds.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = name, now
        self._ledger.phase(name)

    @contextlib.contextmanager
    def _measuring(self, optimizer: Any) -> Iterator[None]:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with contextlib.ExitStack() as stack:
            for parameter in parameters:
                hook = parameter.register_post_accumulate_grad_hook(lambda p: mark("gradients", [p.grad]))
                stack.callback(hook.remove)
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
        self._tokens += tokens

    def times(self) -> dict[str, Any]:
        """Seconds and tokens so far, for a process that goes on with the stage."""
        return {
            "tokens": self._tokens,
            "measured_tokens": self._measured_tokens,
            "seconds": self._seconds,
            "measured_seconds": self._measured_seconds,
            "phase_seconds": self._phase_seconds,
        }

    def resume_from(self, times: dict[str, Any]) -> None:
        """Count on from what another process has counted; the memory of the next steps is followed anew."""
        self._tokens, self._measured_tokens = times["tokens"], times["measured_tokens"]
        self._seconds, self._measured_seconds = times["seconds"], times["measured_seconds"]
        self._phase_seconds = dict(times["phase_seconds"])

    def cost(self) -> Cost:
        """The stage's cost so far, of this process."""
        tokens, seconds = self._tokens, self._seconds
        # The speed is that of the steps that were not followed, where there are any.
        if len(self.step_seconds) > self._measured_steps:
            tokens, seconds = tokens - self._measured_tokens, seconds - self._measured_seconds
        memory, flops = self._ledger.memory(), self._flops
        by_phase: dict[Phase, float] = {
            name: round(spent, 2) for name, spent in self._phase_seconds.items() if name != "load"
        }
        return Cost(
            seconds=round(self._seconds, 2),
            tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            peak_memory_bytes=max(phase.peak for phase in memory.values()),
            peak_rss_bytes=peak_rss_bytes(),
            memory=memory,
            phase_seconds=by_phase,
            flops=None if flops is None else round(flops.total / max(self._measured_tokens, 1) * self._tokens),
            useful_flops_share=None if flops is None else round(flops.useful / max(flops.total, 1.0), 4),
        )
