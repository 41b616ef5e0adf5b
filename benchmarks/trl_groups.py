"""One measurement of the installed TRL's RLOO or GRPO trainer, on the same work.

`python benchmarks/trl_groups.py ALGORITHM MODEL TUNING EPOCHS STEPS`. The reward model is a separate model, as in
TRL's examples; the reference is the base without the adapter or, under full tuning, a second model.
"""

import sys
import tempfile
from functools import partial
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from benchmarks.trl_work import DEVICE, Clock, adapters, made, measure
from perl.bench import work

TRAINERS: dict[str, tuple[Any, Any]] = {
    "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
}


def _tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one word per id, because these trainers pass prompts and completions as text."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{number}": number for number in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def trainer(algorithm: str, model: str, tuning: str, epochs: int, steps: int, dtype: str, clock: Clock) -> Any:
    """Return TRL's trainer for `steps` rollouts; it counts updates, so its `max_steps` is `steps * epochs`."""
    vocabulary = work.MODELS[model]["vocab_size"]
    tokenizer = _tokenizer(vocabulary)
    ids = torch.randint(5, vocabulary, (work.PROMPTS * 4, work.PROMPT_TOKENS)).tolist()
    policy = made(LlamaForCausalLM, model, dtype)
    policy.generation_config.eos_token_id = None  # no completion ends early
    if tuning == "full":  # TRL loads the reference from the policy's path
        policy.config._name_or_path = tempfile.mkdtemp()
        policy.save_pretrained(policy.config._name_or_path)
    make_config, make_trainer = TRAINERS[algorithm]
    return make_trainer(
        model=policy,
        reward_funcs=made(LlamaForSequenceClassification, model, dtype),
        reward_processing_classes=tokenizer,
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [" ".join(f"w{one}" for one in row) for row in ids]}),
        args=make_config(
            output_dir=tempfile.mkdtemp(),
            use_cpu=DEVICE == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=work.MICRO_BATCH,
            gradient_accumulation_steps=work.PROMPTS // work.MICRO_BATCH,
            num_generations=work.GROUP,
            num_iterations=epochs,
            max_steps=steps * epochs,
            max_completion_length=work.ANSWER_TOKENS,
            generation_kwargs={"min_new_tokens": work.ANSWER_TOKENS},
            temperature=1.0,
            beta=0.05,
            learning_rate=work.LEARNING_RATE,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        callbacks=[clock],
        **adapters(tuning),
    )


if __name__ == "__main__":
    epochs, steps = int(sys.argv[4]), int(sys.argv[5])
    measure(partial(trainer, *sys.argv[1:4], epochs, steps, sys.argv[6]), ticks=epochs).print()
