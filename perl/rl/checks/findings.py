"""Findings of the checks of RL: measured values with their limits, and the error that a failed check raises."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from perl.errors import UserError
from perl.results import Check
from perl.system.progress import console

CLOSE_LOG_PROBS = {torch.float32: 1e-3, torch.bfloat16: 0.04, torch.float16: 0.01}
"""Allowed mean difference, nats per token, of mathematically equal log-probs, by the base's dtype; or twice the
rounding noise of a pass if that is more: on some deep models 0.06 is correct in bfloat16."""


class PreflightError(UserError):
    """The recipe is valid, but the parts that it combines do not fit together."""

    status = 1


@dataclass(frozen=True)
class Finding(Check):
    """One check, and the most likely cause if it failed."""

    looks_like: str = ""

    @property
    def passed(self) -> bool:
        return self.figure <= self.limit


def bugs(name: str, words: str, count: int, cause: str) -> Finding:
    """Return a check that counts what only a bug can cause."""
    return Finding(name, words, count, 0.0, f"{cause}. This is a bug.")


def named(names: Sequence[str]) -> str:
    """Return the first of the names and the number of the others."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else ""


def require(findings: Iterable[Finding], when: str, where: str, quiet: bool = False) -> list[Check]:
    """Evaluate checks, with one console line each, and return the findings.

    Args:
        findings: the checks; all are evaluated, one by one.
        when: time of the checks for the message, such as "before the first update".
        where: the run folder.
        quiet: print only those that failed.

    Raises:
        PreflightError: a check failed; the message names the first, its likely cause, and the others that failed.
    """
    found: list[Check] = []
    failed: list[Finding] = []
    for finding in findings:
        found.append(Check(finding.name, finding.words, finding.figure, finding.limit))
        failed += [] if finding.passed else [finding]
        if not (quiet and finding.passed):
            mark = "[green]✓[/]" if finding.passed else "[red]✗[/]"
            limit = f"at most {finding.limit:.2g}"
            console.print(f"{mark} Preflight: {finding.words}: {finding.figure:.2g} ({limit})")
    if failed:
        first, *others = failed
        also = f" Also failed: {', '.join(finding.name for finding in others)}." if others else ""
        raise PreflightError(
            f"preflight failed {when}: {first.words}: {first.figure:.3g}, limit {first.limit:.3g}.{also}",
            where=where,
            remedy=f"Likely cause: {first.looks_like}",
        )
    return found
