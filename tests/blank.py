"""A stand-in for plots, because drawing them takes most of a page's time."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import IO
from unittest import mock

import numpy as np
from numpy.typing import NDArray


class Blank:
    """Replaces a figure and its axes, and ignores all that is drawn on it."""

    def __init__(self, **_: object) -> None: ...

    def __getattr__(self, name: str) -> "Blank":
        return self

    def __call__(self, *_: object, **__: object) -> "Blank":
        return self

    def __getitem__(self, place: object) -> "Blank":
        return self

    def __iter__(self) -> Iterator["Blank"]:
        return iter((self, self))

    def transform(self, points: Iterable[object]) -> NDArray[np.float64]:
        """Map all points of the axes to the figure's corner."""
        return np.zeros((len(list(points)), 2))

    def savefig(self, file: IO[str], **_: object) -> None:
        file.write('<svg viewBox="0 0 1 1"></svg>')


@contextlib.contextmanager
def drawn() -> Iterator[None]:
    """Draw real plots inside this context."""
    from matplotlib.figure import Figure

    with mock.patch("perl.report.svg.Figure", Figure):
        yield
