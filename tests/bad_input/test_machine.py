"""Machine faults and unusable run folders give one message and leave finished work intact."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import torch
import yaml
from transformers import PreTrainedModel

from perl import cli
from perl.data.fetch import TASKMASTER, Repository, cache_folder, fetch
from perl.errors import MachineError, machine_fault
from tests import forks
from tests.bad_input.cases import Case, contents, named
from tests.bad_input.conftest import Refused, RefusedIn
from tests.conftest import RunCli, WriteRecipe


def another_recipe(out: Path) -> None:
    out.mkdir()
    text = (out.parent / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(yaml.safe_dump(yaml.safe_load(text) | {"seed": 7}))
    (out / "policy" / "checkpoints" / "step-00000000").mkdir(parents=True)  # else the folder could be reused


def broken_recipe(out: Path) -> None:
    out.mkdir()
    (out / "recipe.yaml").write_text("name: [")


def broken_result(out: Path) -> None:
    (out / "policy").mkdir(parents=True)
    (out / "policy" / "result.json").write_text("{")


TINY = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
FOLDERS = [
    Case("another run", ("contains another run", "seed is 7, here 0", "Use another --out"), out=another_recipe),
    Case("a broken run", ("not valid YAML", "recipe.yaml", "Fix this line"), out=broken_recipe),
    Case("a broken result", ("not JSON", "result.json", "Remove it"), out=broken_result),
    Case("out is a file", ("cannot be written", "out", "another --out"), out=lambda out: out.write_text("x")),
    Case(
        "a model too large",
        ("Cannot allocate memory", "new_model (perl/backbones/backbone.py)", "smaller base"),
        changes={"base": {"config": {**TINY, "vocab_size": 2**45}, "random_init": True}},
        status=1,
    ),
]


@pytest.mark.parametrize("case", FOLDERS, ids=named)
def test_one_message_and_nothing_lost(case: Case, refused: Refused) -> None:
    refused(case)


def test_a_folder_in_use_is_refused(refused_in: RefusedIn, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", write_recipe()
    out.mkdir()
    with open(out / ".lock", "a") as lock:  # a second open file description acts like another process
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused_in(("another run is using this folder", str(out), "Wait for it"), "run", recipe, "--out", out)


# Disks.


@contextlib.contextmanager
def limit(size: int) -> Iterator[None]:
    """Limit the size of files to `size` bytes, which has the effect of a full disk for any user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """Mount a disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("only root may mount a disk, and not everywhere")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_without_room_what_was_finished_stays(run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path) -> None:
    recipe, out = write_recipe(), tmp_path / "out"
    assert run_cli("reward", recipe, "--out", out)[0] == 0
    before = contents(out / "reward")
    with limit(4096):
        status, written = run_cli("run", recipe, "--out", out)
    assert status == 1, written
    assert "Traceback" not in written
    assert written.count("error: ") == 1
    assert f"{out}/policy" in written
    assert "File too large" in written
    assert "Raise that limit" in written
    assert contents(out / "reward") == before
    assert not (out / "policy" / "adapter").exists()
    assert not list(out.rglob("*.unfinished"))
    assert run_cli("run", recipe, "--out", out)[0] == 0


def test_a_full_disk_is_told_and_what_was_finished_stays(
    mounted: Path, run_cli: RunCli, write_recipe: WriteRecipe
) -> None:
    recipe, out, filler = write_recipe(), mounted / "out", mounted / "filler"
    assert run_cli("reward", recipe, "--out", out)[0] == 0
    before = contents(out / "reward")
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    os.truncate(filler, filler.stat().st_size - 16 * 1024)
    status, written = run_cli("run", recipe, "--out", out)
    assert status == 1, written
    assert "Traceback" not in written
    assert written.count("error: ") == 1
    assert str(out) in written
    assert "No space left on device" in written
    assert "Free some disk space there, then run the same command again" in written
    assert contents(out / "reward") == before
    filler.unlink()
    assert run_cli("run", recipe, "--out", out)[0] == 0
    assert not list(out.rglob("*.unfinished"))


def test_a_page_without_room_is_told_and_comes_later(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, out = write_recipe(rl=None), tmp_path / "out"
    assert run_cli("run", recipe, "--out", out)[0] == 0
    page = out / "report.html"
    whole = page.read_bytes()
    with limit(len(whole) // 2):
        status, written = run_cli("report", out)
    assert status == 1
    assert "File too large" in written
    assert str(page) in written or str(out) in written
    assert page.read_bytes() == whole


def test_a_download_without_room_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served" / "TM-3-2020"
    served.mkdir(parents=True)
    (served / "big.json").write_bytes(b"x" * 10_000)
    listing = tmp_path / "pins"
    listing.write_text(f"{hashlib.sha256(b'x' * 10_000).hexdigest()}  10000  TM-3-2020/big.json\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Repository, "url", served.parent.as_uri())
    repository = replace(TASKMASTER, listing=listing)
    with limit(4096), pytest.raises(MachineError, match="File too large") as caught:
        fetch("TM-3-2020", repository)
    assert "Raise that limit" in caught.value.remedy
    assert not list((cache_folder(repository) / "TM-3-2020").iterdir())


def check_data(file: Path, stdout: int | IO[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "perl", "data", "check", str(file)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | environment,
    )


def test_a_full_disk_behind_the_output_is_told(small_data: Path) -> None:
    with open("/dev/full", "w") as full:
        done = check_data(small_data / "ratings.jsonl", full)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_of_ascii_is_written_to(small_data: Path) -> None:
    done = check_data(small_data / "prompts.jsonl", subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "every row is usable" in done.stdout


# Permission.


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """Return a folder that nobody can write to, not even root."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], capture_output=True, check=False
    ).returncode:
        pytest.skip("root may write everywhere but on a read-only disk, and may not mount one here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_no_permission_for_the_run_folder_is_told_before_the_base_is_trained(
    read_only: Path, refused_in: RefusedIn, write_recipe: WriteRecipe
) -> None:
    says = ("cannot be written", str(read_only / "out"), "another --out")
    recipe = write_recipe(base={"build": {"steps": 100_000}})
    refused_in(says, "run", recipe, "--out", read_only / "out")


def test_no_permission_for_the_cache_is_told_before_the_base_is_trained(
    read_only: Path,
    refused_in: RefusedIn,
    write_recipe: WriteRecipe,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(read_only))
    recipe = write_recipe(base={"build": {"steps": 100_000}})
    refused_in((str(read_only), "XDG_CACHE_HOME"), "run", recipe, "--out", tmp_path / "out", status=1)


def test_a_cache_that_is_a_file(
    refused_in: RefusedIn, write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    says = ("cannot be written", str(tmp_path / "file"), "Set XDG_CACHE_HOME")
    refused_in(says, "run", write_recipe(base={"build": {}}), "--out", tmp_path / "out")


# Memory.


def with_little_memory() -> None:
    """Return the command line, limited to 300 MiB more memory than the process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20, -1))
    cli.main()


def test_out_of_memory_in_a_stage_is_told(write_recipe: WriteRecipe, small_data: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"{n} " + "latte " * 200}], "completion": "Yes.", "label": n % 2}
        for n in range(600)
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = write_recipe(
        data={"source": "jsonl", "path": "own.jsonl", "held_out": 0.1},
        reward={"batch_size": 500, "max_length": 256},
        rl=None,
    )
    run = forks.start(with_little_memory, "run", recipe, "--out", tmp_path / "out", log=tmp_path / "log")
    status, said = run.wait(300), run.said()
    assert status == 1, said
    assert "error: " in said
    assert "Cannot allocate memory" in said
    assert "perl-rlhf estimate" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "reward" / "adapter").exists()


@pytest.mark.parametrize("place", ["from_pretrained", "to"])
def test_out_of_memory_in_loading_is_not_about_batches(
    place: str, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for reading the weights and for moving them to the device."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(PreTrainedModel, place, full)
    status, written = run_cli("run", write_recipe(), "--out", tmp_path / "out")
    assert status == 1
    assert "Tried to allocate 20.00 MiB" in written
    assert "base.quantization: 4bit" in written
    assert "batch_size" not in written


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
            "Tried to allocate 20.00 MiB",
        ),
        (RuntimeError("CUDA error: out of memory\nmore"), "perl-rlhf estimate"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), "perl-rlhf estimate"),
        (MemoryError(), "Cannot allocate memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "/x/y: No space left on device"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Free some disk space"),
        (OSError(errno.EMFILE, "Too many open files"), "Raise that limit"),
        (OSError(errno.EIO, "Input/output error", "/x"), "Check the disk"),
        (Exception("I/O error: No space left on device (os error 28)"), "Free some disk space"),
    ],
)
def test_what_libraries_raise_is_told_in_one_message(error: Exception, says: str) -> None:
    fault = machine_fault(error)
    assert fault is not None
    assert fault.status == 1
    assert says in str(fault)
    assert fault.remedy


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError(errno.ENOENT, "gone", "x"), RuntimeError("a bug"), OSError("no number"), KeyError("x")],
)
def test_other_errors_are_no_fault_of_the_machine(error: Exception) -> None:
    assert machine_fault(error) is None
