"""Compares two finished runs' reward models and policies on the rows that both hold out.

Axis letters: B completions, T completion positions, L positions of prompt and completion.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from perl.backbones.padding import joined
from perl.data.records import Prompt, Records, Speaker, Turn, content_of
from perl.errors import UserError
from perl.measure.two_runs import Comparison, compare_metrics, compare_scores
from perl.measure.verdict import MIN_DIALOGUES
from perl.recipe import Recipe, StageName, changes_nothing
from perl.recipe.reward_parts import ServerPart
from perl.rl.collector import Collector
from perl.rl.evaluate import EVAL_BATCH, PART, of_each, prompt_means, rollouts, samples_per_prompt
from perl.rl.samplers.base import Samples
from perl.roles.role import Role
from perl.runs.folder import RunFolder
from perl.stages.identity import refuse_changed
from perl.stages.material import read_data
from perl.stages.opening import open_session
from perl.stages.reward_rows import Rows, session_rows
from perl.stages.reward_scores import run_scores
from perl.stages.rl_setup import finished_collector, tokenized_prompts
from perl.stages.session import Session
from perl.system.plain_yaml import flat_keys
from perl.system.progress import console, counted, silence

Both = tuple[Path, Path]


@dataclass(frozen=True, kw_only=True)
class TwoRuns:
    """The comparisons of two runs, and the keys in which their recipes differ: (first, second) by key.

    Attributes:
        same_reward: whether both policies were trained on the same reward, which then scores both.
        as_text: whether completions were scored as text, because the runs' tokens or rewards differ.
    """

    runs: tuple[str, str]
    recipes: dict[str, tuple[object, object]]
    reward: Comparison | None = None
    policy: Comparison | None = None
    same_reward: bool | None = None
    as_text: bool | None = None


@dataclass(frozen=True)
class _Written:
    """A completion as text, without its end token; `ended` says whether it had one."""

    prompt: Prompt
    text: str
    ended: bool


@dataclass(frozen=True)
class _Drawn:
    """A policy's completions, grouped by prompt, and metrics per prompt."""

    written: list[_Written]
    metrics: dict[str, list[float]]
    reward: dict[str, str]
    """What the reward depends on."""
    base: str


def compare(runs: Both) -> TwoRuns:
    """Compare the reward models and the policies that both runs have.

    One run is in memory at a time.

    Raises:
        UserError: one is no run, no stage is finished in both, or too few rows are held out by both.
    """
    folders = [RunFolder(run) for run in runs]
    recipes = [folder.recipe() for folder in folders]
    finished: list[StageName] = [
        stage
        for stage in ("reward", "rl")
        if all(
            stage in recipe.stages and folder.result(stage)
            for recipe, folder in zip(recipes, folders, strict=True)
        )
    ]
    if not finished:
        raise UserError(
            "they have neither a finished reward model nor a finished policy in common",
            where=f"{runs[0]} and {runs[1]}",
            remedy="Finish the stage reward or rl in both with `perl-rlhf run RECIPE --out FOLDER`.",
        )
    with silence():
        held_out = [read_data(recipe)[1] for recipe in recipes]
    found = TwoRuns(runs=(str(runs[0]), str(runs[1])), recipes=_differences(recipes))
    if "reward" in finished:
        _refuse_few(held_out, "ratings", "comparisons")
        common = _common(held_out)
        (first, rows), (second, _) = (_scores(run, common) for run in runs)
        found = replace(found, reward=compare_scores(first, second, rows))
    if "rl" in finished:
        _refuse_few(held_out, "prompts")
        most = max(recipe.rl.eval_prompts for recipe in recipes if recipe.rl is not None)
        common = _common(held_out)
        common.prompts = common.prompts[:most]
        found = _compare_policies(found, runs, common)
    return found


def _differences(recipes: Sequence[Recipe]) -> dict[str, tuple[object, object]]:
    first, second = (flat_keys(recipe.model_dump(mode="json")) for recipe in recipes)
    keys = [key for key in dict.fromkeys((*first, *second)) if key != "name" and not changes_nothing(key)]
    both = {key: (first.get(key), second.get(key)) for key in keys}
    return {key: values for key, values in both.items() if values[0] != values[1]}


def _common(held_out: Sequence[Records]) -> Records:
    """Return the rows that both runs hold out, as they are in the first."""
    first, second = held_out
    there = {content_of(row) for row in second.rows()}
    return first.where(lambda row: content_of(row) in there)


def _refuse_few(held_out: Sequence[Records], *kinds: str) -> None:
    """Refuse rows from too few dialogues for an interval."""
    of_both, one, other = (
        [row for kind in kinds for row in records.by_kind()[kind]] for records in (_common(held_out), *held_out)
    )
    dialogues = len({row.dialogue for row in of_both})
    if dialogues < MIN_DIALOGUES:
        raise UserError(
            f"both hold out too few rows in common: {len(of_both):,}, from {counted(dialogues, 'dialogue')} "
            f"({MIN_DIALOGUES} are needed); the first run holds out {counted(len(one), 'row')}, the second "
            f"{counted(len(other), 'row')}",
            where=f"held-out {' and '.join(kinds)}",
            remedy="Train both on the same data, data.held_out and seed, or with the same data.eval_path.",
        )


@contextmanager
def _opened(run: Path, stage: StageName, held_out: Records) -> Iterator[Session]:
    """Open the run's session, to evaluate it on these rows."""
    gc.collect()  # frees the previous run's base
    console.print(f"evaluating {stage} of {run}", markup=False)
    with silence():
        session = open_session(RunFolder(run).recipe(), run)
        refuse_changed(session.folder, {stage: session.identities[stage]})
        session.held_out = held_out
        yield session


def _scores(run: Path, held_out: Records) -> tuple[list[float], Rows]:
    with _opened(run, "reward", held_out) as session:
        session.roles.eval()
        rows = session_rows(session, held_out, "any")
        return run_scores(session, rows.tokens).tolist(), rows


def _compare_policies(found: TwoRuns, runs: Both, held_out: Records) -> TwoRuns:
    """Sample both policies on the same prompts, and score all completions with the reward of each run."""
    each = samples_per_prompt(len(held_out.prompts))
    drawn = [_draw(run, held_out, each) for run in runs]
    same = drawn[0].reward == drawn[1].reward
    metrics = [dict(one.metrics) for one in drawn]
    # With the same base, the sampled tokens are scored; tokenizing their text could give other tokens.
    as_drawn = same and drawn[0].base == drawn[1].base
    for number, run in enumerate(runs):
        if as_drawn or (same and number):
            break
        judged = _judge(run, held_out, [one.written for one in drawn])
        name = "reward" if same else f"reward of {'AB'[number]}"
        for of_policy, rewards in zip(metrics, judged, strict=True):
            of_policy[name] = prompt_means(rewards, each)
    if not same:
        for one in metrics:
            del one["reward"]  # scored by each run's own reward
    order = sorted(metrics[0], key=lambda name: not name.startswith("reward"))
    dialogues = [prompt.dialogue for prompt in held_out.prompts]
    policy = compare_metrics({name: metrics[0][name] for name in order}, metrics[1], dialogues)
    return replace(found, policy=policy, same_reward=same, as_text=not as_drawn)


def _draw(run: Path, held_out: Records, each: int) -> _Drawn:
    with _opened(run, "rl", held_out) as session:
        collector = finished_collector(session)
        prompts = tokenized_prompts(session, held_out.prompts)
        generator, found = collector.generator("evaluate"), dict[str, list[float]]()
        written: list[_Written] = []
        for rollout in rollouts(collector, Role.POLICY, prompts.repeat(each), generator):
            ended = rollout.ended_B.tolist()
            written += map(_Written, rollout.prompts, rollout.texts, ended)
            for name, values in of_each(rollout, held_out.judge).items():
                found.setdefault(name, []).extend(values)
        metrics = {name: prompt_means(values, each) for name, values in found.items() if not name.startswith(PART)}
        return _Drawn(written, metrics, _reward_identity(session), session.identities["rl"].base)


def _judge(run: Path, held_out: Records, of_both: Sequence[Sequence[_Written]]) -> list[list[float]]:
    """Return the run's rewards of each policy's completions."""
    with _opened(run, "rl", held_out) as session:
        collector = finished_collector(session)
        return [_rewards_of(collector, written) for written in of_both]


def _rewards_of(collector: Collector, written: Sequence[_Written]) -> list[float]:
    """Return the collector's reward of each text, tokenized like completions of its base."""
    rewards: list[float] = []
    for start in range(0, len(written), EVAL_BATCH):
        part = written[start : start + EVAL_BATCH]
        prompts, texts = [one.prompt for one in part], [one.text for one in part]
        rewards += collector.reward(prompts, _samples(collector, part), texts).total_B.tolist()
    return rewards


def _samples(collector: Collector, written: Sequence[_Written]) -> Samples:
    """Return the texts as tokens; they were not sampled, so their log-probs are 0."""
    prompts, completions = [], []
    for one in written:
        speaker: Speaker = "text" if one.prompt.context[-1].speaker == "text" else "agent"
        ids = collector.chat.completion(one.prompt.context, Turn(speaker, one.text))
        prompts.append(collector.chat.context(one.prompt.context))
        completions.append(ids if one.ended or len(ids) == 1 else ids[:-1])
    device, pad_id = collector.roles.device, collector.sampling.pad_id
    ids_BL, mask_BL = joined(prompts, completions, pad_id, device)
    length = max(map(len, completions))
    return Samples(
        ids_BL=ids_BL,
        mask_BL=mask_BL,
        prompt_lengths=[len(ids) for ids in prompts],
        completion_lengths=[len(ids) for ids in completions],
        ended_B=torch.tensor([one.ended for one in written], device=device),
        sampler_log_probs_BT=torch.zeros(len(written), length, device=device),
    )


def _reward_identity(session: Session) -> dict[str, str]:
    """Return what the reward depends on: its settings, servers, and the reward stage if its model is a part."""
    rl = session.recipe.rl
    assert rl is not None
    identities = session.identities
    found = {key: value for key, value in identities["rl"].settings.items() if key.startswith("rl.reward")}
    if any(part.needs_model for part in rl.reward_parts):
        found["reward"] = identities["reward"].sha256
    return found | {f"server {part.url}": part.model for part in rl.reward_parts if isinstance(part, ServerPart)}
