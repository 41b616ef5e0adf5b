"""`compare-runs`: the reward models and policies of two runs, on the rows that both held out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from perl.commands.options import JsonFile, say_loading
from perl.system.files import write_metrics
from perl.system.progress import console, counted
from perl.system.typed_json import as_json

if TYPE_CHECKING:
    from perl.measure.two_runs import Comparison, Difference
    from perl.stages.two_runs import TwoRuns


def compare_runs(
    first: Annotated[Path, typer.Argument(metavar="A", help="The folder of a run.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The folder of another run.")],
    json_file: JsonFile = None,
) -> None:
    """Compare the reward models and policies of two runs, on the rows that both held out."""
    say_loading()
    from perl.stages.two_runs import compare

    found = compare((first, second))
    console.print(f"A is {first}, B is {second}.", markup=False)
    if found.recipes:
        table = Table("key", "A", "B", title="Differences between the recipes")
        for key, values in found.recipes.items():
            table.add_row(key, *("–" if value is None else escape(str(value)) for value in values))
        console.print(table)
    if found.reward is not None:
        _print("reward model", "answer", found.reward)
        share = f"{found.reward.agreement:.1%}"
        console.print(f"They agree on {share} of {'the pairs' if _on_pairs(found.reward) else 'the answers'}.")
    if found.policy is not None:
        _print("policy", "prompt", found.policy)
        console.print(_policy_note(found))
    if json_file is not None:
        write_metrics(json_file, as_json(found))


def _print(title: str, row: str, compared: "Comparison") -> None:
    rows, dialogues = counted(compared.rows, row), counted(compared.dialogues, "dialogue")
    table = Table("metric", "A", "B", "B - A (95 %)", "", title=f"{title}, {rows} of {dialogues}")
    for one in compared.differences:
        ends = ("unknown" if value is None else f"{value:.4g}" for value in (one.first, one.second))
        table.add_row(one.metric, *ends, *_told(one))
    console.print(table)


def _told(one: "Difference") -> tuple[str, str]:
    if one.interval is None:
        return "unknown", ""
    from perl.measure.change import equal_words

    low, high = one.interval
    ends = f"{low:+.4g} in every resample" if equal_words(one.interval) else f"{low:+.4g} to {high:+.4g}"
    return ends, ("no difference is shown", "A is higher", "B is higher")[one.higher]


def _on_pairs(compared: "Comparison") -> bool:
    return all(one.metric != "accuracy" for one in compared.differences)


def _policy_note(found: "TwoRuns") -> str:
    if found.same_reward:
        judged = "Both were trained on the same reward."
    else:
        judged = "They were trained on different rewards; each reward scores the completions of both."
    if found.as_text:
        judged += " Completions are scored as text, with each reward's own tokenizer."
    return f"{judged} KL is from each policy to its own reference, in nats per completion."
