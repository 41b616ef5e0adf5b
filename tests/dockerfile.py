"""Parser of Dockerfiles into stages of instructions; supports those in docker/, but no heredocs."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One instruction, with its continuation lines joined."""

    keyword: str
    """Keyword in capitals."""
    flags: dict[str, list[str]]
    """Values of `--NAME=VALUE` before the text; a name may occur several times."""
    text: str

    @property
    def words(self) -> list[str]:
        """Return the text as a list: parsed if it is JSON, else split at whitespace."""
        parsed: list[str] = json.loads(self.text) if self.text.startswith("[") else self.text.split()
        return parsed

    def __str__(self) -> str:
        """Return the instruction on one line."""
        flags = [f"--{name}={value}" for name, values in self.flags.items() for value in values]
        return " ".join([self.keyword, *flags, self.text])


@dataclass
class Stage:
    """The instructions from one FROM to the next."""

    base: str
    name: str
    instructions: list[Instruction] = field(default_factory=list)

    def last(self, keyword: str) -> Instruction:
        """Return the last instruction with this keyword, which overrides earlier ones."""
        return [one for one in self.instructions if one.keyword == keyword][-1]

    def environment(self) -> dict[str, str]:
        """Return the variables that ENV sets, not expanded."""
        pairs = [word for one in self.instructions if one.keyword == "ENV" for word in one.words]
        return dict(pair.split("=", 1) for pair in pairs)

    def health_check(self) -> list[str]:
        """Return the command of HEALTHCHECK."""
        parsed: list[str] = json.loads(self.last("HEALTHCHECK").text.removeprefix("CMD "))
        return parsed


def read_dockerfile(file: Path) -> list[Stage]:
    """Return the stages of a Dockerfile in order; the last one is the image."""
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
    """Return the files in the build context: .dockerignore excludes everything except the names it lists."""
    first, *rest = (
        line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")
    )
    assert first == "*"
    return [line.removeprefix("!") for line in rest if line.startswith("!")]
