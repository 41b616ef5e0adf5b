"""Writes report.json of a finished run, and progress.json and the page of a run in progress."""

import contextlib
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from perl import __version__
from perl.errors import UserError
from perl.recipe import StageName
from perl.results import Hardware, Report, ReportBase
from perl.roles.shared_base import SharedBase
from perl.stages.session import Session
from perl.system.device import hardware_name
from perl.system.files import write_json
from perl.system.progress import console
from perl.system.typed_json import as_json

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
PAGE_EVERY = 60.0
"""Minimum seconds between two pages."""
PAGE_SHARE = 0.01
"""Maximum share of the time spent on writing pages."""
PROGRESS = "progress.json"


def write_report(session: Session, after: str | None) -> None:
    """Write report.json with all finished stages.

    Args:
        after: current SHA-256 of the base's weights; None without a shared base.

    Raises:
        RuntimeError: the run changed the base's bytes.
    """
    path = session.folder.path / "report.json"
    write_json(path, as_json(_report(session, after, None)))
    path.with_name(PROGRESS).unlink(missing_ok=True)
    if after not in (None, session.base.sha256):
        raise RuntimeError(f"the base changed during the run (see {path}): this is a bug in PERL")
    if after is not None:
        console.print(f"The base is unchanged: the SHA-256 of its weights is {after[:16]}… before and after.")


class LivePage:
    """Called after each checkpoint of a stage; writes the page of the run so far when it is due."""

    def __init__(self, session: Session, stage: StageName) -> None:
        self._session, self._stage = session, stage
        self._begun, self._next = False, time.monotonic() + PAGE_EVERY

    def __call__(self) -> None:
        """Write the page if it is due; an error in writing it does not end training."""
        began, folder = time.monotonic(), self._session.folder.path
        if not self._begun:  # not before the first checkpoint: a stage that fails to resume changes no file
            write_json(folder / PROGRESS, as_json(_report(self._session, None, self._stage)))
            self._begun = True
        if began < self._next:
            return
        from perl.report.page import write_page  # matplotlib takes a second to import

        try:
            write_page([folder], folder / "report.html")
        except (UserError, OSError) as error:
            console.print(f"The page of the run so far is not written: {error}", style="yellow", markup=False)
        now = time.monotonic()
        self._next = now + max(PAGE_EVERY, (now - began) / PAGE_SHARE)


def _report(session: Session, after: str | None, unfinished: StageName | None) -> Report:
    recipe, base = session.recipe, session.base
    adapters = session.roles.coverage if isinstance(session.roles, SharedBase) else None
    return Report(
        name=recipe.name,
        seed=recipe.seed,
        tuning=recipe.tuning,
        versions={"perl": __version__, "python": platform.python_version(), **_installed()},
        hardware=_hardware(session.device, session.processes.count, session.engine.name),
        base=ReportBase(
            model=base.name,
            parameters=base.parameters,
            dtype=recipe.base.dtype,
            sha256_before=base.sha256,
            sha256_after=after,
            coverage=adapters.share if adapters else None,
            without_adapter=adapters.without if adapters else None,
        ),
        stages=session.folder.results(),
        unfinished=unfinished,
    )


def _hardware(device: torch.device, processes: int, engine: str) -> Hardware:
    return Hardware(
        device=device.type,
        name=hardware_name(device),
        cores=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        processes=processes,
        engine=engine,
    )


def _installed() -> dict[str, str]:
    """Return the versions of the installed libraries; TRL and datasets may be missing if nothing needs them."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
