"""The processes of one run, started by `torchrun` or `accelerate launch`.

Each process runs the same code on its own share of the rows. Decisions are based on values that all processes
have, so that all make the same decision at the same step. The first process, `main`, writes and prints.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from perl.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process's rank and the number of processes, with collectives."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    """The rank on its host."""

    @property
    def main(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            self.all_gather(None)

    def all_gather(self, value: T) -> list[T]:
        """Return every process's value, by rank."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def broadcast(self, value: T) -> T:
        """Return the main process's value."""
        values: list[Any] = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]  # type: ignore[no-any-return]

    def any_true(self, flag: bool) -> bool:
        return self.all_reduce_max(int(flag)) > 0

    def all_reduce_max(self, number: int) -> int:
        return self._reduced(number, torch.int64, dist.ReduceOp.MAX) if self.count > 1 else number

    def all_reduce_sum(self, number: float) -> float:
        """Return the sum of the processes' numbers, in fp64."""
        return self._reduced(number, torch.float64, dist.ReduceOp.SUM) if self.count > 1 else number

    def _reduced(self, number: Any, dtype: torch.dtype, how: Any) -> Any:
        tensor = torch.tensor([number], dtype=dtype)
        dist.all_reduce(tensor, how)
        return tensor.item()

    def shard(self, total: int) -> list[int]:
        """Return the indices of this process's share of `total` rows: consecutive, and equally many per process.

        The last row is repeated if there are too few; `Rollout.gather` drops the repetitions.
        """
        each = -(-total // self.count)
        return [min(row, total - 1) for row in range(self.rank * each, (self.rank + 1) * each)]

    def local_main_first(self, work: Callable[[], T]) -> T:
        """Run `work`, which may leave files for other processes, first in the first process on each host."""
        results = [work()] if self.local_rank == 0 else []
        self.barrier()
        return results[0] if results else work()

    @torch.no_grad()
    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum each gradient over the processes."""
        if self.count == 1:
            return
        pending: list[Any] = []
        for parameter in (one for one in parameters if one.requires_grad):
            # A process without rows has no gradient, but the others wait for it.
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.contiguous()
            parameter.grad = gradient
            pending.append(dist.all_reduce(gradient, async_op=True))
        for work in pending:
            work.wait()

    @torch.no_grad()
    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Copy the main process's values to all processes."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor.data, src=0)

    def check_divides(self, number: int, key: str) -> None:
        """Refuse a number of rows that cannot be sharded evenly.

        Raises:
            UserError: the number is not divisible; the remedy suggests numbers that are.
        """
        if number % self.count:
            below, above = number // self.count * self.count, -(-number // self.count) * self.count
            fitting = " or ".join(str(one) for one in (below, above) if one)
            raise UserError(
                f"{number} cannot be divided among {self.count} processes",
                where=key,
                remedy=f"Set it to {fitting}, or launch a number of processes that divides {number}.",
            )


ALONE = Processes()
