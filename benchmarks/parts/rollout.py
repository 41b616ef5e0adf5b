"""Generated tokens per second: our sampler, and `generate` on an unmerged LoRA model with the same weights."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from perl.adapters.lora import Lora
from perl.backbones.base import Base
from perl.backbones.loading import random_base
from perl.bench import work
from perl.bench.work import ANSWER_TOKENS, MICRO_BATCH, PROMPT_TOKENS, PROMPTS
from perl.recipe.adapter import LoraSettings
from perl.rl.samplers.base import Sampling
from perl.rl.samplers.local import LocalSampler
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase

GROUPS = {"one answer a prompt": 1, "four answers a prompt": 4}


def measure(model: str, repeats: int) -> dict[str, Any]:
    """Return medians over repeats, with both alternating; the first round is a warm-up and does not count."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = {"model_type": "llama", "tie_word_embeddings": False, **work.MODELS[model]}
    base, lm = random_base(config, torch.bfloat16, device, seed=0)
    plain = base.load()
    # Two configurations, because peft rewrites the target names of the one that it is given.
    ours, theirs = (Lora(model, LoraSettings(rank=work.RANK, alpha=work.ALPHA)) for model in (lm, plain))
    peer = get_peft_model(plain, theirs.config, autocast_adapter_dtype=False).to(torch.bfloat16).eval()
    roles = SharedBase(ours).eval()
    roles.add(Role.POLICY)
    for name, parameter in [*roles.weights(Role.POLICY).items(), *peer.named_parameters()]:
        if ours.starting_value(name) == 0:
            torch.nn.init.normal_(parameter.data, std=0.01)
    found = {}
    for name, answers in GROUPS.items():
        prompts = torch.randint(5, lm.config.vocab_size, (PROMPTS // answers, PROMPT_TOKENS), device=device)
        both: dict[str, Callable[[], object]] = {
            "ours": partial(_ours, roles, base, prompts, answers),
            "generate": partial(_generate, peer, base, prompts, answers),
        }
        rates: dict[str, list[float]] = {side: [] for side in both}
        for _ in range(repeats + 1):
            for side, run in both.items():
                begin = time.perf_counter()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rates[side].append(PROMPTS * ANSWER_TOKENS / (time.perf_counter() - begin))
        medians = {side: statistics.median(rates[side][1:]) for side in both}
        found[name] = {**medians, "ratio": medians["ours"] / medians["generate"]}
    return found


def _ours(roles: SharedBase, base: Base, prompts: Tensor, answers: int) -> None:
    sampling = Sampling(ANSWER_TOKENS, 1.0, (), base.chat.pad_id, MICRO_BATCH)
    rows = [row for row in prompts.tolist() for _ in range(answers)]
    LocalSampler(roles).draw(Role.POLICY, rows, sampling, torch.Generator(prompts.device).manual_seed(0))


def _generate(peer: PreTrainedModel, base: Base, prompts: Tensor, answers: int) -> None:
    with torch.no_grad():
        peer.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=True,
            min_new_tokens=ANSWER_TOKENS,
            max_new_tokens=ANSWER_TOKENS,
            num_return_sequences=answers,
            pad_token_id=base.chat.pad_id,
        )
