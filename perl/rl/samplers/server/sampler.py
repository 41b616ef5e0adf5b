"""The sampler that uses servers: one request per completion, each with its own seed.

A seed belongs to a request: several prompts in one request would get the same random numbers. The seeds are
derived from the run's, so that a resumed run samples the same completions as an uninterrupted one.

Axis letters: B completions, P prompt positions, T completion positions.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from perl.backbones.padding import left_pad
from perl.errors import UserError
from perl.rl.samplers import SamplerSettings
from perl.rl.samplers.base import Read, Sampler, Samples, Sampling, Share
from perl.rl.samplers.server.client import Completion, Server, ServerError, UnknownModelError
from perl.rl.samplers.server.parallel import Calls
from perl.rl.samplers.server.proof import Proof, holding
from perl.rl.samplers.server.versions import NAME, Versions
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase

T = TypeVar("T")


class _Request(NamedTuple):
    server: Server
    prompt: Sequence[int]
    seed: int


class _Drawing(NamedTuple):
    """A draw in progress."""

    role: Role
    name: str
    weights: dict[str, Tensor] | None
    """The role's weights when it was started; None: they have not changed since."""
    requests: list[_Request]
    calls: Calls[_Request, Completion]


class ServerSampler(Sampler):
    """Samples with servers that have the base and receive the roles' adapters whenever these change.

    Row i of a process's share goes to server i modulo the number of servers.

    Raises:
        UserError: the roles are not adapters that vLLM serves.
    """

    def __init__(self, roles: Roles, settings: SamplerSettings) -> None:
        super().__init__(roles, settings)
        if not isinstance(roles, SharedBase):
            raise UserError(
                "servers need adapters, but there are none", where="rl.sampler", remedy="Set tuning: lora."
            )
        self._roles = roles
        self._servers = [Server(url, settings.time_limit, settings.patience) for url in settings.urls]
        self._versions = Versions(roles, self._servers, Path(settings.adapter_dir))
        self._proof = Proof(roles, settings.mismatch_limit)
        self._names: dict[Role, str] = {}
        """The servers' names of the roles whose weights they have."""
        self._loading = threading.Lock()
        self._begun: _Drawing | None = None

    def sync(self, role: Role) -> None:
        """Note that the weights have changed; they are sent to the servers before the next draw as this role."""
        self._names.pop(role, None)

    def begin(
        self,
        role: Role,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
    ) -> None:
        """See `Sampler`; start with the current weights, if the recipe allows completions to be one update old."""
        if self.settings.staleness:
            kept = {key: weight.detach().clone() for key, weight in self._roles.weights(role).items()}
            self._begun = self._drawing(role, self._requests(prompts, generator, share), sampling, kept)
            self._versions.in_use = self._begun.name

    def draw(
        self,
        role: Role,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        generator: torch.Generator,
        share: Share | None = None,
        read: Read | None = None,
    ) -> Samples:
        """See `Sampler`; the completions are checked to be the role's own.

        Raises:
            ServerError: a server is slow, unreachable or sends unusable responses, or samples with other weights
                than the role's.
        """
        requests, drawing = self._requests(prompts, generator, share), self._begun
        if drawing is None or (drawing.role, drawing.requests) != (role, requests):
            drawing = self._drawing(role, requests, sampling, None)
        else:
            self._begun = self._versions.in_use = None
        drawn = self._together(drawing.calls.results)
        samples = self._samples(prompts, drawn, sampling, drawing.name)
        urls = [request.server.url for request in requests]
        with nullcontext() if drawing.weights is None else holding(self._roles, role, drawing.weights):
            self._proof.require(role, samples, sampling, urls)
        return samples

    def _drawing(
        self, role: Role, requests: list[_Request], sampling: Sampling, weights: dict[str, Tensor] | None
    ) -> _Drawing:
        name = self._together(lambda: self._name(role), main=True)
        workers = max(1, self.settings.in_flight // self.roles.engine.processes.count)
        calls = Calls(lambda request: self._complete(name, request, sampling), requests, workers)
        return _Drawing(role, name, weights, requests, calls)

    def _requests(
        self, prompts: Sequence[Sequence[int]], generator: torch.Generator, share: Share | None
    ) -> list[_Request]:
        """Return the requests and their servers."""
        rows, total = share or Share(list(range(len(prompts))), len(prompts))
        seeds = torch.randint(2**31, (total,), generator=generator, device=generator.device)[rows].tolist()
        servers = [self._servers[place % len(self._servers)] for place in range(len(prompts))]
        return [_Request(*one) for one in zip(servers, prompts, seeds, strict=True)]

    def _together(self, work: Callable[[], T], main: bool = False) -> T:
        """Return the result of work; if it fails in one process, raise in all.

        Args:
            main: whether the main process does the work for all.
        """
        processes, result, failed = self.roles.engine.processes, None, None
        if processes.main or not main:
            try:
                result = work()
            except UserError as error:
                failed = error
        for fault in processes.all_gather(failed):
            if fault is not None:
                raise fault
        return processes.broadcast(result) if main else result  # type: ignore[return-value]

    def _name(self, role: Role) -> str:
        """Return a role's name on all servers, after publishing its current weights."""
        if role not in self._names:
            self._names[role] = self._base() if role is Role.BASE else self._versions.publish(role)
        return self._names[role]

    def _base(self) -> str:
        """Return the servers' name of the base."""
        names = {}
        for server in self._servers:
            names[server.url] = [name for name, model in server.models().items() if model.parent is None]
        first = next(iter(names.values()))
        if not first or any(others[:1] != first[:1] for others in names.values()):
            raise ServerError(
                f"the servers call the base by different names: {names}",
                where="rl.sampler.url",
                remedy="Start all with the same --served-model-name.",
            )
        return first[0]

    def _complete(self, name: str, request: _Request, sampling: Sampling) -> Completion:
        """Request a completion; a server that lost an adapter, for example by a restart, receives it again."""
        for again in (False, True):
            try:
                return request.server.complete(name, request.prompt, sampling, request.seed)
            except UnknownModelError:
                if not again and NAME.fullmatch(name):
                    with self._loading:
                        self._versions.load(request.server, name)
        raise ServerError(
            f"the server lists {name} but does not serve it: the adapter was dropped",
            where=request.server.url,
            remedy="Start it with the --max-loras that `perl-rlhf sampler RECIPE` prints.",
        )

    def _samples(
        self, prompts: Sequence[Sequence[int]], drawn: Sequence[Completion], sampling: Sampling, name: str
    ) -> Samples:
        device, length = self.roles.device, sampling.max_new_tokens
        prompt_ids_BP, prompt_mask_BP = left_pad(prompts, sampling.pad_id, device)
        ids_BT = torch.full((len(drawn), length), sampling.pad_id, device=device)
        log_probs_BT = torch.zeros((len(drawn), length), device=device)
        for row, one in enumerate(drawn):
            ids_BT[row, : len(one.ids)] = torch.tensor(one.ids, device=device)
            log_probs_BT[row, : len(one.ids)] = torch.tensor(one.log_probs, device=device)
        lengths = [len(one.ids) for one in drawn]
        mask_BT = torch.arange(length, device=device) < torch.tensor(lengths, device=device)[:, None]
        return Samples(
            ids_BL=torch.cat([prompt_ids_BP, ids_BT], dim=1),
            mask_BL=torch.cat([prompt_mask_BP, mask_BT], dim=1),
            prompt_lengths=[len(prompt) for prompt in prompts],
            completion_lengths=lengths,
            ended_B=torch.tensor([one.ended for one in drawn], device=device),
            sampler_log_probs_BT=log_probs_BT,
            versions=[name] * len(drawn),
        )
