"""Kinds of adapters from outside the package, variants of LoRA, and where the kind may be given."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    FalconConfig,
    FalconForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from perl.adapters import ADAPTERS, low_rank
from perl.adapters.folder import PREFIX, WEIGHTS, read_adapter_folder
from perl.adapters.lora import Lora
from perl.adapters.targets import linear_layers
from perl.backbones.loading import load_base
from perl.errors import UserError
from perl.recipe import Recipe, load_recipe
from perl.recipe.adapter import LoraSettings
from perl.roles.export_formats import merge, save_adapter
from perl.roles.role import Role
from perl.roles.saved import load_role, save_role, stamp_for
from perl.roles.shared_base import SharedBase
from perl.stages.opening import adapters_for
from tests.adapters.example_bias import Bias, BiasSettings
from tests.conftest import RunCli, WriteRecipe
from tests.encoder_decoders import tiny_t5
from tests.tiny import adapter_of_kind, lora, random_llama

ADAPTERS.pop("bias")  # importing the example registered it for all tests


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Register the example as a kind that a recipe can name."""
    monkeypatch.setitem(ADAPTERS, "bias", Bias)


@pytest.fixture
def plugin(own_registries: None) -> str:
    """Return the example's file as a plugin."""
    return str(Path(__file__).parent / "example_bias.py")


def bias(folder: Path | None = None, **settings: Any) -> SharedBase:
    lm = random_llama() if folder is None else load_base(str(folder), torch.float32, torch.device("cpu"))[1]
    return SharedBase(Bias(lm, BiasSettings(kind="bias", **settings)))


def batch() -> tuple[Tensor, Tensor]:
    return torch.arange(3, 27).view(3, 8), torch.ones(3, 8, dtype=torch.bool)


def log_probs(roles: SharedBase, role: Role) -> Tensor:
    found = roles(role, *batch(), completion_length=4, temperature=1.0).log_probs_BT
    assert found is not None
    return found


def test_its_role_comes_back_after_an_exception() -> None:
    roles = bias()
    roles.add(Role.POLICY)

    def fail() -> None:
        with roles.role(Role.POLICY):
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert roles.adapter.active is None  # type: ignore[attr-defined]


def randomized(roles: SharedBase, role: Role, **add: Any) -> SharedBase:
    roles.add(role, **add)
    for parameter in roles.parameters_of(role):
        parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return roles


def test_it_is_saved_and_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    base, _ = load_base(str(tiny_llama), torch.float32, torch.device("cpu"))
    roles = randomized(bias(tiny_llama), Role.REWARD, head=True)
    save_role(roles, Role.REWARD, tmp_path / "reward", stamp_for(Role.REWARD, base))
    again = bias(tiny_llama)
    load_role(again, Role.REWARD, tmp_path / "reward", base)
    expected = roles(Role.REWARD, *batch(), head=Role.REWARD).scores_B
    assert torch.equal(again(Role.REWARD, *batch(), head=Role.REWARD).scores_B, expected)
    for other in (bias(tiny_llama, targets=["v_proj"]), SharedBase(lora(random_llama()))):
        with pytest.raises(UserError, match=r"has another .* than the recipe's (adapter|lora) section"):
            load_role(other, Role.REWARD, tmp_path / "reward", base)
    with pytest.raises(UserError, match="peft does not read adapters of kind bias"):
        save_adapter(roles, Role.REWARD, Role.REWARD, "base", tmp_path)


def test_its_targets_are_checked_and_its_reach_is_told() -> None:
    with pytest.raises(UserError, match=r"adapter\.targets: no module matches 'value'"):
        bias(targets=["value"])
    roles = bias(targets=["v_proj"])
    assert roles.coverage.without == sorted(
        [*(f"mlp.{name}_proj" for name in ("down", "gate", "up")), *(f"self_attn.{name}_proj" for name in "koq")]
    )


@pytest.mark.usefixtures("registered")
def test_a_recipe_chooses_the_kind() -> None:
    content = {"name": "x", "base": {"model": "org/model"}, "reward": {}}
    recipe = Recipe.model_validate({**content, "adapter": {"kind": "bias", "targets": ["v_proj"]}})
    adapter = adapters_for(recipe, random_llama())
    assert isinstance(adapter, Bias)
    assert adapter.settings == BiasSettings(kind="bias", targets=["v_proj"])
    assert isinstance(adapters_for(Recipe.model_validate(content), random_llama()), Lora)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "bais"}, "no adapter kind 'bais': did you mean bias"),
        ({"kind": "bias", "rank": 4}, "rank is no setting: kind bias has kind, targets"),
        ({"kind": "bias", "targets": 4}, "targets.*valid string.*: kind bias has kind, targets"),
    ],
)
def test_what_a_recipe_says_of_it_is_checked(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        Recipe.model_validate({"name": "x", "base": {"model": "org/model"}, "reward": {}, "adapter": settings})


def test_all_stages_run_with_it(
    plugin: str, write_recipe: WriteRecipe, run_cli: RunCli, mixed_data: Path, tmp_path: Path
) -> None:
    """It goes from the base to the report and its evaluation; a kind without export support is not exported."""
    code_lines = Path(plugin).read_text().rpartition('"""')[2].split("\n")
    assert sum(bool(line.strip()) for line in code_lines) <= 40
    file = write_recipe(
        plugins=[plugin],
        lora=None,
        adapter={"kind": "bias"},
        data={"source": "jsonl", "path": str(mixed_data), "held_out": 0.3},
        sft={"batch_size": 4, "max_length": 64},
        rl={"steps": 2, "prompts_per_step": 2, "max_new_tokens": 4, "eval_prompts": 2, "algorithm": "ppo"},
    )
    out = tmp_path / "out"
    code, text = run_cli("run", file, "--out", out)
    assert code == 0, text
    report = json.loads((out / "report.json").read_text())
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"]
    assert report["base"]["coverage"] == 1
    assert load_recipe(out / "recipe.yaml") == load_recipe(file)
    names = set(load_file(out / "policy" / "adapter" / "adapter_model.safetensors"))
    assert "base_model.model.model.layers.0.self_attn.q_proj.learned_bias" in names
    code, text = run_cli("evaluate", out, "policy")
    assert code == 0, text
    code, text = run_cli("export", out, "policy", tmp_path / "adapter")
    assert code == 2
    assert "peft does not read adapters of kind bias" in " ".join(text.split())
    code, text = run_cli("export", out, "policy", tmp_path / "whole", "--merge")
    assert code == 2
    assert "adapters of kind bias cannot be merged" in " ".join(text.split())
    code, text = run_cli("run", file, "adapter.targets=attention", "--out", out)
    assert code == 2
    assert "adapter" in text


VARIANTS = {
    "DoRA": {"use_dora": True},
    "a bias": {"lora_bias": True},
    "rank-stabilized": {"use_rslora": True},
    "activated": {"alora_invocation_tokens": [5]},
}


class Variant(Lora):
    """A kind that uses one of peft's variants, as a user would add it."""

    changes: dict[str, Any]

    def peft_config(self) -> LoraConfig:
        config = super().peft_config()
        for key, value in self.changes.items():
            setattr(config, key, value)
        return config


def variant(**changes: Any) -> SharedBase:
    lm = random_llama(attention_bias=True, mlp_bias=True)
    kind = type("Changed", (Variant,), {"changes": changes})
    return SharedBase(kind(lm, lora(lm).settings))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_variant_of_lora_computes_as_peft_has_it(changes: dict[str, Any]) -> None:
    """It uses the fast path or peft's own forward, but never computes plain LoRA."""
    roles = randomized(variant(**changes), Role.POLICY)
    plain = SharedBase(lora(random_llama(attention_bias=True, mlp_bias=True)))
    plain.add(Role.POLICY)
    theirs = random_llama(attention_bias=True, mlp_bias=True)
    adapter = roles.adapter
    assert isinstance(adapter, Variant)
    inject_adapter_in_model(copy.deepcopy(adapter.config), theirs, adapter_name="policy")
    own = dict(theirs.named_parameters())
    for name, parameter in roles.lm.named_parameters():
        own[name].data.copy_(parameter.data)
    for name, parameter in plain.weights(Role.POLICY).items():
        parameter.data.copy_(roles.weights(Role.POLICY)[name].data)
    ids_BL, _ = batch()
    expected = theirs(ids_BL).logits
    with roles.sampling(Role.POLICY), torch.no_grad():
        sampled = roles.lm(ids_BL).logits
    with roles.role(Role.POLICY):
        torch.testing.assert_close(roles.lm(ids_BL).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sampled, expected, rtol=1e-5, atol=1e-5)
    with plain.role(Role.POLICY):
        assert (plain.lm(ids_BL).logits - expected).abs().max() > 1e-3
    fast = {low_rank.has_own_forward(layer) for layer in adapter._layers}
    assert fast == {"use_rslora" in changes}
    fresh = random_llama(attention_bias=True, mlp_bias=True)
    if "use_rslora" in changes:
        merged = merge(fresh, roles, Role.POLICY)
        torch.testing.assert_close(merged(ids_BL).logits, expected, rtol=1e-5, atol=1e-5)
    else:
        with pytest.raises(UserError, match="cannot be merged"):
            merge(fresh, roles, Role.POLICY)


def test_adapters_of_another_variant_are_not_loaded(tmp_path: Path) -> None:
    lora(random_llama()).write_config(tmp_path, "base", None)
    assert lora(random_llama()).config_fits(tmp_path)
    assert not lora(random_llama(), dropout=0.0, rank=2).config_fits(tmp_path)
    assert not variant(use_rslora=True).config_fits(tmp_path)
    assert not variant(use_dora=True).config_fits(tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora", "loftq", "orthogonal", "eva", False])
def test_a_start_that_is_not_the_base_is_refused(start: object) -> None:
    with pytest.raises(UserError, match="starting LoRA with"):
        variant(init_lora_weights=start)


@pytest.mark.parametrize(("kind", "targets"), [("series", ["DenseReluDense"]), ("parallel", "attention")])
def test_parts_of_t5_are_found_inside_its_lists(kind: str, targets: str | list[str], tmp_path: Path) -> None:
    lm = load_base(str(tiny_t5(tmp_path)), torch.float32, torch.device("cpu"))[1]
    roles = randomized(SharedBase(adapter_of_kind(lm, kind, targets=targets)), Role.POLICY)
    given = {"input_ids": torch.arange(3, 9)[None], "decoder_input_ids": torch.arange(3)[None]}
    with torch.no_grad():
        bare = lm(**given).logits
        with roles.role(Role.POLICY):
            assert not torch.allclose(lm(**given).logits, bare, atol=1e-3)
        assert torch.equal(lm(**given).logits, bare)
    learned = {name.partition(".bottleneck")[0].rpartition(".")[2] for name in roles.weights(Role.POLICY)}
    assert learned == ({"SelfAttention", "EncDecAttention"} if targets == "attention" else {"DenseReluDense"})


def test_a_router_that_subclasses_linear_gets_no_adapter() -> None:
    """The router of Phimoe returns two tensors."""
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = PhimoeForCausalLM(PhimoeConfig(**shape, intermediate_size=32, num_key_value_heads=2, num_local_experts=4))
    names = linear_layers(lm)
    assert any(name.endswith("q_proj") for name in names)
    assert not [name for name in names if "router" in name]


def test_a_subclass_of_linear_with_a_forward_of_its_own_gets_an_adapter() -> None:
    """All linear layers of Falcon are of such a class."""
    shape: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    assert len(linear_layers(FalconForCausalLM(FalconConfig(**shape)))) == 4


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_the_targets_of_a_folder_are_its_modules_and_no_others_of_their_name(kind: str, tmp_path: Path) -> None:
    """Attention's output layer has the name of one in the MLP: `dense`, `c_proj`."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    auto = AutoModelForSequenceClassification if kind == "bert" else AutoModelForCausalLM
    written = lora(auto.from_config(config), targets="attention")
    written.inject("reward")
    written.write_config(tmp_path, "base", None)
    save_file({f"{PREFIX}{name}": one for name, one in written.parameters("reward").items()}, tmp_path / WEIGHTS)
    settings = read_adapter_folder(tmp_path, "reward.adapter").settings
    assert Lora(auto.from_config(config), LoraSettings(**settings)).adapted == written.adapted
