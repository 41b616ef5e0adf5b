"""`evaluate`: judge a trained reward model on rated data, or a policy on prompts."""

from pathlib import Path
from typing import Any

from rich.table import Table

from perl.data.sources import load_records, parse_source
from perl.errors import UserError
from perl.measure.bootstrap import Interval
from perl.measure.reward_model_card import RewardModelCard
from perl.recipe import StageName
from perl.rl.evaluate import evaluate_policy, policy_change
from perl.roles.roles import Role
from perl.runs.folder import RunFolder
from perl.stages.cut_rows import say_cut
from perl.stages.reward import answers_of, tokenize_rows
from perl.stages.reward_card import evaluate_rows, print_card
from perl.stages.rl_setup import eval_prompts, setup_collector
from perl.stages.session import Session, open_session
from perl.system.files import write_metrics
from perl.system.progress import console, counted
from perl.system.typed_json import as_json

STAGES: dict[str, StageName] = {"reward": "reward", "policy": "rl"}
"""The roles that can be judged, and the stage in which each is trained."""


def evaluate(run: Path, role: str, data: str | None, json_file: Path | None) -> None:
    """Judge a role of a finished run, print the metrics, and write them where asked.

    Args:
        run: the run folder.
        role: `reward` or `policy`.
        data: a source or file; the held-out part of the run's own data by default.
        json_file: where the metrics go as JSON.

    Raises:
        UserError: no such run or role, a stage that is not finished, or data that cannot be used.
    """
    if role not in STAGES:
        raise UserError(f"no role {role!r} to evaluate", where="ROLE", remedy="It is reward or policy.")
    recipe, stage = RunFolder(run).recipe(), STAGES[role]
    if stage not in recipe.stages:
        has = ", ".join(recipe.stages)
        remedy = f"Its recipe has no section {stage}; it has {has}."
        raise UserError(f"the run has no {role}", where=str(run), remedy=remedy)
    session = open_session(recipe, run)
    if data is not None:
        source, path = parse_source(data)
        session.held_out = load_records(source, path, session.recipe.seed)
    metrics: RewardModelCard | dict[str, Any]
    if role == "reward":
        metrics = card = _reward(session, data)
        print_card(f"reward of {run}", card)
    else:
        metrics = values = _policy(session)
        _print(f"policy of {run}", values)
    if json_file is not None:
        write_metrics(json_file, as_json(metrics))


def open_run(run: Path) -> Session:
    """The session of a run that was started: its base, and whatever adapters it has, to be loaded.

    Raises:
        UserError: this is no run folder.
    """
    return open_session(RunFolder(run).recipe(), run)


def _reward(session: Session, data: str | None) -> RewardModelCard:
    session.load(Role.REWARD)
    settings = session.recipe.reward
    assert settings is not None
    length = min(settings.max_length, session.base.context_length)
    source = data or session.recipe.data.source
    # Ratings are judged as ratings, whatever the model was trained on; one class only is a fact, not an error.
    rows = tokenize_rows(session.base.chat, session.held_out, "any", length, source)
    say_cut(rows.cut, len(rows.ids), length, "reward.max_length")
    trained_on = answers_of(session.train, settings.loss, session.recipe.data.source)
    return evaluate_rows(session.roles, rows.ids, rows, trained_on, session.base.chat.pad_id)


def _policy(session: Session) -> dict[str, Any]:
    assert session.recipe.rl is not None
    if session.recipe.sft is not None:
        session.load(Role.SFT)
    session.load(Role.POLICY)
    prompts = eval_prompts(session)
    say_cut(prompts.cut, len(prompts), session.recipe.rl.max_prompt_length or 0, "rl.max_prompt_length")
    collector, judge = setup_collector(session), session.held_out.judge
    before = evaluate_policy(collector, session.roles.reference, prompts, judge)
    after = evaluate_policy(collector, Role.POLICY, prompts, judge)
    return policy_change(before, after, prompts)


def _print(title: str, metrics: dict[str, Any]) -> None:
    table = Table("metric", "before", "after", "change (95 %)", title=title)
    for name in ("reward", "gold", "answer_tokens", "ended"):
        if f"{name}_before" in metrics:
            ends = (f"{metrics[f'{name}_{when}']:.4g}" for when in ("before", "after"))
            table.add_row(name, *ends, _ends(metrics[f"{name}_interval"]))
    for name, value in metrics["reward_parts_before"].items():
        table.add_row(f"reward/{name}", f"{value:.4g}", f"{metrics['reward_parts_after'][name]:.4g}", "")
    table.add_row("kl", "0", f"{metrics['kl']:.4g}", _ends(metrics["kl_interval"]))
    console.print(table)
    each = counted(metrics["samples_per_prompt"], "completion")
    console.print(f"{counted(metrics['n'], 'prompt')}, {each} each")


def _ends(interval: Interval | None) -> str:
    return "unknown" if interval is None else f"{interval[0]:+.4g} to {interval[1]:+.4g}"
