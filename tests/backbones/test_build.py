"""The tiny encoder-decoder: an ordinary model folder, pretrained on the agent's replies given their contexts."""

from pathlib import Path

import pytest
import torch
from transformers import T5ForConditionalGeneration

from perl.backbones.build import build_base
from perl.backbones.loading import load_base
from perl.backbones.padding import joined
from perl.data.records import Demonstration, Turn
from perl.roles.role import Role
from perl.roles.shared_base import SharedBase
from tests.tiny import lora

DRINKS = ("tea", "latte", "mocha", "water")
CORPUS = [
    Demonstration((Turn("user", f"A {drink}"),), (Turn("agent", f"One {drink}"),), drink) for drink in DRINKS
]


def test_a_tiny_t5_is_built_once_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    shape = {"hidden_size": 32, "layers": 2, "heads": 2, "vocabulary": 300, "max_length": 64}
    made = build_base(CORPUS, architecture="t5", **shape, steps=60, batch_tokens=128, learning_rate=None, seed=0)  # type: ignore[arg-type]
    base, lm = load_base(str(made), torch.float32, torch.device("cpu"))
    assert isinstance(lm, T5ForConditionalGeneration)
    roles = SharedBase(lora(lm, 2, 4))
    context = CORPUS[0].context
    answers = [base.chat.completion(context, Turn("agent", text)) for text in ("One tea", "No")]
    batch = joined([base.chat.context(context)] * 2, answers, base.chat.pad_id, torch.device("cpu"))
    length = max(map(len, answers))
    with torch.no_grad():
        log_probs_BT = roles(Role.BASE, *batch, completion_length=length, temperature=1.0).log_probs_BT
    assert log_probs_BT is not None
    right, wrong = log_probs_BT.sum(1).tolist()
    assert right > wrong + 2
