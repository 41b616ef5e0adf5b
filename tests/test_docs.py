"""The documentation: link targets, commands and options exist."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from perl import cli

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *ROOT.glob("*/README.md"), *(ROOT / "docs").glob("*.md")])
COMMAND = re.compile(r"perl-rlhf [a-z][^`\n]*")


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Linked files exist, and so do headings in addresses."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    for link in (link for link in links if "://" not in link):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def _commands(page: Path) -> Iterator[list[str]]:
    for found in COMMAND.findall(page.read_text(encoding="utf-8")):
        text = re.sub(r"\\?[|\[\]…]", " ", found.partition("  #")[0].partition(" | ")[0])
        yield shlex.split(text, comments=True)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    """Every command that a page names exists, with the options given there."""
    for words in _commands(page):
        command: Any = typer.main.get_command(cli.app)
        while words and hasattr(command, "commands"):
            name = words.pop(0).rstrip(",.;:")
            if name.startswith("-"):
                break
            assert name in command.commands, name
            command = command.commands[name]
        options = {option for parameter in command.params for option in parameter.opts}
        for word in words:
            option = word.partition("=")[0].rstrip(",.;:)")
            assert not option.startswith("--") or option in options | {"--help"}, (words, option)
