"""A customer with a goal, who answers, confirms, changes their mind and notices mistakes."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from perl.data.simulator.acts import describe
from perl.data.simulator.judge import Mistake, Verdict
from perl.data.simulator.shop import MENU, NEEDED, SLOTS
from perl.data.simulator.state import State

OPENINGS = (
    "hi, i would like {order} please.",
    "hello, can i get {order}?",
    "{order} please.",
    "i want {order}.",
)
ANSWERS = ("{thing} please.", "i would like {thing}.", "{thing}, thanks.")
ANSWERS_WITH_MORE = ("{thing} please, and {more}.", "{thing}, with {more}.")
YES = ("yes, please.", "yes, that is right.", "correct, go ahead.", "yes, thanks.")
CHANGES = ("actually, make that {thing}.", "no wait, i want {thing} now.")
ADDITIONS = ("can you add {thing}?", "and add {thing} please.")
PICKS = ("{thing} then, go ahead.", "ok, {thing}, go ahead.")
THANKS = ("great, thanks.", "perfect, thank you.", "ok, thanks a lot.")

NOTICES: dict[Mistake, tuple[str, ...]] = {
    Mistake.WRONG_ITEM: ("no, i asked for {thing}.", "no, not {word}, {thing}.", "that is wrong, i said {thing}."),
    Mistake.NOT_OFFERED: (
        "that is not on the menu, is it?",
        "{word} is not on the menu.",
        "{word}? you do not have that.",
    ),
    Mistake.FORGOTTEN: ("you forgot the {word}.", "what about the {word}?"),
    Mistake.ALREADY_SAID: ("i already told you, {thing}.", "i said that already, {thing}."),
    Mistake.WRONG_NUMBER: ("no, the screen says {number}.", "that is wrong, i see {number} here."),
    Mistake.UNCLEAR: ("sorry, what?", "i do not understand."),
}
NOT_ASKED_FOR = ("no, i did not ask for {word}.", "no {word} please.")
CONFIRMED_ALREADY = ("i already said yes.", "yes, i told you already.")
NOT_CONFIRMED = ("wait, i did not say yes yet.", "not so fast, i did not say yes.")
NOT_DONE = ("wait, i was not done yet.", "not so fast, you do not know the {slot}.")
WANTS_MORE = ("wait, i also want {thing}.",)
NOT_SOLD_OUT = ("are you sure? please just order it.", "that is not sold out, just order it.")
LEFT_ALONE = ("wait, what about my order?", "wait, we are not done.")
EXTRAS = 0.4
"""Probability that an order has an extra."""
CHANGES_MIND = 0.12
"""Probability that the customer changes the order when it is read back."""

Said = dict[str, str]


def thing(slot: str, value: str) -> str:
    """Return a value as customers name it."""
    return {"drink": f"a {value}", "milk": f"{value} milk"}.get(slot, value)


@dataclass(slots=True)
class Customer:
    """A customer: every method returns words and the slots said with them."""

    goal: Said
    rng: Random

    @staticmethod
    def arrived(rng: Random) -> Customer:
        """Return a customer with a random goal, which has an extra with probability `EXTRAS`."""
        slots = [slot for slot in SLOTS if slot in NEEDED or rng.random() < EXTRAS]
        return Customer({slot: rng.choice(MENU[slot]) for slot in slots}, rng)

    def _pick(self, wordings: tuple[str, ...], **parts: str) -> str:
        return self.rng.choice(wordings).format(**parts)

    def _thing(self, slot: str) -> str:
        return thing(slot, self.goal[slot])

    def open(self) -> tuple[str, Said]:
        """Return the first turn: part of the goal, and the extra if there is one."""
        odds = {"drink": 0.85, "size": 0.6, "milk": 0.55, "extra": 1.0}
        said = {slot: self.goal[slot] for slot in self.goal if self.rng.random() < odds[slot]}
        if not any(slot in said for slot in NEEDED):
            said["drink"] = self.goal["drink"]
        return self._pick(OPENINGS, order=describe(said)), said

    def answer(self, slot: str, state: State) -> tuple[str, Said]:
        """Say what was asked for, and sometimes one more thing."""
        said = {slot: self.goal[slot]}
        others = [other for other in state.missing if other != slot]
        if not others or self.rng.random() < 0.7:
            return self._pick(ANSWERS, thing=self._thing(slot)), said
        other = self.rng.choice(others)
        said[other] = self.goal[other]
        return self._pick(ANSWERS_WITH_MORE, thing=self._thing(slot), more=self._thing(other)), said

    def confirm(self) -> tuple[str, Said]:
        """Say yes to the order as read back, or change it with probability `CHANGES_MIND`."""
        if self.rng.random() >= CHANGES_MIND:
            return self._pick(YES), {}
        slot = self.rng.choice(SLOTS)
        wordings = CHANGES if slot in self.goal else ADDITIONS
        self.goal[slot] = self.rng.choice([value for value in MENU[slot] if value != self.goal.get(slot)])
        return self._pick(wordings, thing=self._thing(slot)), {slot: self.goal[slot]}

    def choose(self, slot: str, options: tuple[str, ...]) -> tuple[str, Said]:
        """Choose one of the options instead of what is sold out, and ask to order it."""
        self.goal[slot] = self.rng.choice(options)
        return self._pick(PICKS, thing=self._thing(slot)), {slot: self.goal[slot]}

    def thank(self) -> tuple[str, Said]:
        """Accept price and minutes."""
        return self._pick(THANKS), {}

    def notice(self, verdict: Verdict, state: State) -> tuple[str, Said]:
        """React to a mistake, and sometimes say what is still missing."""
        mistake, slot, word = verdict.mistake, verdict.slot, verdict.word
        assert mistake is not None, "only mistakes are noticed"
        if mistake is Mistake.TOO_EARLY:
            return self._slow_down(state)
        if mistake is Mistake.OUT_OF_PLACE:
            wordings = NOT_SOLD_OUT if verdict.kind == "offer" else LEFT_ALONE
            return self._pick(wordings), {}
        if mistake is Mistake.ALREADY_SAID and not slot:
            return self._pick(CONFIRMED_ALREADY), {}
        if mistake is Mistake.WRONG_NUMBER:
            unit = "dollars" if slot == "price" else "minutes"
            return self._pick(NOTICES[mistake], number=f"{state.response[slot]} {unit}"), {}
        if mistake is Mistake.WRONG_ITEM and slot not in state.said:
            return self._pick(NOT_ASKED_FOR, word=word), {}
        known = thing(slot, state.said[slot]) if slot in state.said else ""
        text = self._pick(NOTICES[mistake], thing=known, word=word)
        if mistake is Mistake.NOT_OFFERED and verdict.kind == "ask" and self.rng.random() < 0.5:
            return f"{text} {self._pick(ANSWERS, thing=self._thing(slot))}", {slot: self.goal[slot]}
        return text, {}

    def _slow_down(self, state: State) -> tuple[str, Said]:
        if not state.missing:
            return self._pick(NOT_CONFIRMED), {}
        slot = self.rng.choice(state.missing)
        if self.rng.random() < 0.5:
            return self._pick(NOT_DONE, slot=slot), {}
        return self._pick(WANTS_MORE, thing=self._thing(slot)), {slot: self.goal[slot]}
