"""Predicted memory is measured memory: fake steps against real ones."""

from pathlib import Path
from typing import Any

import pytest

from perl.measure.probe import listeners
from perl.predict import TRY, Trial, predict, read_subject, trial_session
from perl.predict.subject import DEPTHS, fake_session
from perl.recipe import Recipe
from tests.conftest import write_rows
from tests.tiny import KINDS, LLAMA

SHORT, LONG = 48, 144
WIDER = {"model_type": "llama", **LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 4}
Memory = dict[str, dict[str, tuple[int, dict[str, int]]]]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return demonstrations and ratings longer than any limit here."""
    rows: list[dict[str, Any]] = []
    for index in range(6):
        prompt = [{"role": "user", "content": f"{index} " + "A latte, please. " * 12}]
        rows.append({"prompt": prompt, "completion": "One latte. " * 10})
        rows.append({"prompt": prompt, "completion": "One latte. " * 10, "label": True})
        rows.append({"prompt": prompt, "completion": "No. " * 5, "label": False})
    folder = tmp_path_factory.mktemp("dialogues")
    (folder / "rewards.py").write_text("def one(completions, **columns):\n    return [1.0 for _ in completions]\n")
    return write_rows(folder / "rows.jsonl", rows)


def recipe(dialogues: Path, layers: int, length: int, stages: str = "sft reward rl", **changes: Any) -> Recipe:
    sections = {
        "sft": {"batch_size": 2, "max_length": length},
        "reward": {"batch_size": 2, "max_length": length},
        "rl": {
            "critic": changes.pop("critic", "shared"),
            "algorithm": changes.pop("algorithm", "reinforce"),
            "prompts_per_step": 3,
            "micro_batch_size": 2,
            "max_prompt_length": length - 8,
            "max_new_tokens": 8,
            "reward": {} if "reward" in stages.split() else {"function": f"{dialogues.parent}/rewards.py:one"},
        },
    }
    base = {"config": {**WIDER, "num_hidden_layers": layers, **changes.pop("config", {})}, "random_init": True}
    content: dict[str, Any] = {
        "name": "predicted",
        "base": {**base, "dtype": changes.pop("dtype", "bfloat16")},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"source": "jsonl", "path": str(dialogues), "held_out": 0.3},
        **{stage: sections[stage] for stage in stages.split()},
        **changes,
    }
    return Recipe.model_validate(content)


def measured(tried: Recipe) -> Memory:
    """Return the memory of each stage alone on real tensors."""
    found: Memory = {}
    for stage in tried.stages:
        with trial_session(tried, Trial(2)) as session:
            memory = TRY[stage](session).memory
        found[stage] = {phase: (metrics.peak, metrics.kinds) for phase, metrics in memory.items()}
    return found


def predicted(tried: Recipe) -> Memory:
    return {
        stage: {phase: (metrics.peak, metrics.kinds) for phase, metrics in memory.items()}
        for stage, memory in predict(tried, read_subject(tried)).items()
    }


def assert_close(actual: Memory, expected: Memory, relative: float) -> None:
    assert {stage: set(phases) for stage, phases in actual.items()} == {
        stage: set(phases) for stage, phases in expected.items()
    }
    for stage, phases in expected.items():
        for phase, (peak, kinds) in phases.items():
            assert actual[stage][phase][0] == pytest.approx(peak, rel=relative), (stage, phase)
            assert actual[stage][phase][1] == pytest.approx(kinds, rel=relative), (stage, phase)


@pytest.mark.parametrize(
    ("length", "changes"),
    [
        (SHORT, {"tuning": "lora", "critic": "shared", "dtype": "float32"}),
        (LONG, {"critic": "adapter", "checkpoint_activations": True, "lora": {"rank": 4, "targets": "attention"}}),
        (LONG, {"tuning": "full", "critic": "adapter"}),
        (SHORT, {"tuning": "full", "checkpoint_activations": True, "algorithm": "ppo", "stages": "rl"}),
        (SHORT, {"config": EXPERTS, "dtype": "float32", "stages": "rl"}),
    ],
    ids=["lora", "lora-long-checkpointed", "full-long", "full-checkpointed", "experts"],
)
def test_all_layers_tried_it_is_what_is_measured(length: int, changes: dict[str, Any], dialogues: Path) -> None:
    tried = recipe(dialogues, 2, length, **changes)
    found = measured(tried)
    assert list(found) == changes.get("stages", "sft reward rl").split()
    assert list(found["rl"]) == ["load", "generate", "score", "update"]
    assert_close(predicted(tried), found, 0.001)
    assert not listeners


def test_a_natural_step_is_what_is_measured(dialogues: Path) -> None:
    tried = recipe(dialogues, 2, SHORT, "rl", algorithm="trpo", critic=None)
    assert_close(predicted(tried), measured(tried), 0.001)


def test_what_a_score_depends_on_besides_is_predicted(dialogues: Path) -> None:
    content = recipe(dialogues, 2, SHORT, "reward rl", algorithm="ppo").model_dump()
    content["reward"] |= {"likelihood": True, "tfidf": True, "eval_steps": 1}
    tried = Recipe.model_validate(content)
    without = predicted(recipe(dialogues, 2, SHORT, "reward rl", algorithm="ppo"))
    found = predicted(tried)
    assert_close(found, measured(tried), 0.001)
    words, network = 4 * (4 * 300 + 3), 4 * (2 * 64 + 64 + 64 + 1)
    for stage in ("reward", "rl"):
        more = found[stage]["update"][1]["adapters"] - without[stage]["update"][1]["adapters"]
        assert more == words + network, stage


def test_groups_that_micro_batches_cut_are_tried_whole(dialogues: Path) -> None:
    """With 15 completions in groups of five, the last two micro-batches of seven would have 14."""
    tried = recipe(dialogues, 2, SHORT, "rl", algorithm="rloo", critic=None)
    assert tried.rl is not None
    settings = tried.rl.model_copy(update={"samples_per_prompt": 5, "micro_batch_size": 7})
    tried = tried.model_copy(update={"rl": settings})
    assert_close(predicted(tried), measured(tried), 0.001)


@pytest.mark.parametrize(
    "changes",
    [{"stages": "reward"}, {"stages": "rl", "tuning": "full"}],
    ids=["lora", "full"],
)
def test_a_deeper_base_lies_on_the_line_through_two_depths(changes: dict[str, Any], dialogues: Path) -> None:
    tried = recipe(dialogues, DEPTHS[0][1] + 2, SHORT, **changes)
    found, expected = predicted(tried), measured(tried)
    for stage, phases in expected.items():
        for phase, (peak, kinds) in phases.items():
            assert found[stage][phase][0] == pytest.approx(peak, rel=0.05), (stage, phase)
            for kind in ("base_weights", "adapters", "optimizer", "kv_cache"):
                assert found[stage][phase][1].get(kind, 0) == kinds.get(kind, 0), (stage, phase, kind)


DENSE_FIRST = {
    "model_type": "deepseek_v3",
    "first_k_dense_replace": 3,
    **{
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 64,
    },
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16},
}


def test_layers_without_experts_below_those_with(dialogues: Path) -> None:
    tried = recipe(dialogues, 10, SHORT, "reward", config=DENSE_FIRST)
    subject = read_subject(tried)
    assert subject.depths == (4, 8)
    weights = predict(tried, subject)["reward"]["update"].kinds["base_weights"]
    with fake_session(tried, subject, subject.depth) as session:
        lm = session.roles.models()[0]
        assert weights == pytest.approx(
            sum(tensor.nbytes for tensor in (*lm.parameters(), *lm.buffers())), rel=0.01
        )


def test_the_peak_of_a_deeper_base_may_be_at_another_moment(dialogues: Path) -> None:
    """With few layers it is in the loss, with more in the optimizer's step, with all gradients."""
    wide = {"hidden_size": 256, "intermediate_size": 1024}
    changes = {"tuning": "full", "checkpoint_activations": True}
    shallow, deep = (
        recipe(dialogues, layers, SHORT, "sft", config=wide, **changes) for layers in (DEPTHS[0][0], 24)
    )
    found, first = predicted(deep)["sft"]["update"], predicted(shallow)["sft"]["update"]
    assert "gradients" not in first[1]
    assert found[1]["gradients"] == pytest.approx(found[1]["base_weights"], rel=0.01)
    with fake_session(deep, read_subject(deep), 24) as session:
        whole = TRY["sft"](session).memory["update"]
    assert found[0] == pytest.approx(whole.peak, rel=0.005)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind in ("dora", "prefix", "series") else pytest.mark.slow)
        for kind in KINDS
        if kind != "lora"
    ],
)
def test_every_kind_of_adapters_is_predicted(kind: str, dialogues: Path) -> None:
    """Predictions equal measurements where all layers are tried; deeper bases are extrapolated from two depths."""
    adapter = {"lora": None, "adapter": {"kind": kind, "layers": "top-half", **KINDS[kind]}}
    tried = recipe(dialogues, 2, SHORT, "sft rl", algorithm="ppo", critic="adapter", **adapter)
    assert_close(predicted(tried), measured(tried), 0.001)
    deeper = recipe(dialogues, DEPTHS[0][1] + 2, SHORT, "rl", **adapter)
    found, expected = predicted(deeper)["rl"], measured(deeper)["rl"]
    for phase, (peak, kinds) in expected.items():
        assert found[phase][0] == pytest.approx(peak, rel=0.05), phase
        for held in ("base_weights", "adapters", "optimizer"):
            assert found[phase][1].get(held, 0) == kinds.get(held, 0), (phase, held)


def test_what_a_prediction_is_made_of(dialogues: Path) -> None:
    lora = predicted(recipe(dialogues, 2, SHORT, "reward"))["reward"]["update"][1]
    full = predicted(recipe(dialogues, 2, SHORT, "reward", tuning="full"))["reward"]["update"][1]
    trunk = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64 + 300 * 64
    embeddings = 300 * 64  # of the output: no score depends on it
    angles = 4 * 2 * 8  # eight frequencies in fp32, twice
    assert lora["base_weights"] == 2 * (trunk + embeddings) + angles
    ranks = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert lora["adapters"] == 4 * (ranks + 64)
    assert lora["optimizer"] == 2 * lora["adapters"] + 4 * (2 * 7 * 2 + 1)  # two moments; a count for each tensor
    # All is trained; the head, which learns in fp32, is counted in with the weights.
    assert full["base_weights"] == lora["base_weights"] + 4 * 64
    assert "adapters" not in full
    assert full["optimizer"] == 2 * (2 * trunk + 4 * 64) + 4 * (2 * 9 + 2 + 1)


def peak_rss() -> int:
    """Return the peak of physical memory since the last write to `clear_refs`, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def test_eight_billion_weights_take_no_memory(dialogues: Path) -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("no peak of physical memory to be read here")
    large = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    tried = recipe(dialogues, 32, SHORT, "reward", config={**large, "vocab_size": 128256})
    subject = read_subject(tried)
    before = peak_rss()
    memory = predict(tried, subject)["reward"]
    assert peak_rss() - before < 1.5e9
    layer = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    embeddings = 2 * 2 * 128256 * 4096
    assert memory["update"].kinds["base_weights"] == pytest.approx(32 * layer + embeddings, rel=1e-4)
    assert memory["update"].peak > memory["load"].peak > 16e9


def test_answers_that_outgrow_the_cache_first_laid_out(dialogues: Path) -> None:
    """Keys and values of all positions: 2 layers, 3 rows, 2 heads of 16, bf16; prompts of 40 are padded to 48."""
    content = recipe(dialogues, 2, SHORT, "rl").model_dump()
    content["rl"] |= {"max_new_tokens": 200}
    changed = Recipe.model_validate(content)
    kinds = predict(changed, read_subject(changed))["rl"]["generate"].kinds
    assert kinds["kv_cache"] == 2 * 2 * 3 * 2 * 16 * (SHORT + 200) * 2
