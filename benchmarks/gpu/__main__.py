"""`python -m benchmarks.gpu --out DIR`: every part in turn; results.json and table.md are written after each."""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import markdown

PATIENCE = 10
"""The limits of parts on the slow and shared CPUs that toys run on, as a multiple."""
SECONDS = 570
"""For everything: a part that has no time left is not begun."""


class Measuring:
    """Measures parts and keeps what they found.

    Args:
        out: the folder for the results.
        command: that a part's name is added to.
        seconds: for everything.
    """

    def __init__(self, out: Path, command: Sequence[str], seconds: float) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self._out, self._command, self._until = out, command, time.monotonic() + seconds
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    def measure(self, name: str, limit: float) -> None:
        """Measure one part in a process of its own; whatever becomes of it, the others go on."""
        begin = time.monotonic()
        left = min(limit, self._until - begin)
        found = {"failed": "no time was left"} if left < 1 else self._measured(name, left)
        with self._lock:
            self.results[name] = found | {"part_seconds": round(time.monotonic() - begin, 1)}
            (self._out / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
            (self._out / "table.md").write_text(markdown(self.results))
        print(f"{name}: {found.get('failed', 'measured')}".splitlines()[0], flush=True)

    def _measured(self, name: str, seconds: float) -> dict[str, Any]:
        log = self._out / f"{name}.log"
        with log.open("w") as stderr:
            process = subprocess.Popen(
                [*self._command, name], stdout=subprocess.PIPE, stderr=stderr, text=True, start_new_session=True
            )
            try:
                printed, _ = process.communicate(timeout=seconds)
            except subprocess.TimeoutExpired:
                return {"failed": f"not finished after {seconds:.0f} s"}
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and what it has started
                    process.communicate()
        if process.returncode == 0 and printed.strip():
            return {"found": json.loads(printed.strip().splitlines()[-1])}
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return {"failed": lines[-1] if lines else f"exit status {process.returncode}"}


def measure_all(measuring: Measuring, limits: dict[str, int], on_host: dict[str, int]) -> None:
    """Measure the parts that need the GPU in turn, and beside them the others, some at a time."""
    with ThreadPoolExecutor(max_workers=max(1, min(4, (os.cpu_count() or 1) // 4))) as pool:
        beside = [pool.submit(measuring.measure, name, limit) for name, limit in on_host.items()]
        for name, limit in limits.items():
            measuring.measure(name, limit)
        for one in beside:
            one.result()


def main() -> None:
    """Measure what was asked for."""
    from benchmarks.gpu.parts import PARTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="tiny models, to see that everything runs")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    asked = parser.parse_args()
    command = [sys.executable, "-m", "benchmarks.gpu.parts", *(["--toy"] if asked.toy else [])]
    patience = PATIENCE if asked.toy else 1
    on_gpu, on_host = (
        {
            name: part.limit * patience
            for name, part in PARTS.items()
            if name in asked.parts and part.on_host is host
        }
        for host in (False, True)
    )
    measure_all(Measuring(asked.out, command, asked.seconds * patience), on_gpu, on_host)
    print((asked.out / "table.md").read_text())


if __name__ == "__main__":
    main()
