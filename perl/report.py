"""report.json: what was run, on what, and what it came to."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from perl import __version__
from perl.files import write_json
from perl.model.shared_base import SharedBase
from perl.progress import console
from perl.stages.session import Session

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def write_report(session: Session, after: str | None) -> Path:
    """Write report.json of all finished stages; say aloud if the base has changed.

    Args:
        after: SHA-256 of the base's weights as they are now; None where there is no shared base.

    Raises:
        RuntimeError: the base's bytes after the run are not those before it.
    """
    recipe, base = session.recipe, session.base
    stages = {stage: session.folder.result(stage) for stage in recipe.stages}
    report: dict[str, Any] = {
        "name": recipe.name,
        "seed": recipe.seed,
        "tuning": recipe.tuning,
        "versions": {
            "perl": __version__,
            "python": platform.python_version(),
            **{n: version(n) for n in LIBRARIES},
        },
        "hardware": hardware(session.device)
        | {"processes": session.processes.count, "engine": session.engine.name},
        "base": {
            "model": base.name,
            "parameters": base.parameters,
            "dtype": recipe.base.dtype,
            "sha256_before": base.sha256,
            "sha256_after": after,
            **_coverage(session),
        },
        "stages": {stage: result for stage, result in stages.items() if result is not None},
    }
    path = session.folder.path / "report.json"
    write_json(path, report)
    if after is None:  # full tuning: every role has weights of its own
        return path
    if after != base.sha256:
        raise RuntimeError(f"the base changed during the run (see {path}): this is a bug in PERL")
    console.print(f"The base is unchanged: its weights' SHA-256 is {after[:16]}… before and after.")
    return path


def _coverage(session: Session) -> dict[str, Any]:
    """How much of the base the adapters reach; nothing under full tuning."""
    if not isinstance(session.roles, SharedBase):
        return {}
    share, without = session.roles.coverage
    return {"coverage": share, "without_adapter": without}


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine, in words and counts."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"device": device.type, "name": name, "cores": os.cpu_count(), "memory_bytes": memory}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
