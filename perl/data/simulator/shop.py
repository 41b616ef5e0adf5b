"""The coffee shop: its menu, what is sold out today, and the order API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from random import Random

MENU: dict[str, tuple[str, ...]] = {
    "drink": ("latte", "mocha", "cappuccino", "macchiato", "cortado", "chai", "tea", "cocoa"),
    "size": ("small", "medium", "large"),
    "milk": ("oat", "soy", "whole", "skim"),
    "extra": ("vanilla", "caramel", "cinnamon", "cream"),
}
"""The values of every slot. Every value is one word, and belongs to one slot only."""

OFF_MENU: dict[str, tuple[str, ...]] = {
    "drink": ("lemonade", "smoothie", "cola"),
    "size": ("huge", "tiny"),
    "milk": ("almond", "rice", "coconut"),
    "extra": ("pumpkin", "honey", "mint"),
}
"""Values that are not on the menu, which careless agents offer."""

SLOTS = tuple(MENU)
NEEDED = ("drink", "size", "milk")
"""Slots that every order needs. An extra is only ordered if the customer asks for it."""

SELLS_OUT = ("drink", "milk", "extra")
BASE_CENTS = {"latte": 350, "mocha": 400, "cappuccino": 350, "macchiato": 400}  # all others: 300
SIZE_CENTS = {"small": 0, "medium": 50, "large": 100}

Order = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Shop:
    """One day of the shop: what is sold out, and how many minutes an order takes."""

    sold_out: frozenset[str]
    minutes: int

    @staticmethod
    def opened(rng: Random, shortage: float = 0.5) -> Shop:
        """Return a shop in which each slot in `SELLS_OUT` lacks one value with probability `shortage`."""
        sold_out = [rng.choice(MENU[slot]) for slot in SELLS_OUT if rng.random() < shortage]
        return Shop(frozenset(sold_out), rng.randint(2, 9))

    def order(self, arguments: Order | None) -> dict[str, str]:
        """Call the order API; return an error, the first thing that is sold out, or price and minutes.

        Args:
            arguments: the call's arguments, or None if the call could not be read.
        """
        if arguments is None or any(slot not in arguments for slot in NEEDED):
            return {"status": "error"}
        if any(value not in MENU[slot] for slot, value in arguments.items()):
            return {"status": "error"}
        for slot in SLOTS:
            if arguments.get(slot) in self.sold_out:
                return {"status": "sold out", slot: arguments[slot]}
        cents = BASE_CENTS.get(arguments["drink"], 300) + SIZE_CENTS[arguments["size"]]
        cents += 50 if "extra" in arguments else 0
        return {"status": "ok", "price": f"{cents / 100:.2f}", "minutes": str(self.minutes)}
