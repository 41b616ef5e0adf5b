"""Checkpoints on disk: a folder a step, written whole or not there, and the newest few of them.

checkpoints/step-00000040/
    state.safetensors    all tensors
    state.json           everything else, what the state belongs to, and the SHA-256 of state.safetensors

Nothing in them can run code when it is read: no pickle.
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
"""The newest checkpoints that stay on disk, besides those that `write` is told to keep."""
TENSORS, VALUES = "state.safetensors", "state.json"


@dataclass(frozen=True)
class State:
    """All state of a stage after so many steps."""

    step: int
    tensors: dict[str, Tensor]
    """Weights, optimizer state and generators, on any device."""
    values: dict[str, Any]
    """All else, as JSON."""


class Checkpoints:
    """The checkpoints of one stage.

    Args:
        folder: made when the first is written. What an interrupted write left there is removed.
        every: steps from one to the next.
        belongs: hashes of what the state depends on, by name: the base, the recipe, roles.
        processes: the main one writes; all can read the folder.
        written: called by the main process when one has been written.
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
        """Whether the state after so many steps is to be written."""
        return step % self._every == 0

    def steps(self) -> list[int]:
        """The steps on disk, oldest first."""
        return sorted(int(folder.name.removeprefix("step-")) for folder in self.folder.glob("step-*"))

    def write(self, state: State, keep: Collection[int] = ()) -> None:
        """Write a state, and only then remove the oldest; `keep` are steps that stay whatever their age.

        Raises:
            OSError: no room; earlier checkpoints are as they were.
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
        """The state to go on from; None if there is none.

        Raises:
            UserError: it is damaged, or belongs elsewhere.
        """
        steps = self.steps()
        return self.read(steps[-1]) if steps else None

    def read(self, step: int) -> State:
        """The state after so many steps.

        Raises:
            UserError: its files are missing or damaged, or it belongs elsewhere.
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
                remedy=f"Put back what it was made with, or remove {self.folder} to start this stage again.",
            )
        return state

    def _of(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"
