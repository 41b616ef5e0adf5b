"""Dialogues of agent and customer, points in them where the agent is to speak, and rated turns."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice
from random import Random

from perl.data.records import Context, Rating, Turn
from perl.data.simulator.acts import parse, parse_call
from perl.data.simulator.agent import speak
from perl.data.simulator.customer import Customer
from perl.data.simulator.judge import Mistake, Verdict, judge_turn
from perl.data.simulator.shop import Shop
from perl.data.simulator.state import KINDS, Kind, State

LONGEST = 8
"""Agent turns after which a dialogue ends, however far it has come."""

SPAN = 1_000_000
"""Dialogue seeds set aside for each seed of a collection of dialogues."""


@dataclass(frozen=True, slots=True)
class Step:
    """One agent turn: where it stands among the turns, the state before it, its deliberate mistake."""

    at: int
    state: State
    mistake: Mistake | None


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A played dialogue: it begins with the customer and ends with the agent."""

    key: str
    turns: Context
    steps: tuple[Step, ...]


def play(seed: int, skill: float) -> Dialogue:
    """One dialogue of an agent of this skill, the same for the same seed."""
    rng = Random(seed)
    shop, customer = Shop.opened(rng), Customer.arrived(rng)
    opening, said = customer.open()
    turns, state = [Turn("user", opening)], State(said=said)
    steps: list[Step] = []
    while len(steps) < LONGEST:
        text, mistake = speak(state, skill, rng)
        steps.append(Step(len(turns), state, mistake))
        turns.append(Turn("agent", text))
        verdict = judge_turn(state, text)
        if len(steps) == LONGEST or (verdict.right and verdict.kind == "bye"):
            break
        if turns[-1].is_call:
            replies, state = _after_call(state, text, verdict, shop, customer)
        else:
            replies, state = _after_words(state, text, verdict, customer)
        turns += replies
    return Dialogue(f"coffee-{seed}", tuple(turns), tuple(steps))


def _after_words(state: State, text: str, verdict: Verdict, customer: Customer) -> tuple[list[Turn], State]:
    """The customer's reply to what the agent said. A mistake leaves the dialogue where it was."""
    act = parse(text)
    if not verdict.right or act is None:
        words, said = customer.notice(verdict, state)
    elif act.kind == "ask":
        words, said = customer.answer(act.slot, state)
    elif act.kind == "read":
        words, said = customer.confirm()
        state = state if said else replace(state, phase="confirmed")
    elif act.kind == "offer":
        words, said = customer.choose(state.lacking[0], act.options)
        state = replace(state, phase="confirmed", response={})
    else:
        words, said = customer.thank()
        state = replace(state, phase="closing", response={})
    return [Turn("user", words)], replace(state, said={**state.said, **said})


def _after_call(
    state: State, text: str, verdict: Verdict, shop: Shop, customer: Customer
) -> tuple[list[Turn], State]:
    """The API's answer, and the customer's word where the order that went through is not theirs."""
    response = shop.order(parse_call(text))
    replies = [Turn("api", json.dumps(response))]
    if response["status"] == "sold out":
        named = replace(state, phase="answered", response=response)
        slot, word = named.lacking
        state = replace(state, sold_out=(*state.sold_out, word))
        if state.said.get(slot) == word:  # true news even where the call was wrong: it is passed on
            return replies, replace(state, phase="answered", response=response)
    if verdict.right:
        return replies, replace(state, phase="answered", response=response)
    if response["status"] == "error" and verdict.mistake is not Mistake.TOO_EARLY:
        return replies, state  # the API has complained already
    words, said = customer.notice(verdict, state)
    return [*replies, Turn("user", words)], replace(state, said={**state.said, **said})


def played(seed: int, skill: float) -> Iterator[Dialogue]:
    """Endless dialogues; those of two seeds differ as long as fewer than `SPAN` are taken."""
    return (play(n, skill) for n in count(seed * SPAN))


def moments(seed: int, skill: float) -> Iterator[tuple[str, Context, State]]:
    """A point where the agent is to speak in each of endless dialogues: key, context and state.

    Every kind of due act comes about equally often.
    """
    rng = Random(seed)
    taken: Counter[Kind] = Counter({kind: 0 for kind in KINDS})
    for dialogue in played(seed, skill):
        rarest = min({step.state.due: None for step in dialogue.steps}, key=taken.__getitem__)
        step = rng.choice([step for step in dialogue.steps if step.state.due == rarest])
        taken[rarest] += 1
        yield dialogue.key, dialogue.turns[: step.at], step.state


def rated(seed: int, ratings: int, skill: float, noise: float) -> list[Rating]:
    """Rated agent turns, two to a context, as in the real data: one rated up and one down make a pair.

    Args:
        seed: picks the dialogues.
        noise: the probability that a rating is not the gold judgement.
    """
    rng = Random(f"ratings {seed}")
    rows: list[Rating] = []
    for key, context, state in islice(moments(seed, skill), (ratings + 1) // 2):
        for _ in range(2):
            # Not a turn of the dialogue itself, of which the last at each stage is always right.
            text, _ = speak(state, skill, rng)
            gold = judge_turn(state, text).right
            label = gold != (rng.random() < noise)
            rows.append(Rating(context, Turn("agent", text), label, key, gold))
    return rows[:ratings]
