"""Reads a Dockerfile: stages of instructions. Enough of the format for those in docker/; heredocs are not."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, its continuation lines joined."""

    keyword: str
    """In capitals."""
    flags: dict[str, list[str]]
    """`--NAME=VALUE` before the text; a name may come several times."""
    text: str

    @property
    def words(self) -> list[str]:
        """The text as a list: JSON where it is, else split at blanks."""
        parsed: list[str] = json.loads(self.text) if self.text.startswith("[") else self.text.split()
        return parsed

    def __str__(self) -> str:
        """On one line."""
        flags = [f"--{name}={value}" for name, values in self.flags.items() for value in values]
        return " ".join([self.keyword, *flags, self.text])


@dataclass
class Stage:
    """What stands between one FROM and the next."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, keyword: str) -> Instruction:
        """The instruction that counts where a later one overrides an earlier."""
        return [one for one in self.instructions if one.keyword == keyword][-1]

    def environment(self) -> dict[str, str]:
        """What ENV sets, as written."""
        pairs = [word for one in self.instructions if one.keyword == "ENV" for word in one.words]
        return dict(pair.split("=", 1) for pair in pairs)

    def health_check(self) -> list[str]:
        """The command of HEALTHCHECK."""
        parsed: list[str] = json.loads(self.last("HEALTHCHECK").text.removeprefix("CMD "))
        return parsed


def read_dockerfile(file: Path) -> list[Stage]:
    """The stages of a Dockerfile in order; the last one is the image."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    stages: list[Stage] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if not line.strip():
            continue
        keyword, _, rest = line.strip().partition(" ")
        flags: dict[str, list[str]] = {}
        while match := re.match(r"\s*--([a-z-]+)=(\S+)\s+(?=\S)", rest):
            # HEALTHCHECK's CMD follows its flags, RUN's command its mounts
            flags.setdefault(match[1], []).append(match[2])
            rest = rest[match.end() :]
        text = " ".join(rest.split())
        if keyword.upper() == "FROM":
            base, *named = text.split()
            stages.append(Stage(base, named[-1] if named else str(len(stages))))
        else:
            stages[-1].instructions.append(Instruction(keyword.upper(), flags, text))
    return stages


def context_files(root: Path) -> list[str]:
    """What .dockerignore lets into the build context: it excludes everything and names exceptions."""
    first, *rest = (
        line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    )
    assert first == "*"
    return [line.removeprefix("!") for line in rest if line.startswith("!")]
