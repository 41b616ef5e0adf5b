"""`keys`: a recipe's keys, from the definitions that validate it."""

from pathlib import Path

from perl.commands.keys import markdown_table
from perl.recipe.keys import recipe_keys
from tests.conftest import RunCli

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def test_the_page_has_every_key_as_the_command_prints_it(run_cli: RunCli) -> None:
    code, text = run_cli("keys", "--markdown")
    assert code == 0
    assert text.splitlines() == markdown_table(list(recipe_keys()))
    assert text in PAGE.read_text(encoding="utf-8"), "put perl-rlhf keys --markdown into docs/recipes.md"


def test_every_key_has_a_meaning() -> None:
    assert [key.name for key in recipe_keys() if not key.meaning] == []


def test_of_a_section_its_own_keys_alone(run_cli: RunCli) -> None:
    code, text = run_cli("keys", "lora")
    assert code == 0
    assert "lora.rank = 8  (whole number > 0)" in text
    assert all(line.startswith(("lora.", " ")) for line in text.splitlines())


def test_bounds_choices_and_defaults(run_cli: RunCli) -> None:
    keys = {key.name: key for key in recipe_keys()}
    assert keys["rl.guard"].values == "stop, warn, off"
    assert keys["rl.learning_rate"].values == "number > 0 ≤ 1 or auto"
    assert keys["seed"].values == "whole number ≥ 0 < 2³²"
    assert keys["base.random_init"].default == "false"
    assert keys["base"].values == "section"
    assert "rl.reward[length].target" in keys


def test_an_unknown_section_is_refused_with_the_nearest(run_cli: RunCli) -> None:
    code, text = run_cli("keys", "rewrad")
    assert code == 2
    assert "did you mean reward?" in text
