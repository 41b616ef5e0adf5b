"""The results as the tables of the docs."""

from collections.abc import Mapping
from typing import Any

from perl.report.numbers import bytes_text

Results = Mapping[str, Mapping[str, Any]]
PHASES = ("generate", "score", "update")


def markdown(results: Results) -> str:
    """Return all tables, and each failed part with its reason."""
    found = {name: one["found"] for name, one in results.items() if "found" in one}
    lines = [*_machine(found), *_steps(found), *_generation(found), *_peers(found), *_commands(found)]
    failed = [f"- {name}: {one['failed']}" for name, one in results.items() if "failed" in one]
    return "\n".join([*lines, *(["Not measured:", *failed] if failed else [])]) + "\n"


def _machine(found: Mapping[str, Any]) -> list[str]:
    if "machine" not in found:
        return []
    chip = found["machine"]
    peak, copied = chip["flops_per_second"] / 1e12, chip["bytes_per_second"] / 1e12
    memory = "" if chip["memory_bytes"] is None else f", {bytes_text(chip['memory_bytes'])}"
    return [f"{chip['device']}{memory}, torch {chip['torch']}: {peak:.3g} TFLOP/s in bf16, {copied:.3g} TB/s.", ""]


def _steps(found: Mapping[str, Any]) -> list[str]:
    """Return one row per step: phases, share of the chip's peak FLOP/s, measured and estimated memory."""
    rows = {name: one for name, one in found.items() if "peak_bytes" in one and "flops_per_second" in one}
    if not rows:
        return []
    lines = [
        "| step | seconds: generate, score, update | tokens/s: generate, score, update | of the peak | memory | "
        "estimated |",
        "|---|---|---|---|---|---|",
    ]
    peak = found.get("machine", {}).get("flops_per_second")
    for name, one in rows.items():
        seconds = ", ".join(f"{one['seconds'][phase]:.3g}" for phase in PHASES)
        tokens = ", ".join(f"{one['tokens_per_second'][phase]:,.0f}" for phase in PHASES)
        share = "" if peak is None else f"{one['flops_per_second'] / peak:.1%}"
        said = found.get(f"estimate-{name}")
        estimated = "" if said is None else bytes_text(max(said["peak_bytes"].values()))
        measured = bytes_text(max(one["peak_bytes"].values()))
        lines.append(f"| {name} | {seconds} | {tokens} | {share} | {measured} | {estimated} |")
    return [*lines, ""]


def _generation(found: Mapping[str, Any]) -> list[str]:
    rates = {
        f"{side}, {answers}": rate
        for answers, sides in found.get("generate", {}).items()
        for side, rate in sides.items()
        if side != "ratio"
    }
    if "continuous-batching" in found:
        rates["continuous batching, one answer a prompt"] = found["continuous-batching"]["tokens_per_second"]
    rows = [f"| {name} | {rate:,.0f} |" for name, rate in rates.items()]
    return ["| sampling under LoRA | tokens/s |", "|---|---|", *rows, ""] if rows else []


def _peers(found: Mapping[str, Any]) -> list[str]:
    peers = {name: one for name, one in found.items() if name.startswith("trl-")}
    rows = [
        f"| {name} | {one['seconds']:.3g} | {bytes_text(one['peak_bytes'])} |"
        for name, one in sorted(peers.items())
    ]
    return ["| TRL, 1b | seconds a step | memory |", "|---|---|---|", *rows, ""] if rows else []


def _commands(found: Mapping[str, Any]) -> list[str]:
    said = {name: found[name] for name in ("tests", "demo") if name in found}
    lines = [f"{name}: {one['seconds']:.0f} s; {one['said'][-1]}" for name, one in said.items()]
    return [*lines, ""] if lines else []
