"""Questions: sampled from the run's roles, recorded reproducibly, chosen as configured."""

from dataclasses import replace
from pathlib import Path

import pytest

import perl
from perl.errors import UserError
from perl.library import LoadedRun, Score
from perl.rating.questions import ASKED_AT_ONCE, CHOSEN, POOL, Questions, distance_from_even
from perl.roles.role import Role
from perl.roles.saved import weights_sha256
from tests.conftest import write_rows
from tests.exported import make, recipe_on


@pytest.fixture(scope="module")
def run(tiny_llama: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """Return a run whose roles have random weights."""
    return perl.load_run(make(tmp_path_factory.mktemp("runs") / "out", recipe_on(tiny_llama, mixed_data)))


def test_questions_are_held_out_prompts_with_completions_of_all_roles(run: LoadedRun) -> None:
    questions = Questions(run, seed=0)
    asked = [one for _ in range(8) for one in questions.draw(1, set())]
    held_out = {(prompt.context, prompt.dialogue) for prompt in run.session.held_out.prompts}
    assert {(one.context, one.dialogue) for one in asked} <= held_out
    assert {one.completions[0].role for one in asked} == {"base", "sft", "policy"}
    for one in questions.draw(2, set()):
        first, second = one.completions
        assert first.role != second.role
        assert first.text != second.text


def test_what_is_recorded_of_a_completion_draws_it_again(run: LoadedRun) -> None:
    (question, *_) = Questions(run, seed=1).draw(2, set())
    for drawn in question.completions:
        contexts = [question.context] * drawn.of
        again = run.complete(contexts, drawn.role, drawn.max_new_tokens, drawn.temperature, drawn.seed)
        assert again[drawn.place] == drawn.text
        assert drawn.base_sha256 == run.session.base.sha256
        if drawn.role != "base":
            saved = run.session.saved(Role(drawn.role))
            assert drawn.adapter_sha256 == weights_sha256(run.session.roles, saved)
        else:
            assert drawn.adapter_sha256 is None


@pytest.mark.parametrize("completions", [1, 2])
def test_uncertainty_asks_what_the_reward_model_cannot_tell_and_as_much_at_random(
    completions: int, run: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[Score] = []
    score_answers = run.score_answers

    def watched(answered: object) -> list[Score]:
        scored.extend(score_answers(answered))  # type: ignore[arg-type]
        return scored

    monkeypatch.setattr(run, "score_answers", watched)
    asked = Questions(run, "uncertainty", seed=0).draw(completions, set())
    judged = [scored[at : at + completions] for at in range(0, len(scored), completions)]
    assert ASKED_AT_ONCE < len(judged) <= POOL
    nearest = sorted(map(distance_from_even, judged))[:CHOSEN]
    told = {how: [of for of in asked if of.chosen_by == how] for how in ("uncertainty", "random")}
    assert [len(of) for of in told.values()] == [CHOSEN, ASKED_AT_ONCE - CHOSEN]
    distances = [
        distance_from_even([Score(0, drawn.probability or 0) for drawn in one.completions])
        for one in told["uncertainty"]
    ]
    assert sorted(distances) == pytest.approx(nearest)


def test_how_far_from_even() -> None:
    at = [Score(0, p) for p in (0.5, 0.2, 0.8, 1.0)]
    assert distance_from_even(at[:1]) == 0
    assert distance_from_even(at[1:2]) == pytest.approx(0.3)
    assert distance_from_even(at[2:3]) == pytest.approx(0.3)
    assert distance_from_even([at[2], at[2]]) == 0
    assert distance_from_even([at[2], at[1]]) == pytest.approx(16 / 17 - 0.5), "odds of 4 against odds of 1/4"
    assert distance_from_even([at[3]]) == pytest.approx(0.5)


def test_what_cannot_be_asked_is_refused(run: LoadedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = Questions(run)
    monkeypatch.setattr(run, "complete", lambda contexts, *_, **__: ["" for _ in contexts])
    for draw in (lambda: questions.draw(1, set()), lambda: questions.draw_for(questions.contexts[0][0], 1)):
        with pytest.raises(UserError, match="4 attempts gave only empty"):
            draw()
    monkeypatch.setattr(run, "results", replace(run.results, reward=None))
    with pytest.raises(UserError, match="no finished reward model to choose by"):
        Questions(run, "uncertainty")


def test_conversations_that_all_begin_with_the_assistant_have_nothing_to_ask_about(
    tiny_llama: Path, tmp_path: Path
) -> None:
    turns = [{"role": "assistant", "content": "Hello!"}, {"role": "user", "content": "A latte."}]
    rows = [{"messages": [*turns, {"role": "assistant", "content": f"{n}?"}], "dialogue": n} for n in range(9)]
    recipe = recipe_on(tiny_llama, write_rows(tmp_path / "rows.jsonl", rows), reward=None, rl=None)
    with pytest.raises(UserError, match="the run has no held-out prompts"):
        Questions(perl.load_run(make(tmp_path / "out", recipe)))
