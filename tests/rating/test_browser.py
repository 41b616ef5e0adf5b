"""The page in a browser: keyboard, hostile texts, closing in the middle, on a screen and on a phone."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perl.data.jsonl import read_jsonl
from perl.data.records import Turn
from perl.rating.app import RatingApp
from perl.rating.log import RatingLog
from perl.server.guard import Guard
from tests.browser import browser, screen
from tests.conftest import DRINKS, RunCli, WriteRecipe
from tests.rating.asking import TOKEN, Made, one, two
from tests.server.running import serving

__all__ = ["browser"]

HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\">",
    "</p><script>document.title='owned'</script>",
    "{{7*7}} ${7*7} \u202egnp.exe\u2028<b>bold</b>",
)


class Page:
    """The page as its user has it: key presses and visible text."""

    def __init__(self, browser: Any, address: str) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser, self._wait = browser, WebDriverWait(browser, 20, poll_frequency=0.02)
        browser.get(f"{address}/?token={TOKEN}")
        self.settle()

    def settle(self) -> None:
        """Wait until pending requests are done."""
        self._wait.until(lambda _: self.of("card").get_attribute("aria-busy") == "false")

    def of(self, name: str) -> Any:
        return self.browser.find_element("id", name)

    def press(self, *keys: str) -> str:
        """Press keys and return the page's text after that."""
        from selenium.webdriver.common.action_chains import ActionChains

        self.settle()
        ActionChains(self.browser, duration=0).send_keys(*keys).perform()
        self.settle()
        return str(self.of("status").text)

    def correct(self, text: str) -> str:
        from selenium.webdriver.common.keys import Keys

        self.press("c")
        self.of("text").clear()
        self.of("text").send_keys(text, Keys.CONTROL + Keys.ENTER)
        self.settle()
        return str(self.of("status").text)

    def completions(self) -> list[str]:
        return [found.text for found in self.browser.find_elements("css selector", ".answer .text")]


@pytest.fixture
def keys() -> Any:
    """Return Selenium's key names; a test that requests the browser first is skipped where there is none."""
    from selenium.webdriver.common.keys import Keys

    return Keys


def app(file: Path, *questions: Any) -> Guard:
    return Guard(RatingApp(Made(*questions), RatingLog(file), [], "runs/tiny").routes(), token=TOKEN)


def test_one_rates_by_keyboard_is_closed_and_goes_on(browser: Any, keys: Any, tmp_path: Path) -> None:
    file = tmp_path / "ratings.jsonl"
    with serving(app(file, *map(one, (*HOSTILE, "fourth", "fifth", "sixth")))) as address:
        page = Page(browser, address)
        assert browser.current_url == f"{address}/", "the token does not stay in the address bar"
        for text in HOSTILE:
            assert browser.execute_script("return document.querySelector('.answer .text').textContent") == text
            assert page.press(keys.ARROW_UP) == "Saved"
        assert browser.find_elements("css selector", "#card :is(img, script, b:not(.turns b))") == []
        assert browser.title == "Rate completions"
        assert page.press(keys.ARROW_DOWN) == "Saved"
        assert page.press("u").startswith("Undone")
        assert page.completions() == ["fourth"]
        assert page.correct("One latte.") == "Saved"
        browser.get("about:blank")  # closed in the middle
        page = Page(browser, address)
        assert page.completions() == ["fifth"]
        for width in (1280, 390):
            for scheme in ("light", "dark"):
                screen(browser, width, scheme)
                needed = browser.execute_script("return document.documentElement.scrollWidth")
                assert needed <= width
        assert browser.get_log("browser") == [], "nothing is fetched from elsewhere, nothing refused"
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
        assert all(name.startswith(f"{address}/") for name in loaded)
    # The server is gone: ratings that cannot be saved are not reported as saved, and stay on the page.
    assert page.press(keys.ARROW_UP).startswith("Not saved: the server does not answer")
    assert page.completions() == ["fifth"]
    records = read_jsonl(file)
    assert [rating.answer.text for rating in records.ratings] == list(HOSTILE)
    assert [len(rows) for rows in (records.demonstrations, records.comparisons, records.problems)] == [1, 1, 0]


def test_pairs_and_typed_conversations(browser: Any, keys: Any, tmp_path: Path) -> None:
    file = tmp_path / "ratings.jsonl"
    with serving(app(file, one(), one("b"), two("x", "y"), two("z", "w"))) as address:
        page = Page(browser, address)
        browser.find_element("css selector", "input[value='2']").click()
        page.settle()
        assert page.completions() == ["x", "y"]
        assert page.press(keys.ARROW_RIGHT) == "Saved"
        page.press("t")
        page.of("text").send_keys("<i>Hi</i>", keys.CONTROL + keys.ENTER)
        page.settle()
        assert page.completions() == ["Hello!"]
        assert page.press(keys.ARROW_DOWN) == "Saved"
        turns = [found.text for found in browser.find_elements("css selector", ".turns p")]
        assert turns == ["User\n<i>Hi</i>", "Assistant\nHello!"], "the conversation goes on"
    (pair,), (rating,) = read_jsonl(file).comparisons, read_jsonl(file).ratings
    assert (pair.better.text, rating.context[0].text, rating.label) == ("y", "<i>Hi</i>", False)


@pytest.mark.slow
def test_fifty_ratings_by_keyboard_train_a_reward_model(
    browser: Any, keys: Any, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    file = tmp_path / "ratings.jsonl"
    asked = [
        replace(one(text), context=(Turn("user", f"A {drink} and {n} more."),), dialogue=f"d{n}")
        for n, (drink, text) in enumerate(itertools.islice(itertools.product(DRINKS, ("Yes?", "No.") * 3), 55))
    ]
    with serving(app(file, *asked)) as address:
        page = Page(browser, address)
        for number in range(25):
            assert page.press(keys.ARROW_UP if number % 2 else keys.ARROW_DOWN) == "Saved"
        browser.get("about:blank")
        page = Page(browser, address)
        for number in range(25, 50):
            assert page.press(keys.ARROW_UP if number % 2 else keys.ARROW_DOWN) == "Saved"
        page.press("u")
        page.press(keys.ARROW_DOWN)
        for text in ("Small?", "Medium?", "Large?"):
            assert page.correct(text) == "Saved"
    status, written = run_cli("data", "check", file)
    assert status == 0, written
    assert "24 thumbs up, 26 down" in written
    data = {"source": "jsonl", "path": str(file), "held_out": 0.3}
    status, written = run_cli("run", write_recipe(rl=None, data=data), "--out", tmp_path / "out")
    assert status == 0, written
