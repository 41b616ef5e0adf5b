"""An agent of limited skill: it knows the right act, but often makes a mistake."""

from random import Random

from perl.data.simulator.acts import Act, call_text, render
from perl.data.simulator.judge import Mistake
from perl.data.simulator.shop import MENU, NEEDED, OFF_MENU, SLOTS, Order
from perl.data.simulator.state import Kind, State

_MISTAKES: dict[Kind, str] = {
    "ask": "ALREADY_SAID NOT_OFFERED TOO_EARLY TOO_EARLY OUT_OF_PLACE UNCLEAR",
    "read": "WRONG_ITEM WRONG_ITEM NOT_OFFERED FORGOTTEN FORGOTTEN ALREADY_SAID TOO_EARLY TOO_EARLY UNCLEAR",
    "call": "WRONG_ITEM WRONG_ITEM NOT_OFFERED FORGOTTEN FORGOTTEN ALREADY_SAID MALFORMED MALFORMED OUT_OF_PLACE",
    "offer": "WRONG_ITEM NOT_OFFERED NOT_OFFERED OUT_OF_PLACE",
    "tell": "WRONG_NUMBER WRONG_NUMBER ALREADY_SAID OUT_OF_PLACE",
    "bye": "ALREADY_SAID UNCLEAR",
}
MISTAKES = {kind: tuple(Mistake[name] for name in names.split()) for kind, names in _MISTAKES.items()}
"""The mistakes made instead of each right act; one listed twice is made twice as often."""

MISNAMED = {"drink": "item", "size": "cup", "milk": "cream"}
"""Argument names that the API does not know."""


def speak(state: State, skill: float, rng: Random) -> tuple[str, Mistake | None]:
    """Return the agent's next turn, and the deliberate mistake in it, with probability `1 - skill`."""
    if rng.random() < skill:
        return render(right_act(state, rng), rng), None
    mistake = rng.choice(MISTAKES[state.due])
    return mistaken(state, mistake, rng), mistake


def right_act(state: State, rng: Random) -> Act:
    """Return what a perfect agent does: a random one of the right acts."""
    match state.due:
        case "ask":
            return _ask(state, rng.choice(state.missing), rng)
        case "offer":
            slot, word = state.lacking
            return Act("offer", word=word, options=_some(state, slot, rng))
        case "tell":
            return Act("tell", price=state.response["price"], minutes=state.response["minutes"])
        case "bye":
            return Act("bye")
        case kind:
            return Act(kind, order=state.said)


def mistaken(state: State, mistake: Mistake, rng: Random) -> str:
    """Return a turn with exactly this mistake, which must be possible in this state."""
    if mistake is Mistake.UNCLEAR:
        words = render(right_act(state, rng), rng).split()
        return " ".join(words[: rng.randrange(1, len(words))])  # broken off in the middle
    if mistake is Mistake.MALFORMED:
        return _malformed(state.said, rng)
    return render(_wrong_act(state, mistake, rng), rng)


def _wrong_act(state: State, mistake: Mistake, rng: Random) -> Act:
    if mistake is Mistake.ALREADY_SAID:
        return _again(state, rng)
    if mistake is Mistake.TOO_EARLY:  # reads back or calls with an incomplete order
        early: Kind = "read" if state.missing and rng.random() < 0.5 else "call"
        return Act(early, order=state.said)
    if mistake is Mistake.OUT_OF_PLACE:
        if state.due == "call" and rng.random() < 0.5:  # falsely says that something is sold out
            slot = rng.choice(("drink", "milk"))
            return Act("offer", word=state.said[slot], options=_some(state, slot, rng, state.said[slot]))
        return Act("bye")
    if state.due in ("read", "call"):
        return Act(state.due, order=_spoilt(state.said, mistake, rng))
    if state.due == "tell":
        return _misquoted(state, rng)
    return _bad_offer(state, mistake, rng)


def _ask(state: State, slot: str, rng: Random) -> Act:
    return Act("ask", slot=slot, options=_some(state, slot, rng))


def _some(state: State, slot: str, rng: Random, but: str = "") -> tuple[str, ...]:
    """Return all available values of a slot, or three of them if there are many, in the menu's order."""
    options = [value for value in state.available(slot) if value != but]
    if len(options) > 4:
        options = [options[n] for n in sorted(rng.sample(range(len(options)), 3))]
    return tuple(options)


def _again(state: State, rng: Random) -> Act:
    """Ask for, or read back, what the customer has already said or confirmed."""
    if state.phase in ("confirmed", "closing") and rng.random() < 0.5:
        return Act("read", order=state.said)
    return _ask(state, rng.choice([slot for slot in NEEDED if slot in state.said]), rng)


def _spoilt(said: Order, mistake: Mistake, rng: Random) -> dict[str, str]:
    """Return what was said with one thing forgotten, changed, or replaced with something not on the menu."""
    order, slot = dict(said), rng.choice(list(said))
    if mistake is Mistake.FORGOTTEN:
        order.pop(rng.choice([s for s in said if s != "drink"]))  # nobody forgets the drink itself
    elif mistake is Mistake.NOT_OFFERED:
        order[slot] = rng.choice(OFF_MENU[slot])
    else:
        order[slot] = rng.choice([value for value in MENU[slot] if value != said[slot]])
    return {slot: order[slot] for slot in SLOTS if slot in order}


def _bad_offer(state: State, mistake: Mistake, rng: Random) -> Act:
    """Return an ask or offer that names the wrong thing as sold out, or offers something unavailable."""
    slot, word = state.lacking if state.due == "offer" else (rng.choice(state.missing), "")
    if mistake is Mistake.WRONG_ITEM:
        word = rng.choice([value for value in MENU[slot] if value != word])
        options = list(_some(state, slot, rng, but=word))
    else:
        options = list(_some(state, slot, rng))
        bad = word if word and rng.random() < 0.4 else rng.choice(OFF_MENU[slot])
        options[rng.randrange(len(options))] = bad
    return Act(state.due, slot=slot if state.due == "ask" else "", word=word, options=tuple(options))


def _misquoted(state: State, rng: Random) -> Act:
    """Tell a price or number of minutes that differs from the API's."""
    price, minutes = state.response["price"], state.response["minutes"]
    if rng.random() < 0.5:
        price = rng.choice([p for p in ("3.00", "3.50", "4.00", "4.50", "5.00", "5.50") if p != price])
    else:
        minutes = rng.choice([m for m in "23456789" if m != minutes])
    return Act("tell", price=price, minutes=minutes)


def _malformed(said: Order, rng: Random) -> str:
    """Return a call that the API cannot read."""
    if rng.random() < 0.5:
        slot = rng.choice(list(MISNAMED))
        return call_text({MISNAMED[name] if name == slot else name: said[name] for name in SLOTS if name in said})
    text = call_text(said)
    # Broken off before its end, or an argument's colon lost.
    return text[:-1] if rng.random() < 0.5 else text.replace('": "', '" "', 1)
