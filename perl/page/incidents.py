"""What went wrong on the way, in sentences: alarms of RL's guards, updates refused, and the checks before RL."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from perl.page.numbers import joined
from perl.page.outcome import STAGE
from perl.page.runs import Run
from perl.page.schema import Incident

SHOWN_STEPS = 5


@dataclass(frozen=True)
class Happening:
    """A headline, what happened, and whether it ended the run."""

    headline: str
    lines: list[str]
    stopped: bool


def happenings(runs: Sequence[Run]) -> list[Happening]:
    """All that went wrong in these runs; what ended one of them first."""
    found = [
        happening for run in runs for happening in _of_run(run, f" (seed {run.report.seed})" if runs[1:] else "")
    ]
    return sorted(found, key=lambda happening: not happening.stopped)


def preflight_rows(run: Run) -> list[tuple[str, str, str]]:
    """The checks before the first update and after it: what, the figure, and what it may be at most."""
    stage = run.report.stages.rl
    found = [("", finding) for finding in stage.preflight] if stage is not None else []
    found += [("after the first update: ", finding) for finding in stage.liveness] if stage is not None else []
    return [(when + finding.words, f"{finding.figure:.2g}", f"{finding.limit:.2g}") for when, finding in found]


def _of_run(run: Run, which: str) -> Iterator[Happening]:
    for role, stage in (("sft", "sft"), ("reward", "reward")):
        refused = run.metrics[role].get("refused")
        if refused is not None:
            steps = (np.flatnonzero(refused == 1) + 1).tolist()
            named = joined([str(step) for step in steps[:SHOWN_STEPS]])
            more = f" and {len(steps) - SHOWN_STEPS} more" if steps[SHOWN_STEPS:] else ""
            yield Happening(
                f"{STAGE[stage]}: {len(steps)} of {len(refused)} updates were refused{which}.",
                [f"At steps {named}{more} the loss or its gradient was not finite; these updates were not made."],
                False,
            )
    for incident in run.report.stages.rl.incidents if run.report.stages.rl is not None else []:
        yield _of_guard(incident, which)


def _of_guard(incident: Incident, which: str) -> Happening:
    stopped = incident.action == "stopped"
    headline = (
        f"RL was stopped at step {incident.step}{which}." if stopped else f"RL, step {incident.step}{which}."
    )
    shown = f" It began to show at step {incident.since}." if incident.since < incident.step else ""
    lines = [f"{incident.what[0].upper()}{incident.what[1:]}.{shown}", incident.causes, incident.remedy]
    if stopped and incident.remains:
        lines.append(
            f"What remains, and is judged on this page, is the policy after {incident.remains} updates, from the "
            "last checkpoint before that."
        )
    elif stopped:
        lines.append("No checkpoint is older than that: what remains is the policy that RL began with.")
    return Happening(headline, lines, stopped)
