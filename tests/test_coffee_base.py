"""The base in `data/coffee-base`: small, complete, where the recipes expect it, and able to copy an order."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from perl.backbones.base import Base
from perl.backbones.loading import load_base
from perl.data.records import Turn
from perl.errors import UserError
from perl.recipe import load_recipe

PROJECT = Path(__file__).parent.parent
FOLDER = PROJECT / "data" / "coffee-base"
SHA256 = "705d795f51a543c382ab3adcd20dfd06441fbcc360579c5467c64303f2cab4ae"


@pytest.fixture(scope="module")
def loaded() -> tuple[Base, PreTrainedModel]:
    return load_base(str(FOLDER), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("name", ["quickstart", "reward-only"])
def test_recipes_find_it_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_recipe(PROJECT / "recipes" / f"{name}.yaml").base.model == str(FOLDER)


def test_a_recipe_without_it_says_where_it_is_looked_for(tmp_path: Path) -> None:
    (tmp_path / "copy.yaml").write_text((PROJECT / "recipes" / "quickstart.yaml").read_text())
    model = load_recipe(tmp_path / "copy.yaml").base.model
    assert model is not None
    with pytest.raises(UserError, match="no such folder") as refused:
        load_base(model, torch.float32, torch.device("cpu"))
    assert "next to the recipe" in str(refused.value)


def test_it_is_small_and_the_one_that_was_measured(loaded: tuple[Base, PreTrainedModel]) -> None:
    base, lm = loaded
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 8_000_000
    assert (base.sha256, base.parameters, base.context_length) == (SHA256, 705_408, 512)
    assert lm.dtype == torch.float32
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in lm.parameters())  # as they were saved
    assert base.chat.probe({"user", "agent", "api"}) == []


@pytest.mark.parametrize("order", ["a large mocha with soy milk", "a small tea with oat milk and cinnamon"])
def test_it_reads_an_order_back(order: str, loaded: tuple[Base, PreTrainedModel]) -> None:
    base, lm = loaded
    ids = torch.tensor([base.chat.context((Turn("user", f"hi, i would like {order} please."),))])
    written = lm.generate(input_ids=ids, attention_mask=ids * 0 + 1, max_new_tokens=30, do_sample=False)  # type: ignore[operator]
    assert order in base.tokenizer.decode(written[0, ids.shape[1] :])
