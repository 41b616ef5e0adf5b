"""The rows' losses and gradients against the loss functions of TRL and torchrl themselves, to 1e-6.

Intended differences: TRL's CISPO bounds the weight only from above (so does the row); torchrl's lets the gradient
flow through the clipped weight instead of log π; TRL's RLOO clips the product of a completion's ratios, ours clips
each token's ratio, so that the two agree, up to the average's factor, where the ratio is 1.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torchrl.objectives.llm import CISPOLoss, GRPOLoss  # type: ignore[import-untyped]
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from perl.rl.algorithm import Algorithm, Targets
from perl.rl.algorithms import ALGORITHMS
from perl.rl.losses import Constants, Sizes, Tokens, clip
from perl.roles.outputs import Outputs
from tests.rl.rollouts import rollout

LENGTHS, LONGEST, BETA = torch.tensor([6, 1, 4, 3]), 9, 0.05
MASK_BT = torch.arange(6)[None] < LENGTHS[:, None]
SIZES = Sizes(float(LENGTHS.sum()), 4.0, LONGEST)
ADVANTAGES_B = torch.tensor([1.3, -0.7, -1.1, 0.4], dtype=torch.float64)
ROWS: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "ppo": (ALGORITHMS["ppo"], {"loss_type": "bnpo"}),
    "ppo, dual clip": (replace(ALGORITHMS["ppo"], dual_clip=1.6), {"loss_type": "bnpo", "delta": 1.6}),
    "rloo": (ALGORITHMS["rloo"], {"loss_type": "bnpo"}),
    "grpo": (ALGORITHMS["grpo"], {"loss_type": "grpo", "beta": BETA}),
    "dr-grpo": (ALGORITHMS["dr-grpo"], {"loss_type": "dr_grpo"}),
    "dapo": (ALGORITHMS["dapo"], {"loss_type": "dapo", "high": 0.28}),
    "gspo": (
        ALGORITHMS["gspo"],
        {"loss_type": "grpo", "level": "sequence", "low": 3e-4, "high": 4e-4, "beta": BETA},
    ),
    "gspo, wide": (
        replace(ALGORITHMS["gspo"], clip=0.1, clip_high=0.2),
        {"loss_type": "grpo", "level": "sequence", "low": 0.1, "high": 0.2, "beta": BETA},
    ),
    "cispo": (ALGORITHMS["cispo"], {"loss_type": "cispo", "high": 5.0}),
    "maxrl": (ALGORITHMS["maxrl"], {"loss_type": "grpo", "beta": BETA}),
    "entropy": (replace(ALGORITHMS["rloo"], entropy_coef=0.3), {"loss_type": "bnpo", "entropy": 0.3}),
}


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return log-probs of the policy, the old policy and the reference, and entropies, all in fp64."""
    generator = torch.Generator().manual_seed(0)
    now_BT, old_BT, reference_BT, entropy_BT = torch.randn(4, 4, 6, generator=generator, dtype=torch.float64)
    now_BT = (now_BT - 3).requires_grad_()
    old_BT, reference_BT = now_BT.detach() + 0.5 * old_BT, now_BT.detach() + 0.5 * reference_BT
    return now_BT, old_BT, reference_BT, entropy_BT.abs().requires_grad_()


def ours(row: Algorithm, now_BT: Tensor, old_BT: Tensor, reference_BT: Tensor, entropy_BT: Tensor) -> Tensor:
    mask_BL = torch.cat([torch.ones(4, 1).bool(), MASK_BT], 1)
    batch = rollout(
        ids_BL=mask_BL.long(),
        mask_BL=mask_BL,
        completion_lengths=LENGTHS.tolist(),
        sampler_log_probs_BT=old_BT,
        policy_log_probs_BT=old_BT,
        reference_log_probs_BT=reference_BT,
    )
    targets = Targets(ADVANTAGES_B[:, None] * MASK_BT, None, None, BETA)
    return row.policy_loss(Outputs(now_BT, entropy_BT), batch, targets, SIZES)[0]


def trainer(now_BT: Tensor, entropy_BT: Tensor, **said: Any) -> SimpleNamespace:
    """Return the trainer attributes that TRL's `_compute_loss` reads."""
    given = {"loss_type": "grpo", "level": "token", "low": 0.2, "high": 0.2, "beta": 0.0, "delta": None} | said
    entropy = given.get("entropy", 0.0)
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (now_BT, entropy_BT, None),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=False, delta=given["delta"], steps_per_generation=1),
        accelerator=SimpleNamespace(
            num_processes=1, sync_gradients=False, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        loss_type=given["loss_type"],
        importance_sampling_level=given["level"],
        epsilon_low=given["low"],
        epsilon_high=given["high"],
        beta=given["beta"],
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        use_adaptive_entropy=False,
        _entropy_bonus_enabled=entropy != 0,
        entropy_coef=entropy,
        _metrics={"train": defaultdict(list)},
    )


def inputs(old_BT: Tensor, reference_BT: Tensor) -> dict[str, Tensor]:
    ids_BT = MASK_BT.long()
    return {
        "prompt_ids": ids_BT[:, :1],
        "prompt_mask": ids_BT[:, :1],
        "completion_ids": ids_BT,
        "completion_mask": ids_BT,
        "advantages": ADVANTAGES_B,
        "old_per_token_logps": old_BT,
        "old_logps": (old_BT * MASK_BT).sum(1),
        "ref_per_token_logps": reference_BT,
        "num_items_in_batch": MASK_BT.sum(),
    }


@pytest.mark.parametrize("name", ROWS)
def test_loss_and_gradient_are_trls(name: str) -> None:
    row, said = ROWS[name]
    now_BT, old_BT, reference_BT, entropy_BT = tensors()
    if name == "gspo":  # within its narrow clip, some of them
        old_BT = now_BT.detach() + 1e-3 * (old_BT - now_BT.detach())
    theirs = GRPOTrainer._compute_loss(trainer(now_BT, entropy_BT, **said), None, inputs(old_BT, reference_BT))
    loss = ours(row, now_BT, old_BT, reference_BT, entropy_BT)
    torch.testing.assert_close(loss, theirs, rtol=1e-6, atol=1e-9)
    (expected_BT,), (gradient_BT,) = (torch.autograd.grad(one, now_BT) for one in (theirs, loss))
    assert gradient_BT[MASK_BT].count_nonzero() >= 4
    torch.testing.assert_close(gradient_BT, expected_BT, rtol=1e-6, atol=1e-9)


def test_rloo_at_ratio_one_has_trls_gradient() -> None:
    now_BT, _, reference_BT, entropy_BT = tensors()
    old_BT = now_BT.detach()
    theirs = RLOOTrainer._compute_loss(trainer(now_BT, entropy_BT), None, inputs(old_BT, reference_BT))
    (expected_BT,) = torch.autograd.grad(theirs, now_BT)
    loss = ours(ALGORITHMS["rloo"], now_BT, old_BT, reference_BT, entropy_BT)
    (gradient_BT,) = torch.autograd.grad(loss, now_BT)
    torch.testing.assert_close(gradient_BT, expected_BT * SIZES.completions / SIZES.tokens, rtol=1e-6, atol=1e-9)


def test_the_clip_is_torchrls() -> None:
    """The upper and lower bounds differ, as in DAPO, per token."""
    now_BT, old_BT, _, _ = tensors()
    tokens = Tokens(now_BT, old_BT, ADVANTAGES_B[:, None].expand(4, 6), torch.ones(4, 6).bool())
    objective = GRPOLoss(clip_epsilon=(0.2, 0.28))
    theirs_BT, _ = objective._compute_policy_objective(now_BT - old_BT, tokens.advantages_BT)
    terms_BT, _ = clip(tokens, Constants(0.2, 0.28))
    torch.testing.assert_close(terms_BT, theirs_BT, rtol=1e-6, atol=1e-7)


def test_torchrls_cispo_has_no_gradient_where_the_weight_is_clipped() -> None:
    """The paper's loss and ours have one there; within the bounds, the gradients are equal."""
    now_BT, old_BT, reference_BT, entropy_BT = tensors()
    theirs_BT, _ = CISPOLoss(clip_epsilon=(0.2, 0.2))._compute_policy_objective(
        now_BT - old_BT, ADVANTAGES_B[:, None].expand(4, 6)
    )
    theirs = (theirs_BT * MASK_BT).sum() / SIZES.tokens
    (expected_BT,) = torch.autograd.grad(theirs, now_BT)
    row = replace(ALGORITHMS["cispo"], clip=0.2, clip_high=0.2)
    (gradient_BT,) = torch.autograd.grad(ours(row, now_BT, old_BT, reference_BT, entropy_BT), now_BT)
    within_BT = ((now_BT - old_BT).exp() - 1).abs() < 0.2
    torch.testing.assert_close(gradient_BT[within_BT], expected_BT[within_BT], rtol=1e-6, atol=1e-9)
    assert not expected_BT[MASK_BT & ~within_BT].any()
    assert gradient_BT[MASK_BT & ~within_BT].all()
