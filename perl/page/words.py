"""The findings in sentences: verdict, summary, and how to read the reward model's figures."""

from collections.abc import Sequence
from dataclasses import dataclass

from perl.page.card_words import fitness
from perl.page.numbers import Spread, decimal, joined, percent, signed, spread
from perl.page.outcome import Change, Group, gold_change, loss_change, reward_change
from perl.page.schema import RewardEval

TRUSTED_AUROC = ((0.9, "very well"), (0.8, "well"), (0.7, "fairly"), (0.6, "weakly"))


@dataclass(frozen=True)
class Verdict:
    """The answer in a few words, the evidence in a sentence or two, and its kind: good, bad or open."""

    headline: str
    evidence: str
    kind: str


def verdict(group: Group) -> Verdict:
    """Is the policy better? Without a policy: is what was trained any good?"""
    reward, gold = reward_change(group.rl), gold_change(group.rl)
    if reward is None:
        return _without_policy(group)
    return _by_reward(group, reward) if gold is None else _by_gold(group, reward, gold)


def _by_gold(group: Group, reward: Change, gold: Change) -> Verdict:
    assert gold.interval is not None
    low, high = (signed(100 * end, 1) for end in gold.interval)
    evidence = (
        f"The gold judge, which training never sees, finds {percent(gold.before.mean)} of the answers right "
        f"before RL and {percent(gold.after.mean)} after (95 % interval of the change: {low} to {high} "
        f"points{_seeds(gold)}). {_reward_words(reward)}"
    )
    if not gold.clear:
        n = joined(sorted({f"{one.n:,}" for one in group.rl}))
        too_few = (
            f"The interval includes 0: {n} prompts are too few to tell. Raise rl.eval_prompts, or run more seeds."
        )
        return Verdict("No clear difference.", f"{evidence} {too_few}", "open")
    if gold.rise > 0:
        return Verdict("The policy is better.", evidence, "good")
    if reward.rise > 0:
        why = "It exploits mistakes of its reward: stop earlier, or raise kl_coef."
        return Verdict("The policy is worse, although its reward rose.", f"{evidence} {why}", "bad")
    return Verdict("The policy is worse.", evidence, "bad")


def _by_reward(group: Group, reward: Change) -> Verdict:
    evidence = f"{_reward_words(reward)} {_interval_words(reward)}"
    no_judge = (
        "That is the judgement of the reward that RL itself raised. The data have no gold judge, so nothing "
        "independent confirms it: read the samples."
    )
    if reward.rise <= 0:
        return Verdict("The reward did not rise.", evidence.strip(), "bad")
    if reward.clear is False:
        return Verdict("No clear difference.", evidence.strip(), "open")
    return Verdict("The reward rose; nothing else has checked it.", f"{evidence.strip()} {no_judge}", "open")


def _interval_words(change: Change) -> str:
    if change.interval is None:
        return ""
    low, high = (signed(end) for end in change.interval)
    return f"The 95 % interval of the change is {low} to {high}."


def _reward_words(reward: Change) -> str:
    verb = "rose" if reward.rise > 0 else "did not rise"
    return (
        f"The reward {verb}: {decimal(reward.before.mean)} before RL, {decimal(reward.after.mean)} after"
        f"{_seeds(reward)}."
    )


def _seeds(change: Change) -> str:
    n = change.after.n
    return "" if n == 1 else f"; up in {change.rose_in} of {n} seeds"


def _without_policy(group: Group) -> Verdict:
    cards = group.reward
    if cards:
        found = fitness(cards)
        if found is not None:
            return Verdict(
                f"The reward model is {found.headline[0].lower()}{found.headline[1:]}",
                f"{' '.join(found.reasons)} There was no RL.",
                found.kind,
            )
        auroc = spread(card.auroc for card in cards)
        if auroc is None:
            return Verdict(
                "The reward model cannot be judged.", "All held-out answers bear the same label.", "open"
            )
        kind = "good" if auroc.mean >= 0.7 else "open" if auroc.mean >= 0.6 else "bad"
        return Verdict(_ranks(auroc.mean), f"{auroc_words(cards)} There was no RL.", kind)
    loss = loss_change(group)
    if loss is None:
        return Verdict("No stage is finished.", "The report holds no results.", "open")
    headline = f"The loss on held-out answers {'fell' if loss.rise < 0 else 'did not fall'}."
    return Verdict(headline, f"{sft_words(group)} There was no RL.", "good" if loss.rise < 0 else "bad")


def _ranks(auroc: float) -> str:
    how = next((word for bound, word in TRUSTED_AUROC if auroc >= bound), None)
    return f"The reward model ranks answers {how}." if how else "The reward model hardly beats a coin."


def auroc_words(cards: Sequence[RewardEval]) -> str:
    """The AUROC as odds that a reader can picture."""
    auroc = spread(card.auroc for card in cards)
    if auroc is None:
        return "The AUROC is undefined: all held-out answers bear the same label."
    judge = "the gold judge calls" if cards[0].against == "gold" else "people rated"
    return (
        f"Given an answer that {judge} good and one bad, the reward model scores the good one higher "
        f"{100 * auroc.mean:.0f} times in 100 (AUROC {decimal(auroc.mean)}; a coin would have 0.50)."
    )


def accuracy_words(cards: Sequence[RewardEval]) -> str:
    """Accuracy beside that of always saying the more frequent label."""
    accuracy, majority = spread(card.accuracy for card in cards), spread(card.majority_accuracy for card in cards)
    assert accuracy is not None
    assert majority is not None
    figures = f"It is right about {percent(accuracy.mean)} of the answers; always giving the more frequent label "
    figures += f"would be right about {percent(majority.mean)}."
    if accuracy.mean <= majority.mean:
        return f"{figures} As a classifier it is worth nothing here; its ranking may still be."
    return figures


def calibration_words(cards: Sequence[RewardEval]) -> str:
    """The calibration error in points, and what scaling makes of it."""
    scaled = [card.calibration for card in cards if card.calibration is not None]
    ece = spread(one.ece_before for one in scaled) or spread(card.ece for card in cards)
    after = spread(one.ece_after for one in scaled)
    assert ece is not None
    words = (
        f"The probabilities it gives are off by {100 * ece.mean:.0f} points on average (ECE {decimal(ece.mean)})"
    )
    if after is None:
        return f"{words}."
    return (
        f"{words}. Scaled to σ({decimal(scaled[0].slope)} · score {signed(scaled[0].intercept)}) they are off by "
        f"{100 * after.mean:.0f}, judged on dialogues that the scaling was not fitted to."
    )


def card_words(cards: Sequence[RewardEval]) -> list[str]:
    """How to read the reward model's card."""
    return [auroc_words(cards), accuracy_words(cards), calibration_words(cards)]


def trust_words(cards: Sequence[RewardEval]) -> str:
    """Whether to build on it, in one sentence."""
    auroc = spread(card.auroc for card in cards)
    if auroc is None:
        return "Judge it on data with both labels before using it."
    how = _ranks(auroc.mean)
    advice = "" if auroc.mean >= 0.7 else " Do not train a policy against it without another judge."
    return f"{how}{advice}"


def sft_words(group: Group) -> str:
    """What SFT did to the loss on held-out answers; empty without SFT."""
    loss = loss_change(group)
    if loss is None:
        return ""
    did = "lowered" if loss.rise < 0 else "did not lower"
    before, after = decimal(loss.before.mean, 3), decimal(loss.after.mean, 3)
    return f"SFT {did} the loss on held-out answers: {before} before, {after} after."


def range_text(change: Change, percentage: bool) -> str:
    """As in 0.18 → 0.80."""
    ends = (change.before.mean, change.after.mean)
    return " → ".join(percent(end) if percentage else decimal(end) for end in ends)


def plus_minus(value: Spread | None, places: int = 2) -> str:
    """The spread over seeds for a tile's second line; empty for a single run."""
    return "" if value is None or value.sd is None else f"± {decimal(value.sd, places)} over {value.n} seeds"
