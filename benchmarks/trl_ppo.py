"""One measurement of TRL's PPO trainer, whose last release with one is 1.12, on the same work.

`python benchmarks/trl_ppo.py MODEL TUNING EPOCHS STEPS`, with that release's folder first on PYTHONPATH. Its LoRA
run adapts the policy and trains the value model whole, as its own example does; the reward model is a model of its
own.
"""

import contextlib
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from perl.bench import work
from perl.bench.measurement import Measurement, PeakOverStart


class _Clock(TrainerCallback):
    """Notes when every step ends."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Start counting."""
        self.times.append(time.perf_counter())

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """A step has ended."""
        self.times.append(time.perf_counter())


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def _trainer(model: str, tuning: str, epochs: int, steps: int, clock: _Clock) -> Any:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    shape = {"tie_word_embeddings": False, **work.MODELS[model]}
    config = LlamaConfig(num_labels=1, pad_token_id=0, bos_token_id=1, eos_token_id=1, **shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make(kind: Any) -> Any:
        return kind(config).to(device=device, dtype=torch.bfloat16)

    ids = torch.randint(5, config.vocab_size, (work.PROMPTS * 8, work.PROMPT_TOKENS)).tolist()
    prompts = Dataset.from_dict({"input_ids": ids})
    lora = tuning == "lora"
    adapters = LoraConfig(r=work.RANK, lora_alpha=work.ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    return PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=device == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=work.MICRO_BATCH,
            gradient_accumulation_steps=work.PROMPTS // work.MICRO_BATCH,
            local_rollout_forward_batch_size=work.PROMPTS,
            num_mini_batches=1,
            num_ppo_epochs=epochs,
            total_episodes=work.PROMPTS * steps,
            response_length=work.ANSWER_TOKENS,
            stop_token=None,
            temperature=1.0,
            learning_rate=work.LEARNING_RATE,
            num_sample_generations=0,
            eval_strategy="no",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        processing_class=_tokenizer(),
        model=make(LlamaForCausalLM),
        ref_model=None if lora else make(LlamaForCausalLM),
        reward_model=make(LlamaForSequenceClassification),
        value_model=make(LlamaForSequenceClassification),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(work.PROMPTS)),
        callbacks=[clock],
        **({"peft_config": adapters} if lora else {}),
    )


def main() -> None:
    """Print the seconds of each step and the peak memory as JSON."""
    warnings.filterwarnings("ignore")
    model, tuning, epochs, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.manual_seed(0)
    clock = _Clock()
    with PeakOverStart() as peak, contextlib.redirect_stdout(sys.stderr):
        trainer = _trainer(model, tuning, epochs, steps, clock)
        trainer.train()
    seconds = [{"all": end - start} for start, end in zip(clock.times, clock.times[1:], strict=False)]
    Measurement(seconds, peak.bytes).print()


if __name__ == "__main__":
    main()
