"""What SFT and reward training share: transformers' Trainer with checkpoints of ours, on one or several processes.

The Trainer's own checkpoints are pickles, and its order of rows depends on what was drawn before. Here the state
is safetensors and JSON, and the order follows from the seed and the epoch alone.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback

from perl.parallel.processes import Processes
from perl.private.trainer import HookedTrainer, LengthGroupedSampler
from perl.runs import snapshot
from perl.runs.checkpoint import State
from perl.stages.step_callback import StepCallback
from perl.stages.training_run import TrainingRun
from perl.system.seeds import derived_seed

SHARE = "share"
"""In a batch: its share of the rows that all processes have; 0 where its row does not count."""


class ShardedCollator:
    """A collator that is given the rows of all processes and collates this one's share of them.

    So the Trainer of each process works as if alone, on the same batches in the same order as a process alone.

    Args:
        collate: for the rows of a share.
    """

    def __init__(self, collate: Callable[..., Any], processes: Processes) -> None:
        self._collate, self._processes = collate, processes

    def __call__(self, examples: list[Any]) -> Any:
        """A batch of every n-th row of n processes; a share of none has one row, which does not count."""
        share = examples[self._processes.rank :: self._processes.count]
        batch = self._collate(share or examples[:1])
        batch[SHARE] = torch.tensor(len(share) / len(examples))
        return batch


class SeededSampler(LengthGroupedSampler):
    """Rows of like length together; the order follows from the seed and the epoch, whatever was drawn before."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(derived_seed(self._seed, "order", self._epoch()))
        return iter(super().__iter__())


class ResumableTrainer(HookedTrainer):
    """A Trainer that goes on where an earlier process stopped, to the same bytes; and one of several processes.

    It sees one process only: `ShardedCollator` gives it its share of each batch, the loss is of that share over
    the whole batch's size, and gradients and losses are added up before it looks at them.

    Args:
        run: what it trains.
        arguments: of the Trainer it extends.
    """

    data_collator: Any

    def __init__(self, run: TrainingRun, **arguments: Any) -> None:
        self.run = run
        super().__init__(**arguments, callbacks=[StepCallback(run)])
        self.remove_callback(PrinterCallback)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As the Trainer's, for the batch of all processes."""
        loss: Tensor = super().training_step(*args, **kwargs)
        processes = self.run.processes
        processes.all_reduce_gradients(self.run.parameters)
        if processes.count == 1:
            return loss
        return torch.tensor(processes.all_reduce_sum(float(loss)), device=loss.device)

    def get_train_dataloader(self) -> Any:
        """The batches of all processes, of which this one collates its share."""
        whole = self.data_collator
        self.data_collator = ShardedCollator(whole, self.run.processes)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = whole

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """The Trainer's, in the engine's form; every process begins with the same weights."""
        self.run.session.begin_together(self.run.parameters)
        self.optimizer = self.run.session.engine.optimizer(super().create_optimizer(*args, **kwargs))
        return self.optimizer

    def resume(self) -> None:
        """Train from the newest checkpoint, or from the start.

        Raises:
            KeyboardInterrupt: a stop was requested; all is saved.
        """
        folder = None
        if self.run.resumed is not None:
            # The Trainer wants its own state in a folder; all else is read in `load_state`.
            folder = self.run.scratch / "resumed"
            folder.mkdir()
            state = json.dumps(self.run.resumed.values["trainer"])
            (folder / "trainer_state.json").write_text(state, encoding="utf-8")
        self.train(resume_from_checkpoint=str(folder) if folder is not None else None)
        if self.run.stop.requested:
            raise KeyboardInterrupt

    def train_sampler(self, lengths: Sequence[int]) -> SeededSampler:
        """The same order in all processes and after a restart."""
        seed, batch_size = self.run.session.recipe.seed, self.args.train_batch_size
        return SeededSampler(lengths, batch_size, seed, lambda: int(self.state.epoch or 0))

    def save_state(self) -> None:
        """Write a checkpoint of ours."""
        run, file = self.run, self.run.scratch / "trainer_state.json"
        self.state.log_history = []  # it is in metrics.jsonl
        self.state.save_to_json(str(file))
        tensors, values = snapshot.take(run.session.roles, [run.learner], snapshot.unwrapped(self.optimizer))
        values["trainer"] = json.loads(file.read_text(encoding="utf-8"))
        values["schedule"] = self.lr_scheduler.state_dict()
        values["meter"] = run.meter.times()
        run.checkpoints.write(State(self.state.global_step, tensors, values))

    def load_state(self) -> None:
        """Read it back."""
        if (state := self.run.resumed) is None:
            return
        run, optimizer = self.run, snapshot.unwrapped(self.optimizer)
        where = str(run.checkpoints.folder)
        snapshot.restore(run.session.roles, [run.learner], optimizer, (state.tensors, state.values), where)
        self.lr_scheduler.load_state_dict(state.values["schedule"])

    def load_generators(self) -> None:
        """Those of the checkpoint."""
        if (state := self.run.resumed) is not None:
            snapshot.set_generators((state.tensors, state.values), self.run.processes)
