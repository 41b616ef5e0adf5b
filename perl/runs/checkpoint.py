"""Checkpoints on disk: one folder per step, either complete or absent; only the newest few are kept.

checkpoints/step-00000040/
    state.safetensors    all tensors
    state.json           everything else, what the state belongs to, and the SHA-256 of state.safetensors

Reading them cannot run code: there are no pickles.
"""

import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from perl.errors import UserError
from perl.parallel.processes import ALONE, Processes
from perl.system.files import file_sha256, whole_folder, write_json, write_tensors

KEPT = 2
"""Number of newest checkpoints to keep, besides those that `write` is told to keep."""
TENSORS, VALUES = "state.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """The complete state of a stage after a step."""

    step: int
    tensors: dict[str, Tensor]
    """Weights, optimizer state and generators, on any device."""
    values: dict[str, Any]
    """Everything else, as JSON."""


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: created when the first checkpoint is written. Incomplete checkpoints in it are removed.
        every: steps between checkpoints.
        belongs: hashes of what the state depends on, by name: the base, the recipe, roles.
        processes: the main process writes; all must be able to read the folder.
        written: called by the main process after each checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        every: int,
        belongs: Mapping[str, str] | None = None,
        processes: Processes = ALONE,
        written: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self._every, self._belongs = folder, every, dict(belongs or {})
        self._processes, self._written = processes, written
        for unfinished in folder.glob(".step-*.unfinished") if processes.main else ():
            shutil.rmtree(unfinished, ignore_errors=True)

    def due(self, step: int) -> bool:
        """Return whether the state after this step is to be written."""
        return step % self._every == 0

    def steps(self) -> list[int]:
        """Return the steps on disk, oldest first."""
        numbers = (folder.name.removeprefix("step-") for folder in self.folder.glob("step-*"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def write(self, state: State, keep: Collection[int] = ()) -> None:
        """Write a state, and only then remove the oldest ones.

        Args:
            keep: steps that are kept whatever their age.

        Raises:
            OSError: the disk is full; earlier checkpoints are unchanged.
        """
        if self._processes.main:
            with whole_folder(self._of(state.step)) as unfinished:
                write_tensors(unfinished / TENSORS, state.tensors)
                content = {"step": state.step, "belongs": self._belongs, "values": state.values}
                write_json(unfinished / VALUES, content | {"sha256": file_sha256(unfinished / TENSORS)})
            for step in set(self.steps()[:-KEPT]) - set(keep):
                shutil.rmtree(self._of(step), ignore_errors=True)
            self._written()
        self._processes.barrier()

    def newest(self) -> State | None:
        """Return the state to resume from; None if there is none.

        Raises:
            UserError: it is damaged, or belongs to another run.
        """
        steps = self.steps()
        return self.read(steps[-1]) if steps else None

    def read(self, step: int) -> State:
        """Return the state after a step.

        Raises:
            UserError: its files are missing or damaged, or it belongs to another run.
        """
        folder = self._of(step)
        try:
            content = json.loads((folder / VALUES).read_text(encoding="utf-8"))
            if content["sha256"] != file_sha256(folder / TENSORS):
                raise ValueError(f"{TENSORS} is not the file that was written")
            state = State(content["step"], load_file(folder / TENSORS), content["values"])
            belongs: dict[str, str] = dict(content["belongs"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            earlier = [one for one in self.steps() if one < step]
            then = f"resumes from step {earlier[-1]}" if earlier else "starts this stage again"
            raise UserError(
                f"this checkpoint is damaged: {error}",
                where=str(folder),
                remedy=f"Remove that folder: the run then {then}.",
            ) from None
        if differs := sorted({name for name, _ in belongs.items() ^ self._belongs.items()}):
            raise UserError(
                f"this checkpoint belongs to another {', another '.join(differs)}",
                where=str(folder),
                remedy=f"Restore what it was made with, or remove {self.folder} to start this stage again.",
            )
        return state

    def _of(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"
