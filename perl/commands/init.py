"""`init`: a recipe for the user's data, with the stages that the rows allow, and the memory that it needs."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from perl.commands.estimate import print_prediction
from perl.commands.options import Columns, parse_columns
from perl.data.chats import speakers_of
from perl.data.records import Records
from perl.data.sources import load_records, parse_source
from perl.data.tables import columns_in
from perl.errors import UserError
from perl.recipe import Recipe
from perl.recipe.draft import commented, draft
from perl.system.files import user_named, write_whole
from perl.system.progress import console, counted

BASE = "Qwen/Qwen2.5-0.5B-Instruct"
"""The suggested base, small enough for a CPU."""
KINDS = {
    "demonstrations": "demonstration",
    "ratings": "rated answer",
    "comparisons": "pair",
    "prompts": "prompt",
}
GIVES = {
    "sft": "a model that answers as the demonstrations do",
    "reward": "a reward model, and whether it is fit for RL",
    "rl": "the policy",
}


def init(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="The recipe to write.")] = Path("recipe.yaml"),
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Your rows: JSON Lines, JSON, CSV, TSV, Parquet.")
    ] = None,
    base: Annotated[str | None, typer.Option("--base", metavar="MODEL", help="A hub id or a folder.")] = None,
    columns: Columns = None,
    yes: Annotated[bool, typer.Option("--yes", help=f"Ask no questions; the default base is {BASE}.")] = False,
) -> None:
    """Write a recipe for your own data, with the stages that the rows allow; show how much memory it needs."""
    if file.exists():
        raise UserError("exists already", where=str(file), remedy="Name another file for the recipe.")
    data = data or _asked("--data", "Your data file", None, yes)
    name, path = parse_source(data)
    if name != "jsonl" or path is None:
        remedy = "Name a file; for a source of this package copy a recipe from recipes/."
        raise UserError(f"{data} is not a file", where="--data", remedy=remedy)
    named = columns_in(Path(path)) | parse_columns(columns)
    records = load_records(name, path, 0, named)
    _describe(records)
    base = base or _asked("--base", "The base model, a hub id or a folder", BASE, yes)
    from perl.backbones.loading import has_chat_format

    chat = speakers_of(records) == {"text"} and has_chat_format(base)
    if chat:
        console.print(f"The rows are plain text: {base}'s chat format is applied to them.", markup=False)
    name, dtype = file.stem, _dtype()
    recipe = Recipe.model_validate(draft(name, base, dtype, path, named, records, chat))
    console.print(f"Predicting the memory that {base} needs …", markup=False)
    print_prediction(recipe)
    base, path = (_seen_from(file.parent, one) for one in (base, path))
    content = draft(name, base, dtype, path, named, records, chat)
    with user_named(file):
        write_whole(file, commented(content))
    console.print(f"Written: {file}.", markup=False)
    if recipe.stages == ("rl",):
        console.print("Its rl.reward is a placeholder: replace it with your own reward first.", style="yellow")
    console.print("Next:")
    for stage in recipe.stages:
        console.print(f"  perl-rlhf {stage} {file}  # {GIVES[stage]}", markup=False)


def _seen_from(folder: Path, given: str) -> str:
    """Return a relative path as seen from the recipe's folder, where it is looked for; a hub id is unchanged."""
    there, path = folder.resolve(), Path(given)
    if path.is_absolute() or there == Path.cwd() or not path.exists():
        return given
    return os.path.relpath(path, there)


def _dtype() -> str:
    """Return the base's dtype: bfloat16, or float32 on a CPU that is slow in bfloat16."""
    import torch

    from perl.system.device import SLOW, slowdown

    if torch.cuda.is_available() or (times := slowdown(torch.bfloat16)) < SLOW:
        return "bfloat16"
    console.print(
        f"This CPU computes bfloat16 about {times:.0f} times slower than float32, which the recipe sets."
    )
    return "float32"


def _asked(option: str, question: str, default: str | None, yes: bool) -> str:
    """Ask the user, or return the default under --yes.

    Raises:
        UserError: there is no user to ask.
    """
    if yes and default is not None:
        return default
    if yes or not sys.stdin.isatty():
        raise UserError(f"{option} is missing", where=option, remedy="Give it, or run this in a terminal.")
    answer: str = typer.prompt(question, default=default, err=True)
    return answer


def _describe(records: Records) -> None:
    found = {kind: len(rows) for kind, rows in records.by_kind().items() if rows}
    if set(found) != {"prompts"}:
        found.pop("prompts", None)  # the contexts of the other rows
    console.print(f"{' and '.join(counted(number, KINDS[kind]) for kind, number in found.items())}.")
    others = list(dict.fromkeys(name for prompt in records.prompts for name in prompt.columns))
    if others and not (records.ratings or records.comparisons):
        console.print(
            f"Only reward functions read {', '.join(others)}. If one of these columns rates the answers, remove "
            "the recipe and give --columns label=NAME.",
            style="yellow",
            markup=False,
        )
    if records.problems:
        first = records.problems[0]
        left_out = counted(len(records.problems), "row")
        console.print(f"{left_out} left out, the first {first.where}: {first.what}", style="yellow", markup=False)
