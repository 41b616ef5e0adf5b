"""The example of a backbone outside the package: it is loaded, read, scored and refused as any other."""

import runpy
from pathlib import Path

import pytest
import torch

from perl.backbones import BACKBONES, backbone_of
from perl.backbones.loading import load_base, numbered_tokens
from perl.errors import UserError
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora

CPU = torch.device("cpu")
EXAMPLE = Path(__file__).with_name("example_backbone.py")


def test_it_is_at_most_40_lines() -> None:
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) <= 40


def test_a_policy_and_a_reward_model_compute_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "sums", BACKBONES["decoder"])  # taken out again at the end
    plugin = runpy.run_path(str(EXAMPLE))
    torch.manual_seed(0)
    plugin["SumsForCausalLM"](plugin["SumsConfig"]()).save_pretrained(tmp_path)
    numbered_tokens(300).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="SumsForCausalLM is a causal LM: it has no KV cache"):
        load_base(str(tmp_path), torch.float32, CPU)

    _, lm = load_base(str(tmp_path), torch.float32, CPU, generates=False)
    assert type(backbone_of(lm.config)) is plugin["Sums"]
    roles = SharedBase(lora(lm, 2, 4))
    roles.add(Role.POLICY)
    roles.add(Role.REWARD, head=True)
    parameters = roles.train_only(Role.POLICY, Role.REWARD)
    for parameter in parameters:
        parameter.data.normal_(std=0.1)
    ids_BL = torch.tensor([[0, 5, 6, 7, 8], [3, 4, 5, 6, 7]])
    mask_BL = torch.ones_like(ids_BL).bool()
    mask_BL[0, 0] = False
    with roles.checkpointed():
        log_probs_BT = roles(Role.POLICY, ids_BL, mask_BL, completion_length=2, temperature=1.0).log_probs_BT
        scores_B = roles(Role.REWARD, ids_BL, mask_BL, head=Role.REWARD).scores_B
        with roles.role(Role.POLICY), torch.no_grad():
            own_TV = lm(input_ids=ids_BL[:1, 1:]).logits[0, 1:-1].log_softmax(-1)
        torch.testing.assert_close(log_probs_BT[0], own_TV.gather(1, ids_BL[0, 3:, None])[:, 0])
        (log_probs_BT.sum() + scores_B.sum()).backward()
    assert scores_B.unique().numel() == 2
    assert all(parameter.grad.abs().sum() > 0 for parameter in parameters)
