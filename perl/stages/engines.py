"""What of a recipe an engine cannot do, refused before anything is read."""

from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.recipe import Recipe


def check_engine(engine: Engine, recipe: Recipe) -> None:
    """Refuse what cannot be dealt to the processes, or spread over them.

    Raises:
        UserError: saying what can.
    """
    processes = engine.processes
    for stage in (recipe.sft, recipe.reward):
        if stage is not None:
            processes.check_divides(stage.batch_size, f"{'sft' if stage is recipe.sft else 'reward'}.batch_size")
    if recipe.rl is not None:
        processes.check_divides(recipe.rl.prompts_per_step, "rl.prompts_per_step")
    if recipe.tuning == "full" and type(engine) is not Engine:
        raise UserError(
            f"{engine.name} shards a frozen base and the optimizer of adapters; full tuning has neither",
            where="tuning: full",
            remedy="Set tuning: lora, or launch plainly (recipes/engines/ddp.yaml).",
        )
    if recipe.base.quantization != "none" and engine.shards_base:
        raise UserError(
            f"{engine.name} cannot spread quantized weights",
            where=f"base.quantization: {recipe.base.quantization}",
            remedy="Set base.quantization: none, or launch with recipes/engines/ddp.yaml or zero2.yaml.",
        )
