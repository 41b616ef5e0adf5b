"""One measurement of ours, in a process of its own: `python -m perl.bench.ours RECIPE_JSON STEPS`."""

import json
import sys
import tempfile
from pathlib import Path

from perl.allocator import keep_freed_memory
from perl.bench.peak import PeakOverStart
from perl.recipe import Recipe
from perl.stages.rl import train_rl
from perl.stages.session import Trial, open_session, seed_everything


def main() -> None:
    """Print the seconds of each step by phase, and the peak memory, as JSON."""
    keep_freed_memory()
    recipe, steps = Recipe.model_validate_json(sys.argv[1]), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as scratch, PeakOverStart() as peak:
        session = open_session(recipe, Path(scratch), Trial(steps, measured=False))
        seed_everything(recipe.seed)
        result = train_rl(session)
    print(json.dumps({"steps": result["step_seconds"], "peak_over_start_bytes": peak.bytes}))


if __name__ == "__main__":
    main()
