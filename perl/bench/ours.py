"""One measurement of PERL in a separate process: `python -m perl.bench.ours RECIPE_JSON STEPS`."""

import sys

from perl.bench.measurement import Measurement, PeakOverStart
from perl.predict import TRY, Trial, trial_session
from perl.recipe import Recipe
from perl.system.allocator import keep_freed_memory


def main() -> None:
    """Print the seconds of each step by phase, and the peak memory, as JSON."""
    keep_freed_memory()
    recipe, steps = Recipe.model_validate_json(sys.argv[1]), int(sys.argv[2])
    with PeakOverStart() as peak, trial_session(recipe, Trial(steps, measured=False)) as session:
        result = TRY["rl"](session)
    steps_seconds = [{str(phase): seconds for phase, seconds in step.items()} for step in result.step_seconds]
    Measurement(steps_seconds, peak.bytes).print()


if __name__ == "__main__":
    main()
