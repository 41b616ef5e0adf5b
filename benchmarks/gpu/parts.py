"""The parts, each in its own process: `python -m benchmarks.gpu.parts NAME [--toy]` prints metrics as JSON.

Each part imports the libraries that it needs, so that only that part fails if one is missing.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perl.bench import work

CUDA = torch.cuda.is_available()
ROOT = Path(__file__).parents[2]
Metrics = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Amount of work in a step."""

    models: dict[str, str]
    """Names in `work.MODELS` of the shapes used as 1B and 8B."""
    prompts: int
    prompt_tokens: int
    answer_tokens: int
    micro_batch: int
    steps: int
    """Memory is measured in the first two, time in the others."""
    product: int
    """Rows of the square matrices whose product measures the chip's peak FLOP/s."""
    demo: str
    """Recipe of a run with all stages."""


GPU = Size({"1b": "1b", "8b": "8b"}, 64, 256, 128, 16, 6, 8192, "recipes/quickstart.yaml")
TOY = Size({"1b": "toy", "8b": "toy"}, 4, 32, 8, 2, 3, 256, "recipes/health.yaml")
TOY_MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


def set_work(size: Size) -> None:
    """Set the size of the work that PERL and TRL both do."""
    work.MODELS["toy"] = TOY_MODEL
    work.PROMPTS, work.PROMPT_TOKENS, work.ANSWER_TOKENS = size.prompts, size.prompt_tokens, size.answer_tokens
    work.MICRO_BATCH = size.micro_batch


def _seconds(run: Callable[[], object], repeats: int = 10) -> float:
    """Return the mean seconds of a call over `repeats`, after three warm-up calls."""
    for count in (3, repeats):
        if CUDA:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(count):
            run()
        if CUDA:
            torch.cuda.synchronize()
    return (time.perf_counter() - begin) / repeats


def machine(size: Size) -> Metrics:
    """Measure the device: FLOP/s of a matrix product in bf16, and bytes/s read and written in a copy."""
    device = "cuda" if CUDA else "cpu"
    a, b = (torch.randn(size.product, size.product, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(size.product**2 * 32, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    names = {"device": torch.cuda.get_device_name() if CUDA else "CPU", "torch": torch.__version__}
    return names | {
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if CUDA else None,
        "flops_per_second": 2 * size.product**3 / _seconds(lambda: a @ b),
        "bytes_per_second": 2 * source.nbytes / _seconds(lambda: target.copy_(source)),
    }


def recipe_of(size: Size, algorithm: str, model: str) -> dict[str, Any]:
    """Return a recipe's content: LoRA on all blocks; 8B checkpoints activations."""
    return work.recipe(size.models[model], "lora", "all", 1, checkpointing=model == "8b", algorithm=algorithm)


def step(size: Size, algorithm: str, model: str, four_bit: bool = False) -> Metrics:
    """Measure seconds, tokens per second and memory of a step of PERL, by phase."""
    with tempfile.TemporaryDirectory() as scratch:
        content = recipe_of(size, algorithm, model)
        if four_bit:
            save_random(size.models[model], Path(scratch))
            content["base"] = {"model": scratch, "dtype": "bfloat16", "quantization": "4bit"}
        return tried(size, content)


def tried(size: Size, content: dict[str, Any]) -> Metrics:
    """Run a recipe's RL steps and return the metrics of `step`."""
    from perl.measure.meter import MEASURED_STEPS
    from perl.predict import TRY, Trial, trial_session
    from perl.recipe import Recipe

    with trial_session(Recipe.model_validate(content), Trial(size.steps)) as session:
        found = TRY["rl"](session)
    timed = found.step_seconds[MEASURED_STEPS:]
    seconds = {phase: statistics.median(one[phase] for one in timed) for phase in ("generate", "score", "update")}
    whole = size.prompts * (size.prompt_tokens + size.answer_tokens)
    tokens = {"generate": size.prompts * size.answer_tokens, "score": whole, "update": whole}
    assert found.flops is not None
    return {
        "seconds": seconds,
        "tokens_per_second": {phase: tokens[phase] / spent for phase, spent in seconds.items()},
        "flops_per_second": found.flops / size.steps / sum(seconds.values()),
        "peak_bytes": {phase: memory.peak for phase, memory in found.memory.items()},
    }


def save_random(model: str, folder: Path) -> None:
    """Save a model with random weights, because quantization happens while loading from disk."""
    from transformers import LlamaForCausalLM

    from benchmarks.trl_work import made
    from perl.backbones.loading import numbered_tokens

    lm = made(LlamaForCausalLM, model)
    lm.save_pretrained(folder)
    numbered_tokens(lm.config.vocab_size).save_pretrained(folder)


def estimate(size: Size, algorithm: str, model: str, four_bit: bool = False) -> Metrics:
    """Return the memory of a step that `estimate` predicts, by phase."""
    from perl.predict import predict, read_subject
    from perl.recipe import Recipe

    content = recipe_of(size, algorithm, model)
    if four_bit:
        content["base"]["quantization"] = "4bit"
    recipe = Recipe.model_validate(content)
    return {
        "peak_bytes": {phase: memory.peak for phase, memory in predict(recipe, read_subject(recipe))["rl"].items()}
    }


def generate(size: Size) -> Metrics:
    """Measure tokens per second of our sampler and of `generate`, under LoRA."""
    from benchmarks.parts.rollout import measure

    return measure(size.models["1b"], 3)


def continuous_batching(size: Size) -> Metrics:
    """Measure tokens per second of transformers' continuous batching on the same model and prompts."""
    from peft import get_peft_model
    from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM

    from benchmarks.trl_work import adapters, made

    model: Any = get_peft_model(made(LlamaForCausalLM, size.models["1b"]), adapters("lora")["peft_config"])
    model = model.to(torch.bfloat16).eval().get_base_model()
    vocabulary = model.config.vocab_size
    prompts = torch.randint(5, vocabulary, (size.prompts, size.prompt_tokens)).tolist()
    settings = GenerationConfig(max_new_tokens=size.answer_tokens, do_sample=True, eos_token_id=-1, pad_token_id=0)
    # By default it takes all free memory, which takes minutes to initialize on a CPU.
    cache = None if CUDA else ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    seconds = []
    for _ in range(2):  # the first is a warm-up
        begin = time.perf_counter()
        outputs = model.generate_batch(prompts, settings, cache)
        seconds.append(time.perf_counter() - begin)
    drawn = sum(len(one.generated_tokens) for one in outputs.values())
    return {"tokens_per_second": drawn / seconds[-1]}


def peer(size: Size, algorithm: str) -> Metrics:
    """Measure seconds per step and peak memory of TRL's trainer."""
    from benchmarks.trl_groups import trainer
    from benchmarks.trl_work import measure

    steps = max(3, size.steps // 2)
    found = measure(partial(trainer, algorithm, size.models["1b"], "lora", 1, steps, "bfloat16"))
    return {
        "seconds": statistics.median(one["all"] for one in found.steps[1:]),
        "peak_bytes": found.peak_over_start_bytes,
    }


def _said(*command: object) -> Metrics:
    """Run a command and return its last lines and the seconds that it took.

    Raises:
        RuntimeError: the command failed.
    """
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode:
        raise RuntimeError("\n".join(lines[-20:]))
    return {"seconds": time.perf_counter() - begin, "said": lines[-3:]}


def tests(size: Size) -> Metrics:
    """Run the tests that need a GPU."""
    return _said(
        "-m", "pytest", "-m", "gpu", "-n", 0, "-W", "default", "-p", "no:cacheprovider", "tests/test_gpu.py"
    )


def demo(size: Size) -> Metrics:
    """Run all stages, from building the base to the report page."""
    with tempfile.TemporaryDirectory() as scratch:
        return _said("-m", "perl", "run", size.demo, "--out", scratch)


@dataclass(frozen=True)
class Part:
    """A measurement and its time limit."""

    run: Callable[[Size], Metrics]
    limit: int
    """Seconds."""
    on_host: bool = False
    """Whether it needs no GPU and runs concurrently with the others."""


STEPS: dict[str, tuple[str, str, bool]] = {
    "ppo-1b": ("ppo", "1b", False),
    "rloo-1b": ("rloo", "1b", False),
    "ppo-8b": ("ppo", "8b", False),
    "rloo-8b": ("rloo", "8b", False),
    "ppo-1b-4bit": ("ppo", "1b", True),
    "ppo-8b-4bit": ("ppo", "8b", True),
}


def _step_part(name: str) -> Part:
    algorithm, model, four_bit = STEPS[name]
    run = partial(step, algorithm=algorithm, model=model, four_bit=four_bit)
    return Part(run, 120 if model == "8b" else 60)


def _estimate_part(name: str) -> Part:
    algorithm, model, four_bit = STEPS[name]
    return Part(partial(estimate, algorithm=algorithm, model=model, four_bit=four_bit), 300, on_host=True)


PARTS: dict[str, Part] = {
    "machine": Part(machine, 60),
    "tests": Part(tests, 90),
    "ppo-1b": _step_part("ppo-1b"),
    "ppo-8b": _step_part("ppo-8b"),
    "generate": Part(generate, 60),
    "rloo-1b": _step_part("rloo-1b"),
    "trl-rloo": Part(partial(peer, algorithm="rloo"), 60),
    "trl-grpo": Part(partial(peer, algorithm="grpo"), 60),
    "continuous-batching": Part(continuous_batching, 60),
    "ppo-1b-4bit": _step_part("ppo-1b-4bit"),
    "rloo-8b": _step_part("rloo-8b"),
    "ppo-8b-4bit": _step_part("ppo-8b-4bit"),
    "demo": Part(demo, 180),
    **{f"estimate-{name}": _estimate_part(name) for name in STEPS},
}
"""Parts in the order of measurement: the most informative come first, because time may run out."""


def main() -> None:
    """Print a part's metrics as the last line."""
    size = TOY if "--toy" in sys.argv else GPU
    set_work(size)
    name = next(one for one in sys.argv[1:] if one in PARTS)
    print(json.dumps(PARTS[name].run(size)))


if __name__ == "__main__":
    main()
