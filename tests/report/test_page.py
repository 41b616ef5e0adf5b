"""The page: complete with any part missing, nothing unescaped, nothing fetched, reproducible bytes."""

import base64
import hashlib
import json
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from perl.errors import UserError
from perl.report.page import write_page
from perl.report.runs import Group, read_run
from perl.report.words import summary
from tests.report.made import make_report, make_run, write

EVIL = "<script>alert(1)</script>\"'&$x_1$"
VOID = {"meta", "link", "br", "img", "input"}


class _Outline(HTMLParser):
    """Tags, ids and addresses, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note it."""
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_endtag(self, tag: str) -> None:
        """Check that it closes the last open tag."""
        assert self.open.pop() == tag


def _page(folder: Path, *runs: Path) -> str:
    return write_page(runs, folder / "report.html").read_text(encoding="utf-8")


def _both(folder: Path) -> list[Path]:
    return [make_run(folder / f"{tuning}-{seed}", seed, tuning) for tuning in ("lora", "full") for seed in (0, 1)]


def _check(text: str) -> _Outline:
    """Check that the page is well-formed, ids are unique, and every address is inside the page."""
    outline = _Outline(text)
    assert outline.open == []
    assert len(set(outline.ids)) == len(outline.ids)
    assert all(address.startswith("#") or address == "data:," for address in outline.addresses)
    targets = {address[1:] for address in outline.addresses if address.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert targets <= set(outline.ids)
    assert outline.tags.count("script") == 1, "the one that copies"
    spoken = re.findall(r'<svg[^>]*role="img"[^>]*aria-label="([^"]+)"[^>]*>\s*<title>([^<]+)</title>', text)
    assert len(spoken) == text.count("<svg")
    assert not re.findall(r"https?://", text)
    assert not re.search(r"url\((?!#)|@import|#0101[01][0-9]", text)
    return outline


def test_everything(tmp_path: Path) -> None:
    """Two tunings with two seeds each and every optional key give every section and plot."""
    text = _page(tmp_path, *_both(tmp_path))
    outline = _check(text)
    sections = {"summary", "policy", "reward", "sft", "cost", "tunings", "samples", "next", "repeat"}
    assert sections <= set(outline.ids)
    names = re.findall(r'class="plot"[^>]*aria-label="([^"]*)"', text)
    assert len(names) == text.count("<svg") == 14
    areas = re.findall(r'<rect class="hover" [^>]*><title>([^<]+)</title></rect>', text)
    for words in ("step 60: Reward ", "Reward · update: base weights ", "held out, after RL: ", " rated up, "):
        assert any(words in one for one in areas), words
    assert "The policy is better." in text
    assert "Where LoRA is behind" in text
    assert "over seeds (n = 2 and 2)" in text
    assert "predicted and measured" in text
    assert "perl-rlhf run recipe.yaml" in text
    assert "perl-rlhf compare" not in text


@pytest.mark.parametrize("kept", [["sft"], ["reward"], ["rl"], ["sft", "rl"], []])
def test_only_the_report(tmp_path: Path, kept: list[str]) -> None:
    """No metrics, no samples, no recipe, only some stages."""
    report = make_report(random.Random(0), 0, "lora", 8)
    report["stages"] = {name: stage for name, stage in report["stages"].items() if name in kept}
    text = _page(tmp_path, write(tmp_path / "a", report))
    _check(text)
    assert "perl-rlhf chat a" in text or "rl" not in kept
    assert "None" not in text
    assert "nan" not in re.sub(r"<[^>]*>", "", text)


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"kind": "length", "target": 40}, "The reward has kind length and target 40."),
        ({"kind": "run", "run": "runs/other"}, "The reward has kind run and run runs/other."),
        ({"kind": "model", "weight": 2.0}, "The reward has kind model and weight 2.0."),
        ({"function": "own.py:f"}, "The reward is what the function own.py:f returns."),
        ({}, "0 is an average answer, 1 is one standard deviation better."),
    ],
)
def test_the_meaning_of_the_reward_is_that_of_its_kind(reward: dict[str, Any], said: str, tmp_path: Path) -> None:
    """Only the reward stage's model returns a probability of a thumb up."""
    file = make_run(tmp_path / "a") / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["rl"]["reward"] = reward
    file.write_text(yaml.safe_dump(recipe))
    run = read_run(file.parent)
    text = " ".join(summary(Group("lora", (run,)), [run]))
    assert said in text
    assert ("thumb" in text) == (not reward)


@pytest.mark.parametrize(("loss", "thumbs"), [("thumbs", True), ("both", True), ("pairs", False)])
def test_scores_are_probabilities_unless_the_model_learned_from_comparisons_alone(
    loss: str, thumbs: bool, tmp_path: Path
) -> None:
    file = make_run(tmp_path / "a") / "recipe.yaml"
    recipe = yaml.safe_load(file.read_text())
    recipe["reward"]["loss"] = loss
    file.write_text(yaml.safe_dump(recipe))
    run = read_run(file.parent)
    assert ("probability of a thumb up" in " ".join(summary(Group("lora", (run,)), [run]))) == thumbs


def test_an_automatic_learning_rate_is_named(tmp_path: Path) -> None:
    """The recipe has only the word "auto"."""
    file = make_run(tmp_path / "a") / "recipe.yaml"
    assert "Learning rates" not in " ".join(summary(Group("lora", (run := read_run(file.parent),)), [run]))
    recipe = yaml.safe_load(file.read_text())
    recipe["rl"]["learning_rate"] = "auto"
    file.write_text(yaml.safe_dump(recipe))
    text = " ".join(summary(Group("lora", (run := read_run(file.parent),)), [run]))
    assert "Learning rates, chosen from the base's width and kind: 0.001 (RL)." in text


def test_full_tuning_alone(tmp_path: Path) -> None:
    """There is no shared base, and the page suggests LoRA for comparison."""
    text = _page(tmp_path, make_run(tmp_path / "a", tuning="full", rich=False))
    _check(text)
    assert "its own weights" in text


def test_few_steps(tmp_path: Path) -> None:
    """Curves too short to match, a single bin, and counts that do not fit their edges."""
    folders = [make_run(tmp_path / tuning, 0, tuning, steps=3) for tuning in ("lora", "full")]
    report = json.loads((folders[0] / "report.json").read_text())
    card = report["stages"]["reward"]["eval"]
    card["score_histogram"]["up"].pop()
    card["calibration"]["reliability_before"] = card["calibration"]["reliability_before"][:1]
    card["calibration"]["reliability_after"] = None
    write(folders[0], report)
    text = _page(tmp_path, *folders)
    _check(text)
    assert "There is no comparison at matched KL" in text
    assert "this may be chance" in text


def test_plots_of_tiny_rewards_are_read_aloud_with_their_digits(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0, "lora")
    file = run / "policy" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"reward": 1e-5 * row["reward"]}) + "\n" for row in rows))
    assert re.search(r'aria-label="Reward: from [0-9.]+e−6 to [0-9.]+e−6 ', _page(tmp_path, run))


def test_escaped(tmp_path: Path) -> None:
    """Content from models, data and machines is always text, never markup."""
    folder = make_run(tmp_path / "a")
    report = json.loads((folder / "report.json").read_text())
    report["name"] = report["hardware"]["name"] = report["base"]["model"] = EVIL
    report["versions"][EVIL] = EVIL
    report["stages"]["rl"]["eval"]["algorithm"] = EVIL
    report["stages"]["reward"]["eval"]["slices"][0] |= {"by": EVIL, "name": EVIL}
    report["stages"]["rl"]["preflight"][0]["words"] = EVIL
    write(folder, report)
    answers = {role: {"text": EVIL, "reward": 0.0} for role in ("base", "sft", "policy", EVIL)}
    sample = {"prompt": [{"role": EVIL, "content": EVIL}], "answers": answers}
    (folder / "policy" / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    (folder / "recipe.yaml").write_text(f"# {EVIL}\n")
    text = _page(tmp_path, folder)
    _check(text)
    assert text.lower().count("<script") == 1, "the one that copies"
    assert text.count("&lt;script&gt;") > 15


def test_same_bytes(tmp_path: Path) -> None:
    """The same runs give the same page, whatever the file contained before."""
    run = make_run(tmp_path / "a")
    first = _page(tmp_path, run)
    assert _page(tmp_path, run) == first


def test_policy_of_content(tmp_path: Path) -> None:
    """The page's policy forbids the browser to load anything."""
    text = _page(tmp_path, write(tmp_path / "a", make_report(random.Random(0), 0, "lora", 8)))
    script = text.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'\""
    assert allowed in text
    assert text.index("Content-Security-Policy") < text.index("<style>")


def test_cannot_be_written(tmp_path: Path) -> None:
    """The file is named."""
    run = write(tmp_path / "a", make_report(random.Random(0), 0, "lora", 8))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_page([run], tmp_path / "file" / "report.html")


def _luminance(colour: str) -> float:
    channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast(theme: int) -> None:
    """WCAG AA in both themes: 4.5 for text, 3 for lines and bars."""
    css = (Path(__file__).parents[2] / "perl" / "report" / "page.css").read_text()
    block = re.findall(r":root \{([^}]*)\}", css)[theme]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
    assert len(colours) >= 14
    for name, colour in colours.items():
        least = {"bg": 0.0, "card": 0.0, "grid": 0.0}.get(name, 3.0 if name.startswith("series") else 4.5)
        for ground in ("bg", "card"):
            low, high = sorted((_luminance(colour), _luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= least, (name, ground)
