"""What was run, on what and at what cost, in sentences."""

from collections.abc import Sequence

from perl.page.numbers import bytes_text, count_text, joined, seconds_text
from perl.page.outcome import Group
from perl.page.runs import Run
from perl.page.words import sft_words

STAGE_WORDS = {"sft": "supervised fine-tuning (SFT)", "reward": "reward modelling", "rl": "RL"}


def summary(group: Group, everyone: Sequence[Run]) -> list[str]:
    """What was run, on what, at what cost, a sentence each."""
    first = group.runs[0]
    done = joined([STAGE_WORDS[name] for name in first.stages])
    seeds = [str(run.report.seed) for run in group.runs]
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({joined(seeds)})"
    lines = [
        f"{group.label}, {which}: {done}, on {base_words(first)}.",
        f"Everything ran on {hardware_words(everyone)}.",
    ]
    seconds = group.over_runs(lambda run: sum(stage.seconds for stage in run.stages.values()))
    peak = group.over_runs(peak_memory)
    if seconds is not None:
        each = "" if len(seeds) == 1 else " a seed"
        memory = "" if peak is None else f", with {bytes_text(peak.mean)} of memory at the peak"
        lines.append(f"The stages took {seconds_text(seconds.mean)}{each}{memory}.")
    lines += [sft_words(group), reward_meaning(first)]
    return [line for line in lines if line]


def base_words(run: Run) -> str:
    """The base: its size, type and name."""
    base, settings = run.report.base, run.recipe.get("base")
    built = isinstance(settings, dict) and settings.get("build") is not None
    name = "a tiny base built by the recipe itself" if built else base.model
    return f"{name} ({count_text(base.parameters)} parameters, {base.dtype})"


def hardware_words(runs: Sequence[Run]) -> str:
    """The machines."""
    names = []
    for run in runs:
        machine = run.report.hardware
        cores = "" if machine.cores is None else f", {machine.cores} cores"
        memory = "" if machine.memory_bytes is None else f", {bytes_text(machine.memory_bytes)} of main memory"
        names.append(f"{machine.name} ({machine.device}{cores}{memory})")
    return joined(list(dict.fromkeys(names)))


def peak_memory(run: Run) -> float | None:
    """The highest peak of any stage."""
    return max((stage.peak_memory_bytes for stage in run.stages.values() if stage.peak_memory_bytes), default=None)


def reward_meaning(run: Run) -> str:
    """What the reward's scale means; empty without RL or recipe."""
    if run.report.stages.rl is None or not run.recipe:
        return ""
    rl, reward = run.recipe.get("rl"), run.recipe.get("reward")
    source = rl.get("reward") if isinstance(rl, dict) else None
    if isinstance(source, dict) and source.get("function"):
        return f"The reward is what the function {source['function']} returns."
    if isinstance(reward, dict) and reward.get("loss") == "thumbs":
        return (
            "The reward is the reward model's probability of a thumb up, in standard deviations from the mean "
            "of its training answers: 0 is an average answer, 1 is one standard deviation better."
        )
    return (
        "The reward is the reward model's score, in standard deviations from the mean of its training answers: "
        "0 is an average answer."
    )


def base_unchanged(runs: Sequence[Run]) -> list[tuple[bool, str]]:
    """Whether the base's bytes are those before, a line a distinct finding."""
    lines: dict[tuple[bool, str], None] = {}
    for run in runs:
        before, after = run.report.base.sha256_before, run.report.base.sha256_after
        if run.report.tuning == "full" and after is None:
            lines[
                (True, "Under full tuning every role has weights of its own; there is no shared base to keep.")
            ] = None
        elif before is None or after is None:
            lines[(False, f"Seed {run.report.seed}: the base was not hashed before and after.")] = None
        elif before == after:
            lines[(True, f"The base is unchanged: its weights' SHA-256 is {before[:16]}… before and after.")] = (
                None
            )
        else:
            lines[
                (
                    False,
                    f"The base has changed: SHA-256 {before[:16]}… before, {after[:16]}… after. This is a bug.",
                )
            ] = None
    return list(lines)
