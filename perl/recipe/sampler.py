"""The section `rl.sampler`: what draws completions."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from perl.recipe.section import Positive, Section, addresses, registered
from perl.rl.samplers import SAMPLERS, SamplerSettings


class SamplerFrom(Section):
    """What draws completions."""

    kind: Annotated[str, registered(SAMPLERS)] = "local"
    """A name in perl/rl/samplers/__init__.py, to which a plugin may add. Unset: server if there is a `url`, else
    local."""
    url: str | list[str] | None = None
    """Address of a vLLM server, or of several that serve the same: `perl-rlhf sampler RECIPE` prints how to start
    one; see docs/serving.md. VLLM_API_KEY is sent if it is set in the environment."""
    adapter_dir: str | None = None
    """Folder used by this run only, through which servers get adapters; they must see it under the same path."""
    time_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """Seconds that a server may take for one completion."""
    patience: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 600.0
    """Seconds to wait for a server that does not answer; its requests are then sent again."""
    in_flight: Positive = 256
    """Concurrent requests to servers, of all processes together."""
    staleness: Annotated[int, Field(ge=0, le=1)] = 0
    """1: servers sample the next step's completions during this step's update, with the policy before that
    update."""
    mismatch_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """The run ends if the mean difference between a server's log-probs and the policy's exceeds this, in nats per
    token. Unset: 0.001 in float32, 0.01 in float16, 0.04 in bfloat16."""

    @property
    def settings(self) -> SamplerSettings:
        """For the sampler."""
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
                "adapter_dir, a folder that it sees too"
            )
        if self.staleness and self.kind != "server":
            raise ValueError("only a server draws while the policy learns: set url, or staleness to 0")
        if self.kind == "local" and (self.adapter_dir or self.url):
            raise ValueError("url and adapter_dir are of a server: set kind to server, or leave them out")
        return self
