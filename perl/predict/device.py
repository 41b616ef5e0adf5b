"""The basis of predicted seconds: a device's speed for each kind of operation, measured or published."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from perl.errors import UserError
from perl.predict.counting import Issuer, Kind, Operation

Curve = list[tuple[float, float]]
"""Increasing sizes of an operation, with the operations or bytes per second at each; interpolated in between."""


@dataclass(frozen=True)
class Device:
    """Rates by kind and dtype, such as `product bfloat16`; a missing dtype has the rates of float32."""

    name: str
    basis: str
    """Description of the source of the rates."""
    flops: Mapping[str, Curve]
    """Operations per second, by the operations of a call."""
    bytes: Mapping[str, Curve]
    """Bytes per second, by the bytes of a call."""
    call: Mapping[Issuer, float]
    """Seconds of the caller's time per call, whatever its size."""
    asynchronous: bool = False
    """Whether the device computes while the caller continues."""

    def seconds(self, operation: Operation) -> float:
        """Return the seconds of one call without the caller's overhead: a roofline of operations and bytes."""
        by_flops = _at(self.flops, operation.kind, operation.dtype, operation.flops)
        by_bytes = _at(self.bytes, operation.kind, operation.dtype, operation.bytes)
        return max(by_flops, by_bytes)


def _at(curves: Mapping[str, Curve], kind: Kind, dtype: str, size: float) -> float:
    """Return the seconds for a number of operations or bytes; 0 if there are no rates for them."""
    curve = curves.get(f"{kind} {dtype}") or curves.get(f"{kind} float32")
    return 0.0 if curve is None or not size else size / rate(curve, size)


def rate(curve: Curve, size: float) -> float:
    """Interpolate linearly between neighbouring points on logarithmic axes; constant beyond the ends."""
    if size <= curve[0][0]:
        return curve[0][1]
    for (low, slow), (high, fast) in itertools.pairwise(curve):
        if size <= high:
            return slow * math.pow(fast / slow, math.log(size / low) / math.log(high / low))
    return curve[-1][1]


@dataclass(frozen=True)
class _Published:
    """Published peaks of a GPU, without sparsity."""

    bfloat16: float
    """Operations per second of matrix products in bf16 and fp16."""
    float32: float
    """Operations per second without TF32, torch's default."""
    bandwidth: float
    """Bytes per second."""
    source: str


T, G = 1e12, 1e9
PUBLISHED = {
    "h200": _Published(989.4 * T, 67 * T, 4800 * G, "NVIDIA H200 datasheet, 2024"),
    "h100": _Published(989.4 * T, 67 * T, 3350 * G, "NVIDIA H100 SXM datasheet, 2023"),
    "a100": _Published(312 * T, 19.5 * T, 2039 * G, "NVIDIA A100 80GB SXM datasheet, 2021"),
    "l40s": _Published(362 * T, 91.6 * T, 864 * G, "NVIDIA L40S datasheet, 2023"),
    "4090": _Published(165.2 * T, 82.6 * T, 1008 * G, "NVIDIA Ada architecture whitepaper, 2022"),
}
PRODUCTS, ATTENTION, MEMORY = 0.6, 0.35, 0.7
"""Attained shares of the peaks: assumed, until they are measured."""
LAUNCH: dict[Issuer, float] = {"model": 8e-6, "training": 10e-6, "backward": 5e-6}
"""Seconds of Python, autograd and driver per kernel: assumed."""


CPU = Device(
    "cpu",
    "measured 2026-11-29 on one thread of an AMD EPYC (AVX-512, bf16), torch 2.13; --calibrate measures yours",
    {
        "product float32": [(6.3e6, 8.6e10), (1.0e8, 8.8e10), (9.1e8, 9.4e10), (6.4e9, 9.4e10)],
        "attention float32": [(5.9e7, 4.8e10), (1.6e9, 7.2e10), (1.1e10, 7.9e10)],
        "product bfloat16": [(6.3e6, 1.8e11), (1.0e8, 3.7e11), (9.1e8, 3.7e11), (6.4e9, 3.7e11)],
        "attention bfloat16": [(5.9e7, 1.6e10), (1.6e9, 6.0e10), (1.1e10, 8.3e10)],
    },
    {
        "rows float32": [(2.5e4, 3.4e9), (2.9e5, 5.6e9), (2.5e6, 6.0e9), (1.7e7, 5.9e9)],
        "rank float32": [(2.2e5, 1.2e10), (8.2e5, 1.3e10), (2.4e6, 1.3e10), (6.4e6, 7.0e9)],
        "cache float32": [(4.1e5, 7.6e9), (3.2e6, 8.2e9), (1.3e7, 8.8e9)],
        "exponential float32": [(3.3e4, 7.9e9), (5.2e5, 2.0e10), (8.4e6, 2.1e10), (6.7e7, 5.4e9)],
        "other float32": [(3.5e4, 1.3e10), (5.6e5, 8.8e10), (8.9e6, 8.0e10), (7.1e7, 7.3e9)],
        "rows bfloat16": [(1.2e4, 7.5e8), (1.5e5, 5.2e9), (1.2e6, 9.4e9), (8.5e6, 1.3e10)],
        "rank bfloat16": [(1.1e5, 5.3e9), (4.1e5, 1.2e10), (1.2e6, 1.6e10), (3.2e6, 1.1e10)],
        "cache bfloat16": [(2.0e5, 4.8e9), (1.6e6, 7.5e9), (6.5e6, 7.8e9)],
        "exponential bfloat16": [(1.6e4, 3.4e9), (2.6e5, 7.3e9), (4.2e6, 7.7e9), (3.4e7, 7.8e9)],
        "other bfloat16": [(2.0e4, 7.2e9), (3.3e5, 3.8e10), (5.2e6, 3.8e10), (4.2e7, 2.3e10)],
    },
    {"model": 1.0e-5, "training": 1.3e-5, "backward": 5e-6},
)
"""One thread of the machine on which docs/cost.md was measured."""


def named(name: str) -> Device:
    """Return a device of the table, by name.

    Raises:
        UserError: the table has no such device.
    """
    if name == CPU.name:
        return CPU
    if name not in PUBLISHED:
        raise UserError(
            f"unknown device {name!r}",
            where="--device",
            remedy=f"Name one of {', '.join(PUBLISHED)}, cpu, or measure this machine with --calibrate.",
        )
    gpu = PUBLISHED[name]
    peaks = {"bfloat16": gpu.bfloat16, "float16": gpu.bfloat16, "float32": gpu.float32}
    flops: dict[str, Curve] = {}
    for dtype, peak in peaks.items():
        flops |= {f"{kind} {dtype}": [(1.0, peak * PRODUCTS)] for kind in ("product", "rows", "rank", "cache")}
        flops[f"attention {dtype}"] = [(1.0, peak * ATTENTION)]
    kinds = ("product", "rows", "rank", "cache", "attention", "exponential", "other")
    moved = {f"{kind} float32": [(1.0, gpu.bandwidth * MEMORY)] for kind in kinds}
    basis = (
        f"published peaks ({gpu.source}); utilization is assumed, not measured: {PRODUCTS:.0%} in products, "
        f"{ATTENTION:.0%} in attention, {MEMORY:.0%} of the bandwidth"
    )
    return Device(name, basis, flops, moved, LAUNCH, asynchronous=True)
