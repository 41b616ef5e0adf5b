"""Dialogues of agent and customer, points in them where the agent speaks next, and rated turns."""

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
"""Maximum number of agent turns in a dialogue."""

SPAN = 1_000_000
"""Dialogue seeds reserved for each seed of a collection of dialogues."""


@dataclass(frozen=True, slots=True)
class Step:
    """One agent turn: its index among the turns, the state before it, and its deliberate mistake."""

    at: int
    state: State
    mistake: Mistake | None


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A dialogue, which begins with the customer and ends with the agent."""

    key: str
    turns: Context
    steps: tuple[Step, ...]


def play(seed: int, skill: float) -> Dialogue:
    """Return one dialogue of an agent with this skill; the same for the same seed."""
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
    """Return the customer's reply to what the agent said. A mistake does not change the dialogue's phase."""
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
    """Return the API's response, and the customer's complaint if the order that went through is wrong."""
    response = shop.order(parse_call(text))
    replies = [Turn("api", json.dumps(response))]
    if response["status"] == "sold out":
        named = replace(state, phase="answered", response=response)
        slot, word = named.lacking
        state = replace(state, sold_out=(*state.sold_out, word))
        if state.said.get(slot) == word:  # correct information, even if the call was wrong
            return replies, replace(state, phase="answered", response=response)
    if verdict.right:
        return replies, replace(state, phase="answered", response=response)
    if response["status"] == "error" and verdict.mistake is not Mistake.TOO_EARLY:
        return replies, state  # the API has already reported an error
    words, said = customer.notice(verdict, state)
    return [*replies, Turn("user", words)], replace(state, said={**state.said, **said})


def played(seed: int, skill: float) -> Iterator[Dialogue]:
    """Return endless dialogues; those of two seeds differ as long as fewer than `SPAN` are taken."""
    return (play(n, skill) for n in count(seed * SPAN))


def moments(seed: int, skill: float) -> Iterator[tuple[str, Context, State]]:
    """Yield a point where the agent speaks next from each of endless dialogues: key, context and state.

    Every kind of due act occurs about equally often.
    """
    rng = Random(seed)
    taken: Counter[Kind] = Counter({kind: 0 for kind in KINDS})
    for dialogue in played(seed, skill):
        rarest = min({step.state.due: None for step in dialogue.steps}, key=taken.__getitem__)
        step = rng.choice([step for step in dialogue.steps if step.state.due == rarest])
        taken[rarest] += 1
        yield dialogue.key, dialogue.turns[: step.at], step.state


def rated(seed: int, ratings: int, skill: float, noise: float) -> list[Rating]:
    """Return rated agent turns, two per context, as in the real data: one rated up and one down make a pair.

    Args:
        seed: selects the dialogues.
        noise: the probability that a rating differs from the gold verdict.
    """
    rng = Random(f"ratings {seed}")
    rows: list[Rating] = []
    for key, context, state in islice(moments(seed, skill), (ratings + 1) // 2):
        for _ in range(2):
            # Not a turn of the dialogue itself, because its last turn in each phase is always right.
            text, _ = speak(state, skill, rng)
            gold = judge_turn(state, text).right
            label = gold != (rng.random() < noise)
            rows.append(Rating(context, Turn("agent", text), label, key, gold))
    return rows[:ratings]
