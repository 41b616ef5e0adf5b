"""The processes in which `estimate` traces stages, each as one of the devices over which it may be sharded."""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from perl.errors import InternalError, MachineError, UserError, machine_fault
from perl.recipe import Recipe, Rl, StageName
from perl.recipe.section import Section
from perl.system.progress import track

if TYPE_CHECKING:
    from perl.predict import Memory, Subject, Traced

SHARDED = ("base_weights", "adapters", "gradients", "optimizer")
"""Memory that ZeRO-3 and FSDP shard over the devices."""


class Workers:
    """Processes that trace stages; each takes up to half a minute, spent in Python rather than in arithmetic.

    They import what they need while the caller reads the data.

    Args:
        devices: number of devices over which a stage is sharded.
    """

    def __init__(self, devices: int) -> None:
        self.subject: Subject
        self._devices = devices
        context = get_context("forkserver")
        context.set_forkserver_preload(["perl.predict"])  # slow imports, done once for all
        self._pool = ProcessPoolExecutor(min(3, os.cpu_count() or 1), context)
        self._pool.submit(int)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def in_turn(self, recipes: Mapping[str, Recipe]) -> "Iterator[tuple[str, dict[StageName, Traced]]]":
        """Yield each recipe's stages, as soon as they and those of the previous recipes are known."""
        heaviest_first = [(label, stage) for label, recipe in recipes.items() for stage in reversed(recipe.stages)]
        futures = {
            (label, stage): self._pool.submit(_trace, recipes[label], self.subject, stage, self._devices)
            for label, stage in heaviest_first
        }
        with track("predicting", len(futures)) as bar:
            for label, recipe in recipes.items():
                found: dict[StageName, Traced] = {}
                for stage in recipe.stages:
                    try:
                        found[stage] = futures[label, stage].result()
                    except UserError:
                        raise
                    except Exception as error:
                        raise _as_one_message(error, f"estimate of {stage}, tuning {recipe.tuning}") from None
                    bar()
                yield label, found


def _as_one_message(error: Exception, where: str) -> UserError:
    """Return the error of a process as one message, with its traceback in a file."""
    if isinstance(error, BrokenProcessPool):
        remedy = "The system may have ended it for lack of memory: free some, then run the same command again."
        return MachineError("a process ended abruptly", where=where, remedy=remedy)
    with NamedTemporaryFile("w", prefix="perl-rlhf-estimate-", suffix=".txt", delete=False) as file:
        file.write(str(error.__cause__))  # the pool's copy of the traceback
    remedy = f"This is a bug in PERL. Please report it with the recipe and the traceback, which is in {file.name}"
    return InternalError(str(error), where=where, remedy=remedy)


def _trace(recipe: Recipe, subject: "Subject", stage: StageName, devices: int) -> "Traced":
    import torch

    from perl.predict import Traced, trace, weight_sizes
    from perl.stages.material import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(1)
    try:
        traced = trace(share(recipe, devices) if devices > 1 else recipe, subject, stage)
    except UserError:
        raise
    except Exception as error:  # some of torch's exceptions cannot be pickled
        raise machine_fault(error) or RuntimeError(f"{type(error).__name__}: {error}") from error
    if devices == 1:
        return traced
    size = weight_sizes(subject.config, getattr(torch, recipe.base.dtype))
    # Gathered weights: the current block, the next one, and everything outside the blocks.
    return Traced(_sharded(traced.memory, devices, 2 * size.block + size.outside), traced.work)


def share(recipe: Recipe, devices: int) -> Recipe:
    """Return a recipe with one device's part of every batch; not validated, since a part may be one completion."""
    parts: dict[str, Section] = {}
    for stage, key in (("sft", "batch_size"), ("reward", "batch_size"), ("rl", "prompts_per_step")):
        if (section := getattr(recipe, stage)) is not None:
            parts[stage] = section.model_copy(update={key: -(-getattr(section, key) // devices)})
    if isinstance(rl := parts.get("rl"), Rl):
        rows = min(rl.micro_batch_size, rl.prompts_per_step * rl.samples_per_prompt)
        parts["rl"] = rl.model_copy(update={"micro_batch_size": rows})
    return recipe.model_copy(update=parts)


def _sharded(memory: "Memory", devices: int, gathered: int) -> "Memory":
    from perl.predict import changed

    spread: Memory = {}
    for phase, peak in memory.items():
        less = {kind: -count * (1 - 1 / devices) for kind, count in peak.kinds.items() if kind in SHARDED}
        spread |= changed({phase: peak}, less | {"activations": gathered})
    return spread
