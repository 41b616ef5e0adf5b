"""`evaluate`: evaluate a trained reward model on rated data, or a policy on prompts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.markup import escape
from rich.table import Table

from perl.commands.options import JsonFile, Run, say_loading
from perl.errors import UserError
from perl.system.files import write_metrics
from perl.system.progress import console, counted
from perl.system.typed_json import as_json

if TYPE_CHECKING:
    from perl.measure.bootstrap import Interval
    from perl.measure.reward_model_card import RewardModelCard
    from perl.rl.results import PolicyChange
    from perl.stages.session import Session

ROLES = ("reward", "policy")


def evaluate(
    run: Run,
    role: Annotated[str, typer.Argument(metavar="ROLE", help="reward or policy.")],
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE[:PATH]", help="A source or a file; the run's own by default."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Evaluate a trained reward model on rated data, or a policy on prompts."""
    if role not in ROLES:
        raise UserError(f"no role {role!r} to evaluate", where="ROLE", remedy="Use reward or policy.")
    say_loading()
    session = _open(run, role, data)
    metrics = _reward(session, run, data) if role == "reward" else _policy(session, run, data)
    if json_file is not None:
        write_metrics(json_file, as_json(metrics))


def _open(run: Path, role: str, data: str | None) -> "Session":
    """Open the run's session, with the evaluation data as its held-out data."""
    from perl.data.sources import load_records, parse_source
    from perl.data.tables import columns_present
    from perl.runs.folder import RunFolder
    from perl.stages.material import print_left_out
    from perl.stages.opening import open_session

    recipe, stage = RunFolder(run).recipe(), "rl" if role == "policy" else role
    if stage not in recipe.stages:
        remedy = f"Its recipe has no section {stage}; it has {', '.join(recipe.stages)}."
        raise UserError(f"the run has no {role}", where=str(run), remedy=remedy)
    session = open_session(recipe, run)
    if data is not None:
        name, path = parse_source(data)
        columns = columns_present(Path(path), recipe.data.columns) if name == "jsonl" and path is not None else {}
        session.held_out = load_records(name, path, recipe.seed, columns, "--data", recipe.data.chat)
        print_left_out(session.held_out.problems)
    return session


def _reward(session: "Session", run: Path, data: str | None) -> "RewardModelCard":
    from perl.stages.cut_rows import say_cut
    from perl.stages.identity import refuse_changed
    from perl.stages.reward_card import evaluate_rows, print_card
    from perl.stages.reward_rows import answers_of, session_rows

    for role in session.reward_members:
        session.load(role)
    if data is None:
        refuse_changed(session.folder, {"reward": session.identities["reward"]})
    assert session.recipe.reward is not None
    # Ratings are evaluated as ratings, whatever the model was trained on; a single class is not an error.
    rows = session_rows(session, session.held_out, "any", data)
    say_cut(rows.cut, len(rows.tokens), session.max_length("reward"), "reward.max_length")
    trained_on = answers_of(session.train, session.recipe.reward.loss, session.recipe.data.source)
    card = evaluate_rows(session, rows.tokens, rows, trained_on)
    print_card(f"reward of {run}", card)
    return card


def _policy(session: "Session", run: Path, data: str | None) -> "PolicyChange":
    from perl.rl.evaluate import evaluate_policy, policy_change
    from perl.roles.role import Role
    from perl.stages.cut_rows import say_cut
    from perl.stages.identity import refuse_changed
    from perl.stages.rl_setup import eval_prompts, finished_collector

    assert session.recipe.rl is not None
    collector, judge = finished_collector(session), session.held_out.judge
    if data is None:
        refuse_changed(session.folder, {"rl": session.identities["rl"]})
    prompts = eval_prompts(session)
    say_cut(prompts.cut, len(prompts), session.recipe.rl.max_prompt_length or 0, "rl.max_prompt_length")
    before = evaluate_policy(collector, session.roles.reference, prompts, judge)
    after = evaluate_policy(collector, Role.POLICY, prompts, judge)
    change = policy_change(before, after, prompts, collector.eval_samples)
    _print(f"policy of {run}", change)
    return change


def _print(title: str, found: "PolicyChange") -> None:
    from perl.rl.results import PairedMetric

    table = Table("metric", "before", "after", "change (95 %)", title=escape(title))
    rows = [(name, found.change(name)) for name in get_args(PairedMetric)]
    rows += [(f"pass@{one.k}", one) for one in found.pass_at or []]
    for name, change in rows:
        if change is not None:
            table.add_row(name, f"{change.before:.4g}", f"{change.after:.4g}", _ends(change.interval))
    after = found.reward_parts_after or {}
    for name, value in (found.reward_parts_before or {}).items():
        table.add_row(f"reward/{name}", f"{value:.4g}", f"{after[name]:.4g}", "")
    table.add_row("kl", "0", f"{found.kl:.4g}", _ends(found.kl_interval))
    console.print(table)
    each = counted(found.samples_per_prompt or 1, "completion")
    console.print(f"{counted(found.n, 'prompt')}, {each} each")


def _ends(interval: "Interval | None") -> str:
    from perl.measure.change import equal_words

    if interval is None:
        return "unknown"
    return equal_words(interval) or f"{interval[0]:+.4g} to {interval[1]:+.4g}"
