"""The work of `perl.bench.work` for TRL's trainers, and the measurement of their steps."""

import contextlib
import itertools
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from transformers import LlamaConfig, TrainerCallback

from perl.bench import work
from perl.bench.measurement import Measurement, PeakOverStart

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Clock(TrainerCallback):
    """Records the time at which each step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Record the start."""
        self.times.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Record the end of a step."""
        self.times.append(time.perf_counter())


def made(kind: Any, model: str, dtype: str) -> Any:
    """Return a model of this class with the shape `work.MODELS[model]` and random weights of this dtype."""
    shape = {"tie_word_embeddings": False, **work.MODELS[model]}
    config = LlamaConfig(num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=1, **shape)
    return kind(config).to(device=DEVICE, dtype=getattr(torch, dtype))


def adapters(tuning: str) -> dict[str, LoraConfig]:
    """Return the trainer's argument for LoRA on the policy; none under full tuning."""
    if tuning != "lora":
        return {}
    shape = {"r": work.RANK, "lora_alpha": work.ALPHA, "target_modules": "all-linear"}
    return {"peft_config": LoraConfig(**shape, task_type="CAUSAL_LM")}


def measure(trainer: Callable[[Clock], Any], ticks: int = 1) -> Measurement:
    """Run a trainer and measure the seconds of each step and the peak memory.

    Args:
        ticks: number of the trainer's steps in one of ours.
    """
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    clock = Clock()
    with PeakOverStart() as peak, contextlib.redirect_stdout(sys.stderr):
        trainer(clock).train()
    times = clock.times[::ticks]
    seconds = [{"all": end - start} for start, end in itertools.pairwise(times)]
    return Measurement(seconds, peak.bytes)
