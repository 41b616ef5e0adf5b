"""What runs of one seed on one base can share, and how it is read."""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Sized
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
from perl.data.records import Demonstration, Records
from perl.data.sources import load_records
from perl.data.splits import split
from perl.errors import UserError
from perl.parallel.engine import Engine
from perl.parallel.processes import ALONE
from perl.recipe import Recipe, StageName
from perl.system.device import slowdown
from perl.system.progress import console, counted

SLOW = 2.0
"""A dtype is named if fp32 is so many times faster on this CPU."""


@dataclass(frozen=True)
class Material:
    """The records, and the base as it was loaded."""

    train: Records
    held_out: Records
    base: Base
    lm: PreTrainedModel
    device: torch.device


def read_material(recipe: Recipe, engine: Engine | None = None) -> Material:
    """The data and the base of a recipe.

    Raises:
        UserError: they cannot be used, or processes on several hosts have read different ones.
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
            f"processes 0 and {differ[0]} have read another base or other data",
            where=f"base.model {base.name}, data.source {recipe.data.source}",
            remedy="Put the same files on all hosts.",
        )
    speakers = speakers_of(train) | speakers_of(held_out)
    _print_notes(base.chat.probe(speakers) if speakers - {"text"} else _outside_chat(base))
    return Material(train, held_out, base, lm, device)


def _slow_dtype(name: str) -> list[str]:
    """Return a note if this CPU has no instructions for a dtype."""
    if name == "float32" or (times := slowdown(getattr(torch, name))) < SLOW:
        return []
    return [
        f"this CPU computes {name} about {times:.0f} times slower than float32: base.dtype=float32 is faster but "
        "takes twice the memory"
    ]


def _outside_chat(base: Base) -> list[str]:
    """What to say of plain text on a chat model."""
    if base.tokenizer.chat_template in (None, PLAIN_TEMPLATE):
        return []
    return ["the rows are plain text, to which the base's chat format is not applied; data.chat: true applies it"]


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        console.print(f"[yellow]Note[/]: {escape(note)}.")


def read_data(recipe: Recipe) -> tuple[Records, Records]:
    """The recipe's records, to train on and held out.

    Raises:
        UserError: they cannot be read, or a stage finds nothing in them.
    """
    data = recipe.data
    records = load_records(data.source, data.path, recipe.seed, data.columns, chat=data.chat)
    own = None
    if data.eval_path is not None:
        own = load_records(data.source, data.eval_path, recipe.seed, data.columns, "data.eval_path", data.chat)
    if problems := [*records.problems, *(own.problems if own is not None else ())]:
        first = problems[0]
        quoted = escape(f"{first.where}: {first.what}")
        console.print(
            f"[yellow]{counted(len(problems), 'row')} left out[/], the first {quoted} "
            "(`perl-rlhf data check` names them all)"
        )
    _print_notes(records.notes)
    train, held_out = (records, own) if own is not None else split(records, data.held_out, recipe.seed)
    for note in held_out.notes:
        console.print(f"[yellow]Split[/]: {escape(note)}")
    _check_records(recipe, train, held_out)
    train.fingerprints = fingerprints(records)
    if own is not None:
        train.fingerprints = {kind: [*rows, *fingerprints(own)[kind]] for kind, rows in train.fingerprints.items()}
    return train, held_out


def open_base(recipe: Recipe, train: Records, device: torch.device) -> tuple[Base, PreTrainedModel]:
    """The base of a recipe: loaded, built or drawn at random."""
    spec, dtype, four_bit = recipe.base, getattr(torch, recipe.base.dtype), recipe.base.quantization == "4bit"
    if four_bit and spec.random_init:
        raise UserError(
            "weights drawn at random are not quantized",
            where="base.quantization",
            remedy="Give a base with weights; what a larger one needs in 4 bits, perl-rlhf estimate says.",
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
    """Whether completions are generated under a recipe, or learned to be: not by a reward model alone."""
    return recipe.stages != ("reward",)


def corpus(train: Records) -> list[Demonstration]:
    """What a tiny base is trained on: the source's own corpus, or all training records."""
    if train.corpus:
        return train.corpus
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
"""The records that each stage learns from, their name, and the columns of a file that has them."""


def _check_records(recipe: Recipe, train: Records, held_out: Records) -> None:
    for stage in recipe.stages:
        needed, name, columns = NEEDED[stage]
        trained, judged = len(needed(train)), len(needed(held_out))
        if not trained and not judged:
            raise UserError(
                f"{recipe.data.source} has no {name}, which {stage} needs",
                where="data.source",
                remedy=f"Use another source, add rows of {columns}, or take the section {stage} out of the "
                "recipe.",
            )
        if not trained or not judged:
            raise UserError(
                f"its {name} ({trained + judged}) are all of dialogues that belong together: there is nothing to "
                f"{'judge' if trained else 'train'} {stage} on",
                where="data.held_out",
                remedy="Use more data, or give each row's conversation its own `dialogue`.",
            )


def quiet_libraries() -> None:
    """Turn off the libraries' own progress bars and notes."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    with contextlib.suppress(ImportError):  # RL on rows of a file does without it
        import datasets

        datasets.disable_progress_bars()
    # TRL's settings and peft use the old names, and releases of transformers before the new ones know no others.
    old_names = "`(is_)?gradient_checkpointing` is deprecated"
    warnings.filterwarnings("ignore", message=old_names, category=FutureWarning)
