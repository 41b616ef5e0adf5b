"""Validation rows: dialogues that are split off from a stage's training data."""

from typing import Any

from perl.data.records import Records
from perl.data.splits import split
from perl.errors import UserError
from perl.recipe import StageName
from perl.stages.identity import KINDS
from perl.stages.material import NEEDED
from perl.stages.session import Session
from perl.system.seeds import derived_seed


def validation_split(session: Session, stage: StageName) -> tuple[Records, Records | None]:
    """Return a stage's training records and its validation records; None without validation.

    Raises:
        UserError: there are too few dialogues for both.
    """
    settings, records = session.recipe.section(stage), session.train
    if settings.eval_steps is None:
        return records, None
    needed, name, _ = NEEDED[stage]
    own: dict[str, Any] = {kind: records.by_kind()[kind] for kind in KINDS[stage]}
    notes: list[str] = []
    if len({record.dialogue for rows in own.values() for record in rows}) > 1:
        seed = derived_seed(session.recipe.seed, "validation", 0)
        train, validation = split(Records(**own), settings.validation_share, seed)
        if needed(train) and needed(validation) and not validation.incomplete:
            return train, validation
        notes = validation.notes
    raise UserError(
        "; ".join([f"the {name} to train on have too few dialogues to use a part for validation", *notes]),
        where=f"{stage}.eval_steps",
        remedy="Use more data, or remove eval_steps.",
    )
