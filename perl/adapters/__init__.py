"""The kinds of adapters: what each puts into the base, and what it computes."""

from perl.adapters.bottleneck import Parallel, Series
from perl.adapters.dora import Dora
from perl.adapters.ia3 import Ia3
from perl.adapters.kind import AdapterKind
from perl.adapters.lora import Lora, RsLora
from perl.adapters.miss import Miss
from perl.adapters.prefix import Prefix
from perl.adapters.tinylora import TinyLora
from perl.adapters.vera import Vera

ADAPTERS: dict[str, type[AdapterKind]] = {
    "lora": Lora,
    "rslora": RsLora,
    "dora": Dora,
    "ia3": Ia3,
    "vera": Vera,
    "miss": Miss,
    "series": Series,
    "parallel": Parallel,
    "tinylora": TinyLora,
    "prefix": Prefix,
}
"""Every kind by its name in a recipe. A plugin adds to it: `ADAPTERS["mine"] = Mine`."""

__all__ = ["ADAPTERS", "AdapterKind"]
