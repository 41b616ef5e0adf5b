"""Private interfaces: all that are used exist, and a missing one is refused by name."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import peft.tuners.lora
import pytest
from peft.functional import inject_adapter_in_model

from perl.errors import MachineError
from perl.private.checked import TESTED, need

ROOT = Path(__file__).parents[2]
PUBLIC = {"_replace", "_exit"}
"""Public interfaces with a leading underscore: `NamedTuple._replace`, `os._exit`."""


def _sources(*without: str) -> Iterator[Path]:
    """Yield the package's files, without those in some folders."""
    for file in sorted((ROOT / "perl").rglob("*.py")):
        if file.relative_to(ROOT / "perl").parts[0] not in without:
            yield file


def test_a_name_that_a_library_no_longer_has_is_refused_with_both_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("perl.private.checked.version", lambda library: "9.9")
    need(peft.tuners.lora.LoraLayer, "get_base_layer")
    with pytest.raises(MachineError) as refusal:
        need(peft.tuners.lora.LoraLayer, "get_base_layer", "_gone")
    said = str(refusal.value)
    assert "peft 9.9 has no _gone in peft.tuners.lora.layer.LoraLayer" in said
    assert f"pip install 'peft=={TESTED['peft']}'" in said
    with pytest.raises(MachineError, match=r"has no gone in peft\.tuners\.lora,"):
        need(peft.tuners.lora, "gone")


@pytest.mark.parametrize("library", ["torch", "peft", "deepspeed", "transformers"])
def test_the_installed_version_has_what_is_used(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    importlib.import_module(f"perl.private.{library}")


def test_the_versions_named_are_those_that_the_tests_run_with() -> None:
    pinned = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: pinned[name] for name in TESTED} == TESTED


def test_of_a_function_the_parameters_are_checked() -> None:
    need(inject_adapter_in_model, "adapter_name")
    with pytest.raises(MachineError, match=r"has no gone in peft\.mapping\.inject_adapter_in_model"):
        need(inject_adapter_in_model, "gone")


def test_private_names_of_others_stand_in_the_files_that_check_them() -> None:
    found = []
    for file in _sources("private"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                own = ast.unparse(node.value) in ("self", "cls", "super()")
                names = [] if own else [node.attr]
            elif isinstance(node, ast.ImportFrom):
                names = (node.module or "").split(".") + [alias.name for alias in node.names]
            else:
                continue
            private = [one for one in names if re.match("_[^_]", one) and one not in PUBLIC]
            found += [f"{file.relative_to(ROOT)}:{node.lineno} {one}" for one in private]
    assert found == []


def test_names_of_lora_in_peft_stand_with_the_adapters() -> None:
    known = re.compile(r"\blora_[AB]\b|LoraLayer|\blora_bias\b")
    found = [file for file in _sources("private", "adapters") if known.search(file.read_text(encoding="utf-8"))]
    assert found == []
