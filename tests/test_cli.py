"""The command line: help, usage errors, `data check`, and a run that is interrupted and resumed."""

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from perl import __version__, cli
from tests import forks
from tests.conftest import RunCli, WriteRecipe, write_rows
from tests.exported import make, recipe_on

COMMANDS = [
    *(
        "run",
        "sft",
        "reward",
        "rl",
        "algorithms",
        "evaluate",
        "bench",
        "compare",
        "estimate",
        "report",
        "chat",
        "export",
        "sweep",
        "generate",
        "score",
        "rate",
        "serve",
        "keys",
        "compare-runs",
        "init",
        "sampler",
    ),
    *("data", "data fetch", "data import", "data check", "data leaks"),
]


def test_every_command_is_in_the_table_above() -> None:
    group = typer.main.get_command(cli.app)
    names = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        names += [name, *(f"{name} {below}" for below in getattr(command, "commands", ()))]
    assert sorted(names) == sorted(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_says_what_a_command_does(command: str, run_cli: RunCli) -> None:
    status, written = run_cli(*command.split(), "--help")
    assert status == 0
    assert f"perl-rlhf {command}".strip() in written.splitlines()[0]
    assert "--help" in written
    assert len(written.splitlines()) > 4


def test_version(run_cli: RunCli) -> None:
    assert run_cli("--version") == (0, f"perl-rlhf {__version__}\n")


def test_a_typo_does_not_wait_for_torch(tmp_path: Path) -> None:
    code = "import sys, perl.cli\ntry: perl.cli.main()\nfinally: print('torch' in sys.modules)"
    for arguments in (["run", "none.yaml"], ["estimate", "none.yaml"], ["export", "run", "nobody", "there"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert done.returncode == 2
        assert done.stdout == "False\n"
        assert "error: " in done.stderr


def test_the_first_words_wait_for_no_large_library(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    code = """import json, sys, perl.cli
from perl.system.progress import console
LARGE = {'torch', 'transformers', 'peft', 'datasets', 'scipy', 'sklearn', 'pandas', 'pyarrow', 'matplotlib'}
def first(*words, **options):
    print(words[0] if not LARGE & set(sys.modules) else LARGE & set(sys.modules))
    sys.exit()
print(LARGE & set(sys.modules) or 'all commands, such as keys')
console.print = first
for arguments in json.loads(sys.argv.pop()):
    sys.argv[1:] = arguments
    try: perl.cli.main()
    except SystemExit: pass"""
    recipe, gone = str(write_recipe()), str(tmp_path / "gone")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    commands = [["run", recipe], ["estimate", recipe], ["compare", recipe], ["compare-runs", gone, gone]]
    commands += [["sweep", recipe, "--stage", "rl"]]
    commands += [["evaluate", gone, "policy"], ["export", gone, "policy", gone], ["chat", gone], ["report", gone]]
    commands += [[name, gone, str(tmp_path / "rows.jsonl")] for name in ("generate", "score")]
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    start, *said = done.stdout.splitlines()
    assert start == "all commands, such as keys"
    assert len(said) == len(commands), done.stderr
    assert said[0] == "tiny: reward, rl. Loading the libraries …"
    assert set(said[1:]) == {"Loading the libraries …"}


def test_chat_shows_every_policys_answer(
    run_cli: RunCli, tiny_llama: Path, mixed_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = make(tmp_path / "out", recipe_on(tiny_llama, mixed_data))
    monkeypatch.setattr(sys, "stdin", io.StringIO("A latte, please.\nLarge.\n"))
    status, written = run_cli("chat", out)
    assert status == 0, written
    assert "Talking to base, SFT, RL policy" in written
    for title in ("base", "SFT", "RL policy"):
        assert len(re.findall(rf"─ {title} ─", written)) == 2


def test_help_lists_every_command(run_cli: RunCli) -> None:
    _, written = run_cli("--help")
    for command in COMMANDS:
        assert re.search(rf"^  {command.split()[0]}  +[A-Z]", written, re.MULTILINE), command


def test_python_m_perl_is_the_same_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "perl", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0
    assert "Usage: " in done.stdout
    assert "evaluate" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("runn",), "No such command 'runn'"),
        (("run",), "Missing argument 'RECIPE'"),
        (("run", "recipe.yaml", "--ou", "x"), "No such option"),
        (("run", "recipe.yaml", "--out"), "requires an argument"),
        (("evaluate", "x"), "Missing argument 'ROLE'"),
        (("data", "check"), "Missing argument"),
        (("data", "look"), "No such command 'look'"),
    ],
)
def test_usage_errors_exit_with_2(arguments: tuple[str, ...], says: str, run_cli: RunCli) -> None:
    status, written = run_cli(*arguments)
    assert status == 2
    assert says in written
    assert "Traceback" not in written


def test_data_check_describes_a_good_file(run_cli: RunCli, small_data: Path) -> None:
    status, written = run_cli("data", "check", small_data / "ratings.jsonl")
    assert status == 0
    assert "10 thumbs up, 10 down" in written
    assert "10 dialogues in all" in written
    assert "every row is usable" in written


def test_data_check_names_every_bad_row(run_cli: RunCli, tmp_path: Path) -> None:
    good = {"prompt": "a", "completion": "b", "label": True}
    file = write_rows(tmp_path / "own.jsonl", [good, {"prompt": "a"} | {"label": True}, good | {"label": 2}, []])
    status, written = run_cli("data", "check", file)
    assert status == 2
    for line, what in ((2, "fit no format"), (3, "label is 2"), (4, "a list; an object expected")):
        assert re.search(rf"{re.escape(str(file))}:{line}: .*{what}", written), line
    assert f"{file}:1:" not in written
    assert "3 rows left out" in written


def test_a_run_writes_its_folder_and_is_not_repeated(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe()
    status, written = run_cli("run", recipe)
    assert status == 0, written
    out = tmp_path / "runs" / "tiny"
    report = json.loads((out / "report.json").read_text())
    assert report["base"]["sha256_before"] == report["base"]["sha256_after"]
    assert (report["base"]["coverage"], report["base"]["without_adapter"]) == (1.0, [])
    assert "The adapters cover all of the blocks' matrix weights." in written
    assert list(report["stages"]) == ["reward", "rl"]
    status, again = run_cli("run", recipe)
    assert status == 0
    assert "reward is already finished" in again
    assert "rl is already finished" in again
    assert json.loads((out / "report.json").read_text())["stages"] == report["stages"]


def test_stages_run_one_by_one(
    run_cli: RunCli, write_recipe: WriteRecipe, small_data: Path, tmp_path: Path
) -> None:
    data = {"source": "jsonl", "path": str(small_data / "demonstrations.jsonl"), "held_out": 0.3}
    recipe, out = write_recipe(sft={"max_length": 64, "batch_size": 4}, reward=None, data=data), tmp_path / "out"
    assert run_cli("rl", recipe, "--out", out)[0] == 2, "it starts from the SFT policy, which is not there"
    assert not out.exists()
    for stage in ("sft", "rl"):
        status, written = run_cli(stage, recipe, "--out", out)
        assert status == 0, written
    assert list(json.loads((out / "report.json").read_text())["stages"]) == ["sft", "rl"]


def test_evaluate_writes_its_metrics(
    run_cli: RunCli, write_recipe: WriteRecipe, small_data: Path, tmp_path: Path
) -> None:
    recipe, out, metrics = write_recipe(), tmp_path / "out", tmp_path / "figures.json"
    assert run_cli("run", recipe, "--out", out)[0] == 0
    data = f"jsonl:{small_data / 'pairs.jsonl'}"
    assert run_cli("evaluate", out, "reward", "--data", data, "--json", metrics)[0] == 0
    assert json.loads(metrics.read_text())["n"] == 20
    status, written = run_cli("evaluate", out, "reward", "--data", small_data / "prompts.jsonl")
    assert status == 2, "nothing there is rated"
    assert "prompts.jsonl has neither ratings nor pairs" in written
    assert "rows with prompt, completion and label" in written
    assert run_cli("evaluate", out, "policy", "--json", metrics)[0] == 0
    assert json.loads(metrics.read_text())["n"] == 2
    status, written = run_cli("evaluate", out, "policy", "--json", tmp_path / "gone" / "figures.json")
    assert status == 2
    assert "cannot be written" in written


ONE_BY_ONE = {
    "reward": {"function": "rewards.py:length"},
    "steps": 30,
    "prompts_per_step": 2,
    "max_new_tokens": 2,
    "eval_prompts": 1,
}


def wait_for(metrics: Path, process: forks.Fork, meanwhile: Callable[[], object]) -> None:
    """Wait until the metrics have the first step."""
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        meanwhile()
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_an_interrupted_run_says_so_and_goes_on(
    number: signal.Signals, run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, out = write_recipe(reward=None, rl=ONE_BY_ONE), tmp_path / "out"
    metrics = out / "policy" / "metrics.jsonl"
    process = forks.start(cli.main, "run", recipe, "--out", out, log=tmp_path / "log")
    wait_for(metrics, process, lambda: None)
    process.send_signal(signal.SIGSTOP)  # otherwise it might finish before the next line
    status, refusal = run_cli("run", recipe, "--out", out)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    ended, written = process.wait(60), process.said()

    assert status == 2, "a second process on the folder"
    assert "another run is using this folder" in refusal
    assert ended == 130, written
    assert "interrupted" in written
    assert "run the same command again" in written
    assert "Traceback" not in written
    assert not (out / "policy" / "result.json").exists()
    assert not list(out.glob("**/*.unfinished"))

    status, written = run_cli("run", recipe, "--out", out)
    assert status == 0, written
    assert len(metrics.read_text().splitlines()) == ONE_BY_ONE["steps"]


def test_a_run_whose_terminal_is_closed_saves_and_goes_on(
    run_cli: RunCli, write_recipe: WriteRecipe, tmp_path: Path
) -> None:
    recipe, out = write_recipe(reward=None, rl=ONE_BY_ONE, checkpoint_every=100), tmp_path / "out"
    metrics = out / "policy" / "metrics.jsonl"
    ours, its = pty.openpty()
    os.set_blocking(ours, False)
    terminal = Path(os.ttyname(its))
    process = forks.start(cli.main, "run", recipe, "--out", out, log=terminal, terminal=True)

    def read() -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(ours, 2**16)

    wait_for(metrics, process, read)
    os.close(its)
    os.close(
        ours
    )  # as an ssh connection that drops: SIGHUP, and every word to the terminal is an error from now on
    assert process.wait(60) == 130
    done = len(metrics.read_text().splitlines())
    assert done < ONE_BY_ONE["steps"]
    newest = max((out / "policy" / "checkpoints").iterdir())
    assert newest.name == f"step-{done:08}", "the step that was being done is saved"
    assert run_cli("run", recipe, "--out", out)[0] == 0
