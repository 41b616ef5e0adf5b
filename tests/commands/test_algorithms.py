"""`algorithms`: the table of RL algorithms."""

import subprocess
import sys

from perl.commands.algorithms import COLUMNS
from perl.rl.algorithms import ALGORITHMS
from tests.conftest import RunCli


def test_a_line_a_row_its_name_first(run_cli: RunCli) -> None:
    code, text = run_cli("algorithms")
    assert code == 0
    head, *lines = text.splitlines()
    assert head.split() == [*COLUMNS]
    assert [line.split()[0] for line in lines] == list(ALGORITHMS)
    dapo = next(line for line in lines if line.startswith("dapo"))
    assert dapo.endswith("clip 0.2, clip_high 0.28, drop_equal_groups true, redraws 3")


def test_it_does_not_wait_for_torch() -> None:
    code = "import sys, perl.cli\ntry: perl.cli.main()\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "algorithms"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
