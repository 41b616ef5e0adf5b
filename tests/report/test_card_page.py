"""The reward model's card on the page: verdict, every metric, the other tuning, and no markup from the data."""

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perl.data.records import Turn
from perl.measure.rated_rows import RatedRows
from perl.measure.reward_model_card import RewardModelCard, reward_model_card
from perl.measure.tfidf_baseline import TfidfScores, tfidf_scores
from perl.report.numbers import GAP
from perl.report.page import write_page
from perl.report.runs import groups, read_runs
from perl.report.tunings import reward_line
from perl.report.words import fitness
from perl.stages.reward_card import card_lines
from perl.system.typed_json import as_json
from perl.system.typed_json import made as made_of
from tests.measure.rated import made
from tests.report.made import make_run, write

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def metrics() -> dict[str, Any]:
    """Return the card of a good model as in report.json."""
    data = made(dialogues=100)
    baseline = tfidf_scores(data.train, data.held_out)
    card = reward_model_card((2 * data.quality).tolist(), data.held_out, baseline)
    metrics: dict[str, Any] = json.loads(json.dumps(as_json(card)))
    return metrics


def run(folder: Path, metrics: dict[str, Any], seed: int = 0, tuning: str = "lora", only: bool = False) -> Path:
    """Return a finished run with this card and, if `only`, no stage but the reward stage."""
    made_run = make_run(folder, seed, tuning)
    report = json.loads((made_run / "report.json").read_text())
    report["stages"]["reward"]["eval"] = metrics
    if only:
        report["stages"] = {"reward": report["stages"]["reward"]}
    return write(made_run, report)


def page(folder: Path, *runs: Path) -> str:
    return write_page(runs, folder / "report.html").read_text(encoding="utf-8").replace(GAP, " ")


def test_a_fit_model(tmp_path: Path, metrics: dict[str, Any]) -> None:
    text = page(tmp_path, run(tmp_path / "a", metrics, only=True))
    assert "The reward model is fit for RL." in text
    assert '<p class="lead">Fit for RL.</p>' in text
    for reason in metrics["verdict"]["reasons"]:
        assert f"<li>{reason}</li>" in text
    assert f'<td class="number">{metrics["tfidf_baseline"]["value"]:.2f}</td>' in text
    after = metrics["calibration"]["ece_after"]
    assert f'… with slope and intercept</th><td class="number">{after:.2f}</td>' in text
    assert "on dialogues that it was not fitted to" in text
    assert "of the model among similar lengths" in text
    for one in metrics["slices"]:
        assert f'<th scope="row">{one["by"]}</th><td data-head="Slice">{one["name"]}</td>' in text
    assert "Reliability diagram (scaled)" in text
    assert metrics["mistakes"]["downs_scored_high"][0]["answer"] in text


def test_a_model_that_is_not_fit(tmp_path: Path, metrics: dict[str, Any]) -> None:
    reason = "It only counts length (correlation +1.00, Spearman)."
    text = page(
        tmp_path, run(tmp_path / "a", metrics | {"verdict": {"fit": False, "reasons": [reason]}}, only=True)
    )
    assert "The reward model is not fit for RL." in text
    assert 'class="verdict bad"' in text
    assert text.count(reason) == 2  # at the top, and in the section
    assert "ranks answers very well" not in text


def test_seeds_disagree(metrics: dict[str, Any]) -> None:
    def cards(*fit: bool) -> list[RewardModelCard]:
        verdicts = [{"fit": one, "reasons": [f"Because {one}."]} for one in fit]
        return [made_of(RewardModelCard, metrics | {"verdict": verdict}) for verdict in verdicts]

    def findings(*fit: bool) -> tuple[str, list[str], str]:
        finding = fitness(cards(*fit))
        return finding.headline, finding.lines, finding.kind

    assert findings(True) == ("Fit for RL.", ["Because True."], "good")
    assert findings(False) == ("Not fit for RL.", ["Because False."], "bad")
    assert findings(True, True, True) == ("Fit for RL in all 3 seeds.", ["Because True."], "good")
    assert findings(True, False, True) == ("Fit for RL in 2 of 3 seeds.", ["Because False."], "open")
    assert findings(False, False) == ("Not fit for RL.", ["Because False."], "bad")


def test_lora_beside_full_tuning(tmp_path: Path, metrics: dict[str, Any]) -> None:
    folders = [
        run(tmp_path / f"{tuning}{seed}", metrics | {"auroc": auroc + seed / 100}, seed, tuning)
        for tuning, auroc in (("lora", 0.9), ("full", 0.8))
        for seed in (0, 1)
    ]
    found = reward_line(groups(read_runs(folders)))
    assert found == "LoRA is ahead of full tuning. Reward model's AUROC: 0.91 against 0.81."
    one_each = reward_line(groups(read_runs([folders[0], folders[2]])))
    assert "0.90 against 0.80; with a single run this may be chance" in one_each
    assert "LoRA is ahead of full tuning" in page(tmp_path, *folders)


def test_pairs_are_measured_by_pairwise_accuracy(tmp_path: Path) -> None:
    """There is no AUROC and no accuracy of single answers; the tunings are compared by pairwise accuracy."""
    count, random = 200, np.random.default_rng(0)
    answers = RatedRows(
        contexts=[(Turn("user", f"question {n}"),) for n in range(count)] * 2,
        answers=[Turn("agent", f"answer {'so ' * random.integers(9)}{n}") for n in range(2 * count)],
        dialogues=[str(n) for n in range(count)] * 2,
        sources=["shop"] * (2 * count),
        labels=[True] * count + [False] * count,
        gold=None,
        pairs=[(n, count + n) for n in range(count)],
    )
    baseline = TfidfScores(random.normal(size=2 * count), 1, 1)
    folders = []
    for tuning, better in (("lora", 2.0), ("full", 1.0)):
        members = random.normal(size=(2, 2 * count)) + better * np.repeat([1, 0], count)
        found = reward_model_card(members, answers, baseline, log_odds=False)
        console_lines = [*card_lines(found)]
        assert "AUROC" not in "".join(console_lines[:1] + console_lines[-3:])
        assert f"Pairwise accuracy {found.pairwise_accuracy:.2f}" in console_lines[0]
        folders.append(run(tmp_path / tuning, as_json(found), 0, tuning, only=True))
    text = page(tmp_path, *folders)
    section = text[text.index('<section id="reward">') :].split("</section>")[0]
    assert "AUROC" not in section.replace("AUROC of the disagreement", "")
    assert "Accuracy</th>" not in section
    for words in (
        "Pairwise accuracy of length alone",
        "length of better answer",
        "Given two answers",
    ):
        assert words in section
    assert "LoRA and full tuning. Reward model's pairwise accuracy: 0." in html.unescape(section)
    assert "Reward model pairwise accuracy" in text
    assert "Worse answers that score higher than the better one" in section


def test_what_the_data_say_is_text(tmp_path: Path, metrics: dict[str, Any]) -> None:
    evil = json.loads(json.dumps(metrics))
    evil["mistakes"]["ups_scored_low"][0] |= {"context": EVIL, "answer": EVIL}
    evil["slices"][0]["name"] = evil["verdict"]["reasons"][0] = EVIL
    text = page(tmp_path, run(tmp_path / "a", evil))
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;") == 4


def test_cards_with_little_in_them(tmp_path: Path) -> None:
    """One class, one dialogue, no slice large enough: unknown values are omitted or shown as a dash."""
    answers = RatedRows(
        contexts=[(Turn("user", "hi"),)] * 8,
        answers=[Turn("agent", f"answer {n}") for n in range(8)],
        dialogues=["only"] * 8,
        sources=["shop"] * 8,
        labels=[True] * 8,
        gold=None,
        pairs=[],
    )
    few = as_json(reward_model_card([0.0] * 8, answers, TfidfScores(np.zeros(8), 1, 1)))
    text = page(tmp_path, run(tmp_path / "a", few, only=True))
    assert "The reward model is not fit for RL." in text
    assert "Too few to tell" in text
    assert "None" not in text
    assert "Good answers with low scores" in text
    assert "Bad answers with high scores" not in text
