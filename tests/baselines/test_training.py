"""KTO and DPO on the shared base: TRL's rows and loss, with the SFT policy as the reference."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from perl.baselines.training import Row, dpo_rows, kto_rows, train_baseline
from perl.data.pairs import pair_ratings
from perl.errors import UserError
from perl.recipe import load_recipe
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from perl.stages.opening import open_session
from perl.stages.session import Session
from tests.conftest import WriteRecipe

BATCH = 4


@pytest.fixture
def session(write_recipe: WriteRecipe, mixed_data: Path, tmp_path: Path) -> Session:
    """Yield a session with an SFT policy that differs from the base, and a policy that is its copy."""
    data = {"source": "jsonl", "path": str(mixed_data), "held_out": 0.3}
    reward = {"batch_size": BATCH, "epochs": 4, "max_length": 64}
    recipe = load_recipe(write_recipe(data=data, reward=reward, sft={"batch_size": BATCH}))
    opened = open_session(recipe, tmp_path / "run")
    opened.roles.add(Role.SFT)
    for weight in opened.roles.weights(Role.SFT).values():
        torch.nn.init.normal_(weight, std=1.0)
    opened.roles.add(Role.POLICY, copy_of=Role.SFT)
    opened.roles.eval()
    return opened


def messages(turns: Any) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if turn.speaker == "agent" else turn.speaker, "content": turn.text} for turn in turns
    ]


def test_rows_are_those_that_trl_makes_of_the_same_ratings(session: Session) -> None:
    """TRL's own preparation is the oracle: the same tokens, and the same mismatched completion for the KL."""
    rows = kto_rows(session, session.train, BATCH)
    ratings = {
        (tuple(session.base.chat.context(one.context)), one.answer.text): one for one in session.train.ratings
    }
    decode = session.base.chat.decode
    ordered = [ratings[tuple(row["prompt_ids"]), decode(row["completion_ids"])] for row in rows]
    assert len(rows) == len(session.train.ratings)
    asked = Dataset.from_list(
        [
            {"prompt": messages(one.context), "completion": messages([one.answer]), "label": one.label}
            for one in ordered
        ]
    )
    trainer = KTOTrainer.__new__(KTOTrainer)
    trainer.calculate_KL, trainer.desirable_weight, trainer.undesirable_weight = True, 1.0, 1.0
    arguments = KTOConfig("unused", per_device_train_batch_size=BATCH, bf16=False, use_cpu=True)
    expected = trainer._prepare_dataset(asked, session.base.tokenizer, arguments, "train")
    assert rows == to_end(session, expected, rows)

    pairs = pair_ratings(session.train.ratings)
    asked = Dataset.from_list(
        [
            {"prompt": messages(one.context), "chosen": messages([one.better]), "rejected": messages([one.worse])}
            for one in pairs
        ]
    )
    expected = DPOTrainer.__new__(DPOTrainer)._prepare_dataset(
        asked, session.base.tokenizer, DPOConfig("unused", bf16=False, use_cpu=True), "train"
    )
    found = dpo_rows(session, session.train, BATCH)
    assert found == to_end(session, expected, found)


def to_end(session: Session, expected: Dataset, like: Sequence[Row]) -> list[dict[str, Any]]:
    """Return TRL's rows without the template's text after a completion's end token, which is never generated."""
    end = session.base.chat.end_id

    def cut(key: str, value: Any) -> Any:
        return value[: value.index(end) + 1] if key.endswith("_ids") and key != "prompt_ids" else value

    return [{key: cut(key, row[key]) for key in like[0]} for row in expected.to_list()]


def test_a_last_batch_of_one_rating_is_left_out(session: Session) -> None:
    session.train.ratings = session.train.ratings[:9]
    assert len(kto_rows(session, session.train, 4)) == 8


@pytest.fixture
def no_second_base(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a second base is loaded")

    for module in ("kto_trainer", "dpo_trainer"):
        monkeypatch.setattr(f"trl.trainer.{module}.create_model_from_path", load)


@pytest.mark.usefixtures("no_second_base")
@pytest.mark.parametrize("name", ["kto", "dpo"])
def test_the_policy_alone_moves_towards_what_was_rated_up(session: Session, name: str) -> None:
    """It starts from the SFT policy, thumbs up become likelier than thumbs down, and nothing else changes."""
    roles = session.roles
    assert isinstance(roles, SharedBase)
    sft = {key: weight.clone() for key, weight in roles.weights(Role.SFT).items()}
    before, base = margin(session), roles.base_sha256()
    seen: list[int] = []
    trained = train_baseline(session, name, 0.05, seen.append)
    assert trained.steps == 4 * len(range(0, trained.rows, BATCH))
    assert seen[-1] == trained.steps
    assert margin(session) > before + 1
    assert all(torch.equal(weight, sft[key]) for key, weight in roles.weights(Role.SFT).items())
    assert roles.base_sha256() == base
    assert roles.active is Role.BASE
    assert "forward" not in vars(roles.lm)
    assert trained.cost.peak_memory_bytes > 0


@torch.no_grad()
def margin(session: Session) -> float:
    """Return the policy's mean log-prob of thumbs up minus that of thumbs down."""
    by_label: dict[bool, list[float]] = {True: [], False: []}
    for one in session.train.ratings:
        row = session.base.chat.row(one.context, one.answer)
        ids = torch.tensor([row.ids])
        length = len(row.ids) - row.prompt_length()
        found = session.roles(
            Role.POLICY, ids, torch.ones_like(ids, dtype=torch.bool), completion_length=length, temperature=1.0
        )
        by_label[one.label].append(float(found.log_probs_BT.sum()))
    return sum(by_label[True]) / len(by_label[True]) - sum(by_label[False]) / len(by_label[False])


def test_reference_is_the_sft_policy(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step, TRL's reference log-probs are those of the SFT policy, not of the base."""
    kept: list[Dataset] = []
    ours = KTOTrainer._precompute_ref_logps

    def keep(self: KTOTrainer, *args: Any) -> Dataset:
        kept.append(ours(self, *args))
        raise InterruptedError  # before the first step

    monkeypatch.setattr(KTOTrainer, "_precompute_ref_logps", keep)
    with pytest.raises(InterruptedError):
        train_baseline(session, "kto", 1e-3, lambda _: None)
    (rows,) = kept
    for row in rows.select(range(3)):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        mask, length = torch.ones_like(ids, dtype=torch.bool), len(row["completion_ids"])
        by_role = [
            float(session.roles(role, ids, mask, completion_length=length, temperature=1.0).log_probs_BT.sum())
            for role in (Role.SFT, Role.BASE)
        ]
        assert row["ref_logps"] == pytest.approx(by_role[0], abs=1e-4)
        assert row["ref_logps"] != pytest.approx(by_role[1], abs=1e-2)


def test_ratings_that_cannot_be_used_are_refused(session: Session) -> None:
    session.train.ratings = [one for one in session.train.ratings if one.label]
    with pytest.raises(UserError, match="no ratings with both labels"):
        kto_rows(session, session.train, BATCH)
    with pytest.raises(UserError, match="neither pairs nor ratings of one context with both labels"):
        dpo_rows(session, session.train, BATCH)
