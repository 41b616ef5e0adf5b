"""Predicted memory is measured memory: fake steps against real ones, and what fakes leave alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor
from transformers import LlamaConfig, LlamaForCausalLM

from perl.backbones.fake import fake_lm, unknown_values
from perl.commands.run import TRAIN
from perl.measure.probe import listeners
from perl.predict import DEPTHS, predict, read_subject
from perl.predict_rl import try_rl
from perl.recipe import Recipe
from perl.roles.fake import FakeSeparateModels, FakeSharedBase
from perl.roles.roles import Role
from perl.roles.separate_models import SeparateModels
from perl.roles.shared_base import SharedBase
from perl.stages.session import Trial, trial_session
from tests.conftest import write_rows
from tests.tiny import LLAMA, lora

SHORT, LONG = 48, 144
WIDER = {"model_type": "llama", **LLAMA, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}
Memory = dict[str, dict[str, tuple[int, dict[str, int]]]]


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demonstrations and ratings longer than any length here."""
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
    """What the stages take, each by itself on real tensors."""
    found: Memory = {}
    for stage in tried.stages:
        with trial_session(tried, Trial(2)) as session:
            memory = (try_rl if stage == "rl" else TRAIN[stage])(session).memory
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
    ],
    ids=["lora", "lora-long-checkpointed", "full-long", "full-checkpointed"],
)
def test_all_layers_tried_it_is_what_is_measured(length: int, changes: dict[str, Any], dialogues: Path) -> None:
    tried = recipe(dialogues, 2, length, **changes)
    found = measured(tried)
    assert list(found) == changes.get("stages", "sft reward rl").split()
    assert list(found["rl"]) == ["load", "generate", "score", "update"]
    assert_close(predicted(tried), found, 0.001)
    assert not listeners


@pytest.mark.parametrize(
    "changes",
    [{"stages": "reward"}, {"stages": "rl", "tuning": "full"}],
    ids=["lora", "full"],
)
def test_a_deeper_base_lies_on_the_line_through_two_depths(changes: dict[str, Any], dialogues: Path) -> None:
    tried = recipe(dialogues, max(DEPTHS) + 2, SHORT, **changes)
    found, expected = predicted(tried), measured(tried)
    for stage, phases in expected.items():
        for phase, (peak, kinds) in phases.items():
            assert found[stage][phase][0] == pytest.approx(peak, rel=0.05), (stage, phase)
            for kind in ("base_weights", "adapters", "optimizer", "kv_cache"):
                assert found[stage][phase][1].get(kind, 0) == kinds.get(kind, 0), (stage, phase, kind)


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
    """The most physical memory since `clear_refs` was last written to, in bytes."""
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


# The fakes themselves.


def config(tied: bool = False) -> LlamaConfig:
    return LlamaConfig(**WIDER, tie_word_embeddings=tied)


@pytest.mark.parametrize("tied", [False, True])
def test_a_fake_model_has_the_shapes_of_a_real_one_and_no_weights(tied: bool) -> None:
    fake, real = fake_lm(config(tied), torch.bfloat16), LlamaForCausalLM(config(tied)).bfloat16()
    assert {n: (p.shape, p.dtype) for n, p in fake.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    assert {n: b.shape for n, b in fake.named_buffers()} == {n: b.shape for n, b in real.named_buffers()}
    assert all(isinstance(p.data, FakeTensor) for p in (*fake.parameters(), *fake.buffers()))
    assert {p.device.type for p in fake.parameters()} == {"cpu"}
    shared = fake.get_input_embeddings().weight is fake.get_output_embeddings().weight
    assert shared is tied


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_fake_roles_have_the_parameters_of_real_ones(tuning: str) -> None:
    lm, fake = LlamaForCausalLM(config()), fake_lm(config(), torch.float32)
    shape = lora(lm, 4, 8)
    pair = (
        (SharedBase(lm, shape), FakeSharedBase(fake, shape))
        if tuning == "lora"
        else (SeparateModels(lm, lambda: lm), FakeSeparateModels(fake))
    )
    for roles in pair:
        roles.add(Role.SFT)
        roles.keep(Role.SFT)
        roles.add(Role.POLICY, copy_of=Role.SFT)
        roles.add(Role.REWARD, head=True)
        roles.add(Role.CRITIC, copy_of=Role.REWARD, head=True)
        roles.train_only(Role.POLICY, Role.CRITIC)
    real, faked = (
        {n: (p.shape, p.dtype, p.requires_grad, p.is_leaf) for n, p in roles.named_parameters()} for roles in pair
    )
    assert faked == real
    assert all(isinstance(parameter.data, FakeTensor) for parameter in pair[1].parameters())


def test_a_fakes_values_are_zeros_only_where_they_are_asked_for() -> None:
    weight = next(fake_lm(config(), torch.float32).parameters())
    with pytest.raises(Exception, match=r"data-dependent|DataDependent|aten\._local_scalar_dense"):
        weight.sum().item()
    with unknown_values():
        assert weight.detach().sum().item() == 0.0
        assert float(weight.detach().sum()) == 0.0
        assert weight.detach()[:2, :2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert not (weight.detach().sum() > 1)
        assert torch.multinomial(weight.detach()[:3], 1).tolist() == [[0], [0], [0]]
        assert isinstance(weight.detach() + 1, FakeTensor)


def test_real_tensors_keep_their_values_among_unknown_ones() -> None:
    ids, share = torch.tensor([3, 1, 2]), torch.tensor(0.25)
    with unknown_values():
        assert ids.tolist() == [3, 1, 2]
        assert int(ids[0]) == 3
        assert share.item() == float(share) == 0.25
        assert bool(share > 0.2)
        assert not torch.allclose(ids, ids + 1)
        assert torch.multinomial(torch.tensor([[0.0, 1.0, 0.0]]), 1).tolist() == [[1]]
        for made in (torch.zeros(3, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool), torch.full((2,), 7)):
            assert not isinstance(made, FakeTensor)
        assert torch.full((2,), 7).tolist() == [7, 7]
        assert torch.tensor([1.5]).tolist() == [1.5]
        assert isinstance(torch.zeros(3), FakeTensor)  # a buffer that fake values are to be written to
    assert not isinstance(torch.zeros(3), FakeTensor)


def test_answers_that_outgrow_the_cache_first_laid_out(dialogues: Path) -> None:
    """Keys and values of all positions: 2 layers, 3 rows, 2 heads of 16, bf16; prompts of 40 are padded to 48."""
    content = recipe(dialogues, 2, SHORT, "rl").model_dump()
    content["rl"] |= {"max_new_tokens": 200}
    changed = Recipe.model_validate(content)
    kinds = predict(changed, read_subject(changed))["rl"]["generate"].kinds
    assert kinds["kv_cache"] == 2 * 2 * 3 * 2 * 16 * (SHORT + 200) * 2
