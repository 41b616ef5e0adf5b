"""Incidents are shown prominently on the page, in words, and only if there are any."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from perl.report.page import write_page
from perl.report.runs import read_run
from perl.report.words import incidents
from tests.report.made import make_run

STOPPED: dict[str, Any] = {
    "name": "shrinking",
    "step": 39,
    "since": 31,
    "good_until": 29,
    "value": 46.0,
    "limit": 61.5,
    "grave": True,
    "what": "completions have shrunk to 46 tokens, from 123 at the start",
    "causes": "To stop at once is cheapest <&>.",
    "remedy": "Lower rl.learning_rate.",
    "action": "stopped",
    "remains": 20,
}
WARNED = {key: value for key, value in STOPPED.items() if key != "remains"} | {"action": "warned", "since": 39}
FINDING = {"name": "sampled as read", "words": "the sampler's log-probs", "figure": 1.4e-6, "limit": 0.001}


def change(run: Path, **more: Any) -> Path:
    """Add keys to the report's RL stage."""
    report = json.loads((run / "report.json").read_text())
    report["stages"]["rl"] |= more
    (run / "report.json").write_text(json.dumps(report))
    return run


def page(*runs: Path) -> str:
    return write_page(runs, runs[0] / "report.html").read_text(encoding="utf-8")


def test_a_run_without_incidents_says_nothing_of_any(tmp_path: Path) -> None:
    for rich in (True, False):
        text = page(make_run(tmp_path / str(rich), rich=rich))
        assert "What went wrong" not in text
        assert ("Checks before the first update" in text) == rich


def test_a_run_that_was_stopped_says_so_before_any_figure(tmp_path: Path) -> None:
    text = page(change(make_run(tmp_path / "a"), incidents=[WARNED | {"step": 12}, STOPPED]))
    told = text[text.index('id="incidents"') : text.index('class="tiles"')]
    assert 'class="verdict bad" id="incidents"' in text
    assert told.index("RL was stopped at step 39.") < told.index("RL, step 12.")  # what ended it comes first
    assert "Completions have shrunk to 46 tokens, from 123 at the start. It began to show at step 31." in told
    assert "cheapest &lt;&amp;&gt;." in told
    assert "is the policy after 20 updates" in told
    assert "What went wrong</a>" in text


@pytest.mark.parametrize(
    ("incident", "words"),
    [
        (STOPPED | {"remains": 0}, "the result is the policy that RL started from"),
        (STOPPED, "policy after 20 updates"),
        (WARNED, "Lower rl.learning_rate."),
    ],
)
def test_what_remains(incident: dict[str, Any], words: str, tmp_path: Path) -> None:
    (found,) = incidents([read_run(change(make_run(tmp_path / "a"), incidents=[incident]))])
    assert found.kind == ("bad" if incident["action"] == "stopped" else "open")
    assert words in found.lines[-1]


def test_of_several_runs_the_seed_is_named(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 0), change(make_run(tmp_path / "b", 1), incidents=[STOPPED])]
    assert "RL was stopped at step 39 (seed 1)." in page(*runs)


@pytest.mark.parametrize(
    ("folder", "label"), [("sft", "SFT"), ("reward", "Reward"), ("reward/member-2", "Reward, member 2")]
)
def test_updates_refused_in_supervised_stages_are_counted(folder: str, label: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    file = run / folder / "metrics.jsonl"
    if not file.exists():
        file.parent.mkdir()
        shutil.copyfile(run / "reward" / "metrics.jsonl", file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[2:9]:
        line |= {"refused": 1.0, "grad_norm": None}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = incidents([read_run(run)])
    assert found.headline == f"{label}: 7 of {len(lines)} updates were refused."
    assert found.lines[0].startswith("At steps 3, 4, 5, 6 and 7 and 2 more ")
    assert found.kind == "open"


def test_the_checks_before_rl_have_their_metrics(tmp_path: Path) -> None:
    text = page(change(make_run(tmp_path / "a"), preflight=[FINDING]))
    assert "Checks before the first update of RL (seed 0)" in text
    assert "1.4e-06" in text


def test_where_no_update_remains_the_verdict_says_so(tmp_path: Path) -> None:
    begun = "The policy is the one that RL started from"
    assert begun in page(change(make_run(tmp_path / "a"), incidents=[STOPPED | {"remains": 0}]))
    assert begun not in page(change(make_run(tmp_path / "b"), incidents=[STOPPED]))


@pytest.mark.parametrize(
    ("allowed", "remedy"),
    [(10_000, "Use more prompts or a larger data.held_out"), (1, "Raise rl.eval_prompts")],
)
def test_the_remedy_for_too_few_prompts_is_one_that_helps(allowed: int, remedy: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", rich=False)
    report = json.loads((run / "report.json").read_text())
    report["stages"]["rl"]["eval"] |= {"reward_interval": [-1.0, 1.0]}
    for name in ("gold_before", "gold_after", "gold_interval"):
        report["stages"]["rl"]["eval"].pop(name, None)
    (run / "report.json").write_text(json.dumps(report))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["rl"]["eval_prompts"] = allowed
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert f"too few to tell. {remedy}" in page(run)
