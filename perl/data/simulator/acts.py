"""What an agent can say: acts, their wordings, and the strict parser from text to acts.

`render` and `parse` use the same wordings, so `parse` accepts exactly what an agent can say.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

from perl.data.records import CALL
from perl.data.simulator.shop import NEEDED, SLOTS, Order
from perl.data.simulator.state import Kind

API = "order"

WORDINGS: dict[Kind, tuple[str, ...]] = {
    "ask": (
        "what {slot} would you like, {options}?",
        "which {slot} do you want? we have {options}.",
        "and the {slot}? you can have {options}.",
    ),
    "read": (
        "so that is {order}, right?",
        "let me check: {order}. is that right?",
        "you want {order}, correct?",
        "i have {order}. shall i order it?",
    ),
    "offer": (
        "sorry, we are out of {word}. would you like {options}?",
        "sorry, {word} is sold out. we have {options}.",
        "there is no {word} left. how about {options}?",
    ),
    "tell": (
        "that is {price} dollars and takes {minutes} minutes.",
        "your order costs {price} dollars. it is ready in {minutes} minutes.",
        "done. {price} dollars please, ready in {minutes} minutes.",
    ),
    "bye": ("thank you, goodbye!", "have a nice day, bye!", "thanks, see you soon!"),
}

_PARTS = {
    "slot": f"(?P<slot>{'|'.join(NEEDED)})",
    "options": r"(?P<options>(?:[a-z]+, )*[a-z]+ or [a-z]+)",
    "order": r"a(?: (?P<size>[a-z]+))? (?P<drink>[a-z]+)"
    r"(?: with (?:(?P<milk>[a-z]+) milk(?: and (?P<extra>[a-z]+))?|(?P<only_extra>[a-z]+)))?",
    "word": r"(?P<word>[a-z]+)",
    "price": r"(?P<price>\d+\.\d\d)",
    "minutes": r"(?P<minutes>\d+)",
}


@dataclass(frozen=True, slots=True)
class Act:
    """One thing an agent does, apart from its wording.

    Attributes:
        slot: what is asked for.
        options: what is offered for a slot.
        order: what is read back or ordered.
        word: what is said to be sold out.
    """

    kind: Kind
    slot: str = ""
    options: tuple[str, ...] = ()
    order: Order = field(default_factory=dict)
    word: str = ""
    price: str = ""
    minutes: str = ""


def describe(order: Order) -> str:
    """Return an order, complete or not, in words: `a large drink with oat milk and vanilla`."""
    size, milk, extra = (order.get(slot, "") for slot in ("size", "milk", "extra"))
    additions = " and ".join(filter(None, (milk and f"{milk} milk", extra)))
    words = ("a", size, order.get("drink", "drink"), additions and f"with {additions}")
    return " ".join(filter(None, words))


def call_text(order: Mapping[str, str]) -> str:
    """Return the API call as a turn's text, arguments in the menu's order and unknown ones last."""
    known = {slot: order[slot] for slot in SLOTS if slot in order}
    return f"{CALL}{API} {json.dumps({**known, **order})}"


def render(act: Act, rng: Random) -> str:
    """Return an act in one of its wordings."""
    if act.kind == "call":
        return call_text(act.order)
    return rng.choice(WORDINGS[act.kind]).format(
        slot=act.slot,
        options=f"{', '.join(act.options[:-1])} or {act.options[-1]}" if act.options else "",
        order=describe(act.order) if act.kind == "read" else "",
        word=act.word,
        price=act.price,
        minutes=act.minutes,
    )


def _pattern(wording: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", wording)  # literal text and names of parts alternate
    return re.compile("".join(_PARTS[p] if i % 2 else re.escape(p) for i, p in enumerate(pieces)))


_PATTERNS = [(kind, _pattern(wording)) for kind, wordings in WORDINGS.items() for wording in wordings]


@lru_cache(4096)  # the same texts occur again and again
def parse(text: str) -> Act | None:
    """Return the act that a text performs, or None if it is not exactly one of the wordings."""
    if text.startswith(CALL):
        arguments = parse_call(text)
        return None if arguments is None else Act("call", order=arguments)
    for kind, pattern in _PATTERNS:
        if match := pattern.fullmatch(text):
            return _act(kind, {name: word for name, word in match.groupdict().items() if word})
    return None


def _act(kind: Kind, found: dict[str, str]) -> Act:
    options, extra = found.pop("options", ""), found.pop("only_extra", "")
    order = {slot: found.pop(slot) for slot in SLOTS if slot in found} | ({"extra": extra} if extra else {})
    if order.get("drink") == "drink":  # the placeholder for an unspecified drink
        del order["drink"]
    return Act(kind, options=tuple(re.split(", | or ", options)) if options else (), order=order, **found)


def parse_call(text: str) -> dict[str, str] | None:
    """Return the arguments of a call, or None if it is malformed: other name, bad JSON, unknown argument."""
    prefix = f"{CALL}{API} "
    if not text.startswith(prefix + "{"):
        return None
    try:
        pairs = json.loads(text[len(prefix) :], object_pairs_hook=list)
        arguments = {slot: value for slot, value in pairs if isinstance(value, str)}
    except (ValueError, TypeError, RecursionError):
        return None
    if not pairs or len(arguments) != len(pairs) or any(slot not in SLOTS for slot in arguments):
        return None
    return arguments
