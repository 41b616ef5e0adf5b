"""Trials that measure the cost of stages."""

import json
from pathlib import Path
from typing import Any

import pytest

from perl.data.records import Records
from perl.predict import TRY, Trial, read_subject, trial_session
from perl.recipe import Recipe, StageName, load_recipe
from perl.roles.role import Role
from perl.stages.material import read_data
from perl.stages.reward_rows import training_examples, training_rows
from perl.stages.sft import tokenized
from tests.conftest import WriteRecipe, write_rows
from tests.encoder_decoders import T5
from tests.tiny import LLAMA

TRAINED = {"epochs": 4, "batch_size": 4, "learning_rate": 0.003}
RL = {"steps": 3, "prompts_per_step": 4, "micro_batch_size": 4, "max_new_tokens": 6, "reward": {}}


def recipe(write_recipe: WriteRecipe, mixed_data: Path, tuning: str, **rl: Any) -> Recipe:
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    return load_recipe(write_recipe(tuning=tuning, data=data, sft=TRAINED, reward={**TRAINED}, rl=RL | rl))


@pytest.mark.parametrize("tuning", ["lora", "full"])
@pytest.mark.parametrize("stage", ["sft", "reward", "rl"])
def test_a_trial_takes_its_steps_evaluates_nothing_and_saves_nothing(
    stage: StageName, tuning: str, write_recipe: WriteRecipe, mixed_data: Path
) -> None:
    tried = recipe(write_recipe, mixed_data, tuning, critic="adapter")
    with trial_session(tried, Trial(2)) as session:
        base = session.roles.base_sha256()
        if stage != "rl":
            session.held_out = Records()  # nothing could be evaluated on it
        result = TRY[stage](session)
        written = {file.name for file in session.folder.path.rglob("*") if file.is_file()}
        assert session.roles.base_sha256() == base
    assert written <= {"metrics.jsonl"}
    assert not session.folder.path.exists()
    assert len(result.step_seconds) == 2
    assert result.peak_memory_bytes == max(phase.peak for phase in result.memory.values())
    assert result.tokens_per_second > 0


def test_the_longest_rows_are_tried(write_recipe: WriteRecipe, mixed_data: Path) -> None:
    tried = recipe(write_recipe, mixed_data, "lora")
    with trial_session(tried, Trial(2)) as session:
        for rows in (session.train.demonstrations, [one for one in session.train.ratings if one.label]):
            lengths = [len(row.context[0].text) for row in rows]
            assert lengths == sorted(lengths, reverse=True)
        assert {rating.label for rating in session.train.ratings} == {True, False}


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_rows_of_a_demonstration_are_counted(kind: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """An encoder-decoder's demonstration is a row per answer, each with the turns before it."""
    said = [
        ("user", "What is there?"),
        ("assistant", "Tea."),
        ("user", "One, please."),
        ("assistant", "Here it is."),
    ]
    messages = [{"role": role, "content": text} for role, text in said]
    data = {
        "source": "jsonl",
        "path": str(write_rows(tmp_path / "said.jsonl", said_often(messages))),
        "held_out": 0.3,
    }
    shape = LLAMA if kind == "llama" else T5
    base = {"config": {"model_type": kind, **shape}, "random_init": True, "dtype": "float32"}
    tried = load_recipe(write_recipe(data=data, base=base, sft=TRAINED, reward=None, rl=None))
    with trial_session(tried, Trial(2)) as session:
        train, held_out = read_data(tried)
        found, each = read_subject(tried).sizes["sft"], 1 if kind == "llama" else 2
        assert found.train == len(tokenized(session, train.demonstrations)) == each * len(train.demonstrations)
        assert found.held_out == len(tokenized(session, held_out.demonstrations))


def said_often(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    first, *others = messages
    return [{"messages": [{**first, "content": f"{first['content']} {n}"}, *others]} for n in range(20)]


@pytest.mark.parametrize("loss", ["thumbs", "pairs", "both"])
def test_a_reward_models_examples_are_counted(loss: str, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """The long answers of each label have no context in common, so pairs are made before the longest are kept."""
    rows = [
        {
            "prompt": f"question {n}",
            "completion": ("long " * 9 if good == (n < 200) else "") + str(good),
            "label": good,
        }
        for n in range(400)
        for good in (True, False)
    ]
    file = tmp_path / "rated.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = {"source": "jsonl", "path": str(file), "held_out": 0.3}
    tried = load_recipe(write_recipe(data=data, reward=TRAINED | {"loss": loss}, rl=None))
    with trial_session(tried, Trial(2)) as session:
        everything = read_data(tried)[0]
        examples = training_examples(training_rows(session, everything), loss)
        assert read_subject(tried).sizes["reward"].train == len(examples) > 0
        assert len(TRY["reward"](session).step_seconds) == 2


def test_a_trials_answers_are_as_long_as_they_can_get(write_recipe: WriteRecipe, mixed_data: Path) -> None:
    with trial_session(recipe(write_recipe, mixed_data, "lora", max_new_tokens=12), Trial(3)) as session:
        TRY["rl"](session)
        lines = (session.folder.path / "policy" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer_tokens"] for line in lines] == [12, 12, 12]
    assert [json.loads(line)["ended"] for line in lines] == [0, 0, 0]


def test_a_stage_can_be_tried_without_those_before_it(write_recipe: WriteRecipe, mixed_data: Path) -> None:
    """RL runs alone although its SFT policy and reward model were never trained."""
    with trial_session(recipe(write_recipe, mixed_data, "full"), Trial(2)) as session:
        result = TRY["rl"](session)
    assert session.roles.roles == {Role.SFT, Role.REWARD, Role.POLICY, Role.CRITIC}
    # Four models, of which two learn; AdamW's moments are two for each of their weights, but for the critic's
    # language-model head.
    models = session.base.parameters * 4
    assert result.memory["load"].kinds["base_weights"] == pytest.approx(4 * models, rel=0.01)
    head = session.roles.models()[0].get_output_embeddings().weight.nbytes
    assert result.memory["update"].kinds["optimizer"] == pytest.approx(2 * (2 * models - head), rel=0.01)
