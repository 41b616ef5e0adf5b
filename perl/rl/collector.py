"""Collection of rollouts: the sampler completes prompts, the reward scores the completions, other roles read them.

With several processes, each handles its share of the prompts; `Rollout.gather` joins the shares.

Axis letters: B completions, T completion positions.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from perl.backbones.chat import ChatFormat
from perl.measure.probe import Phase
from perl.parallel.processes import Processes
from perl.rl.batches import micro_batches, trim
from perl.rl.rewards.combination import CombinedReward
from perl.rl.rollout import EncodedPrompts, Rollout
from perl.rl.samplers.base import Read, Sampler, Samples, Sampling, Share
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.system.device import to_device
from perl.system.seeds import derived_seed

Phases = Callable[[Phase], AbstractContextManager[None]]
"""Returns a context manager that measures its block as a phase."""


def _unmeasured(name: Phase) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass(frozen=True)
class Collector:
    """The sampler, the reward, and their settings."""

    roles: Roles
    sampler: Sampler
    reward: CombinedReward
    sampling: Sampling
    chat: ChatFormat
    micro_batch_size: int
    seed: int
    """All random draws are derived from it and from their purpose."""
    eval_samples: int | None = None
    """Completions per prompt in evaluations; None: see `perl.rl.evaluate`."""

    @property
    def processes(self) -> Processes:
        """The processes that run together."""
        return self.roles.engine.processes

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype."""
        dtype: torch.dtype = self.roles.models()[0].dtype
        return dtype

    def generator(self, purpose: str, number: int = 0) -> torch.Generator:
        """Return a random generator for one purpose, always with the same seed."""
        return torch.Generator(self.roles.device).manual_seed(derived_seed(self.seed, purpose, number))

    def draw(
        self,
        role: Role,
        prompts: EncodedPrompts,
        generator: torch.Generator,
        share: Share | None = None,
        head: Role | None = None,
    ) -> Samples:
        """Sample one completion per prompt; the head of role `head` reads values from the same hidden states."""
        self.roles.eval()
        samples = self.sampler.draw(role, prompts.ids, self.sampling, generator, share, self._read(head))
        return replace(samples, groups=prompts.groups)

    def _read(self, head: Role | None) -> Read | None:
        if head is None:
            return None
        linear = self.roles.head(head)
        return lambda hidden_BD: linear(hidden_BD.float())

    def begin(self, role: Role, prompts: EncodedPrompts, generator: torch.Generator) -> None:
        """Let a sampler that works ahead start on the prompts of the next call of `collect`."""
        rows = self.processes.shard(len(prompts))
        ids = prompts.take(rows).ids
        self.sampler.begin(role, ids, self.sampling, generator, Share(rows, len(prompts)))

    def collect(
        self,
        role: Role,
        prompts: EncodedPrompts,
        generator: torch.Generator,
        *,
        critic: Role | None = None,
        phase: Phases = _unmeasured,
    ) -> Rollout:
        """Complete this process's share of the prompts, score the completions, and read them with the other roles.

        Args:
            role: the role that completes them.
            prompts: the prompts of all processes.
            critic: the role that predicts values; without weights of its own it is a head on the trunk of `role`.
        """
        rows, temperature = self.processes.shard(len(prompts)), self.sampling.temperature
        local = prompts.take(rows)
        shared = critic if critic is not None and not self.roles.weights(critic) else None
        with phase("generate"):
            samples = self.draw(role, local, generator, Share(rows, len(prompts)), shared)
            texts = self._texts(local, samples)
        with phase("score"):
            samples = self._with_lower_hidden(samples)
            scores = self.reward(local.prompts, samples, texts)
            reference_BT, _ = self.read(self.roles.reference, samples, temperature)
            policy_BT: Tensor | None = samples.sampler_log_probs_BT
            values_BT = samples.read_BT
            if not self.sampler.exact or (shared is not None and values_BT is None):
                policy_BT, values_BT = self.read(role, samples, temperature, shared)
            if critic is not None and shared is None:
                _, values_BT = self.read(critic, samples, None, critic)
        assert reference_BT is not None
        assert policy_BT is not None
        known = vars(samples) | {"read_BT": None}
        return Rollout(
            **known,
            prompts=local.prompts,
            texts=texts,
            rewards_B=scores.total_B,
            reward_parts=scores.parts,
            policy_log_probs_BT=policy_BT,
            reference_log_probs_BT=reference_BT,
            values_BT=values_BT,
        )

    def _texts(self, prompts: EncodedPrompts, samples: Samples) -> list[str]:
        """Return the completions as text; completions of plain text keep their whitespace."""
        rows = zip(prompts.prompts, prompts.ids, samples.completions(), strict=True)
        return [
            self.chat.decode(ids, before if prompt.context[-1].speaker == "text" else ())
            for prompt, before, ids in rows
        ]

    def _with_lower_hidden(self, samples: Samples) -> Samples:
        """Add the shared blocks' hidden states of the rows, if the sampler has not returned them."""
        if samples.lower_hidden_BLD is not None or not self.roles.shared_blocks:
            return samples
        size = self.micro_batch_size
        batches = (slice(start, start + size) for start in range(0, len(samples.ids_BL), size))
        parts = [self.roles.lower_hidden(samples.ids_BL[rows], samples.mask_BL[rows]) for rows in batches]
        return replace(samples, lower_hidden_BLD=torch.cat(parts))

    def read(
        self, role: Role, samples: Samples, temperature: float | None, head: Role | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `read_completions`."""
        return read_completions(
            self.roles, role, samples, self.micro_batch_size, temperature=temperature, head=head
        )

    def log_probs(self, role: Role, samples: Samples, temperature: float | None = None) -> Tensor:
        """Return a role's log-probs (B, T) from a forward pass; at the sampling temperature if None is given."""
        log_probs_BT, _ = self.read(role, samples, temperature or self.sampling.temperature)
        assert log_probs_BT is not None
        return log_probs_BT


@torch.no_grad()
def read_completions(
    roles: Roles,
    role: Role,
    samples: Samples,
    micro_batch_size: int,
    *,
    temperature: float | None,
    head: Role | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Return teacher-forced log-probs and values (B, T) of the completions under one role, without gradients.

    Args:
        temperature: temperature of the log-probs; None: no log-probs are computed.
        head: the role whose head reads values; None: no values are computed.
    """
    log_probs_BT = torch.zeros_like(samples.sampler_log_probs_BT) if temperature is not None else None
    values_BT = torch.zeros_like(samples.sampler_log_probs_BT) if head is not None else None
    for rows in micro_batches(samples, micro_batch_size):
        batch = trim(samples, rows)
        length = batch.completion_length
        outputs = roles(
            role,
            batch.ids_BL,
            batch.mask_BL,
            completion_length=length,
            temperature=temperature,
            head=head,
            lower_hidden_BLD=batch.lower_hidden_BLD,
            prompts=batch.shared_prompts,
            lengths=batch.completion_lengths,
        )
        rows_B = to_device(rows, samples.ids_BL.device)
        if log_probs_BT is not None:
            log_probs_BT[rows_B, :length] = outputs.log_probs_BT
        if values_BT is not None:
            values_BT[rows_B, :length] = outputs.values_BT.masked_fill(~batch.completion_mask_BT, 0.0)
    return log_probs_BT, values_BT
