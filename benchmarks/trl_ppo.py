"""One measurement of TRL's PPO trainer (last released in TRL 1.12), on the same work.

`python benchmarks/trl_ppo.py MODEL TUNING EPOCHS STEPS`, with that release's folder first on PYTHONPATH. With LoRA
it adapts the policy and trains the whole value model, as in TRL's example; the reward model is a separate model.
"""

import sys
import tempfile
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.trl_work import DEVICE, Clock, adapters, made, measure
from perl.bench import work


def _tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def trainer(model: str, tuning: str, epochs: int, steps: int, dtype: str, clock: Clock) -> Any:
    """Return TRL's trainer for `steps` steps."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    vocabulary = work.MODELS[model]["vocab_size"]
    ids = torch.randint(5, vocabulary, (work.PROMPTS * 8, work.PROMPT_TOKENS)).tolist()
    prompts = Dataset.from_dict({"input_ids": ids})
    return PPOTrainer(
        args=PPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=DEVICE == "cpu",
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
        model=made(LlamaForCausalLM, model, dtype),
        ref_model=None if tuning == "lora" else made(LlamaForCausalLM, model, dtype),
        reward_model=made(LlamaForSequenceClassification, model, dtype),
        value_model=made(LlamaForSequenceClassification, model, dtype),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(work.PROMPTS)),
        callbacks=[clock],
        **adapters(tuning),
    )


if __name__ == "__main__":
    measure(partial(trainer, sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])).print()
