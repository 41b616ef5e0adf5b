"""The text of the page: the verdict and its evidence, what was done, and what went wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from perl.measure.change import HARDLY, Change, change_verb, change_words, equal_words
from perl.measure.reward_model_card import RewardModelCard
from perl.recipe import StageName
from perl.report.numbers import bytes_text, count_text, decimal, joined, percent, signed, spread
from perl.report.outcome import MeanChange, mean_change, mean_of
from perl.report.runs import Group, Run
from perl.results import Incident
from perl.roles.role import REWARD_MEMBERS, Role
from perl.system.progress import counted

STAGE: dict[StageName, str] = {"sft": "SFT", "reward": "Reward", "rl": "RL"}
STAGE_WORDS = {"sft": "supervised fine-tuning (SFT)", "reward": "reward modelling", "rl": "RL"}
NO_RL = "There was no RL."
NO_JUDGE = (
    "This is measured with the reward that RL itself raised. The data have no gold judge, so nothing "
    "independent confirms it: read the samples."
)
NO_INTERVAL = "The report has no interval of the change, so it may be chance."
EXPLOITS = "It exploits errors in its reward: stop earlier, or strengthen the KL term (rl.kl, rl.kl_coef)."
SAME = "It did not change on any prompt, so more prompts would hardly help: look at the reward and the samples."
SHOWN_STEPS = 5


@dataclass(frozen=True)
class Finding:
    """A headline, the sentences that support it, and its kind: good, bad or open."""

    headline: str
    lines: list[str]
    kind: str


def verdict(group: Group) -> Finding:
    """Return whether the policy is better, by the gold judge if any; without RL, a verdict on the other stages."""
    reward, gold = mean_change(group.rl, "reward"), mean_change(group.rl, "gold")
    if reward is None:
        return _without_policy(group)
    lines, decisive = [_reward_words(reward)], reward
    if gold is not None:
        lines, decisive = [_gold_words(gold), *lines], gold
    if _nothing_remains(group):
        return Finding("The policy is the one that RL started from.", lines, "open")
    if decisive.clear is None:
        return Finding("The policy cannot be judged.", [*lines, NO_INTERVAL], "open")
    if not decisive.clear:
        same = decisive.interval == (0.0, 0.0)
        return Finding("No clear difference.", [*lines, SAME if same else _too_few(group)], "open")
    if gold is None:
        if reward.rise > 0:
            return Finding("The reward rose; nothing else has checked it.", [*lines, NO_JUDGE], "open")
        return Finding("The reward fell.", lines, "bad")
    if gold.rise > 0:
        return Finding("The policy is better.", lines, "good")
    if reward.clear and reward.rise > 0:
        return Finding("The policy is worse, although its reward rose.", [*lines, EXPLOITS], "bad")
    return Finding("The policy is worse.", lines, "bad")


def _nothing_remains(group: Group) -> bool:
    """Return whether RL was stopped in every run before there was a policy to keep."""
    stages = [run.report.stages.rl for run in group.runs if run.report.stages.rl is not None]
    return bool(stages) and all(
        any(one.action == "stopped" and not one.remains for one in rl.incidents) for rl in stages
    )


def _gold_words(gold: MeanChange) -> str:
    ends = f"{percent(gold.before.mean)} of the completions right before RL and {percent(gold.after.mean)} after"
    return f"The gold judge, which training never sees, finds {ends}{_evidence(gold, 100.0, 1, ' points')}."


def _reward_words(reward: MeanChange) -> str:
    ends = decimal(reward.before.mean, reward.places), decimal(reward.after.mean, reward.places)
    return f"The reward {change_words(*ends, reward.interval)}{_evidence(reward, 1.0, reward.places)}."


def _evidence(change: MeanChange, scale: float, places: int, unit: str = "") -> str:
    """Return the interval, and with several seeds how many agree."""
    moved = ("up", change.rose_in) if change.rise >= 0 else ("down", change.fell_in)
    seeds = "" if change.after.n == 1 else f"; {moved[0]} in {moved[1]} of {change.after.n} seeds"
    if change.interval is None:
        return seeds
    if equal := equal_words(change.interval):
        return f" (the change is {equal}{' of a seed' if seeds else ''}{seeds})"
    low, high = (signed(scale * end, places) for end in change.interval)
    return f" (95 % interval of the change: {low} to {high}{unit}{seeds})"


def _too_few(group: Group) -> str:
    most = max(one.n for one in group.rl)
    n = joined(sorted({f"{one.n:,}" for one in group.rl}))
    few = f"{n} prompt is" if most == 1 else f"{n} prompts are"
    allowed = [run.section("rl").get("eval_prompts") for run in group.runs]
    more = "Raise rl.eval_prompts"
    if any(isinstance(one, int) and most < one for one in allowed):  # all held-out prompts were used
        more = "Use more prompts or a larger data.held_out"
    return f"The interval includes 0: {few} too few to tell. {more}, or run more seeds."


def _without_policy(group: Group) -> Finding:
    if group.reward:
        fit = fitness(group.reward)
        return Finding(f"The reward model is {fit.headline.lower()[:-3]}RL.", [*fit.lines, NO_RL], fit.kind)
    if not group.sft:
        return Finding("No stage is finished.", ["The report has no results."], "open")
    loss = _loss_change(group)
    if loss.interval is None:
        return Finding("The loss cannot be judged.", [sft_words(group), NO_INTERVAL, NO_RL], "open")
    verb = change_verb(loss.interval, HARDLY * loss.before.mean)
    kind = {"fell": "good", "rose": "bad"}.get(verb, "open")
    return Finding(f"The loss on held-out answers {verb}.", [sft_words(group), NO_RL], kind)


def fitness(cards: Sequence[RewardModelCard]) -> Finding:
    """Return whether the reward model is fit for RL, in how many seeds, and the reasons of the first unfit one."""
    verdicts = [card.verdict for card in cards]
    count, fit = len(verdicts), sum(verdict.fit for verdict in verdicts)
    reasons = next((verdict.reasons for verdict in verdicts if not verdict.fit), verdicts[0].reasons)
    kind = "good" if fit == count else "open" if fit else "bad"
    seeds = "" if count == 1 or not fit else f" in {'all' if fit == count else f'{fit} of'} {count} seeds"
    return Finding(f"{'Fit' if fit else 'Not fit'} for RL{seeds}.", reasons, kind)


def reward_model_words(cards: Sequence[RewardModelCard]) -> list[str]:
    """Return the ranking in words, and whether the model is useful as a classifier."""
    ranked, compared = spread(card.ranked[0] for card in cards), cards[0].compared
    if ranked is None:
        return ["The AUROC is undefined: all held-out answers have the same label."]
    judge = "the gold judge calls" if cards[0].against == "gold" else "people rated"
    given = f"Given an answer that {judge} good and one bad, the reward model scores the good one higher"
    if compared:
        given = "Given two answers to one prompt, the reward model scores the one that people preferred higher"
    lines = [f"{given} {100 * ranked.mean:.0f} times in 100; a coin flip would do so 50 times."]
    if cards[0].ensemble is not None:
        lines += cards[0].ensemble.words(cards[0].metric)
    if compared:
        return lines
    if np.mean([card.accuracy for card in cards]) <= np.mean([card.majority_accuracy for card in cards]):
        lines.append(
            "As a classifier it is useless here: always giving the more frequent label is right as often. Its "
            "ranking may still be useful."
        )
    return lines


def sft_words(group: Group) -> str:
    """Return how SFT changed the loss on held-out answers; empty without SFT."""
    if not group.sft:
        return ""
    loss = _loss_change(group)
    ends = decimal(loss.before.mean, loss.places), decimal(loss.after.mean, loss.places)
    told = change_words(*ends, loss.interval, HARDLY * loss.before.mean)
    return f"The loss on held-out answers {told} SFT{_evidence(loss, 1.0, loss.places)}."


def _loss_change(group: Group) -> MeanChange:
    found = mean_of([Change(one.loss_before, one.loss_after, one.loss_interval) for one in group.sft])
    assert found is not None
    return found


def summary(group: Group, runs: Sequence[Run]) -> list[str]:
    """Return what was run, on what, and what its reward means, one sentence each.

    Args:
        runs: all runs on the page.
    """
    seeds = [str(run.report.seed) for run in group.runs]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({joined(seeds)})"
    done = joined([STAGE_WORDS[name] for name in group.first.stages]) or "no stage"
    base = group.first.report.base
    built = group.first.section("base").get("build") is not None
    name = "a tiny base built by the recipe itself" if built else base.model
    machines = joined(list(dict.fromkeys(_machine(run) for run in runs)))
    lines = [
        f"{group.label}, {which}: {done}, on {name} ({count_text(base.parameters)} parameters, {base.dtype}).",
        *_starts(group.first),
        *_chosen_rates(group.first),
        f"Everything ran on {machines}.",
        _reward_meaning(group.first),
        *dict.fromkeys(_base_unchanged(run) for run in runs),
    ]
    return [line for line in lines if line]


def _starts(run: Run) -> Iterator[str]:
    """Yield a sentence for each adapter, trained elsewhere, that a stage started from."""
    for name, stage in run.stages.items():
        if (start := stage.started_from) is not None:
            yield f"{STAGE[name]} started from the adapter in {start.folder} (SHA-256 {start.sha256[:16]}…)."


def _chosen_rates(run: Run) -> Iterator[str]:
    """Yield a sentence with the learning rates that were chosen automatically, if any."""
    chosen = [name for name in run.stages if run.section(name).get("learning_rate") == "auto"]
    rates = [f"{rate:.2g} ({STAGE[name]})" for name in chosen if (rate := run.stages[name].learning_rate)]
    if rates:
        yield f"Learning rates, chosen from the base's width and kind: {joined(rates)}."


def _machine(run: Run) -> str:
    machine = run.report.hardware
    cores = "" if machine.cores is None else f", {machine.cores} cores"
    return f"{machine.name} ({machine.device}{cores}, {bytes_text(machine.memory_bytes)} of main memory)"


def _reward_meaning(run: Run) -> str:
    """Return what the reward's scale is; empty without RL or recipe, and for a sum of several rewards."""
    source = run.section("rl").get("reward") or {}
    if run.report.stages.rl is None or not run.recipe or isinstance(source, list):
        return ""
    kind = source.get("kind", "function" if source.get("function") else "model")
    if kind not in ("function", "model") or source.get("weight", 1.0) != 1.0:
        return f"The reward has {joined([f'{key} {value}' for key, value in source.items()])}."
    if kind == "function":
        return f"The reward is what the function {source['function']} returns."
    thumbs = run.section("reward").get("loss") != "pairs"
    what, unit = ("probability of a thumb up", ", 1 is one standard deviation better") if thumbs else ("score", "")
    scale = "in standard deviations from the mean of its training answers"
    return f"The reward is the reward model's {what}, {scale}: 0 is an average answer{unit}."


def _base_unchanged(run: Run) -> str:
    before, after = run.report.base.sha256_before, run.report.base.sha256_after
    if run.report.unfinished:  # the base is hashed when all stages are finished
        return ""
    if after is None:
        return "Under full tuning every role has its own weights; there is no shared base to check."
    if before == after:
        return f"The base is unchanged: the SHA-256 of its weights is {before[:16]}… before and after."
    return f"⚠ The base has changed: SHA-256 {before[:16]}… before, {after[:16]}… after. This is a bug."


def incidents(runs: Sequence[Run]) -> list[Finding]:
    """Return everything that went wrong in these runs; what ended a run is bad, and comes first."""
    findings = [one for run in runs for one in _of_run(run, f" (seed {run.report.seed})" if runs[1:] else "")]
    return sorted(findings, key=lambda one: one.kind != "bad")


def _of_run(run: Run, which: str) -> Iterator[Finding]:
    labels = {Role.SFT: STAGE["sft"], Role.REWARD: STAGE["reward"]}
    labels |= {role: f"{STAGE['reward']}, member {n}" for n, role in enumerate(REWARD_MEMBERS[1:], 2)}
    for role, label in labels.items():
        refused = run.metrics[role].get("refused")
        if refused is not None:
            steps = (np.flatnonzero(refused == 1) + 1).tolist()
            named = joined([str(step) for step in steps[:SHOWN_STEPS]])
            more = f" and {len(steps) - SHOWN_STEPS} more" if steps[SHOWN_STEPS:] else ""
            count = f"{len(steps)} of {counted(len(refused), 'update')}"
            yield Finding(
                f"{label}: {count} {'was' if len(steps) == 1 else 'were'} refused{which}.",
                [f"At steps {named}{more} the loss or its gradient was not finite; these updates were skipped."],
                "open",
            )
    for incident in run.report.stages.rl.incidents if run.report.stages.rl is not None else []:
        yield _of_guard(incident, which)


def _of_guard(incident: Incident, which: str) -> Finding:
    shown = f" It began to show at step {incident.since}." if incident.since < incident.step else ""
    lines = [f"{incident.what[0].upper()}{incident.what[1:]}.{shown}", incident.causes, incident.remedy]
    if incident.action == "warned":
        return Finding(f"RL, step {incident.step}{which}.", lines, "open")
    remains = "No checkpoint is older than that, so the result is the policy that RL started from."
    if incident.remains:
        remains = (
            "The result, which this page evaluates, is the policy after "
            f"{counted(incident.remains, 'update')}, from the last checkpoint before that."
        )
    return Finding(f"RL was stopped at step {incident.step}{which}.", [*lines, remains], "bad")
