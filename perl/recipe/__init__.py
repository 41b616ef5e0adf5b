"""The recipe: one YAML file that describes a run, checked before anything is loaded.

Only the stages and the command line read a recipe; everything below takes plain values. One file per section.
"""

from perl.recipe.load import load_recipe
from perl.recipe.recipe import STAGES, Recipe, StageName, changes_nothing
from perl.recipe.rl import Rl
from perl.recipe.supervised import Supervised

__all__ = ["STAGES", "Recipe", "Rl", "StageName", "Supervised", "changes_nothing", "load_recipe"]
