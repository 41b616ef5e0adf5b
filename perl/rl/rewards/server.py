"""A reward model on vLLM servers, which may run on other machines; rows are sent as token ids.

The endpoint is /classify with `use_activation` false: otherwise vLLM sends the sigmoid of a head with one output
and the softmax of a head with several. Rows are sent as tokens rather than text so that the score is read at the
same last token as in the model's training.

Axis letter: B completions.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import httpx2
import torch
from pydantic import BaseModel

from perl.data.records import Prompt
from perl.rl.rewards.base import RewardServers, RewardSource
from perl.rl.rewards.model import standardized, with_written_end
from perl.rl.samplers.base import Samples
from perl.rl.samplers.server.client import QUICK, Server, ServerError, UselessError, refused
from perl.rl.samplers.server.parallel import Calls
from perl.roles.saved import Stamp
from perl.system.files import file_sha256

SECTION = "rl.reward"
ROWS = 16
"""Rows per request: small, so that little is lost if one fails and replicas share a rollout."""
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")


class _Scored(BaseModel):
    index: int
    probs: list[float]


class _Usage(BaseModel):
    prompt_tokens: int


class _Scores(BaseModel):
    data: list[_Scored]
    usage: _Usage


class _Tokens(BaseModel):
    tokens: list[int]


class _Request(NamedTuple):
    server: Server
    rows: list[list[int]]


class ServedModel(RewardSource):
    """The reward of a model on servers: its score or its sigmoid, centred and scaled if the stamp is known.

    Requests are distributed to the servers in turn. With every rollout each server scores one row again, because a
    server that was restarted with another adapter scores it differently.

    Args:
        limit: largest difference of two scores of one row that rounding explains.
        ends: the end tokens of completions; the model's training rows end with the first.
        stamp: the model's stamp, if this run has it.
    """

    name, title, runs_user_code = "server", "the reward server", False

    def __init__(self, asked: RewardServers, limit: float, ends: tuple[int, ...], stamp: Stamp | None) -> None:
        self.servers = [Server(url, asked.time_limit, asked.patience, SECTION) for url in asked.urls]
        self._asked, self.limit, self._ends, self._stamp = asked, limit, ends, stamp
        self._known: tuple[list[int], float] | None = None
        """A row and its score in the first request of this process."""
        self.weights_sha256: str | None = None
        """The start of the SHA-256 of the served weights file, if it is visible on this machine; set by the first
        rollout."""

    def rewards(self, prompts: Sequence[Prompt], samples: Samples, texts: Sequence[str]) -> list[float]:
        """See `RewardSource`.

        Raises:
            ServerError: a server is slow, unreachable, sends no scores, or scores differently than before.
        """
        samples = with_written_end(samples, self._ends)
        both = zip(samples.prompt_ids(), samples.completions(), strict=True)
        scores_B = torch.tensor(self._scores([[*prompt, *tokens] for prompt, tokens in both]), dtype=torch.float64)
        if self._stamp is not None:
            scores_B = standardized(self._stamp, scores_B)
        elif self._asked.probability:
            scores_B = scores_B.sigmoid()
        return self._check(scores_B.tolist(), texts)

    def _scores(self, rows: list[list[int]]) -> list[float]:
        """Return the scores of rows, computed by all servers together."""
        if self._known is None:
            for server in self.servers:
                self.require(server)
            self._known = rows[0], self.scores(self.servers[0], rows[:1])[0]
        parts = [rows[first : first + ROWS] for first in range(0, len(rows), ROWS)]
        requests = [_Request(self.servers[place % len(self.servers)], part) for place, part in enumerate(parts)]
        again = [_Request(server, [self._known[0]]) for server in self.servers]
        found = Calls(lambda one: self.scores(*one), [*again, *requests], self._asked.in_flight).results()
        for server, (score,) in zip(self.servers, found, strict=False):
            if not abs(score - self._known[1]) <= self.limit:
                raise ServerError(
                    f"the server scores a row {score:.4g} that was scored {self._known[1]:.4g} at the start of "
                    "this run: it now serves another adapter or another base",
                    where=server.url,
                    remedy=f"Start each server of {SECTION}.url with its original adapter, and run this again.",
                )
        return [score for part in found[len(again) :] for score in part]

    def require(self, server: Server) -> None:
        """Check that a server has the model, and record the hash of its weights.

        Raises:
            ServerError: the server does not have it.
        """
        models = server.models()
        if self._asked.model not in models:
            raise ServerError(
                f"the server has no model {self._asked.model}: it has {', '.join(models) or 'none'}",
                where=server.url,
                remedy=f"Start it with --lora-modules {self._asked.model}=DIR, or name one of these in "
                f"{SECTION}.model.",
            )
        root = models[self._asked.model].root
        files = [file for name in WEIGHTS if root and (file := Path(root, name)).is_file()]
        if files:
            self.weights_sha256 = file_sha256(files[0])[:16]

    def scores(self, server: Server, rows: list[list[int]]) -> list[float]:
        """Return the raw head scores of rows of tokens from one server."""
        body = {
            "model": self._asked.model,
            "input": rows,
            "use_activation": False,
            "add_special_tokens": False,
        }

        def read(response: httpx2.Response) -> list[float]:
            return _scores(response, rows)

        return server.ask("POST", "/classify", body, read, self._asked.time_limit)

    def tokens(self, server: Server, text: str) -> list[int] | None:
        """Return a server's tokens of a text; None if it does not tell."""
        body = {"model": self._asked.model, "prompt": text, "add_special_tokens": False}

        def read(response: httpx2.Response) -> list[int] | None:
            return _Tokens.model_validate_json(response.content).tokens if response.status_code == 200 else None

        return server.ask("POST", "/tokenize", body, read, QUICK)


def _scores(response: httpx2.Response, rows: list[list[int]]) -> list[float]:
    """Return the scores in a response after checking that it is complete."""
    where = str(response.url)
    if response.status_code == 404:
        raise ServerError(
            f"the server does not have this model, or does not score: {refused(response)}",
            where=where,
            remedy="Start it with --runner pooling --convert classify and --lora-modules (docs/serving.md).",
        )
    if response.status_code != 200:
        longest = max(map(len, rows))
        raise ServerError(
            f"the server refuses {len(rows)} rows of up to {longest} tokens: {refused(response)}",
            where=where,
            remedy="Its --max-model-len must be at least the longest prompt plus completion; the base alone has "
            f"no head, so name the adapter in {SECTION}.model.",
        )
    answer = _Scores.model_validate_json(response.content)
    if sorted(one.index for one in answer.data) != [*range(len(rows))]:
        raise UselessError(f"{len(answer.data)} scores of {len(rows)} rows")
    outputs = {len(one.probs) for one in answer.data}
    if outputs != {1}:
        raise ServerError(
            f"the server sends {max(outputs)} numbers per row, but a reward model's head has one output",
            where=where,
            remedy="Start it with --hf-overrides '{\"num_labels\": 1, ...}' (docs/serving.md).",
        )
    if answer.usage.prompt_tokens != sum(map(len, rows)):
        raise UselessError(f"it read {answer.usage.prompt_tokens} tokens of rows of {sum(map(len, rows))}")
    ordered = {one.index: one.probs[0] for one in answer.data}
    if not all(map(math.isfinite, ordered.values())):
        raise UselessError("a score is not a finite number")
    return [ordered[index] for index in range(len(rows))]
