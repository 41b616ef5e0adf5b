"""Reads the data and the base, which runs with the same seed and base can share."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass

import torch
from rich.markup import escape
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from perl.backbones.base import Base
from perl.backbones.build import build_base
from perl.backbones.loading import load_base, random_base
from perl.backbones.template import PLAIN_TEMPLATE
from perl.data.chats import speakers_of
from perl.data.fingerprint import fingerprints, sha256_of
from perl.data.records import Demonstration, Problem, Records
from perl.data.sources import load_records
from perl.data.splits import split
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.parallel.processes import ALONE
from perl.recipe import Recipe, StageName
from perl.system.device import SLOW, slowdown
from perl.system.progress import console, counted


@dataclass(frozen=True)
class Material:
    """The records and the loaded base."""

    train: Records
    held_out: Records
    base: Base
    lm: PreTrainedModel
    device: torch.device


def read_material(recipe: Recipe, engine: Engine | None = None) -> Material:
    """Read the data and the base of a recipe.

    Raises:
        UserError: they cannot be used, or processes on different hosts have read different ones.
    """
    engine = engine or Engine(ALONE)
    quiet_libraries()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, held_out = read_data(recipe)
    if device.type == "cpu":
        _print_notes(_slow_dtype(recipe.base.dtype))
    base, lm = engine.processes.local_main_first(lambda: open_base(recipe, train, engine.load_device(device)))
    own = (base.sha256, sha256_of((train, held_out), train.by_kind()))
    main, *others = engine.processes.all_gather(own)
    if differ := [rank for rank, one in enumerate(others, 1) if one != main]:
        raise UserError(
            f"processes 0 and {differ[0]} have read different bases or different data",
            where=f"base.model {base.name}, data.source {recipe.data.source}",
            remedy="Put the same files on all hosts.",
        )
    speakers = speakers_of(train) | speakers_of(held_out)
    _print_notes(base.chat.probe(speakers) if speakers - {"text"} else _outside_chat(base))
    return Material(train, held_out, base, lm, device)


def _slow_dtype(name: str) -> list[str]:
    """Return a note on a dtype for which this CPU has no instructions."""
    if name == "float32" or (times := slowdown(getattr(torch, name))) < SLOW:
        return []
    return [
        f"this CPU computes {name} about {times:.0f} times slower than float32: base.dtype=float32 is faster, but "
        "needs twice the memory"
    ]


def _outside_chat(base: Base) -> list[str]:
    """Return a note on plain text with a chat model."""
    if base.tokenizer.chat_template in (None, PLAIN_TEMPLATE):
        return []
    return ["the rows are plain text, to which the base's chat format is not applied; data.chat: true applies it"]


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        console.print(f"[yellow]Note[/]: {escape(note)}.")


def read_data(recipe: Recipe) -> tuple[Records, Records]:
    """Return the recipe's training records and held-out records.

    Raises:
        UserError: they cannot be read, or have no rows for a stage.
    """
    data = recipe.data
    records = load_records(data.source, data.path, recipe.seed, data.columns, chat=data.chat)
    own = None
    if data.eval_path is not None:
        own = load_records(data.source, data.eval_path, recipe.seed, data.columns, "data.eval_path", data.chat)
    print_left_out([*records.problems, *(own.problems if own is not None else ())])
    _print_notes(records.notes)
    train, held_out = (records, own) if own is not None else split(records, data.held_out, recipe.seed)
    if own is not None:
        _print_notes(own.notes)
    else:
        for note in held_out.notes:
            console.print(f"[yellow]Split[/]: {escape(note)}")
    _check_records(recipe, train, held_out)
    train.fingerprints = fingerprints(records)
    if own is not None:
        train.fingerprints = {kind: [*rows, *fingerprints(own)[kind]] for kind, rows in train.fingerprints.items()}
    return train, held_out


def print_left_out(problems: Sequence[Problem]) -> None:
    """Print the number of rows that cannot be used, and why the first cannot."""
    if problems:
        quoted = escape(f"{problems[0].where}: {problems[0].what}")
        console.print(
            f"[yellow]{counted(len(problems), 'row')} left out[/]; the first: {quoted} "
            "(`perl-rlhf data check` names more)"
        )


def open_base(recipe: Recipe, train: Records, device: torch.device) -> tuple[Base, PreTrainedModel]:
    """Return the base of a recipe: loaded, built or initialised at random."""
    spec, dtype, four_bit = recipe.base, getattr(torch, recipe.base.dtype), recipe.base.quantization == "4bit"
    if four_bit and spec.random_init:
        raise UserError(
            "random weights cannot be quantized",
            where="base.quantization",
            remedy="Use a base with weights. perl-rlhf estimate predicts what a larger base needs in 4 bits.",
        )
    if spec.build is not None:
        folder = build_base(corpus(train), **spec.build.model_dump())
        return load_base(str(folder), dtype, device, four_bit=four_bit)
    if spec.config is not None:
        return random_base(spec.config, dtype, device, recipe.seed)
    assert spec.model is not None
    return load_base(
        spec.model,
        dtype,
        device,
        four_bit=four_bit,
        trust_remote_code=spec.trust_remote_code,
        random_seed=recipe.seed if spec.random_init else None,
        generates=generates(recipe),
    )


def generates(recipe: Recipe) -> bool:
    """Return whether a recipe generates or trains on completions: all do but those with a reward stage only."""
    return recipe.stages != ("reward",)


def corpus(train: Records) -> list[Demonstration]:
    """Return what a tiny base is trained on: the source's own corpus, or all training records."""
    if train.corpus is not None:
        return train.corpus()
    rated = [Demonstration(record.context, (record.answer,), record.dialogue) for record in train.ratings]
    compared = [Demonstration(record.context, (record.better,), record.dialogue) for record in train.comparisons]
    return [*train.demonstrations, *rated, *compared]


NEEDED: dict[StageName, tuple[Callable[[Records], Sized], str, str]] = {
    "sft": (lambda records: records.demonstrations, "demonstrations", "prompt and completion"),
    "reward": (
        lambda records: records.ratings or records.comparisons,
        "ratings or comparisons",
        "prompt, completion and label (or prompt, chosen and rejected)",
    ),
    "rl": (lambda records: records.prompts, "prompts", "prompt"),
}
"""The records that each stage is trained on, their name, and the columns of a file that provides them."""


def _check_records(recipe: Recipe, train: Records, held_out: Records) -> None:
    for stage in recipe.stages:
        needed, name, columns = NEEDED[stage]
        trained, judged = len(needed(train)), len(needed(held_out))
        if not trained and not judged:
            raise UserError(
                f"{recipe.data.source} has no {name}, which {stage} needs",
                where="data.source",
                remedy=f"Use another source, add rows with {columns}, or remove the section {stage} from the "
                "recipe.",
            )
        if not trained or not judged:
            raise UserError(
                f"its {name} ({trained + judged}) all come from dialogues that belong together: there is nothing "
                f"to {'evaluate' if trained else 'train'} {stage} on",
                where="data.held_out",
                remedy="Use more data, or give each row's conversation its own `dialogue`.",
            )


def quiet_libraries() -> None:
    """Turn off the libraries' progress bars and notes."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with contextlib.suppress(ImportError):  # RL on rows of a file does not need it
        import datasets

        datasets.disable_progress_bars()
    # TRL's settings and peft use the old names; older releases of transformers have no others.
    old_names = "`(is_)?gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", message=old_names, category=FutureWarning)
