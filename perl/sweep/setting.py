"""A setting of a sweep: the kind, size and placement of adapters, or full tuning; and its learning rate."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from perl.errors import UserError
from perl.recipe import Recipe, StageName
from perl.recipe.adapter import LORA, LoraSettings, settings_of_kind
from perl.recipe.complaints import explain
from perl.recipe.section import Section
from perl.recipe.supervised import FULL_SHARE

FULL = "full"
SIZES = ("size", "bottleneck", "length", "rank")
"""Keys to which a kind's number of weights is proportional; the first one that the kind has applies."""
ENTRY = re.compile(r"(?P<kind>[^:@]+)(:(?P<size>\d+))?(@(?P<targets>[^:@]+))?")


@dataclass(frozen=True)
class Setting:
    """What a sweep varies. None: the recipe's value, or the kind's default."""

    kind: str
    """Kind of adapters; `FULL`: full tuning."""
    targets: str | None = None
    size: int | None = None
    """See `SIZES`."""
    rate: float | None = None
    """The learning rate; None: the recipe's, and a tenth of it under full tuning."""

    @property
    def name(self) -> str:
        """Name in its runs' folders, such as lora-attention-4."""
        return "-".join(str(part) for part in (self.kind, self.targets, self.size) if part is not None)

    @property
    def words(self) -> str:
        """Description, such as lora on attention, rank 4."""
        return self.line + ("" if self.size is None else f", {size_key(self.kind)} {self.size}")

    @property
    def line(self) -> str:
        """Description without the size, shared by settings that differ only in size."""
        place = "" if self.targets is None else f" on {self.targets}"
        return "full tuning" if self.kind == FULL else f"{self.kind}{place}"

    def folder(self, out: Path, seed: int) -> Path:
        """Return the folder of its run with this seed."""
        rate = "" if self.rate is None else f"-lr{self.rate:g}"
        return out / f"{self.name}{rate}-{seed}"

    def recipe(self, recipe: Recipe, seed: int) -> Recipe:
        """Return a recipe of one stage with this setting.

        Raises:
            UserError: the kind does not support it.
        """
        rates = {} if self.rate is None else {recipe.stages[0]: self.rate}
        content = variant(recipe, "full" if self.kind == FULL else "lora", seed, rates).model_dump()
        if self.kind != FULL:
            content |= {"adapter": self._adapter(recipe), "lora": None}
        try:
            return Recipe.model_validate(content)
        except ValidationError as error:
            raise explain(error, content, self.name) from None

    def _adapter(self, recipe: Recipe) -> dict[str, object]:
        """Return the recipe's adapter settings that this kind has too, with this setting."""
        own, kind = recipe.adapter_settings, _settings_of(self.kind)
        keys = set(type(own).model_fields) - {"kind"} if recipe.adapter_kind == self.kind else {"layers"}
        if isinstance(own, LoraSettings) and issubclass(kind, LoraSettings):
            keys = set(LoraSettings.model_fields)
        section = own.model_dump(include=keys & set(kind.model_fields)) | {"kind": self.kind}
        if self.targets is not None:
            section["targets"] = self.targets
        if self.size is not None and (key := size_key(self.kind)) is not None:
            section[key] = self.size
        return section


def variant(recipe: Recipe, tuning: str, seed: int, rates: Mapping[StageName, float] | None = None) -> Recipe:
    """Return the recipe under another tuning: full tuning has a separate critic.

    Args:
        rates: learning rates by stage; of the others full tuning has a tenth of LoRA's, whichever of the two the
            recipe is for.

    Raises:
        UserError: the recipe uses something that this tuning does not support.
    """
    content, rates = recipe.model_dump(), rates or {}
    full, lora = (tuning == one != recipe.tuning for one in ("full", "lora"))
    for stage in recipe.stages:
        if stage in rates:
            content[stage]["learning_rate"] = rates[stage]
        elif (full or lora) and content[stage]["learning_rate"] != "auto":  # which depends on the tuning
            rate = content[stage]["learning_rate"]
            content[stage]["learning_rate"] = rate * FULL_SHARE if full else min(rate / FULL_SHARE, 1.0)
    if full and content["rl"] is not None and content["rl"]["critic"] == "shared":
        content["rl"]["critic"] = None
    if recipe.rl is not None and recipe.rl.sampler.kind == "server":  # full tuning has no adapters for it
        content["rl"]["sampler"] = {}
    for stage in recipe.starts if full else ():  # there is no adapter
        content[stage]["adapter"] = None
    try:
        return Recipe.model_validate(content | {"tuning": tuning, "seed": seed})
    except ValidationError as error:
        raise explain(error, content, f"{recipe.name} under tuning: {tuning}") from None


def size_key(kind: str) -> str | None:
    """Return the key to which a kind's number of weights is proportional; None if it has none."""
    return next((key for key in SIZES if key in _settings_of(kind).model_fields), None)


def parse_settings(kinds: Sequence[str], sizes: Sequence[int], targets: Sequence[str]) -> list[Setting]:
    """Parse every kind with every size and placement; an entry `KIND:SIZE@TARGETS` fixes what it names.

    Args:
        sizes: empty: the recipe's; a kind without sizes occurs once. The same holds for targets.

    Raises:
        UserError: an invalid entry, an unknown kind, or a size or targets for a kind that has none.
    """
    settings: list[Setting] = []
    for entry in kinds:
        if (found := ENTRY.fullmatch(entry)) is None:
            what, remedy = f"{entry!r} is not a kind of adapters", "Give KIND, KIND:SIZE or KIND:SIZE@TARGETS."
            raise UserError(what, where="--kinds", remedy=remedy)
        kind, size, place = found["kind"], found["size"], found["targets"]
        has_size, has_place = _has(kind)
        if (size and not has_size) or (place and not has_place):
            what = f"{kind} has no {'size' if size and not has_size else 'targets'}"
            raise UserError(f"{what} to set", where=f"--kinds {entry}", remedy=f"Give {kind} alone.")
        its_sizes = [int(size)] if size else [*sizes] if has_size and sizes else [None]
        its_places = [place] if place else [*targets] if has_place and targets else [None]
        settings += [Setting(kind, where, one) for where in its_places for one in its_sizes]
    if len(set(settings)) < len(settings):
        twice = next(one for number, one in enumerate(settings) if one in settings[:number])
        raise UserError(f"{twice.words} is given twice", where="--kinds", remedy="Name each once.")
    return settings


def _has(kind: str) -> tuple[bool, bool]:
    """Return whether a kind has a size, and whether it has targets."""
    if kind == FULL:
        return False, False
    try:
        return size_key(kind) is not None, "targets" in _settings_of(kind).model_fields
    except ValueError as error:
        what, _, remedy = str(error).partition(": ")
        raise UserError(what, where="--kinds", remedy=f"{remedy[:1].upper()}{remedy[1:]}") from None


def _settings_of(kind: str) -> type[Section]:
    return LoraSettings if kind == LORA else settings_of_kind(kind)
