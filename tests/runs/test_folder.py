"""The files of a run folder."""

import json
from pathlib import Path

from perl.results import Completion, Sample
from perl.roles.role import Role
from perl.runs.folder import RunFolder


def sample(text: str) -> Sample:
    return Sample(prompt="a", answers={"policy": Completion(text=text, reward=0.0)})


def test_a_completion_may_contain_every_line_separator_of_unicode(tmp_path: Path) -> None:
    folder, text = RunFolder(tmp_path), "a\x85b\u2028c\u2029d\x1ce\nf"
    folder.role(Role.POLICY).mkdir()
    for step in (0, 50, 100, 50):  # the last one after an interruption
        folder.add_samples(step, [sample(text)])
    lines = (tmp_path / "policy" / "samples-by-step.jsonl").read_text(encoding="utf-8").split("\n")
    found = [json.loads(line) for line in lines if line]
    assert [(one["step"], one["answers"]["policy"]["text"]) for one in found] == [(0, text), (50, text)]
