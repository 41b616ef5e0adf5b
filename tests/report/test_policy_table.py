"""The table of the policy: every metric of RL, and each part of a reward that has several."""

import html
import json
from pathlib import Path

from perl.report.page import write_page
from tests.report.made import make_run


def rows(run: Path) -> str:
    """Return the table as HTML."""
    text = write_page([run], run / "report.html").read_text(encoding="utf-8")
    section = text[text.index('id="policy"') :]
    return section[: section.index("</table>")]


def test_parts_of_the_reward_follow_it(tmp_path: Path) -> None:
    table = rows(make_run(tmp_path / "a"))
    model = '<th scope="row">… model</th><td class="number">0.30</td><td class="number">0.80</td>'
    length = '<th scope="row">… length</th><td class="number">−0.12</td><td class="number">−0.06</td>'
    assert table.index(">Reward<") < table.index(model) < table.index(length) < table.index("Gold judge")
    assert "KL to the reference" in table


def test_best_of_n_the_ensemble_and_the_kept_weights_are_told(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    text = write_page([run], run / "report.html").read_text(encoding="utf-8")
    assert "Compared with the best of 4 completions before RL (KL 0.64, no training), on 128 prompts" in text
    assert "Crosses: best of n completions" in text
    assert "its 2 members alone have AUROC 0.810, 0.800" in text
    assert "member 2: Scores are the sum of the model's score and a TF-IDF score" in html.unescape(text)
    assert "kept weights are those of step 40 of 100, the best of 3 validations by loss (0.4) on 160 rows" in text


def test_a_change_that_is_equal_on_all_prompts_has_no_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    report = json.loads((run / "report.json").read_text())
    report["stages"]["rl"]["eval"] |= {"reward_after": 0.9, "reward_interval": [0.6, 0.6 + 1e-16]}
    (run / "report.json").write_text(json.dumps(report))
    assert '<td class="number">0.90</td><td class="number">equal in every dialogue</td>' in rows(run)


def test_a_single_reward_has_no_parts(tmp_path: Path) -> None:
    assert "…" not in rows(make_run(tmp_path / "a", rich=False))


def test_a_single_part_with_a_weight_is_not_the_reward(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", rich=False)
    report = json.loads((run / "report.json").read_text())
    report["stages"]["rl"]["eval"]["reward_parts_before"] = {"model": 0.36}
    report["stages"]["rl"]["eval"]["reward_parts_after"] = {"model": 1.6}
    (run / "report.json").write_text(json.dumps(report))
    assert '… model</th><td class="number">0.36</td><td class="number">1.60</td>' in rows(run)


def test_a_part_that_came_later_has_one_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    report = json.loads((run / "report.json").read_text())
    report["stages"]["rl"]["eval"]["reward_parts_before"] = {"<b>": 1.0}
    report["stages"]["rl"]["eval"]["reward_parts_after"] = {}
    (run / "report.json").write_text(json.dumps(report))
    assert '… &lt;b&gt;</th><td class="number">1.00</td><td class="number">–</td>' in rows(run)
