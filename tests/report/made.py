"""Made-up run folders with plausible metrics and every optional key, for tests of the report."""

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from perl.rl.algorithms import ALGORITHMS
from perl.system.typed_json import as_json

SHARES = {
    "load": {"base_weights": 0.98, "adapters": 0.02},
    "generate": {"base_weights": 0.5, "adapters": 0.05, "optimizer": 0.1, "kv_cache": 0.35},
    "score": {"base_weights": 0.55, "adapters": 0.05, "optimizer": 0.1, "activations": 0.3},
    "update": {"base_weights": 0.35, "adapters": 0.04, "gradients": 0.06, "optimizer": 0.12, "activations": 0.43},
}
PEAKS = {"load": 1.5e9, "generate": 2.9e9, "score": 2.7e9, "update": 4.1e9}
PHASES = {
    "sft": ("load", "update"),
    "reward": ("load", "update"),
    "rl": ("load", "generate", "score", "update"),
}
SECONDS = {"load": 3.0, "generate": 80.0, "score": 31.0, "update": 95.0}


def make_run(folder: Path, seed: int = 0, tuning: str = "lora", steps: int = 60, rich: bool = True) -> Path:
    """Write a finished run of all three stages.

    Args:
        folder: folder of the run.
        seed: seed of its noise.
        tuning: with full tuning, memory is larger and the gain slightly larger.
        steps: RL steps.
        rich: whether to add every optional key and samples to what every run has.
    """
    noise = random.Random(f"{seed} {tuning}")
    report = make_report(noise, seed, tuning, steps)
    if rich:
        _add_optional(report, noise, tuning)
    write(folder, report)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(make_recipe(seed, tuning, steps), sort_keys=False))
    _metrics(folder, noise, tuning, steps, rich)
    if rich:
        (folder / "policy" / "samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in make_samples()))
    return folder


def write(folder: Path, report: dict[str, Any]) -> Path:
    """Write only report.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    return folder


def make_recipe(seed: int, tuning: str, steps: int) -> dict[str, Any]:
    """Return a recipe that fits such a run."""
    return {
        "name": "coffee-qwen",
        "seed": seed,
        "tuning": tuning,
        "base": {"model": "Qwen/Qwen2.5-0.5B", "dtype": "bfloat16"},
        "lora": {"rank": 16, "alpha": 32},
        "data": {"source": "coffee-simulator"},
        "reward": {"loss": "thumbs"},
        "rl": {"algorithm": "reinforce", "steps": steps, "kl_coef": 0.05},
    }


def make_report(noise: random.Random, seed: int, tuning: str, steps: int) -> dict[str, Any]:
    """Return a report with the keys that every run has."""
    full = tuning == "full"
    gain = noise.gauss(0.06 if full else 0.03, 0.015)

    def cost(stage: str, seconds: float, speed: float, peak: float) -> dict[str, Any]:
        peak += 3.4e9 if full else 1.0e9
        share = seconds / sum(SECONDS[phase] for phase in PHASES[stage])
        return {
            "trainable_parameters": 494_032_768 if full else 8_798_208,
            "learning_rate": 1e-3,
            "rows": 1_600,
            "rows_cut": 12,
            "seconds": seconds + noise.random(),
            "tokens_per_second": speed,
            "peak_memory_bytes": round(peak),
            "peak_rss_bytes": 3_100_000_000,
            "memory": {phase: _memory(phase, peak / PEAKS["update"], tuning) for phase in PHASES[stage]},
            "phase_seconds": {phase: SECONDS[phase] * share for phase in PHASES[stage]},
        }

    return {
        "name": "coffee-qwen",
        "seed": seed,
        "tuning": tuning,
        "versions": {"perl": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "peft": "0.21.2"},
        "hardware": {"device": "cuda", "name": "NVIDIA H200", "cores": 16, "memory_bytes": 128_000_000_000}
        | {"processes": 1, "engine": "none"},
        "base": {
            "model": "Qwen/Qwen2.5-0.5B",
            "parameters": 494_032_768,
            "dtype": "bfloat16",
            "sha256_before": "6d3a62b4329d566357877a29081a9302298be316b8ab0b52be6e071e093c95d5",
            "sha256_after": None if full else "6d3a62b4329d566357877a29081a9302298be316b8ab0b52be6e071e093c95d5",
        },
        "stages": {
            "sft": {
                **cost("sft", 61.2, 21_000.0 * (1.1 if full else 1.0), 3.9e9),
                "eval": {"n": 272, "loss_before": 1.31, "loss_after": 0.42, "loss_interval": (-0.92, -0.86)},
            },
            "reward": {
                **cost("reward", 88.0, 24_000.0 * (1.2 if full else 1.0), 3.6e9),
                "recorded": [{"row": 0, "score": 0.4, "tokens": 1}],
                "eval": make_reward_model_card() | {"auroc": 0.9 + gain / 4},
            },
            "rl": {
                **cost("rl", 209.0, 3_700.0 * (1.05 if full else 1.0), 4.1e9),
                "algorithm_row": as_json(ALGORITHMS["reinforce"]),
                "preflight": [],
                "liveness": [],
                "incidents": [],
                "eval": {
                    "algorithm": "reinforce",
                    "critic": "shared",
                    "steps": steps,
                    "n": 128,
                    "reward_before": 0.18,
                    "reward_after": 0.74 + gain,
                    "reward_parts_before": {"model": 0.18},
                    "reward_parts_after": {"model": 0.74 + gain},
                    "answer_tokens_before": 15.3,
                    "answer_tokens_after": 16.7,
                    "ended_before": 1.0,
                    "ended_after": 1.0,
                    "kl": 0.62 + gain,
                },
            },
        },
    }


def make_reward_model_card() -> dict[str, Any]:
    """Return the card of a good reward model."""
    edges = [-6 + 0.5 * step for step in range(25)]
    centres = [edge + 0.25 for edge in edges[:-1]]
    bins = [
        {"probability": p, "share": min(1.0, max(0.0, p + 0.06 * math.sin(7 * p))), "n": 120}
        for p in (0.03, 0.09, 0.17, 0.29, 0.43, 0.58, 0.71, 0.83, 0.92, 0.97)
    ]
    slice_ = {"by": "kind of answer", "name": "text", "n": 1000, "share_up": 0.5}
    mistake = {"context": "user: A latte.", "answer": "No.", "score": 2.1, "probability": 0.89}
    return {
        "n": 1204,
        "up": 634,
        "dialogues": 300,
        "seen_in_training": 0,
        "against": "gold",
        "auroc": 0.9,
        "balanced_accuracy": 0.84,
        "accuracy": 0.846,
        "majority_accuracy": 0.527,
        "ece": 0.047,
        "compared": False,
        "pairs": 0,
        "intervals": {"auroc": [0.88, 0.92], "accuracy": [0.82, 0.87], "auroc_labels": None},
        "reliability": bins,
        "score_histogram": {
            "edges": edges,
            "up": [round(120 * math.exp(-((x - 1.9) ** 2) / 3)) for x in centres],
            "down": [round(110 * math.exp(-((x + 1.6) ** 2) / 4)) for x in centres],
        },
        "calibration": {
            "of": "a thumb up",
            "n": 1204,
            "slope": 0.9,
            "intercept": -0.2,
            "temperature": 1.1,
            "ece_before": 0.06,
            "ece_temperature": 0.05,
            "ece_after": 0.02,
            "ece_by_chance": 0.03,
            "reliability_before": bins,
            "reliability_after": bins,
        },
        "slices": [{**slice_, "auroc": 0.9, "interval": [0.88, 0.92], "ece": 0.03}, {**slice_, "n": 9}],
        "length": {
            "correlation": 0.15,
            "auroc_of_length": 0.55,
            "auroc_within": 0.88,
            "auroc_within_interval": [0.86, 0.9],
            "ahead": 0.3,
            "ahead_interval": [0.2, 0.4],
        },
        "tfidf_baseline": {
            "metric": "auroc",
            "value": 0.77,
            "value_interval": [0.74, 0.79],
            "ahead": 0.13,
            "ahead_interval": [0.1, 0.16],
            "rows": 5000,
            "of_rows": 5000,
        },
        "mistakes": {"downs_scored_high": [mistake], "ups_scored_low": []},
        "verdict": {"fit": True, "reasons": ["It ranks better than chance: AUROC 0.90 (0.88 to 0.92)."]},
    }


def _add_optional(report: dict[str, Any], noise: random.Random, tuning: str) -> None:
    """Add every optional key."""
    for name, stage in report["stages"].items():
        scale = stage["peak_memory_bytes"] / PEAKS["update"]
        stage["predicted_memory"] = {phase: _memory(phase, scale * 0.96, tuning) for phase in PHASES[name]}
        stage["flops"] = round(3.1e15 * stage["seconds"] / 60)
        stage["useful_flops_share"] = 0.81
        stage["data_sha256"] = "5e" * 32
        stage["waited_seconds"] = stage["seconds"] + 25.0
        stage["reused_from"] = "runs/earlier"
        stage["started_from"] = {"folder": "adapters/elsewhere", "sha256": "a1" * 32}
    report["stages"]["rl"]["eval"] |= {
        "gold_before": 0.53,
        "gold_after": 0.72 + noise.gauss(0.03 if tuning == "full" else 0.0, 0.01),
        "gold_interval": [0.08, 0.3],
        "reward_interval": [0.41, 0.75],
        "answer_tokens_interval": [0.9, 1.9],
        "ended_interval": [0.0, 0.0],
        "kl_interval": [0.5, 0.75],
        "samples_per_prompt": 2,
    }
    report["stages"]["rl"]["eval"]["best_of_n"] = [
        {"n": n, "kl": kl, "prompts": 128, "reward": reward, "rl_reward": 0.8, "reward_interval": [-0.1, 0.2]}
        | {"gold": gold, "rl_gold": 0.72, "gold_interval": [-0.05, 0.09]}
        for n, kl, reward, gold in ((2, 0.19, 0.52, 0.6), (4, 0.64, 0.68, 0.66), (8, 1.2, 0.77, 0.7))
    ]
    kept = [
        {
            "step": 40,
            "taken": 80,
            "steps": 100,
            "by": "loss",
            "rows": 160,
            "values": [[20, 0.5], [40, 0.4], [80, 0.45]],
        }
    ]
    for stage in report["stages"].values():
        stage["kept"] = kept
    report["stages"]["reward"]["eval"]["ensemble"] = {
        "auroc": [0.81, 0.8],
        "ahead": 0.012,
        "ahead_interval": [0.004, 0.02],
        "by_disagreement": [
            {"disagreement": 0.02, "error": 0.1, "n": 400},
            {"disagreement": 0.2, "error": 0.3, "n": 400},
        ],
        "auroc_of_disagreement": 0.7,
        "auroc_of_disagreement_interval": [0.66, 0.74],
    }
    report["stages"]["rl"]["eval"]["reward_parts_before"] = {"model": 0.3, "length": -0.12}
    report["stages"]["rl"]["eval"]["reward_parts_after"] = {"model": 0.8, "length": -0.06}
    edges = [-1.0 + 0.1 * step for step in range(21)]
    report["stages"]["rl"]["eval"]["reward_histogram"] = {
        "edges": edges,
        "before": [max(0, 12 - abs(step - 9)) for step in range(20)],
        "after": [max(0, 13 - abs(step - 14)) for step in range(20)],
    }
    report["stages"]["rl"]["eval"]["pass_at"] = [
        {"k": 1, "before": 0.24, "after": 0.38, "interval": [0.08, 0.2]}
        | {"before_interval": [0.2, 0.29], "after_interval": [0.32, 0.43]}
    ]
    report["stages"]["rl"]["eval"] |= {"pass_at_1_before": 0.24, "pass_at_1_after": 0.38}
    report["stages"]["reward"]["eval"] |= {"pairwise_accuracy": 0.89, "auroc_labels": 0.83}
    report["stages"]["reward"]["kept_below_bytes"] = 1_000_000
    blend = {"model": 1.9, "words": 2.2, "intercept": 0.1, "rows": 160}
    report["stages"]["reward"]["blends"] = [blend, {**blend, "rows": 161}]
    report["stages"]["rl"]["preflight"] = [
        {"name": "sampled as read", "words": "the sampler's log-probs", "figure": 1.4e-6, "limit": 0.001}
    ]


def _memory(phase: str, scale: float, tuning: str) -> dict[str, Any]:
    peak = PEAKS[phase] * scale
    shares = dict(SHARES[phase])
    if tuning == "full":
        shares.pop("adapters")
        shares |= {"optimizer": shares["optimizer"] + 0.3} if "optimizer" in shares else {}
        total = sum(shares.values())
        shares = {kind: share / total for kind, share in shares.items()}
    kinds = {kind: round(share * peak) for kind, share in shares.items()}
    return {"peak": sum(kinds.values()), "kinds": kinds}


def _metrics(folder: Path, noise: random.Random, tuning: str, steps: int, rich: bool) -> None:
    for role, start, count in (("sft", 1.3, 31), ("reward", 0.69, 90)):
        rows = [
            {
                "step": step,
                "loss": start * (0.35 + 0.65 * math.exp(-4 * step / count)) + noise.gauss(0, 0.02),
                "grad_norm": 0.4,
                "learning_rate": 1e-3 * (1 - step / count),
            }
            for step in range(1, count + 1)
        ]
        _write_lines(folder / role / "metrics.jsonl", rows)
    rows = []
    for step in range(1, steps + 1):
        gone = 1 - math.exp(-2.5 * step / steps)
        row: dict[str, Any] = {
            "step": step,
            "reward": 0.15 + (0.68 if tuning == "full" else 0.62) * gone + noise.gauss(0, 0.08),
            "kl": max(0.0, 0.9 * gone**2 * (1.1 if tuning == "full" else 1.0) + noise.gauss(0, 0.03)),
            "entropy": 0.3 - 0.1 * gone,
            "grad_norm": None if step == 3 else 0.2,
        }
        if rich:
            row["gold"] = min(1.0, 0.53 + 0.22 * gone - 0.05 * gone**4 + noise.gauss(0, 0.04))
        rows.append(row)
    _write_lines(folder / "policy" / "metrics.jsonl", rows)


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_samples() -> list[dict[str, Any]]:
    """Return samples with prompts as turns and as text, and one without a role."""
    dialogue = [
        {"role": "user", "content": "Hi, can I get something warm? It is freezing outside."},
        {"role": "assistant", "content": "Of course! What would you like to drink?"},
        {"role": "user", "content": "A large latte with oat milk, please, and one extra shot."},
    ]
    three = {
        "base": {"text": "We have lattes. Do you want a latte?", "reward": -0.61, "gold": 0},
        "sft": {"text": "One large latte with whole milk. Anything else?", "reward": 0.12, "gold": 0},
        "policy": {
            "text": "One large latte with oat milk and an extra shot. Is there anything else?",
            "reward": 1.04,
            "gold": 1,
        },
    }
    two = {
        "base": {"text": "place_order(item=mocha, size=", "reward": -1.2},
        "policy": {"text": "place_order(item=mocha, size=small)", "reward": 0.7},
    }
    return [
        {"prompt": dialogue, "answers": three},
        {"prompt": "A small mocha to go.", "answers": two},
        *[
            {
                "prompt": f"A medium {drink}, please.",
                "answers": {"base": {"text": "No.", "reward": -1.0}, "policy": {"text": drink, "reward": 0.4}},
            }
            for drink in ("latte", "mocha", "espresso", "cappuccino", "tea", "cocoa", "cider", "juice")
        ],
    ]
