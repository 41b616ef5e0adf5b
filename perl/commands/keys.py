"""`keys`: the keys of a recipe."""

import textwrap
from typing import Annotated

import typer

from perl.errors import UserError
from perl.recipe.keys import Key, recipe_keys
from perl.recipe.section import nearest

INDENT = " " * 4


def keys(
    section: Annotated[str, typer.Argument(metavar="[SECTION]", help="base, lora, data, sft, reward, rl …")] = "",
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/recipes.md.")] = False,
) -> None:
    """Print the keys of a recipe, or of one section, with values, default and meaning."""
    rows = [key for key in recipe_keys() if not section or key.name.startswith((f"{section}.", f"{section}["))]
    if not rows:
        known = [key.name for key in recipe_keys() if key.values == "section"]
        raise UserError(f"a recipe has no section {section!r}", where="SECTION", remedy=nearest(section, known))
    if markdown:
        print("\n".join(markdown_table(rows)))
        return
    for key in rows:
        default = f" = {key.default}" if key.default else ""
        print(f"{key.name}{default}" + (f"  ({key.values})" if key.values != "section" else ""))
        if key.meaning:
            print(textwrap.fill(key.meaning, width=100, initial_indent=INDENT, subsequent_indent=INDENT))


def markdown_table(rows: list[Key]) -> list[str]:
    """Return the lines of a table in Markdown."""
    body = (
        f"| `{key.name}` | {key.values} | {f'`{key.default}`' if key.default else ''} | {key.meaning} |"
        for key in rows
    )
    return ["| key | values | default | meaning |", "|---|---|---|---|", *body]
