"""Sampling by transformers' own `generate`, as a plugin: `rl: {sampler: {kind: generate}}`."""

import torch
import torch.nn.functional as F

from perl.backbones.padding import left_pad
from perl.rl.samplers import SAMPLERS
from perl.rl.samplers.base import Sampler, Samples


class Generate(Sampler):
    """Draws with the roles in memory; the log-probs are those of a forward pass, so they are the policy's own."""

    exact = True

    def sync(self, role) -> None:
        """Nothing to do: the weights are the roles' own."""

    @torch.no_grad()
    def draw(self, role, prompts, sampling, generator, share=None, read=None) -> Samples:
        """See `Sampler`; values, which `read` asks for, are left to a forward pass."""
        ids_BP, mask_BP = left_pad(prompts, sampling.pad_id, self.roles.device)
        settings = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        stop = {"eos_token_id": list(sampling.end_ids) or None, "pad_token_id": sampling.pad_id}
        length = sampling.max_new_tokens
        with torch.random.fork_rng(), self.roles.role(role):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            ids_BL = self.roles.model().generate(
                ids_BP, attention_mask=mask_BP.long(), max_new_tokens=length, **settings, **stop
            )
        ids_BL = F.pad(ids_BL, (0, ids_BP.shape[1] + length - ids_BL.shape[1]), value=sampling.pad_id)
        ends_BT = torch.isin(ids_BL[:, -length:], torch.tensor(sampling.end_ids))
        lengths_B = ((ends_BT.cumsum(1) == 0).sum(1) + 1).clamp(max=length)
        mask_BL = torch.cat([mask_BP, torch.arange(length) < lengths_B[:, None]], 1)
        drawn = self.roles(role, ids_BL, mask_BL, completion_length=length, temperature=sampling.temperature)
        lengths = [len(prompt) for prompt in prompts], lengths_B.tolist()
        return Samples(ids_BL, mask_BL, *lengths, ends_BT.any(1), drawn.log_probs_BT)


SAMPLERS["generate"] = Generate
