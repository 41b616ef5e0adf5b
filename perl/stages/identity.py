"""The identity of a stage: everything that it depends on.

A stage depends on its own section of the recipe, on seed, tuning and adapters, on the base's weights and chat
format, on the rows that it is trained and evaluated on, and on the stages that it starts from; on nothing else.
Its identity is written to `identity.json` in the stage's folder before the first step.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from perl.backbones.base import Base
from perl.data.fingerprint import difference, sha256_of
from perl.data.records import Records
from perl.errors import UserError
from perl.plugins import adds_to, plugin_sha256
from perl.recipe import Recipe, StageName, changes_nothing
from perl.results import Start
from perl.roles.role import Role
from perl.runs.folder import STAGE_ROLE, RunFolder
from perl.system.files import file_sha256, write_json
from perl.system.typed_json import as_json, read

KINDS: dict[StageName, tuple[str, ...]] = {
    "sft": ("demonstrations",),
    "reward": ("ratings", "comparisons"),
    "rl": ("prompts",),
}
"""The kinds of records that each stage reads."""
ROLES: dict[StageName, tuple[Role, ...]] = {
    "sft": (Role.SFT,),
    "reward": (Role.REWARD,),
    "rl": (Role.CRITIC, Role.POLICY),
}
"""The roles that each stage writes; the last one's folder has its result."""
LENGTH = ("sft.epochs", "reward.epochs", "rl.steps")
ONLY_RL = {"ALGORITHMS", "SAMPLERS", "REWARDS"}
"""Registries that SFT and reward training do not use."""
FILE = "identity.json"


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a stage depends on.

    Attributes:
        settings: keys of the recipe that are not at their defaults, and the SHA-256 of files that it names.
        base: SHA-256 of the base's weights and chat format.
        data_sha256: SHA-256 of the rows and their split.
        earlier: the hashes of the stages that it starts from.
        rows: fingerprints of all rows of its kinds, to count changes; one string, to save space.
    """

    settings: dict[str, str]
    base: str
    data_sha256: str
    earlier: dict[str, str] = field(default_factory=dict)
    rows: str = ""

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole identity except `rows`."""
        return _hash([self.settings, self.base, self.data_sha256, self.earlier])

    def differences(self, here: "Identity") -> list[str]:
        """Describe how `here` differs from this identity; empty if the stage is the same."""
        found = []
        for key in sorted(differing(self.settings, here.settings)):
            there, now = (of.get(key, "its default") for of in (self.settings, here.settings))
            hashed = key.endswith(("(file)", "plugins"))
            named = key.removesuffix(" (file)")
            found.append(f"the file of {named} has changed" if hashed else f"{key} was {there} and is {now}")
        if self.base != here.base:
            found.append("the base is a different one")
        if self.data_sha256 != here.data_sha256:
            changed = difference(self.rows.split(), here.rows.split())
            found.append(f"the data have changed ({changed or 'their order, or how they are split'})")
        found += [f"{stage} is a different one" for stage in sorted(differing(self.earlier, here.earlier))]
        return found


def identify(
    recipe: Recipe, train: Records, held_out: Records, base: Base, starts: Mapping[StageName, Start]
) -> dict[StageName, Identity]:
    """Return the identity of each stage of a recipe.

    Args:
        starts: the adapters that stages start from.
    """
    found: dict[StageName, Identity] = {}
    for stage in recipe.stages:
        settings = stage_settings(recipe, stage)
        if stage in starts:
            settings[f"{stage}.adapter (file)"] = starts[stage].sha256
        rows = [row for kind in KINDS[stage] for row in train.fingerprints.get(kind, ())]
        found[stage] = Identity(
            settings=settings,
            base=_hash([base.sha256, base.chat.sha256]),
            data_sha256=sha256_of((train, held_out), KINDS[stage]),
            earlier={name: one.sha256 for name, one in found.items()} if stage == "rl" else {},
            rows=" ".join(rows),
        )
    return found


def stage_settings(recipe: Recipe, stage: StageName) -> dict[str, str]:
    """Return the recipe keys that a stage depends on and that are not at their defaults."""
    said = recipe.model_dump(mode="json", exclude_defaults=True)
    sections: tuple[str, ...] = ("seed", "tuning", "lora", "adapter", stage)
    if stage != "rl" and recipe.tuning == "full":
        sections = (*sections, "full")
    flat = dict(_flat({key: said[key] for key in sections if said.get(key) is not None}))
    flat |= {f"base.{key}": str(getattr(recipe.base, key)) for key in ("dtype", "quantization")}
    flat = {key: value for key, value in flat.items() if not changes_nothing(key)}
    for key in [key for key in flat if key.endswith("function")]:  # the file's contents, not its path
        file, _, name = json.loads(flat.pop(key)).rpartition(":")
        flat |= {f"{key} (name)": name, f"{key} (file)": sha256_or_missing(Path(file))}
    for key in [key for key in flat if key.endswith(".run")]:  # the identity of that run's reward model
        folder = RunFolder(Path(json.loads(flat.pop(key))))
        flat[f"{key} (file)"] = sha256_or_missing(folder.role(Role.REWARD) / FILE)
    plugins = [file for file in recipe.plugins if stage == "rl" or not adds_to(file) <= ONLY_RL]
    return flat | ({"plugins": _hash([plugin_sha256(file) for file in plugins])} if plugins else {})


def trained_settings_sha256(folder: RunFolder, recipe: Recipe, stage: StageName) -> str:
    """Return the SHA-256 of a stage's settings as recorded in a folder, or of the recipe's if none are recorded.

    The files of reward functions may have changed since then; the trained weights can be used all the same.
    """
    there = recorded(folder, stage)
    if there is None:
        return settings_sha256(recipe, stage)
    return _hash({key: value for key, value in there.settings.items() if key != f"{stage}.adapter (file)"})


def settings_sha256(recipe: Recipe, stage: StageName, *, any_length: bool = False) -> str:
    """Return the SHA-256 of a stage's settings.

    Args:
        any_length: ignore its number of epochs or steps.
    """
    settings = stage_settings(recipe, stage)
    return _hash({key: value for key, value in settings.items() if not (any_length and key in LENGTH)})


def recorded(folder: RunFolder, stage: StageName) -> Identity | None:
    """Return the recorded identity of a stage; None if none is recorded."""
    file = folder.role(STAGE_ROLE[stage]) / FILE
    return read(Identity, file, "Remove the stage's folder to train it again.")


def record(folder: RunFolder, stage: StageName, identity: Identity) -> None:
    """Write a stage's identity, before it starts."""
    path = folder.role(STAGE_ROLE[stage])
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / FILE, as_json(identity))


def refuse_changed(
    folder: RunFolder, identities: Mapping[StageName, Identity], elsewhere: str | None = None
) -> None:
    """Refuse to continue a run in whose stages anything has changed since they were started.

    Args:
        elsewhere: what another --out means for the user; by default, what it means for `perl-rlhf run`.

    Raises:
        UserError: says what has changed, with numbers of rows.
    """
    for stage, here in identities.items():
        there = recorded(folder, stage) if folder.begun(stage) else None
        if there is not None and (found := there.differences(here)):
            run = f"there, `perl-rlhf run` with --from {folder.path} trains only the affected stages again"
            raise UserError(
                f"since {stage} was trained here, {'; '.join(found)}",
                where=str(folder.path),
                remedy=f"Restore what it was trained with, or use another --out; {elsewhere or run}.",
            )


def differing(one: Mapping[str, str], other: Mapping[str, str]) -> set[str]:
    """Return the keys whose values differ."""
    return {key for key in {*one, *other} if one.get(key) != other.get(key)}


def _flat(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every value of a tree as JSON, with its dotted key."""
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, list):
        inner = dict(enumerate(value)).items()
    else:
        yield key, json.dumps(value)
        return
    for name, one in inner:
        yield from _flat(one, f"{key}.{name}" if key else str(name))


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sha256_or_missing(path: Path) -> str:
    """Return the SHA-256 of a file, or `missing` if there is none."""
    return file_sha256(path) if path.is_file() else "missing"
