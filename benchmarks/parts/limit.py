"""An RL step's peak memory compared with the minimum that the method needs."""

from collections import Counter
from typing import Any

import torch

from perl.bench import work
from perl.measure.memory import LiveBytes
from perl.predict import TRY, Trial, trial_session
from perl.recipe import Recipe
from perl.roles.role import Role
from perl.stages.session import Session


def measure(model: str, layers: str) -> dict[str, Any]:
    """Return the measured peak in bytes, the bytes needed by kind of tensor, and the peak divided by their sum."""
    recipe = Recipe.model_validate(work.recipe(model, "lora", layers, 1, checkpointing=True))
    with trial_session(recipe, Trial(2)) as session:
        memory = TRY["rl"](session).memory
        kinds: Counter[str] = Counter()
        for phase in memory.values():
            kinds |= Counter(phase.kinds)  # the largest of each kind
        needed = {
            "base weights": kinds["base_weights"],
            "adapters and their optimizer": kinds["adapters"] + kinds["gradients"] + kinds["optimizer"],
            "one micro-batch, checkpointed": _micro_batch(session),
            "KV cache of the rollout": kinds["kv_cache"],
        }
    peak = max(phase.peak for phase in memory.values())
    return {"peak": peak, "needed": needed, "ratio": peak / sum(needed.values())}


def _micro_batch(session: Session) -> int:
    """Return the peak bytes that one micro-batch adds in forward and backward, without the gradients."""
    length = work.PROMPT_TOKENS + work.ANSWER_TOKENS
    ids_BL = torch.randint(5, 250, (work.MICRO_BATCH, length), device=session.device)
    mask_BL = torch.ones_like(ids_BL, dtype=torch.bool)
    roles, learners = session.roles, session.roles.train_only(Role.POLICY, Role.CRITIC)
    with LiveBytes() as live, roles.checkpointed():
        outputs = roles(
            Role.POLICY,
            ids_BL,
            mask_BL,
            completion_length=work.ANSWER_TOKENS,
            temperature=1.0,
            head=Role.CRITIC,
        )
        assert outputs.log_probs_BT is not None
        assert outputs.values_BT is not None
        (outputs.log_probs_BT.sum() + outputs.values_BT.sum()).backward()
    return live.peak - sum(parameter.nbytes for parameter in learners)
