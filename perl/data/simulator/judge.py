"""The gold judge: decides whether a text is a right agent turn in the visible state of a dialogue.

Mistakes of timing take precedence over mistakes of content: a call before the customer said yes is too early,
whatever its arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from perl.data.records import CALL, Prompt
from perl.data.simulator.acts import Act, parse
from perl.data.simulator.shop import MENU, SLOTS, Order
from perl.data.simulator.state import Kind, State


class Mistake(StrEnum):
    """What can be wrong with an agent's turn."""

    WRONG_ITEM = "wrong item"
    NOT_OFFERED = "option not offered"
    FORGOTTEN = "option forgotten"
    ALREADY_SAID = "already said"
    TOO_EARLY = "too early"
    MALFORMED = "malformed call"
    WRONG_NUMBER = "wrong number"
    OUT_OF_PLACE = "out of place"
    UNCLEAR = "unclear"


@dataclass(frozen=True, slots=True)
class Verdict:
    """The mistake (None: right), and its act, slot and word."""

    mistake: Mistake | None = None
    kind: Kind | None = None
    slot: str = ""
    word: str = ""

    @property
    def right(self) -> bool:
        """Whether the turn is right."""
        return self.mistake is None


def judge_turn(state: State, text: str) -> Verdict:
    """Return the verdict on any text as the agent's turn in this state."""
    text = text.strip()
    act = parse(text)
    if act is None:
        broken_call = text.startswith(CALL.strip())
        return Verdict(Mistake.MALFORMED if broken_call else Mistake.UNCLEAR)
    verdict = _timing(state, act)
    return _content(state, act) if verdict.right else verdict


def _timing(state: State, act: Act) -> Verdict:
    """Check whether this kind of act is allowed now."""
    kind, due = act.kind, state.due
    if kind == "ask" and act.slot in state.said:
        return Verdict(Mistake.ALREADY_SAID, kind, act.slot)
    if kind == due:
        return Verdict(kind=kind)
    if kind in ("read", "call") and state.phase == "gather":
        return Verdict(Mistake.TOO_EARLY, kind)
    if kind == "read":
        return Verdict(Mistake.ALREADY_SAID, kind)
    return Verdict(Mistake.OUT_OF_PLACE, kind)


def _content(state: State, act: Act) -> Verdict:
    """Check the content of an act that is allowed now."""
    if act.kind == "ask":
        return _options(state, act, act.slot)
    if act.kind in ("read", "call"):
        return _order(act.kind, act.order, state.said)
    if act.kind == "offer":
        slot, word = state.lacking
        if act.word != word:
            return Verdict(Mistake.WRONG_ITEM, act.kind, slot, act.word)
        return _options(state, act, slot)
    if act.kind == "tell":
        for told, key in ((act.price, "price"), (act.minutes, "minutes")):
            if told != state.response[key]:
                return Verdict(Mistake.WRONG_NUMBER, act.kind, key, told)
    return Verdict(kind=act.kind)


def _options(state: State, act: Act, slot: str) -> Verdict:
    available = state.available(slot)
    for n, word in enumerate(act.options):
        if word not in available or word in act.options[:n]:  # a repeated option is not a second one
            return Verdict(Mistake.NOT_OFFERED, act.kind, slot, word)
    return Verdict(kind=act.kind)


def _order(kind: Kind, order: Order, said: Order) -> Verdict:
    """Check whether an order is what was said, the worst mistake first."""
    for slot, word in order.items():
        if word not in MENU[slot]:
            return Verdict(Mistake.NOT_OFFERED, kind, slot, word)
    for slot, word in order.items():
        if word != said.get(slot):
            return Verdict(Mistake.WRONG_ITEM, kind, slot, word)
    for slot in SLOTS:
        if slot in said and slot not in order:
            return Verdict(Mistake.FORGOTTEN, kind, slot, said[slot])
    return Verdict(kind=kind)


def judge(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
    """Return gold scores, 1.0 right and 0.0 wrong: a `Judge` that reads each prompt's column `state`."""
    states = [State.from_json(prompt.columns["state"]) for prompt in prompts]
    return [float(judge_turn(state, answer).right) for state, answer in zip(states, answers, strict=True)]
