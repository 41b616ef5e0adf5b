"""`python -m benchmarks.gpu --out DIR` measures every part and writes results.json and table.md after each."""

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
"""Factor on the time limits of parts with --toy, which runs on slow and shared CPUs."""
SECONDS = 570
"""Time limit for all parts together; a part is not started if no time is left."""


class Measuring:
    """Measures parts and keeps their results.

    Args:
        out: folder for the results.
        command: command to which a part's name is appended.
        seconds: time limit for all parts together.
    """

    def __init__(self, out: Path, command: Sequence[str], seconds: float) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self._out, self._command, self._until = out, command, time.monotonic() + seconds
        self._lock = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)

    def measure(self, name: str, limit: float) -> None:
        """Measure one part in its own process, whose failure does not affect the others."""
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
                    os.killpg(process.pid, signal.SIGKILL)  # with its child processes
                    process.communicate()
        if process.returncode == 0 and printed.strip():
            return {"found": json.loads(printed.strip().splitlines()[-1])}
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return {"failed": lines[-1] if lines else f"exit status {process.returncode}"}


def measure_all(measuring: Measuring, limits: dict[str, int], on_host: dict[str, int]) -> None:
    """Measure the parts that need the GPU one after another, and the others concurrently in a thread pool."""
    with ThreadPoolExecutor(max_workers=max(1, min(4, (os.cpu_count() or 1) // 4))) as pool:
        beside = [pool.submit(measuring.measure, name, limit) for name, limit in on_host.items()]
        for name, limit in limits.items():
            measuring.measure(name, limit)
        for one in beside:
            one.result()


def main() -> None:
    """Measure the parts given on the command line."""
    from benchmarks.gpu.parts import PARTS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--toy", action="store_true", help="tiny models, to check that everything runs")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit for all parts together")
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
