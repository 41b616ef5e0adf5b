"""Sends metrics to TensorBoard, Weights & Biases and trackio with accelerate's trackers.

All of them work without a network. TensorBoard's files are in the run folder. wandb writes there too, for `wandb
sync`, if it has no API key on this machine or WANDB_MODE=offline is set. trackio has its own folder.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from perl.errors import UserError

Send = Callable[[int, Mapping[str, float]], None]
"""Called with a step and its metrics."""


def require(names: Sequence[str]) -> None:
    """Refuse trackers whose package is not installed.

    Raises:
        UserError: names the command that installs it.
    """
    for name in names:
        if find_spec(name) is None:
            remedy = f"Run `pip install {name}`, or remove it from report_to."
            raise UserError(f"{name} is not installed", where="report_to", remedy=remedy)


@contextlib.contextmanager
def sending(
    names: Sequence[str], run: str, stage: str, folder: Path, settings: Mapping[str, object], done: int
) -> Iterator[Send]:
    """Yield a function that sends metrics to these trackers as `STAGE/METRIC`.

    Args:
        run: the name of the run, used as the project in wandb and trackio.
        folder: the run folder.
        settings: the recipe's keys.
        done: number of steps that an earlier process has sent.
    """
    trackers: list[GeneralTracker] = []
    own: dict[str, dict[str, object]] = {
        "tensorboard": {"logging_dir": str(folder / "tensorboard"), "purge_step": done + 1},
        "wandb": {"name": stage, "dir": str(folder), "mode": _wandb_mode()},
        "trackio": {"name": stage},
    }
    if names:
        PartialState()  # accelerate's trackers need it to log their start
    with contextlib.ExitStack() as stack:
        for name in names:
            tracker = LOGGER_TYPE_TO_CLASS[name](stage if name == "tensorboard" else run, **own[name])
            tracker.start()
            stack.callback(tracker.finish)
            plain = {key: _plain(value) for key, value in settings.items()}
            if name == "tensorboard":  # its store_init_configuration would create two more folders
                tracker.log({"recipe": "\n".join(f"    {key}: {value}" for key, value in plain.items())}, step=0)
            else:
                tracker.store_init_configuration(plain)
            trackers.append(tracker)

        def send(step: int, metrics: Mapping[str, float]) -> None:
            for tracker in trackers:
                tracker.log({f"{stage}/{name}": value for name, value in metrics.items()}, step=step)

        yield send


def _plain(value: object) -> object:
    return value if isinstance(value, bool | str | int | float | None) else str(value)


def _wandb_mode() -> str:
    """Return offline if nobody is logged in, because wandb would stop to ask."""
    known = "WANDB_API_KEY" in os.environ
    with contextlib.suppress(OSError):
        known = known or "wandb" in Path("~/.netrc").expanduser().read_text(encoding="utf-8")
    return os.environ.get("WANDB_MODE") or ("online" if known else "offline")
