"""The section `rl.sampler`: what samples completions."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from perl.recipe.section import Positive, Section, addresses, registered
from perl.rl.samplers import SAMPLERS, SamplerSettings


class SamplerFrom(Section):
    """What samples completions."""

    kind: Annotated[str, registered(SAMPLERS)] = "local"
    """A name in perl/rl/samplers/__init__.py, to which a plugin may add. Unset: server if there is a `url`."""
    url: str | list[str] | None = None
    """Address of a vLLM server, or of several that serve the same. `perl-rlhf sampler RECIPE` prints how to start
    one; see also docs/serving.md. VLLM_API_KEY is sent if the environment has it."""
    adapter_dir: str | None = None
    """Folder that only this run uses to pass adapters to servers, which must see it under the same path."""
    time_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Seconds that a server may take for one completion."""
    patience: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600.0
    """Seconds to wait for a server that does not answer; its completions are then sampled again."""
    in_flight: Positive = 256
    """Concurrent requests to servers, over all processes."""
    staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: a server samples the next step's completions during this step's update, with the policy from before
    it."""
    mismatch_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Largest mean difference allowed between a server's log-probs and the policy's, in nats per token; beyond it
    the run ends. Unset: 0.001 in float32, 0.01 in float16, 0.04 in bfloat16."""

    @property
    def settings(self) -> SamplerSettings:
        """Settings of the sampler."""
        named = self.model_dump(exclude={"kind", "url", "adapter_dir"})
        return SamplerSettings(addresses(self.url), self.adapter_dir or "", **named)

    @model_validator(mode="before")
    @classmethod
    def _a_url_is_a_server(cls, given: Any) -> Any:
        return {"kind": "server", **given} if isinstance(given, dict) and given.get("url") is not None else given

    @model_validator(mode="after")
    def _servers_are_whole(self) -> "SamplerFrom":
        if self.kind == "server" and not (self.settings.urls and self.adapter_dir):
            raise ValueError(
                "a server needs a url and an adapter_dir: set url, such as to http://127.0.0.1:8000, and "
                "adapter_dir to a folder that the server sees too"
            )
        if self.staleness and self.kind != "server":
            raise ValueError("only a server samples while the policy is trained: set url, or staleness to 0")
        if self.kind == "local" and (self.adapter_dir or self.url):
            raise ValueError("url and adapter_dir are for servers: set kind to server, or leave them out")
        return self
