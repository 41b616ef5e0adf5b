"""Runs several recipes in the processes of one launch: RECIPE=DIR ... (imports take longer than tiny runs)."""

import sys
from pathlib import Path

from perl.parallel.joined import joined
from perl.recipe import load_recipe
from perl.stages.pipeline import run

if __name__ == "__main__":
    with joined() as engine:
        for pair in sys.argv[1:]:
            recipe, out = pair.split("=")
            run(load_recipe(recipe), Path(out), engine=engine)
