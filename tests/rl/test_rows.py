"""The table's rows in a recipe: overrides, refused settings, and two steps of each."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from perl.errors import UserError
from perl.recipe import Recipe, load_recipe
from perl.recipe.rl import CELLS, Rl
from perl.results import RlStage
from perl.rl.algorithms import ALGORITHMS
from perl.stages.identity import settings_sha256
from perl.system.typed_json import parse
from tests.conftest import RunCli, WriteRecipe

Load = Callable[..., Recipe]
SETTINGS = {"steps": 2, "prompts_per_step": 4, "max_new_tokens": 6, "eval_prompts": 2, "guard": "off"}


@pytest.fixture
def load(write_recipe: WriteRecipe) -> Load:
    """Load a recipe of this row with these overrides of `rl`."""
    file = write_recipe(reward=None, rl=SETTINGS | {"reward": {"function": "rewards.py:length"}})
    return lambda name, *said: load_recipe(file, [f"rl.algorithm={name}", *(f"rl.{one}" for one in said)])


def rl_of(recipe: Recipe) -> Rl:
    assert recipe.rl is not None
    return recipe.rl


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_a_recipe_leaves_out_is_the_rows(name: str, load: Load) -> None:
    assert rl_of(load(name)).row == ALGORITHMS[name]


@pytest.mark.parametrize("key", CELLS)
def test_every_cell_and_constant_can_be_overridden(key: str, load: Load) -> None:
    values = {
        **{"advantage": "group", "surrogate": "clip-weight", "ratio": "answer", "average": "constant"},
        **{"kl": "loss-k2", "whiten": True, "normalize_rewards": False, "drop_equal_groups": True},
        **{"gae_lambda": 0.5, "clip": 0.1, "clip_high": 0.3, "dual_clip": 3.0, "tau": 2.0, "value_clip": 0.0},
        **{"value_coef": 0.5, "entropy_coef": 0.01, "direction": "natural", "trust_region": 0.02},
        **{"redraws": 2, "reset_optimizer": True},
    }
    value = values[key]
    needs = {
        **{"direction": ["epochs=1", "trust_region=0.02"], "redraws": ["drop_equal_groups=true"]},
        **{"gae_lambda": ["advantage=gae"], "tau": ["surrogate=mirror", "kl=none"]},
        **{"value_clip": ["advantage=gae"], "value_coef": ["advantage=gae"]},
    }.get(key, [])
    recipe = load("grpo", f"{key}={json.dumps(value)}", *needs)
    assert getattr(rl_of(recipe).row, key) == value != getattr(ALGORITHMS["grpo"], key)
    assert yaml.safe_load(recipe.to_yaml())["rl"][key] == value
    assert settings_sha256(recipe, "rl") != settings_sha256(load("grpo"), "rl")


def test_what_says_no_more_than_the_row_is_as_if_left_out(load: Load) -> None:
    """A folder of an earlier version, which recorded these keys, then matches this recipe; another algorithm
    uses its own row.
    """
    plain, said = (
        load("ppo"),
        load("ppo", "clip=0.2", "gae_lambda=1.0", "value_clip=0.2", "normalize_rewards=true"),
    )
    assert said == plain
    assert settings_sha256(said, "rl") == settings_sha256(plain, "rl")
    assert not {"clip", "gae_lambda", "surrogate", "kl"} & yaml.safe_load(said.to_yaml())["rl"].keys()


def test_the_resolved_recipe_says_the_row_in_a_comment(load: Load) -> None:
    first = load("grpo", "clip=0.1").to_yaml().splitlines()[0]
    assert first.startswith("# rl.algorithm grpo: advantage group-std, ")
    assert first.endswith("kl loss-k3, clip 0.1")


def test_the_critic_is_the_rows_or_the_recipes(load: Load) -> None:
    assert load("reinforce++").critic == "none"
    assert load("reinforce++", "critic=shared").critic == "shared"
    assert rl_of(load("reinforce++", "critic=shared")).row.needs_critic
    assert not rl_of(load("reinforce", "critic=none")).row.needs_critic
    assert load("rloo", "advantage=gae").critic == "shared"
    assert load("ppo", "advantage=group", "samples_per_prompt=2").critic == "none"


@pytest.mark.parametrize(
    ("name", "said", "what", "remedy"),
    [
        ("grpo", ["samples_per_prompt=1"], "group-std compares completions", "at least 2"),
        ("ppo", ["advantage=group"], "group compares completions", "at least 2"),
        ("ppo", ["critic=none"], "gae needs a critic", "Set critic to shared or adapter"),
        ("kimi", ["critic=adapter"], "kimi has no critic", "Leave it out"),
        ("grpo", ["surrogate=plain"], "plain is on-policy", "Set epochs to 1"),
        ("reinforce", ["ratio=answer"], "plain has no ratio per completion", "Set ratio to token"),
        ("kimi", ["ratio=answer"], "mirror has no ratio per completion", "Set ratio to token"),
        ("kimi", ["average=tokens"], "mirror is for whole completions", "Set average to answers"),
        ("kimi", ["kl=loss-k3"], "mirror limits the policy by tau", "Set kl to none"),
        ("grpo", ["kl=reward-k1"], "group-std would divide the KL", "Set kl to loss-k2"),
        ("maxrl", ["normalize_rewards=true"], "divides by the mean of raw", "Set normalize_rewards to false"),
        ("ppo", ["drop_equal_groups=true"], "gae has no groups", "Set drop_equal_groups to false"),
        ("trpo", ["epochs=2"], "natural takes one step", "Set epochs to 1"),
        ("trpo", ["minibatches=2"], "natural takes one step", "Set minibatches to 1"),
        ("trpo", ["value_coef=0.5"], "for the policy's loss only", "Set value_coef to 0"),
        ("reinforce", ["direction=natural"], "no step length without trust_region", "Set trust_region"),
        ("grpo", ["redraws=1"], "that drop_equal_groups leaves out", "redraws to 0"),
        ("reinforce", ["minibatches=2"], "plain is on-policy", "Set minibatches to 1"),
        ("grpo", ["minibatches=17"], "16 completions per step", "Lower minibatches"),
        ("dapo", ["kl_target=3"], "kl none has no coefficient", "Set kl"),
        ("ppo", ["kl_target=3", "kl_coef=0"], "stays 0", "Raise kl_coef"),
        ("ppo", ["length_reward=1"], "length_reward compares", "at least 2"),
        ("ppo", ["overlong_buffer=2"], "no effect without overlong_penalty", "Set overlong_penalty"),
        ("ppo", ["overlong_penalty=1", "overlong_buffer=7"], "longer than the 6 tokens", "Lower it"),
        ("grpo", ["gae_lambda=0.9"], "gae_lambda has no effect without advantage gae", "Leave it out"),
        ("rloo", ["tau=2"], "tau has no effect without surrogate mirror", "Leave it out"),
        ("kimi", ["clip=0.1"], "clip has no effect without surrogate clip or clip-weight", "Leave it out"),
        ("cispo", ["dual_clip=3"], "dual_clip has no effect without surrogate clip", "Leave it out"),
        ("dapo", ["value_coef=0.5"], "value_coef has no effect without a critic", "Leave it out"),
        ("trpo", ["value_clip=0.5"], "no effect without a critic and surrogate clip", "Leave it out"),
        ("ppo", ["dual_clip=0.5"], "the gradient of everything worse than expected", "Raise it"),
        ("ppo", ["success_reward=1"], "without length_reward or another prompt_sampling", "Leave it out"),
        ("grpo", ["length_reward_delay=0.1"], "no effect without length_reward", "Leave it out"),
        ("grpo", ["length_reward=1", "length_reward_delay=1"], "leaves no step with a length reward", "Lower it"),
        ("grpo", ["surrogate=clipp"], "should be 'plain', 'ratio', 'clip'", "Did you mean clip?"),
        ("grpo", ["clip=2"], "less than or equal to 1", ""),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, said: list[str], what: str, remedy: str, load: Load) -> None:
    with pytest.raises(UserError) as caught:
        load(name, *said)
    assert what in str(caught.value)
    assert remedy in str(caught.value).partition("\n")[2]


@pytest.mark.parametrize("name", ["kimi", "dr-grpo", "grpo"])
def test_a_kl_of_no_weight_is_allowed(name: str, load: Load) -> None:
    assert rl_of(load(name, "kl_coef=0")).kl_coef == 0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_steps_of_each_row(name: str, write_recipe: WriteRecipe, tmp_path: Path, run_cli: RunCli) -> None:
    rl = SETTINGS | {"algorithm": name, "reward": {"function": "rewards.py:length"}, "micro_batch_size": 3}
    code, text = run_cli("rl", write_recipe(reward=None, rl=rl), "--out", tmp_path / "out")
    assert code == 0, text
    assert f"{name}: {ALGORITHMS[name].words}." in " ".join(text.split())
    stage = parse(RlStage, (tmp_path / "out/policy/result.json").read_text(), "result.json", "")
    assert stage.algorithm_row == ALGORITHMS[name]
    steps = [json.loads(line) for line in (tmp_path / "out/policy/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(step["grad_norm"] > 0 and not step.get("refused") for step in steps)
    assert abs(steps[1]["kl"]) > 1e-5
