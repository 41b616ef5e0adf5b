"""Measurement of this machine for the prediction of seconds; takes about a minute, and is cached.

On a CPU with one thread we measure CPU seconds, which do not include other work on the machine.
"""

import itertools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from perl.predict.counting import Issuer, counted
from perl.predict.device import Curve, Device
from perl.private.torch import PACKS_BF16, packed_linear, packed_weight
from perl.system.device import hardware_name
from perl.system.files import user_cache, user_named, write_json
from perl.system.typed_json import as_json, read

REPEATS, LEAST = 3, 0.02
"""Number of measurements of an operation, of which the median is used, and the minimum seconds of each."""
TOKENS, ROWS, RANK = 768, 16, 8
"""Rows of a large product, rows of a product with few rows, and the rank of a low-rank product."""
WIDTHS, COUNTS = (64, 256, 768, 2048), (2**12, 2**16, 2**20, 2**23)
SHAPES, HEADS = ((4, 64), (12, 192), (12, 512)), (8, 64, 256)
"""Measured sizes of products, of elementwise operations, and of attention and caches."""
MEMORY, COPIES = 2**27, 84
"""Weights and caches are read in rotation, like those of a model's layers: maximum bytes in total, which exceed a
processor's cache, and maximum number."""
Calls = list[tuple[Callable[[], object], float]]
"""Calls, with the operations or bytes of each."""


def machine() -> str:
    """Return the description of what the rates are valid for: hardware, torch version and number of threads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{hardware_name(device)}, torch {torch.__version__}, threads {torch.get_num_threads()}"


def _file() -> Path:
    return user_cache() / "devices" / f"{''.join(one if one.isalnum() else '-' for one in machine())}.json"


def calibrated() -> Device | None:
    """Return this machine's cached measurement; None if there is none."""
    return read(Device, _file(), "Measure again: perl-rlhf estimate RECIPE --calibrate.")


def measure() -> Device:
    """Measure this machine and cache the result.

    Raises:
        UserError: the cache cannot be written.
    """
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.random.fork_rng():
        device = _measured()
    with user_named(_file()):
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_json(_file(), as_json(device))
    return device


def _measured() -> Device:
    flops: dict[str, Curve] = {}
    moved: dict[str, Curve] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        flops[f"product {name}"] = _curve(_products(width, dtype) for width in WIDTHS)
        flops[f"attention {name}"] = _curve(_attention(*shape, dtype) for shape in SHAPES)
        moved[f"rows {name}"] = _curve(_rows(width, dtype) for width in WIDTHS)
        moved[f"rank {name}"] = _curve(_ranks(width, dtype) for width in WIDTHS)
        moved[f"cache {name}"] = _curve(_caches(heads, dtype) for heads in HEADS)
        moved[f"exponential {name}"] = _curve(_exponentials(count, dtype) for count in COUNTS)
        moved[f"other {name}"] = _curve(_others(count, dtype) for count in COUNTS)
    now = time.strftime("%Y-%m-%d")
    device = Device("this machine", f"measured {now} on {machine()}", flops, moved, {}, torch.cuda.is_available())
    return Device(**{**vars(device), "call": _calls(device)})


def _curve(points: Iterable[Calls]) -> Curve:
    """Return a point per list of calls: their mean size, and the size per second."""
    curve: Curve = []
    for calls in points:
        sizes = [size for _, size in calls]
        curve.append((sum(sizes) / len(sizes), sum(sizes) / sum(_seconds(run) for run, _ in calls)))
    return curve


def _seconds(run: Callable[[], object]) -> float:
    """Return the seconds of one call, as the median of several measurements."""
    clock = (
        time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    )
    run()
    found: list[float] = []
    count = 1
    while len(found) < REPEATS:
        _wait()
        begin = clock()
        for _ in range(count):
            run()
        _wait()
        spent = clock() - begin
        if spent < LEAST:
            count *= 2
        else:
            found.append(spent / count)
    return median(found)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _products(width: int, dtype: torch.dtype) -> Calls:
    """Return the forward product and the gradients of both factors."""
    x, weight = torch.randn(TOKENS, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
    flops = 2.0 * TOKENS * width * width
    return [(lambda: x @ weight.t(), flops), (lambda: x @ weight, flops), (lambda: x.t() @ x, flops)]


def _copies(size: int) -> int:
    return max(1, min(COPIES, MEMORY // size))


def _rows(width: int, dtype: torch.dtype) -> Calls:
    """Return products of one token per sequence, with weights read from memory, packed if a sampler packs them."""
    count = _copies(width * width * dtype.itemsize)
    x, weights = torch.randn(ROWS, width, dtype=dtype), torch.randn(count, width, width, dtype=dtype)
    packed: list[Tensor] = []
    if PACKS_BF16 and dtype is torch.bfloat16 and x.device.type == "cpu":
        packed = [packed_weight(weight) for weight in weights]

    turn = itertools.cycle(packed or weights.unbind())

    def run() -> Tensor:
        weight = next(turn)
        return packed_linear(x, weight, None) if packed else x @ weight.t()

    return [(run, float((width * width + 2 * ROWS * width) * dtype.itemsize))]


def _ranks(width: int, dtype: torch.dtype) -> Calls:
    """Return an adapter's products: down, up, and a gradient."""
    x, up = torch.randn(TOKENS, width, dtype=dtype), torch.randn(RANK, width, dtype=dtype)
    narrow, size = torch.randn(TOKENS, RANK, dtype=dtype), float((TOKENS + RANK) * (width + RANK) * dtype.itemsize)
    return [(lambda: x @ up.t(), size), (lambda: narrow @ up, size), (lambda: narrow.t() @ x, size)]


def _caches(heads: int, dtype: torch.dtype) -> Calls:
    """Return the attention of one token to 192 keys of width 64, and to their values."""
    size = heads * 192 * 66 * dtype.itemsize
    query, weights = torch.randn(heads, 64, 1, dtype=dtype), torch.randn(heads, 1, 192, dtype=dtype)
    turn = itertools.cycle(torch.randn(_copies(size), heads, 192, 64, dtype=dtype).unbind())
    return [(lambda: next(turn) @ query, float(size)), (lambda: weights @ next(turn), float(size))]


def _attention(heads: int, length: int, dtype: torch.dtype) -> Calls:
    """Return attention on four rows, forward and backward, with two and five products."""
    q = torch.randn(4, heads, length, 64, dtype=dtype, requires_grad=True)
    mask, product = (
        torch.ones(4, 1, length, length, dtype=torch.bool).tril(),
        4 * heads * 2.0 * length * length * 64,
    )
    return [
        (lambda: F.scaled_dot_product_attention(q, q, q, mask).sum().backward(), 7 * product)  # type: ignore[no-untyped-call]
    ]


def _exponentials(count: int, dtype: torch.dtype) -> Calls:
    x, size = torch.randn(count // 256, 256, dtype=dtype), 2.0 * count * dtype.itemsize
    return [(lambda: F.silu(x), size), (lambda: x.softmax(-1), size)]


def _others(count: int, dtype: torch.dtype) -> Calls:
    """Return an elementwise product, one in place, a copy, and a conversion."""
    x, y = torch.randn(count // 256, 256, dtype=dtype), torch.ones(count // 256, 256, dtype=dtype)
    other = torch.bfloat16 if dtype is torch.float32 else torch.float32
    size = float(count * dtype.itemsize)
    converted = float(count * (dtype.itemsize + other.itemsize))
    return [
        (lambda: x * y, 3 * size),
        (lambda: y.mul_(y), 2 * size),
        (x.clone, 2 * size),
        (lambda: x.to(other), converted),
    ]


def _calls(device: Device) -> dict[Issuer, float]:
    """Return the overhead of a call by issuer, measured on a model so small that it takes nearly all the time."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **shape))
    ids = torch.zeros(1, ROWS, dtype=torch.long)

    def forward() -> Tensor:
        logits: Tensor = model(input_ids=ids).logits
        return logits.sum()

    found: dict[Issuer, float] = {}
    whole, training = _seconds(lambda: forward().backward()), _seconds(forward)  # type: ignore[no-untyped-call]
    with counted() as work:
        forward().backward()  # type: ignore[no-untyped-call]
    with torch.no_grad():
        plain = _seconds(forward)
        with counted() as plain_work:
            forward()
    spent: dict[Issuer, float] = {"model": plain, "training": training, "backward": whole - training}
    for issuer, seconds in spent.items():
        own = (
            plain_work
            if issuer == "model"
            else {one: count for one, count in work.items() if one.issuer == issuer}
        )
        computed = 0.0 if device.asynchronous else sum(count * device.seconds(one) for one, count in own.items())
        found[issuer] = max(seconds - computed, 0.0) / max(sum(own.values()), 1.0)
    return found
