"""`import perl`: the README's code runs, and a loaded run generates and scores."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
import yaml

import perl
from perl.backbones.chat import ChatFormat
from perl.roles.role import Role
from tests.conftest import WriteRecipe
from tests.exported import Run, make, recipe_on

README = Path(__file__).parent.parent / "README.md"
CHAT = [{"role": "user", "content": "A latte, please."}]


def test_the_readmes_lines_run(
    write_recipe: WriteRecipe,
    mixed_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    section = README.read_text().partition("## As a library\n")[2].partition("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    rl = {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 2, "reward": {}}
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    recipe = write_recipe(data=data, sft={"max_length": 64, "batch_size": 4}, rl=rl)
    (tmp_path / "recipes").mkdir()
    recipe.rename(tmp_path / "recipes" / "quickstart.yaml")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    reward, scores, chances = capsys.readouterr().out.splitlines()
    assert math.isfinite(float(reward))
    assert len(eval(scores)) == len(eval(chances)) == 1
    assert 0 < eval(chances)[0] < 1
    assert (tmp_path / "runs" / "quickstart" / "report.html").exists()


def test_a_recipe_may_be_given_as_a_file_or_as_what_the_file_contains(
    write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path
) -> None:
    rl = {"steps": 1, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 2, "best_of_n": 0}
    rl["reward"] = [{"kind": "length", "weight": 1.0}]
    file = write_recipe(data={"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}, rl=rl)
    content = yaml.safe_load(file.read_text())
    assert perl.load_recipe(content, ["seed=3"]) == perl.load_recipe(file, ["seed=3"])
    assert "seed" not in content or content["seed"] != 3, "the caller's mapping stays as it is"
    with pytest.raises(perl.UserError, match=r"the recipe: rl\.stepps: unknown key"):
        perl.load_recipe({**content, "rl": {"stepps": 2}})
    with pytest.raises(perl.UserError, match="no such recipe"):
        perl.run(tmp_path / "absent.yaml")
    assert perl.run(content, tmp_path / "out").rl is not None


def test_importing_it_imports_no_torch() -> None:
    code = "import sys, perl; perl.load_recipe; perl.Recipe; print('torch' in sys.modules, sorted(dir(perl)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("False")
    for name in perl.__all__:
        assert f"'{name}'" in done.stdout
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        perl.train  # noqa: B018


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose roles have random weights."""
    return make(tmp_path_factory.mktemp("runs") / "out", recipe_on(tiny_llama, mixed_data))


@pytest.fixture(scope="module")
def loaded(folder: Path) -> perl.LoadedRun:
    return perl.load_run(folder)


def test_each_role_generates_and_draws_repeat(loaded: perl.LoadedRun) -> None:
    assert loaded.policies == ["base", "sft", "policy"]
    drawn = {role: loaded.generate([CHAT, CHAT], role, max_new_tokens=8) for role in loaded.policies}
    assert len({tuple(texts) for texts in drawn.values()}) == 3
    assert loaded.generate([CHAT, CHAT], max_new_tokens=8) == drawn["policy"]
    assert loaded.generate([CHAT, CHAT], max_new_tokens=8, seed=1) != drawn["policy"]
    greedy = {tuple(loaded.generate([CHAT], max_new_tokens=8, temperature=0, seed=seed)) for seed in (0, 1)}
    assert len(greedy) == 1, "the most likely tokens do not depend on the seed"
    assert len(loaded.generate(["A latte"])) == 1
    assert loaded.generate([]) == []


def test_several_batches_give_the_same_completions_as_one(
    loaded: perl.LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["Once upon", "a time", "there", "was a cat that"]
    whole = loaded.generate(prompts, max_new_tokens=8)
    monkeypatch.setattr("perl.library.BATCH", 3)
    assert loaded.generate(prompts, max_new_tokens=8) == whole
    assert len(set(whole)) > 1


def test_completions_of_plain_text_keep_their_whitespace(loaded: perl.LoadedRun) -> None:
    """A completion appended to its prompt equals the text of both token sequences."""
    prompts = ["Once upon", "there was"]
    decode, chat = ChatFormat.decode, loaded.session.base.chat
    seen: list[tuple[list[int], str]] = []

    def watched(self: ChatFormat, ids: Sequence[int], continued: Sequence[int] = ()) -> str:
        seen.append(([*continued, *ids], text := decode(self, ids, continued)))
        return text

    with mock.patch.object(ChatFormat, "decode", watched):
        texts = loaded.generate(prompts, max_new_tokens=8)
    for prompt, text, (ids, decoded) in zip(prompts, texts, seen, strict=True):
        assert text == decoded
        assert prompt + text == chat.tokenizer.decode(ids, skip_special_tokens=True)


def test_scores_are_the_reward_models(folder: Path, loaded: perl.LoadedRun) -> None:
    answer = "What size?"
    expected = Run(folder).scores(Role.REWARD, [[*CHAT, {"role": "assistant", "content": answer}]])
    scores = loaded.score([CHAT, CHAT], [answer, "No."])
    assert scores[0] == pytest.approx(float(expected[0]), abs=1e-5)
    assert scores[0] != pytest.approx(scores[1], abs=1e-5)
    assert loaded.results.reward is not None
    fitted = loaded.results.reward.eval.calibration
    chances = loaded.score([CHAT, CHAT], [answer, "No."], probability=True)
    for score, chance in zip(scores, chances, strict=True):
        assert chance == pytest.approx(1 / (1 + math.exp(-(fitted.slope * score + fitted.intercept))))


def test_the_probability_of_a_model_of_pairs_is_relative_to_an_average_answer(
    tiny_llama: Path, mixed_data: Path, tmp_path: Path
) -> None:
    """Only differences of its scores have a meaning; 0.25 is the mean score that `make` writes."""
    recipe = recipe_on(tiny_llama, mixed_data, reward={"loss": "pairs"}, rl=None)
    file = make(tmp_path / "out", recipe) / "reward" / "result.json"
    result = json.loads(file.read_text())
    result["eval"] |= {"compared": True, "pairwise_accuracy": 0.8}
    file.write_text(json.dumps(result))
    pairs = perl.load_run(tmp_path / "out")
    assert pairs.results.reward is not None
    fitted = pairs.results.reward.eval.calibration
    (score,), (chance,) = (pairs.score([CHAT], ["What size?"], probability=one) for one in (False, True))
    assert chance == pytest.approx(1 / (1 + math.exp(-(fitted.slope * (score - 0.25) + fitted.intercept))))


def test_what_cannot_be_read_is_named(loaded: perl.LoadedRun) -> None:
    with pytest.raises(perl.UserError, match=r"prompts\[1\]: .*unknown role 'robot'"):
        loaded.generate([CHAT, [{"role": "robot", "content": "x"}]])
    with pytest.raises(perl.UserError, match=r"prompts\[0\]: prompt is an object; text or a list of messages"):
        loaded.generate(CHAT)  # one conversation, not a list of them
    for one in ("A latte", ["A latte"]):
        with pytest.raises(
            perl.UserError, match="prompts: is a text" if isinstance(one, str) else "2 completions"
        ):
            loaded.score(one, ["Hot?", "No."])
    with pytest.raises(perl.UserError, match="prompts: is a text; a list expected"):
        loaded.generate("A latte")  # not a prompt for each character
    with pytest.raises(perl.UserError, match="no role 'critic' that generates"):
        loaded.generate([CHAT], "critic")
    with pytest.raises(perl.UserError, match="of two kinds"):
        loaded.generate([CHAT, "A latte"])
    for temperature in (-0.1, math.inf, math.nan):
        with pytest.raises(perl.UserError, match=f"temperature is {temperature:g}"):
            loaded.generate([CHAT], temperature=temperature)
    with pytest.raises(perl.UserError, match="max_new_tokens is 256"):
        loaded.generate([CHAT], max_new_tokens=256)
    with pytest.raises(perl.UserError, match="max_new_tokens is 0"):
        loaded.generate([CHAT], max_new_tokens=0)
    with pytest.raises(perl.UserError, match="completion is empty"):
        loaded.score([CHAT], [" "])


def test_a_run_without_a_reward_model_scores_nothing(tiny_llama: Path, small_data: Path, tmp_path: Path) -> None:
    recipe = recipe_on(tiny_llama, small_data / "demonstrations.jsonl", reward=None, rl=None)
    run = perl.load_run(make(tmp_path / "out", recipe))
    assert run.policies == ["base", "sft"]
    with pytest.raises(perl.UserError, match="no finished reward model"):
        run.score([CHAT], ["No."])
    with pytest.raises(perl.UserError, match="not a run folder"):
        perl.load_run(tmp_path)
