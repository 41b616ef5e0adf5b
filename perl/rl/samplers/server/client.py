"""Client of one server with the API of vLLM 0.32: its models and adapters, and completions of token ids.

Endpoints: /v1/models, /v1/completions, /v1/load_lora_adapter, /v1/unload_lora_adapter, and those passed to `ask`.
`load_inplace` is never used: the server would then read the adapter's files again at every use.
"""

import math
import os
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from perl.errors import MachineError
from perl.rl.samplers.base import Sampling
from perl.system.progress import console

T = TypeVar("T")

TRIES = 3
"""Attempts for a request whose response is late or unusable."""
PAUSE = 0.2
"""Seconds until a server that does not answer is asked again; doubled each time, up to `LONGEST_PAUSE`."""
LONGEST_PAUSE = 5.0
QUICK = 60.0
"""Time limit in seconds of all requests but completions."""
START = "Start it with the command that `perl-rlhf sampler RECIPE` prints, and run this again: the run continues."


class ServerError(MachineError):
    """A server does not work as it should; the run can continue once it does."""


class UnknownModelError(Exception):
    """The server does not have the adapter: it was dropped, or the server was restarted."""


class UselessError(Exception):
    """An unusable response; the message says why."""


@dataclass(frozen=True)
class Completion:
    """One completion, including its end token."""

    ids: list[int]
    log_probs: list[float]
    ended: bool


class _Model(BaseModel):
    id: str
    root: str | None = None
    parent: str | None = None


class _Models(BaseModel):
    data: list[_Model]


class _LogProbs(BaseModel):
    token_logprobs: list[float | None]


class _Choice(BaseModel):
    token_ids: list[int]
    prompt_token_ids: list[int]
    logprobs: _LogProbs
    finish_reason: str | None


class _Choices(BaseModel):
    choices: list[_Choice]


class Server:
    """One server, usable from any number of threads.

    Args:
        time_limit: time limit of a completion, in seconds.
        patience: seconds to wait for a server that does not answer.
        section: the recipe's section that names the server, for messages.
    """

    def __init__(self, url: str, time_limit: float, patience: float, section: str = "rl.sampler") -> None:
        self.url, self.section, self._time_limit, self._patience = url, section, time_limit, patience
        self._away = False
        """Whether it did not answer the last request, which has been reported."""
        key = os.environ.get("VLLM_API_KEY")
        self._http = httpx2.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            timeout=httpx2.Timeout(time_limit, connect=QUICK),
            trust_env=False,  # proxies are for external hosts
        )
        weakref.finalize(self, self._http.close)

    def models(self) -> dict[str, _Model]:
        """Return the served models by name; adapters have a `parent`, and their folder as `root`."""

        def read(response: httpx2.Response) -> dict[str, _Model]:
            if response.status_code != 200:
                raise UselessError(refused(response))
            return {model.id: model for model in _Models.model_validate_json(response.content).data}

        return self.ask("GET", "/v1/models", None, read, QUICK)

    def load(self, name: str, folder: str) -> None:
        """Load an adapter, unless it is loaded already."""
        self.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder}, _loaded, QUICK)

    def unload(self, name: str) -> None:
        """Unload an adapter; an unknown adapter is no error."""
        self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, _unloaded, QUICK)

    def complete(self, model: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> Completion:
        """Request a completion.

        Raises:
            UnknownModelError: the server does not have this model.
            ServerError: it does not answer in time, or its response is not a completion of this prompt.
        """
        body = {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": seed,
            "stop_token_ids": list(sampling.end_ids),
            "ignore_eos": True,  # the base's own end token; ours are in stop_token_ids
            "logprobs": 1,
            "return_token_ids": True,
            # Override the base's generation_config.json:
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }

        def read(response: httpx2.Response) -> Completion:
            if response.status_code == 404:
                raise UnknownModelError(model)
            return _completion(response, prompt, sampling)

        return self.ask("POST", "/v1/completions", body, read, self._time_limit)

    def ask(self, method: str, path: str, body: object, read: Callable[[httpx2.Response], T], limit: float) -> T:
        """Send a request until there is a response, and return the result of `read`.

        A request whose response is late or unusable is sent `TRIES` times. If a server cannot be reached or
        reports an internal failure, this waits for it.

        Args:
            read: parses the response; raises `UselessError` if it is unusable. Other exceptions are not retried.
            limit: time limit of the response, in seconds.
        """
        useless, pause, away_since = 0, PAUSE, math.inf
        while True:
            away = False
            try:
                response = self._http.request(method, path, json=body, timeout=limit)
                if response.status_code in (401, 403):
                    raise ServerError(
                        f"the server requires its API key: {refused(response)}",
                        where=self.url,
                        remedy="Set VLLM_API_KEY in the environment to the server's --api-key.",
                    )
                away = response.status_code >= 500
                if not away:
                    self._away = False
                    return read(response)
                why = f"has failed: {refused(response)}"
            except httpx2.ReadTimeout:
                why = f"is slow: {path} took longer than {limit:g} s"
            except httpx2.TransportError as error:
                away, why = True, f"does not answer: {str(error) or type(error).__name__}"
            except ValidationError as error:
                why = f"sent an incomplete response from {path}: {error.errors(include_url=False)[0]['msg']}"
            except UselessError as error:
                why = f"sent an unusable response from {path}: {error}"
            away_since = min(away_since, time.monotonic()) if away else math.inf
            useless += not away
            if useless >= TRIES or time.monotonic() - away_since >= self._patience:
                times = f"for {self._patience:g} s" if away else f"{TRIES} times"
                raise ServerError(f"the server {why}, {times}", where=self.url, remedy=self._remedy(why)) from None
            if away and not self._away:
                self._away = True
                console.print(f"The server {self.url} {why}; waiting for it.", style="yellow", markup=False)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _remedy(self, why: str) -> str:
        if why.startswith("is slow"):
            key = self.section
            return f"Raise {key}.time_limit, lower {key}.in_flight, or add a replica to {key}.url."
        return f"Look at its log. {START}"


def refused(response: httpx2.Response) -> str:
    """Return the server's status and message for a refused request."""
    return f"status {response.status_code}: {response.text[:300]}"


def _loaded(response: httpx2.Response) -> None:
    if response.status_code == 400 and "already been loaded" in response.text:
        return
    if response.status_code != 200:
        raise ServerError(
            f"the server does not accept the adapter: {refused(response)}",
            where=str(response.url),
            remedy="It must see rl.sampler.adapter_dir under the same path, and be started with the command that "
            "`perl-rlhf sampler RECIPE` prints.",
        )


def _unloaded(response: httpx2.Response) -> None:
    if response.status_code not in (200, 404):
        raise UselessError(refused(response))


def _completion(response: httpx2.Response, prompt: Sequence[int], sampling: Sampling) -> Completion:
    """Return the completion in a response after checking that it is complete."""
    if response.status_code != 200:
        raise ServerError(
            f"the server refuses a prompt of {len(prompt)} tokens with {sampling.max_new_tokens} more: "
            f"{refused(response)}",
            where=str(response.url),
            remedy="Start it with the command of `perl-rlhf sampler RECIPE`, with --max-model-len at least that.",
        )
    choices = _Choices.model_validate_json(response.content).choices
    if len(choices) != 1:
        raise UselessError(f"{len(choices)} completions instead of one")
    choice = choices[0]
    ids, log_probs = choice.token_ids, choice.logprobs.token_logprobs
    if choice.prompt_token_ids != list(prompt):
        raise UselessError(f"it read {len(choice.prompt_token_ids)} tokens of a prompt of {len(prompt)}")
    known = [value for value in log_probs if value is not None and math.isfinite(value)]
    if len(known) != len(ids):
        raise UselessError(f"{len(known)} log-probs of {len(ids)} tokens")
    if max(known, default=0.0) > 1e-3:
        raise ServerError(
            f"the server sends log-probs above 0 ({max(known):.3g}), so they are logits",
            where=str(response.url),
            remedy="Start it with --logprobs-mode processed_logprobs.",
        )
    ended = bool(ids) and ids[-1] in sampling.end_ids
    if not ended and len(ids) != sampling.max_new_tokens:
        said = f"finish_reason {choice.finish_reason}"
        raise UselessError(f"a completion was cut after {len(ids)} of {sampling.max_new_tokens} tokens ({said})")
    return Completion(ids, known, ended)
