"""Plots as inline SVG in the page's colours.

matplotlib draws with placeholder colours, which are replaced with CSS variables for light and dark mode. Text
stays text, and the same metrics give the same bytes.
"""

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FG, MUTED, GRID, BG = "#010101", "#010102", "#010103", "#010104"
SERIES = ("#010111", "#010112", "#010113", "#010114", "#010115", "#010116")
VARIABLES = {
    FG: "--fg",
    MUTED: "--muted",
    GRID: "--grid",
    BG: "--card",
    **{colour: f"--series-{number}" for number, colour in enumerate(SERIES, start=1)},
}
"""The placeholder colours and the page's CSS variables."""

LEAST_AREA = 5.0
"""Minimum width and height of a hover area in points, so that a pointer can hit it."""
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names may contain $
    "font.family": "DejaVu Sans",  # bundled with matplotlib, so the layout is the same everywhere
    "font.size": 10.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.linewidth": 0.8,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), FG),
    **dict.fromkeys(("xtick.color", "ytick.color", "legend.labelcolor"), FG),
    "axes.edgecolor": MUTED,
    "grid.color": GRID,
}


@dataclass(frozen=True)
class Plot:
    """A drawing and its caption; a tall one is placed next to two others."""

    svg: Markup
    caption: str
    tall: bool = False


@dataclass(frozen=True)
class Hover:
    """Hover text for a part of a plot.

    Attributes:
        x: from and to, in data coordinates of the axes, as is `y`; a point is enlarged for the pointer.
        y: from and to; None: the whole height of the axes.
    """

    axes: Axes
    x: tuple[float, float]
    y: tuple[float, float] | None
    words: str


@contextmanager
def drawing(width: float = 4.0, height: float = 2.75) -> Iterator[Figure]:
    """Yield a figure in the page's style; width and height in inches."""
    with matplotlib.rc_context(SETTINGS):
        yield Figure(figsize=(width, height), dpi=100, layout="constrained")


def titled(axes: Axes, title: str, x: str, y: str) -> Axes:
    """Set title and labels of the axes; return the axes."""
    axes.set(title=title, xlabel=x, ylabel=y)
    return axes


def to_svg(figure: Figure, name: str, title: str, hovers: Sequence[Hover] = ()) -> Markup:
    """Convert a figure drawn inside `drawing` to an <svg> element.

    Args:
        name: a name that is unique on the page.
        title: description of the plot for screen readers.
        hovers: hover texts; later ones are above earlier ones.
    """
    written = io.StringIO()
    # Referenced ids are hashes salted with the plot's name, so that plots do not share ids.
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(written, format="svg", metadata=metadata)
    head, _, body = written.getvalue().partition("<svg")[2].partition(">")
    view = re.findall(r'viewBox="[^"]*"', head)[0]
    # HTML needs no namespaces; metadata and styles that would apply to the whole page are removed.
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", body, flags=re.DOTALL).replace("xlink:href", "href")
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', body))
    body = re.sub(r'(<[^>]*?) id="([^"]+)"', lambda tag: tag[0] if tag[2] in used else tag[1], body)
    body = re.sub(r'style="[^"]*"', lambda style: _themed(style[0]), body)
    title, (width, height) = escape(title), map(float, view.strip('"').split()[-2:])
    body = body.replace("</svg>", f"{''.join(_area(figure, one, width, height) for one in hovers)}</svg>")
    # matplotlib has already escaped the text in the drawing.
    return Markup(f'<svg class="plot" {view} role="img" aria-label="{title}"><title>{title}</title>\n{body}')


def _area(figure: Figure, hover: Hover, width: float, height: float) -> str:
    """Return a rectangle with hover text, in a drawing of this size."""
    corners = list(zip(hover.x, hover.y or hover.axes.get_ylim(), strict=True))
    ends = figure.transFigure.inverted().transform(hover.axes.transData.transform(corners))
    left, wide = _extent(width * ends[:, 0])
    top, high = _extent(height * (1 - ends[:, 1]))
    place = f'x="{left:.1f}" y="{top:.1f}" width="{wide:.1f}" height="{high:.1f}"'
    return f'<rect class="hover" {place}><title>{escape(hover.words)}</title></rect>\n'


def _extent(ends: Iterable[float]) -> tuple[float, float]:
    """Return start and length of an interval, which is at least `LEAST_AREA` long."""
    low, high = sorted(ends)
    reach = max(LEAST_AREA, high - low)
    return (low + high - reach) / 2, reach


def _themed(style: str) -> str:
    """Replace placeholder colours with CSS variables, and fonts with the page's."""
    for colour, variable in VARIABLES.items():
        style = style.replace(colour, f"var({variable})")
    return re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", style)
