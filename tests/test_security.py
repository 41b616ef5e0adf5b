"""Content of a model, an adapter, a checkpoint, data or a recipe cannot run code, leave its folder or leak."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import dynamic_module_utils

from perl.backbones.fake import fake_lm
from perl.backbones.loading import load_base
from perl.data.fetch import TASKMASTER, Repository, fetch
from perl.errors import UserError
from perl.predict import read_subject
from perl.recipe import load_recipe
from perl.roles.role import Role
from perl.roles.saved import load_role, save_role, stamp_for
from perl.roles.shared_base import SharedBase
from perl.runs.checkpoint import Checkpoints
from tests.bad_input.cases import contents
from tests.conftest import RunCli, WriteRecipe, write_rows
from tests.tiny import lora

CPU = torch.device("cpu")
PACKAGE = Path(__file__).parent.parent / "perl"


class Mine:
    """An object whose unpickling runs code, which creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(self.file), "w")


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """Return a file that exists only if forbidden code has run."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "code that came with a file has run"


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_the_canary_works(tmp_path: Path) -> None:
    torch.save(Mine(tmp_path / "ran"), tmp_path / "pickle")
    torch.load(tmp_path / "pickle", weights_only=False).close()
    assert (tmp_path / "ran").exists()


# No pickles.


def alone(model: Path, pickle: Mine) -> None:
    (model / "model.safetensors").unlink()
    torch.save(pickle, model / "pytorch_model.bin")


def by_the_index(model: Path, pickle: Mine) -> None:
    shards = dict.fromkeys(load_file(model / "model.safetensors"), "shard.bin")
    (model / "model.safetensors").rename(model / "other.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    torch.save(pickle, model / "shard.bin")


def by_the_configuration(model: Path, pickle: Mine) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"transformers_weights": "adapter_model.bin"}))
    torch.save(pickle, model / "adapter_model.bin")


def as_an_adapter(model: Path, pickle: Mine) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 2, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(config))
    torch.save(pickle, model / "adapter_model.bin")


def under_another_name(model: Path, pickle: Mine) -> None:
    torch.save(pickle, model / "model.safetensors")


@pytest.mark.parametrize("put", [alone, by_the_index, by_the_configuration, as_an_adapter, under_another_name])
def test_no_pickle_of_a_model_is_read(put: Callable[[Path, Mine], None], model: Path, canary: Path) -> None:
    put(model, Mine(canary))
    with pytest.raises(UserError, match=r"cannot be loaded") as caught:
        load_base(str(model), torch.float32, CPU)
    assert "safetensors" in str(caught.value)


def test_pickles_beside_safetensors_are_left_alone(model: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        torch.save(Mine(canary), model / name)
    load_base(str(model), torch.float32, CPU)


def test_no_pickle_of_an_adapter_is_read(model: Path, canary: Path, tmp_path: Path) -> None:
    def roles() -> SharedBase:
        return SharedBase(lora(lm, 2, 4))

    base, lm = load_base(str(model), torch.float32, CPU)
    mine, folder = roles(), tmp_path / "sft" / "adapter"
    mine.add(Role.SFT)
    save_role(mine, Role.SFT, folder, stamp_for(Role.SFT, base))
    weights = folder / "adapter_model.safetensors"
    weights.unlink()
    torch.save(Mine(canary), folder / "adapter_model.bin")
    with pytest.raises(UserError, match="pickles are never read"):
        load_role(mine, Role.SFT, folder, base)
    torch.save(Mine(canary), weights)
    with pytest.raises(UserError, match="cannot be read"):
        load_role(mine, Role.SFT, folder, base)


def test_no_pickle_of_a_checkpoint_is_read(canary: Path, tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    for name in ("state.safetensors", "optimizer.pt", "rng_state.pth"):
        torch.save(Mine(canary), step / name)
    (step / "state.json").write_text('{"step": 1, "sha256": "", "values": {}}')
    with pytest.raises(UserError, match="this checkpoint is damaged"):
        Checkpoints(tmp_path / "checkpoints", 1).newest()


FORBIDDEN = re.compile(
    r"torch\.load\(|import pickle|weights_only|trust_remote_code=True[,)]|yaml\.(unsafe_|full_)?load\(|shell=True|"
    r"(?<![.\w])(eval|exec)\(|verify=False|extractall|os\.system"
)


def test_the_package_has_no_call_that_would() -> None:
    found = [
        f"{file.name}: {match[0]}"
        for file in PACKAGE.rglob("*.py")
        for match in FORBIDDEN.finditer(file.read_text(encoding="utf-8"))
    ]
    assert found == ["plain_yaml.py: yaml.load("], "with a loader of its own that makes plain values only"


# Code that comes with a model.

OWN = """
from importlib import import_module
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({ran!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = {model_type!r}
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Path]]:
    """Give the model its own Python code for a model type; return the file that the code creates."""
    cache = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))
    monkeypatch.syspath_prepend(cache)  # transformers adds it too; this removes it again

    def give(model_type: str) -> Path:
        ran = tmp_path / "ran"
        (model / "own.py").write_text(OWN.format(ran=str(ran), model_type=model_type))
        config = json.loads((model / "config.json").read_text())
        config |= {
            "model_type": model_type,
            "architectures": ["OwnForCausalLM"],
            "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
        }
        (model / "config.json").write_text(json.dumps(config))
        return ran

    yield give
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def test_code_of_a_model_runs_only_if_the_recipe_says_so_and_that_is_said(
    own_code: Callable[[str], Path], model: Path, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    ran, out = own_code("own"), tmp_path / "out"
    recipe = write_recipe(base={"model": str(model), "dtype": "float32"}, reward=None)
    for command in (["run", recipe, "--out", out], ["estimate", recipe]):
        status, written = run_cli(*command)
        assert status == 2
        assert f"base.model {model}: it comes with Python code of its own, which is not run" in written
        assert "set base.trust_remote_code: true" in written
        assert not ran.exists()
        assert not out.exists()
    trusting = "base.trust_remote_code=true"
    status, written = run_cli("run", recipe, trusting, "--out", out)
    assert status == 0, written
    assert ran.exists()
    assert f"\nPython code that comes with {model} may run now: the recipe sets base.trust" in written
    config = read_subject(load_recipe(recipe, [trusting])).config
    assert type(fake_lm(config, torch.float32)).__name__ == "OwnForCausalLM", "estimates are of this code too"


def test_a_known_model_is_used_without_the_code_that_comes_with_it(
    own_code: Callable[[str], Path], model: Path
) -> None:
    ran = own_code("llama")
    for seed in (None, 0):
        _, lm = load_base(str(model), torch.float32, CPU, random_seed=seed)
        assert type(lm).__module__ == "transformers.models.llama.modeling_llama"
    assert not ran.exists()


def test_a_configuration_in_a_recipe_cannot_call_for_code(
    own_code: Callable[[str], Path], model: Path, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    ran = own_code("llama")
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": f"{model}--own.OwnForCausalLM"}
    recipe = write_recipe(base={"config": config, "random_init": True, "dtype": "float32"}, reward=None)
    status, written = run_cli("run", recipe, "--out", tmp_path / "out")
    assert status == 0, written
    assert not ran.exists()


def test_no_library_tells_the_hub_what_it_does() -> None:
    from huggingface_hub import constants

    import_module("perl.private.trl")
    assert constants.HF_HUB_DISABLE_TELEMETRY


# Names and archives.


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "..", ".", ".x", "-x", "a\nb", "a\0b", "a\\b", "", "x" * 101]
)
def test_a_run_cannot_be_named_out_of_its_folder(name: str, write_recipe: WriteRecipe) -> None:
    with pytest.raises(UserError, match="name"):
        load_recipe(write_recipe(name=name))


@pytest.mark.parametrize("path", ["TM-3-2020/../../evil.json", "TM-3-2020/..", "TM-3-2020/a/../../../evil.json"])
def test_a_download_cannot_be_put_out_of_its_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "served" / "TM-3-2020" / "a").mkdir(parents=True)
    (tmp_path / "evil.json").write_text("old")
    listing = tmp_path / "pins"
    listing.write_text(f"{'0' * 64}  3  {path}\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Repository, "url", (tmp_path / "served").as_uri())
    before = contents(tmp_path)
    with pytest.raises(UserError, match="points outside its folder"):
        fetch("TM-3-2020", replace(TASKMASTER, listing=listing))
    assert contents(tmp_path) == before


# Leaks.

SECRETS = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"]
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)> [/red] $x_1$"


@pytest.mark.usefixtures("drawn_plots")
def test_reports_and_logs_hold_no_secrets_and_nothing_that_would_run(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, f"s3cr3t-{name}")
    rows = [
        {"prompt": [{"role": "user", "content": f"{n} {EVIL}"}], "completion": f"{EVIL} {n}", "label": n % 2}
        for n in range(20)
    ]
    file = write_rows(tmp_path / "own.jsonl", [*rows, {"prompt": EVIL, "label": EVIL, EVIL: 1}])
    recipe = write_recipe(data={"source": "jsonl", "path": str(file), "held_out": 0.3})
    out = tmp_path / "out"
    status, written = run_cli("run", recipe, "--out", out)
    assert status == 0, written
    said = [written.encode(), *(content for content in contents(out).values() if content is not None)]
    assert not any(b"s3cr3t" in content for content in said)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page, "the prompts are shown"
    assert page.count("<script") == 1, "ours, which the page's policy lets run by its hash"
    assert "<img" not in page
