"""A server with vLLM's reward-model endpoints, on transformers' classifier and peft, with faults to switch on."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.fake_vllm import FakeVllm

FAULTS = (
    "base served",
    "another head",
    "sigmoid",
    "softmax",
    "wrong scale",
    "two classes",
    "few scores",
    "not a number",
    "one token more",
    "other tokens",
    "no adapter",
    "no classifier",
    "refuses",
    "slow",
    "half answers",
    "fails",
    "wants a key",
    "another server",
)


class FakeRewardServer(FakeVllm):
    """One server with one adapter, named reward, from the start.

    It scores row by row with the weights that peft loads from the adapter's folder.
    """

    def __init__(self, folder: Path, adapter: Path) -> None:
        self._adapter = adapter
        super().__init__(folder)

    def restart(self) -> None:
        """Restart with the state of a new process."""
        self.loaded = {"reward": str(self._adapter)}
        base = AutoModelForSequenceClassification.from_pretrained(
            self._folder, num_labels=1, pad_token_id=-1, dtype=torch.float32
        )
        self._peft = PeftModel.from_pretrained(base, str(self._adapter)).eval()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return the HTTP status and the response body."""
        if path == "/tokenize":
            tokenizer = AutoTokenizer.from_pretrained(self._folder)
            ids = tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]
            return 200, {"tokens": ids[:-1] if self.fault == "other tokens" else ids}
        self.asked.append(body)
        if path != "/classify" or self.fault == "no classifier":
            return 404, {"detail": "Not Found"}
        answers = {"fails": (500, "EngineDeadError"), "refuses": (400, "maximum context length is 2")}
        return answers.get(self.fault) or self._classify(body)

    def _classify(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] not in self.loaded:
            return 404, "does not exist"
        with self._lock, torch.no_grad():
            scores = [self._said(self._score(row), body["use_activation"]) for row in body["input"]]
        data = [{"index": index, "probs": probs, "num_classes": 1} for index, probs in enumerate(scores)]
        count = sum(map(len, body["input"])) + (self.fault == "one token more")
        data = data[:-1] if self.fault == "few scores" else data[::-1]
        return 200, {"model": body["model"], "data": data, "usage": {"prompt_tokens": count}}

    def _score(self, row: list[int]) -> float:
        layers = [layer for layer in self._peft.modules() if isinstance(layer, LoraLayer)]
        factor = {"base served": 0.0, "wrong scale": 1.05}.get(self.fault, 1.0)
        kept = [layer.scaling for layer in layers]
        for layer in layers:
            layer.scaling = {name: factor * value for name, value in layer.scaling.items()}
        model = self._peft.base_model.model
        hidden = model.model(torch.tensor([row])).last_hidden_state[0, -1]
        for layer, scaling in zip(layers, kept, strict=True):
            layer.scaling = scaling
        return float(model.score(hidden.flip(-1) if self.fault == "another head" else hidden))

    def _said(self, score: float, activated: bool) -> list[float]:
        said = {"not a number": [math.nan], "softmax": [1.0], "two classes": [score, score]}
        if activated or self.fault == "sigmoid":
            return [1 / (1 + math.exp(-score))]
        return said.get(self.fault, [score])
