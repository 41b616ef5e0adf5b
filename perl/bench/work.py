"""The workload: RL on a random Llama, prompts of 128 tokens, completions of 64, none of which ends early."""

from typing import Any

PROMPTS = 16
"""Prompts per step, or as many completions of fewer prompts if the algorithm compares completions."""
GROUP = 4
"""Completions per prompt in that case."""
PROMPT_TOKENS = 128
ANSWER_TOKENS = 64
MICRO_BATCH = 4
RANK, ALPHA = 8, 16
LEARNING_RATE = 3e-6
"""TRL's default: so small that no completion changes its length or cost."""

MODELS: dict[str, dict[str, Any]] = {
    "100m": {
        "vocab_size": 8192,
        "hidden_size": 768,
        "intermediate_size": 2112,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "max_position_embeddings": 1024,
    },
    "1b": {  # the shape of Llama 3.2 1B
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    },
    "8b": {  # the shape of Llama 3.1 8B
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
    },
}


def recipe(
    model: str,
    tuning: str,
    layers: str,
    epochs: int,
    checkpointing: bool,
    algorithm: str = "ppo",
    dtype: str = "bfloat16",
) -> dict[str, Any]:
    """Return the workload as a recipe; the reward model is an adapter with random weights and a zero head."""
    each = 1 if algorithm == "ppo" else GROUP
    return {
        "name": f"bench-{model}",
        "tuning": tuning,
        "checkpoint_activations": checkpointing,
        "base": {
            "config": {"model_type": "llama", "tie_word_embeddings": False, **MODELS[model]},
            "random_init": True,
            "dtype": dtype,
        },
        "lora": {"rank": RANK, "alpha": ALPHA, "layers": layers if tuning == "lora" else "all"},
        "data": {"source": "coffee-simulator"},
        "reward": {},
        "rl": {
            "algorithm": algorithm,
            "epochs": epochs,
            "prompts_per_step": PROMPTS // each,
            "samples_per_prompt": each,
            "micro_batch_size": MICRO_BATCH,
            "max_prompt_length": PROMPT_TOKENS,
            "max_new_tokens": ANSWER_TOKENS,
            "learning_rate": LEARNING_RATE,
        },
    }
