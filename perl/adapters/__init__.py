"""The kinds of adapters: what each puts into the base, and what it computes."""

from perl.adapters.kind import AdapterKind
from perl.adapters.lora import Lora

ADAPTERS: dict[str, type[AdapterKind]] = {"lora": Lora}
"""Every kind by its name in a recipe. A plugin adds to it: `ADAPTERS["mine"] = Mine`."""

__all__ = ["ADAPTERS", "AdapterKind"]
