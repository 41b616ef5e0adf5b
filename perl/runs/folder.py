"""The run folder, in which every stage reads what the earlier stages wrote.

recipe.yaml                              the recipe as resolved
sft/ reward/ policy/ critic/
    identity.json                        what the stage depends on, see perl.stages.identity; not in critic/
    adapter/ (or model/: full tuning)    see perl.roles.saved
    checkpoints/                         the stage's complete state between two steps, the newest few
    metrics.jsonl                        one line per step
    member-2/ ...                        reward/ only: further members of an ensemble, each with the three above
    samples.jsonl                        policy/ only: completions of base, SFT and policy side by side
    samples-by-step.jsonl                policy/ only: the policy's during training, every rl.sample_every steps
    waited.json                          seconds that the user has waited for the stage until its last checkpoint
    result.json                          the stage's result; exists once the stage is finished
report.json  report.html  tensorboard/
progress.json                            instead of report.json until the run is finished
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from perl.errors import UserError
from perl.parallel.processes import ALONE, Processes
from perl.recipe import Recipe, StageName, changes_nothing, load_recipe
from perl.results import RESULTS, Sample, StageResult, Stages
from perl.roles.role import Role
from perl.runs.trackers import Send
from perl.system.files import write_json, write_whole
from perl.system.plain_yaml import flat_keys
from perl.system.typed_json import as_json, made, read

STAGE_ROLE: dict[StageName, Role] = {"sft": Role.SFT, "reward": Role.REWARD, "rl": Role.POLICY}
"""The role that each stage trains; the stage's folder has the role's name."""
RERUN = "Remove it to run the stage again."


class RunFolder:
    """The folder of one run.

    Args:
        path: a folder that all processes can read.
        processes: the main process writes.
    """

    def __init__(self, path: Path, processes: Processes = ALONE) -> None:
        self.path, self._processes = path, processes

    @contextlib.contextmanager
    def claim(self, recipe: Recipe) -> Iterator[None]:
        """Claim the folder for this recipe's run inside the context; no other run can claim it meanwhile.

        Raises:
            UserError: it cannot be written, has another recipe's run, or is in use by another run; or a process
                on another host does not see it.
        """
        with self._locked(recipe) if self._processes.main else contextlib.nullcontext():
            self._processes.barrier()
            if not (self.path / "recipe.yaml").exists():
                raise UserError(
                    f"process {self._processes.rank} does not see what the main process has written there",
                    where=str(self.path.absolute()),
                    remedy="Use an --out that all hosts share.",
                )
            yield

    @contextlib.contextmanager
    def _locked(self, recipe: Recipe) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context(open(self.path / ".lock", "a"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.check(recipe)  # again, now that no other run can write it
                write_whole(self.path / "recipe.yaml", recipe.to_yaml())
            except BlockingIOError:
                raise UserError(
                    "another run is using this folder",
                    where=str(self.path),
                    remedy="Wait for it, or use another --out.",
                ) from None
            except OSError as error:
                raise self._unwritable(error.strerror) from None
            yield

    def check_writable(self) -> None:
        """Refuse a folder in which `claim` would fail for want of a permission, before anything is loaded.

        Raises:
            UserError: the folder, or the nearest above it that exists, cannot be written.
        """
        if not self._processes.main:
            return
        path = self.path.absolute()
        try:
            nearest = next(one for one in (path, *path.parents) if one.exists())
        except OSError as error:
            raise self._unwritable(error.strerror) from None
        if not nearest.is_dir():
            raise self._unwritable(os.strerror(errno.ENOTDIR))
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise self._unwritable(os.strerror(errno.EACCES))

    def _unwritable(self, why: str | None) -> UserError:
        return UserError(f"cannot be written: {why}", where=str(self.path), remedy="Use another --out.")

    def check(self, recipe: Recipe) -> None:
        """Refuse a folder with another recipe's run; a section whose stage has not been started may change.

        So may a path, if what it named is now elsewhere: the stages' identities say whether it is the same.

        Raises:
            UserError: names the first key that differs.
        """
        if not (self.path / "recipe.yaml").exists():
            return
        new, old = flat_keys(recipe.model_dump()), flat_keys(self.recipe().model_dump())
        for key in sorted({*new, *old}):
            section = key.partition(".")[0]
            stages = [section] if section in STAGE_ROLE else STAGE_ROLE
            begun = any(self.begun(stage) for stage in stages)
            if not begun or changes_nothing(key) or _has_moved(old.get(key), new.get(key)):
                continue
            if new.get(key) != old.get(key):
                raise UserError(
                    f"contains another run: there {key} is {old.get(key)!r}, here {new.get(key)!r}",
                    where=str(self.path),
                    remedy=f"Use another --out; there, `perl-rlhf run` with --from {self.path} reuses the "
                    "stages that still fit.",
                )

    def begun(self, stage: StageName) -> bool:
        """Return whether a stage is finished or has a checkpoint."""
        return (self.role(STAGE_ROLE[stage]) / "result.json").exists() or self.has_checkpoint(stage)

    def has_checkpoint(self, stage: StageName) -> bool:
        return any((self.role(STAGE_ROLE[stage]) / "checkpoints").glob("step-*"))

    def recipe(self) -> Recipe:
        """Load the recipe of a run that was started.

        Raises:
            UserError: this is not a run folder.
        """
        file = self.path / "recipe.yaml"
        if not file.exists():
            remedy = "Name the --out of a `perl-rlhf run`."
            raise UserError("not a run folder", where=str(self.path), remedy=remedy)
        return load_recipe(file, resolved=True)

    def role(self, role: Role) -> Path:
        return self.path / role.folder

    def metrics(self, role: Role, done: int = 0, send: Send | None = None) -> "MetricsLog":
        """Open the metrics log of a role's training; lines after step `done` are removed.

        Args:
            send: also called with each step's metrics.
        """
        file = self.role(role) / "metrics.jsonl" if self._processes.main else None
        return MetricsLog(file, done, send)

    def write_samples(self, samples: Sequence[Sample]) -> None:
        """Write completions for people to read, one line per prompt."""
        if self._processes.main:
            lines = (json.dumps(as_json(sample), ensure_ascii=False) + "\n" for sample in samples)
            write_whole(self.role(Role.POLICY) / "samples.jsonl", "".join(lines))

    def add_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Add completions of the policy after a step, and remove those of later steps, left by an interruption."""
        if self._processes.main:
            file = self.role(Role.POLICY) / "samples-by-step.jsonl"
            # not splitlines, which also ends lines at separators that JSON leaves in texts, such as U+2028
            found = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
            kept = [line for line in found if line and json.loads(line)["step"] < step]
            added = [json.dumps(as_json(replace(one, step=step)), ensure_ascii=False) for one in samples]
            write_whole(file, "".join(f"{line}\n" for line in [*kept, *added]))

    def results(self) -> Stages:
        """Return the results of the finished stages; raises as `result`."""
        return made(Stages, {stage: self.result(stage) for stage in RESULTS})

    def result(self, stage: StageName) -> StageResult | None:
        """Return the result of a finished stage; None if it is not finished.

        Raises:
            UserError: its result.json cannot be read, or is not a result of this stage; names the field.
        """
        return read(RESULTS[stage], self.role(STAGE_ROLE[stage]) / "result.json", RERUN)

    def waited(self, stage: StageName) -> float:
        """Return the seconds that the user has waited for a stage until its last checkpoint; 0 if not started."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            return float(json.loads((self.role(STAGE_ROLE[stage]) / "waited.json").read_text(encoding="utf-8")))
        return 0.0

    def set_waited(self, stage: StageName, seconds: float) -> None:
        write_json(self.role(STAGE_ROLE[stage]) / "waited.json", round(seconds, 2))

    def finish(self, stage: StageName, result: StageResult) -> None:
        """Write a stage's result, which marks the stage as finished."""
        if self._processes.main:
            write_json(self.role(STAGE_ROLE[stage]) / "result.json", as_json(result))
        self._processes.barrier()


def _has_moved(old: object, new: object) -> bool:
    """Return whether a file or folder is now elsewhere; identities compare its content."""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(a == b or _has_moved(a, b) for a, b in zip(old, new, strict=True))
    if not (isinstance(old, str) and isinstance(new, str) and os.path.isabs(old)):
        return False
    before, now = (Path(re.sub(r"\.py:\w+\Z", ".py", path)) for path in (old, new))  # of FILE.py:NAME, the file
    return Path(old).name == Path(new).name and not before.exists() and now.exists()


class MetricsLog:
    """A JSON Lines file with one line per step.

    Args:
        file: the file; None: write nothing.
        done: number of steps whose lines are kept; lines after the checkpoint are removed.
        send: also called with the finite metrics of each step.
    """

    def __init__(self, file: Path | None, done: int = 0, send: Send | None = None) -> None:
        self._send = send
        self._file: TextIO | None = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if done and file.exists() else []
            write_whole(file, "".join(lines[:done]))
            self._file = open(file, "a", encoding="utf-8")  # noqa: SIM115  closed with the log

    def write(self, step: int, metrics: dict[str, float], served: Mapping[str, str] | None = None) -> None:
        """Add a line and flush it, so that the run can be followed; values that are not finite become null.

        Args:
            served: identifies the weights on servers with which completions were sampled and scored.
        """
        if self._file is not None:
            line: dict[str, float | str | None] = {"step": step, **(served or {})}
            line |= {name: value if math.isfinite(value) else None for name, value in metrics.items()}
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._send is not None:
            self._send(step, {name: value for name, value in metrics.items() if math.isfinite(value)})

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
