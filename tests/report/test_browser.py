"""The page in a browser: all drawn, nothing fetched, nothing wider than the screen, in light and dark."""

from pathlib import Path
from typing import Any

import pytest

from perl.report.page import write_page
from perl.report.runs import read_runs
from perl.report.sweep import Cell, Sweep, write_sweep
from perl.sweep.setting import Setting
from tests.browser import browser, screen
from tests.report.made import make_run

__all__ = ["browser"]

OUTCOMES = """return ['all', 'better', 'worse'].map(outcome => {
    const choice = document.getElementById('show-' + outcome);
    if (!choice) return -1;
    choice.click();
    return [...document.querySelectorAll('#samples > .sample')].filter(one => one.offsetHeight > 0).length;
})"""
PLOTS = """return [...document.querySelectorAll('svg.plot')].map(svg => {
    const box = svg.getBoundingClientRect();
    return [box.width, box.height, svg.querySelectorAll('path').length, svg.querySelectorAll('text').length];
})"""
LINE = "return getComputedStyle(document.querySelector('svg.plot path[style*=\"--series-1\"]')).stroke"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a full page, a minimal one, and that of a sweep."""
    folder = tmp_path_factory.mktemp("pages")
    runs = [make_run(folder / f"{tuning}{seed}", seed, tuning) for tuning in ("lora", "full") for seed in (0, 1)]
    lora, full = (tuple(read_runs(some)) for some in (runs[:2], runs[2:]))
    of_lora, of_full = (dict(enumerate(some)) for some in (lora, full))
    settings = [Setting("lora", place, rank) for place in ("attention", "mlp") for rank in (1, 4, 16)]
    cells = (*(Cell(one, of_lora) for one in settings), Cell(Setting("full"), of_full))
    return {
        "rich": write_page(runs, folder / "rich.html"),
        "plain": write_page([make_run(folder / "plain", rich=False)], folder / "plain.html"),
        "sweep": write_sweep(Sweep("coffee", "rl", (0, 1), (), cells), folder / "sweep.html"),
    }


@pytest.mark.parametrize("page", ["rich", "plain", "sweep"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser: Any, pages: dict[str, Path], page: str, width: int, scheme: str) -> None:
    """The page is shown as on a laptop and on a phone."""
    screen(browser, width, scheme)
    browser.get(pages[page].as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    script = "return [document.documentElement.scrollWidth, innerWidth]"
    needed, there = browser.execute_script(script)
    assert needed <= there <= width
    plots = browser.execute_script(PLOTS)
    assert len(plots) >= {"rich": 14, "plain": 4, "sweep": 1}[page]
    for wide, high, paths, texts in plots:
        assert wide > 200
        assert high > 60
        assert paths > 3
        assert texts > 1
    dark = "rgb(92, 179, 240)"  # --series-1 in the dark
    assert (browser.execute_script(LINE) == dark) == (scheme == "dark")
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(17, 20, 24)") == (scheme == "dark")
    assert browser.execute_script("return document.querySelectorAll('button.copy').length") > 0
    assert browser.execute_script(OUTCOMES) == ([3, 3, 0] if page == "rich" else [-1, -1, -1])
