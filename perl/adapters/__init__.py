"""The kinds of adapters."""

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
"""All kinds, by their names in a recipe. A plugin can add one: `ADAPTERS["mine"] = Mine`."""

__all__ = ["ADAPTERS", "AdapterKind"]
