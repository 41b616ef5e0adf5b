"""The state of a dialogue as far as its visible turns show it, without the customer's hidden goal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from perl.data.records import JSON
from perl.data.simulator.shop import MENU, NEEDED, SLOTS, Order

Phase = Literal["gather", "confirmed", "answered", "closing"]
"""The order is being taken; the customer said yes; the API has answered; the customer said thanks."""

Kind = Literal["ask", "read", "call", "offer", "tell", "bye"]
"""What an agent's turn does: ask for a slot, read the order back, call the API, say what is sold out
and offer what there is, tell price and minutes, say goodbye."""

KINDS: tuple[Kind, ...] = ("ask", "read", "call", "offer", "tell", "bye")


@dataclass(frozen=True, slots=True)
class State:
    """What the turns so far have established.

    Args:
        phase: the phase of the dialogue.
        said: what the customer has asked for, including corrections.
        sold_out: what the API has named as sold out.
        response: the API's response that the agent still has to pass on; empty otherwise.
    """

    phase: Phase = "gather"
    said: Order = field(default_factory=dict)
    sold_out: tuple[str, ...] = ()
    response: Mapping[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        """The needed slots that the customer has not said yet."""
        return [slot for slot in NEEDED if slot not in self.said]

    @property
    def due(self) -> Kind:
        """What the agent should do now."""
        if self.phase == "gather":
            return "ask" if self.missing else "read"
        if self.phase == "answered":
            return "tell" if self.response["status"] == "ok" else "offer"
        return "call" if self.phase == "confirmed" else "bye"

    @property
    def lacking(self) -> tuple[str, str]:
        """The slot and value that the API's response names as sold out; empty strings if it names none."""
        named = [(slot, self.response[slot]) for slot in SLOTS if slot in self.response]
        return named[0] if named else ("", "")

    def available(self, slot: str) -> list[str]:
        """Return the values of a slot that can be offered, as far as the dialogue tells."""
        return [value for value in MENU[slot] if value not in self.sold_out]

    def to_json(self) -> JSON:
        """Return the state as plain JSON values."""
        said, response = dict(self.said), dict(self.response)
        return {"phase": self.phase, "said": said, "sold_out": list(self.sold_out), "response": response}

    @staticmethod
    def from_json(value: JSON) -> State:
        """Return the state of `to_json`, also after a round trip through Arrow, which adds absent keys as None."""
        row = cast(Mapping[str, Any], value)
        said, response = (
            {key: word for key, word in (row.get(name) or {}).items() if word} for name in ("said", "response")
        )
        return State(row["phase"], said, tuple(row.get("sold_out") or ()), response)
