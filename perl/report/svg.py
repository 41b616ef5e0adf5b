"""Plots as inline SVG that follows the page's colours.

matplotlib draws with placeholder colours, which become CSS variables; so one drawing serves light and dark.
Text stays text, and the same metrics give the same bytes.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
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
"""The placeholder colours, and what the page calls them."""

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name with $ in it is a name
    "font.family": "DejaVu Sans",  # comes with matplotlib: the layout is the same everywhere
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
    """A drawing and the words under it."""

    svg: Markup
    caption: str


@contextmanager
def drawing(width: float = 4.0, height: float = 2.75) -> Iterator[Figure]:
    """A figure to draw on, of so many inches, in the page's style."""
    with matplotlib.rc_context(SETTINGS):
        yield Figure(figsize=(width, height), dpi=100, layout="constrained")


def titled(axes: Axes, title: str, x: str, y: str) -> Axes:
    """Title and axis labels."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    return axes


def to_svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an <svg> element.

    Args:
        figure: drawn inside `drawing`.
        name: unique on the page.
        title: what the plot shows, for those who hear the page.
    """
    written = io.StringIO()
    with matplotlib.rc_context(SETTINGS | {"svg.hashsalt": name}):
        figure.savefig(
            written, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    root = ElementTree.fromstring(written.getvalue())
    _tidy(root)
    _drop_unused_ids(root)
    for element in root.iter():
        _follow_theme(element)
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"class": "plot", "viewBox": view, "role": "img", "aria-label": title})
    spoken = ElementTree.Element("title")
    spoken.text = title
    spoken.tail = "\n"
    root.insert(0, spoken)
    # The text is escaped by ElementTree.
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _tidy(root: ElementTree.Element) -> None:
    """HTML needs no namespaces; metadata, and styles for the whole page, do not belong in it."""
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
        for key in [key for key in parent.attrib if key.startswith("{")]:
            parent.attrib[key.rpartition("}")[2]] = parent.attrib.pop(key)


def _drop_unused_ids(root: ElementTree.Element) -> None:
    """Those that are used are hashes salted with the plot's name, so that no two plots share one."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', text))
    for element in root.iter():
        if element.attrib.get("id") not in used:
            element.attrib.pop("id", None)


def _follow_theme(element: ElementTree.Element) -> None:
    """Placeholder colours become variables, which only style (not attributes) takes; fonts are the page's."""
    style = element.attrib.pop("style", "")
    for key in ("fill", "stroke"):
        if key in element.attrib:
            style += f"; {key}: {element.attrib.pop(key)}"
    style = re.sub(r"#[0-9a-f]{6}", lambda found: _variable(found[0]), style)
    style = re.sub(r"font: ([^;]*?)([\d.]+px) [^;]*", r"font: \1\2 var(--font)", style)
    if style:
        element.attrib["style"] = style.strip("; ")


def _variable(colour: str) -> str:
    return f"var({VARIABLES[colour]})" if colour in VARIABLES else colour
