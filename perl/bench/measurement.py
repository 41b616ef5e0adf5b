"""What one process measured of a step, handed on as a line of JSON."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Measurement:
    """The seconds of each step by phase, and the peak memory over what was held before."""

    steps: list[dict[str, float]]
    peak_over_start_bytes: int

    def print(self) -> None:
        """As the last line, for `bench` to read."""
        print(json.dumps(asdict(self)))
