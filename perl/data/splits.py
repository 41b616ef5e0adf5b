"""Splits records by dialogue.

Contexts of one dialogue are prefixes of one another, so rows are not split at random. Dialogues that share a row,
or have nearly the same row (`perl.data.duplicates`), are on one side too. A published test part is held out as
published.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from perl.data.duplicates import Rows
from perl.data.records import Context, Record, Records, answers_of
from perl.errors import UserError

LARGEST_GROUP = 0.25
"""Maximum share of the dialogues in a group; rows that more dialogues share, such as a greeting, are ignored."""
TRIES = 16
"""Maximum number of random splits, until one has every kind and class on both sides where possible."""
Groups = Mapping[str, Sequence[str]]
"""Dialogues that must be on the same side, by the first of their names."""


class _Row(NamedTuple):
    """The unit that is compared: a context with an answer, if there is one. A comparison is two rows."""

    kind: str
    record: Record
    turns: Context


def split(records: Records, held_out: float, seed: int) -> tuple[Records, Records]:
    """Split records into training and held-out records; no dialogue is on both sides.

    Both classes of ratings and every kind of record are on both sides, in about the same shares, if more than one
    group of dialogues has them; else they are trained on. Rows that are on both sides because too many dialogues
    share them are removed from the held-out part, unless it would lose a kind or a class. `notes` of the held-out
    records say what was done.

    The same rows, share and seed always give the same split. Both sides get the judge, only the first gets the
    problems and the corpus.

    Args:
        held_out: the share of dialogues, above 0 and below 1; at least one is held out. Ignored if there is a
            published test part.

    Raises:
        UserError: there is only one dialogue.
    """
    dialogues = {record.dialogue for record in records.rows()}
    if len(dialogues) < 2:
        remedy = "Use more data, give each row's conversation its own `dialogue`, or set data.eval_path."
        what = "; ".join([f"{len(dialogues)} dialogue cannot be split", *records.notes])
        raise UserError(what, where="data.held_out", remedy=remedy)
    if records.published_test:
        chosen = set(records.published_test)
        train, held = _sides(records, chosen)
    else:
        rows = list(_rows(records))
        alike = Rows([row.turns for row in rows], [row.record.dialogue for row in rows])
        groups = _groups(rows, alike.clusters())
        chosen = _drawn(groups, _properties(records, groups), held_out, seed)
        train, held = _sides(records, chosen)
        _leave_out_seen(held, rows, alike, chosen)
    train.problems, train.corpus = records.problems, records.corpus
    for kind, count in _counts(records).items():
        if count and not _counts(held)[kind]:
            held.incomplete = True
            held.notes.append(f"no {kind} are held out: all {count} are in dialogues that are trained on")
    return train, held


def _rows(records: Records) -> Iterator[_Row]:
    for kind, of_kind in records.by_kind().items():
        for record in of_kind:
            for answer in answers_of(record) or [()]:
                yield _Row(kind, record, (*record.context, *answer))


def _sides(records: Records, chosen: set[str]) -> tuple[Records, Records]:
    train = records.where(lambda record: record.dialogue not in chosen)
    return train, records.where(lambda record: record.dialogue in chosen)


def _counts(records: Records) -> dict[str, int]:
    up = sum(rating.label for rating in records.ratings)
    return {
        "demonstrations": len(records.demonstrations),
        "thumbs up": up,
        "thumbs down": len(records.ratings) - up,
        "comparisons": len(records.comparisons),
        "prompts": len(records.prompts),
    }


# Which dialogues are held out.


def _groups(rows: Sequence[_Row], clusters: Sequence[int]) -> Groups:
    """Group dialogues by the rows that they share, starting with rows that few dialogues share."""
    sharing: dict[int, set[str]] = defaultdict(set)
    for cluster, row in zip(clusters, rows, strict=True):
        sharing[cluster].add(row.record.dialogue)
    group_of = {row.record.dialogue: {row.record.dialogue} for row in rows}
    most = min(len(group_of) - 1, max(2, int(LARGEST_GROUP * len(group_of))))
    shared = [sorted(some) for some in sharing.values() if len(some) > 1]
    for together in sorted(shared, key=lambda some: (len(some), some)):
        parts = {id(group_of[dialogue]): group_of[dialogue] for dialogue in together}
        if sum(map(len, parts.values())) > most:
            continue
        first, *others = sorted(parts.values(), key=len, reverse=True)
        for other in others:
            first |= other
            group_of.update(dict.fromkeys(other, first))
    return {min(group): sorted(group) for group in group_of.values()}


def _properties(records: Records, groups: Groups) -> dict[str, set[str]]:
    """Return what both sides should have, and the groups that have it."""
    group_of = {dialogue: group for group, dialogues in groups.items() for dialogue in dialogues}
    labels: dict[tuple[str, Context], set[bool]] = defaultdict(set)
    for rating in records.ratings:
        labels[rating.dialogue, rating.context].add(rating.label)
    has = {kind: {group_of[record.dialogue] for record in rows} for kind, rows in records.by_kind().items()}
    for name, wanted in (
        ("label True", {True}),
        ("label False", {False}),
        ("both labels of a context", {True, False}),
    ):
        has[name] = {group_of[dialogue] for (dialogue, _), values in labels.items() if wanted <= values}
    return {name: members for name, members in has.items() if members}


def _drawn(groups: Groups, has: Mapping[str, set[str]], share: float, seed: int) -> set[str]:
    """Return the dialogues to hold out: of several random splits, the first with the fewest one-sided kinds."""

    def one_sided(held: set[str]) -> int:
        return sum(len(of) > 1 and (of <= held or not of & held) for of in has.values())

    salts = (f"{seed}.{number}" if number else f"{seed}" for number in range(TRIES))
    draws: list[set[str]] = []
    for salt in salts:
        draws.append(_stratified(groups, has, share, salt))
        if not one_sided(draws[-1]):
            break
    return {dialogue for group in min(draws, key=one_sided) for dialogue in groups[group]}


def _stratified(groups: Groups, has: Mapping[str, set[str]], share: float, salt: str) -> set[str]:
    """Return groups to hold out, a share of each property, rarest first (Sechidis, Tsoumakas & Vlahavas 2011).

    Args:
        groups: at least two groups.
        has: the groups with each property; each group has at least one property.
        salt: salt of the random order.
    """
    order = _spread(groups, has, salt)
    held: set[str] = set()
    undecided = set(groups)
    for _, of in sorted(has.items(), key=lambda item: (len(item[1]), item[0])):
        free = [group for group in order if group in undecided and group in of]
        undecided -= of
        if len(of) == 1:
            continue  # a property of a single group is trained on
        total = sum(len(groups[group]) for group in of)
        wanted = min(max(round(share * total), 1), total - 1)
        have = sum(len(groups[group]) for group in of & held)
        for group in free:
            if have + len(groups[group]) <= wanted:
                held.add(group)
                have += len(groups[group])
        if not have and free:
            held.add(min(free, key=lambda group: len(groups[group])))
    return held or {order[0]}


def _spread(groups: Groups, has: Mapping[str, set[str]], salt: str) -> list[str]:
    """Order the groups so that every prefix has about its share of each combination of properties."""
    # Ordered by a hash, so that most dialogues stay on their side if a few rows are added.
    like: dict[frozenset[str], list[str]] = defaultdict(list)
    for group in sorted(groups, key=lambda group: hashlib.sha256(f"{salt}:{group}".encode()).digest()):
        like[frozenset(name for name, of in has.items() if group in of)].append(group)
    places = [((place + 0.5) / len(some), group) for some in like.values() for place, group in enumerate(some)]
    return [group for _, group in sorted(places)]


# Rows that are on both sides nevertheless.


def _leave_out_seen(held: Records, rows: Sequence[_Row], alike: Rows, chosen: set[str]) -> None:
    """Remove held-out rows that are the same or nearly the same as training rows, and note how many."""
    before, removed = _counts(held), 0
    for kinds in (("demonstrations",), ("ratings", "comparisons"), ("prompts",)):
        trained, asked = (
            [n for n, row in enumerate(rows) if row.kind in kinds and (row.record.dialogue in chosen) == is_held]
            for is_held in (False, True)
        )
        seen = {id(rows[n].record) for n, yes in zip(asked, alike.like(asked, trained), strict=True) if yes}
        for kind in kinds:
            records: list[Record] = getattr(held, kind)
            kept = [record for record in records if id(record) not in seen]
            setattr(held, kind, kept)
            if any(count and not _counts(held)[name] for name, count in before.items()):
                setattr(held, kind, records)
                held.incomplete = True
                held.notes.append(
                    f"{len(records) - len(kept)} of {len(records)} held-out {kind} are also trained on, in other "
                    "dialogues; they are kept, because the rest alone would be too few to evaluate on"
                )
            else:
                removed += len(records) - len(kept)
    if removed:
        held.notes.insert(0, f"{removed} held-out rows are near-duplicates of training rows, and are left out")
