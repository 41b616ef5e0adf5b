"""The recipe: one YAML file that says what a run does, checked before anything is loaded.

Only the stages and the command line read a recipe; all that lies below takes plain values.
"""

import difflib
import hashlib
import json
import os
import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from perl.errors import UserError
from perl.system import plain_yaml

Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
LrSchedulerType = Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
"""How the learning rate goes over a stage, by transformers' names: those that need no further arguments and are
not another one without them. All but `constant` warm up."""
ORIGINS = {"model": ("trust_remote_code",), "build": (), "config": ("random_init",)}
"""Keys of `base` that say where it comes from, one of which a recipe has, and those that only go with them."""


class Section(BaseModel):
    """A part of a recipe: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Build(Section):
    """A tiny base, trained by the recipe itself on the source's dialogues, and cached."""

    hidden_size: Positive = 128
    layers: Positive = 3
    heads: Positive = 4
    vocabulary: Positive = 512
    """Size of the byte-level BPE vocabulary, trained on the same dialogues."""
    max_length: Positive = 512
    """Context length, in tokens."""
    steps: Positive = 1500
    batch_tokens: Positive = 1536
    learning_rate: Rate = 3e-3
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of the base alone: like a pretrained model, it stays the same when the run's seed changes."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "Build":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} is not an even multiple of heads {self.heads}: "
                f"choose a multiple of {2 * self.heads}"
            )
        return self


class Base(Section):
    """The frozen base that all roles share."""

    model: str | None = None
    """A hub id or a folder with a causal language model."""
    build: Build | None = None
    config: dict[str, JsonValue] | None = None
    """A transformers configuration with its `model_type`; needs `random_init: true`."""
    random_init: bool = False
    """Take only the configuration and draw the weights at random: for measuring, not for use."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantization: Literal["none", "4bit"] = "none"
    trust_remote_code: bool = False
    """Let Python code run that comes with the model, where transformers has none for it. Read that code first."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Base":
        if sum(origin is not None for origin in (self.model, self.build, self.config)) != 1:
            raise ValueError("a base is exactly one of model, build and config: give one of them alone")
        if self.config is not None and not self.random_init:
            raise ValueError("config has no weights: add random_init: true, or give model instead")
        if self.trust_remote_code and self.model is None:
            raise ValueError("trust_remote_code is about a model's own code: give model, or leave it out")
        return self


class Lora(Section):
    """The adapters: the same shape for every role."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an adapter's inputs that are zeroed in the training passes of SFT and of the reward model. Never in
    RL: there the policy that learns has to be the one that sampled. The base's own dropout is off everywhere."""
    targets: Literal["attention", "all-linear"] | list[str] = "all-linear"
    """Modules that get an adapter: attention projections (the paper), all linear layers and experts, or names. The
    share of the blocks' weights that is covered is said at the start and in the report."""
    layers: Literal["all", "top-half"] | list[Annotated[int, Field(ge=0)]] = "all"


class Data(Section):
    """Where the records come from."""

    source: str = "coffee-simulator"
    path: str | None = None
    """A folder or file that the source reads instead of its own."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the dialogues kept for evaluation; not read where a source was published with a test part."""


class Supervised(Section):
    """What SFT and reward training have in common."""

    epochs: Positive = 1
    batch_size: Positive = 16
    learning_rate: Rate = 1e-3
    lr_scheduler_type: LrSchedulerType = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the learning rate rises from 0, rounded down; `constant` has none."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """As in AdamW: this share of the learning rate is taken off every weight at each step."""
    max_length: Positive = 512
    """Longest sequence, in tokens; older context is cut off first."""


class Sft(Supervised):
    """Supervised fine-tuning on demonstrations."""


class Reward(Supervised):
    """The reward model."""

    loss: Literal["thumbs", "pairs", "both"] = "thumbs"
    """Learn from ratings, from comparisons, or from both in one training. Comparisons may be made from ratings."""
    epochs: Positive = 2


class RewardFrom(Section):
    """Where the RL reward comes from; empty means the reward stage's model."""

    function: str | None = None
    """FILE.py:NAME, called as TRL calls reward functions."""


ALGORITHM_DEFAULTS: dict[str, dict[str, int]] = {
    "ppo": {"epochs": 2},
    "rloo": {"epochs": 2, "samples_per_prompt": 4},
}
"""Where an algorithm's best setting is another than that of the key: measured in docs/experiments.md."""


class Rl(Section):
    """Reinforcement learning against the reward."""

    algorithm: Literal["reinforce", "ppo", "rloo"] = "ppo"
    """A row of the table in perl/rl/algorithms.py. The default learned every kind of reward that was tried, rare
    ones too, from as few completions as any (docs/experiments.md)."""
    critic: Literal["shared", "adapter", "none"] | None = None
    """A head on the policy's trunk, an adapter (or under full tuning a model) of its own, or none. Unset: none
    for rloo; else shared under LoRA, adapter under full tuning."""
    reward: RewardFrom = RewardFrom()
    steps: Positive = 100
    prompts_per_step: Positive = 16
    samples_per_prompt: Positive = 1
    """Completions of each prompt. Unset: 4 for rloo, which compares them."""
    epochs: Positive = 1
    """Updates from each rollout. Unset: 2 for ppo and rloo; reinforce is on-policy and takes 1."""
    micro_batch_size: Positive = 4
    max_prompt_length: Positive | None = None
    """Cut older context off so that prompts have at most so many tokens; unset, a longer prompt is refused."""
    max_new_tokens: Positive = 64
    temperature: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    """Outside these bounds logits over it, and the log-probs of what is sampled, cannot be reckoned with."""
    learning_rate: Rate | Literal["auto"] = "auto"
    """auto: by the width of the base, the tuning and the epochs, see perl/rl/schedule.py."""
    head_learning_rate: Rate | Literal["auto"] = "auto"
    """Of the critic's head. auto: by the width and the size of the base's hidden states."""
    lr_scheduler_type: LrSchedulerType = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps in which the learning rate rises to its full value."""
    kl_coef: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """β of the objective (1-β) r - β KL(π‖reference), where r is the normalised reward."""
    normalize_rewards: bool = True
    """Train on (reward - mean) / std, over all rewards of the run so far: rewards of any scale work, and what is
    reported stays raw. false: train on the rewards as they are."""
    missing_end_penalty: NonNegative | None = None
    """Taken off the reward of a completion that was cut before its end, in standard deviations of the reward.
    Unset: half of one for turns of a chat, none for plain text."""
    gae_lambda: Annotated[float, Field(ge=0, le=1)] = 1.0
    """λ of GAE, for ppo: 1 takes the whole return, less leans on the critic."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far ppo and rloo let the ratio of new to old probability move from 1 in one step."""
    value_clip: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 0.2
    """How far ppo lets a value move in one step, in standard deviations of the reward; null: any distance."""
    value_coef: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the critic's gradient that reaches a trunk shared with the policy; 0: its head alone learns."""
    eval_prompts: Positive = 128
    """Held-out prompts on which the policy is judged before and after."""
    guard: Literal["stop", "warn", "off"] = "stop"
    """When training goes wrong (perl/rl/checks/guards.py): stop at the last good step, warn, or never look."""
    kl_limit: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 50.0
    """Nats an answer that the policy may be away from its reference."""

    @field_validator("guard", mode="before")
    @classmethod
    def _off_is_no_boolean(cls, value: Any) -> Any:
        return "off" if value is False else value  # in YAML 1.1 a bare off is false

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_algorithm(cls, given: Any) -> Any:
        name = given.get("algorithm", "ppo") if isinstance(given, dict) else None
        return ALGORITHM_DEFAULTS.get(name, {}) | given if isinstance(name, str) else given

    @model_validator(mode="after")
    def _fits_together(self) -> "Rl":
        if self.algorithm == "rloo" and self.samples_per_prompt < 2:
            raise ValueError("rloo compares answers to one prompt: set samples_per_prompt to at least 2")
        if self.algorithm == "rloo" and self.critic not in (None, "none"):
            raise ValueError(f"rloo has no critic, so critic {self.critic!r} would never be used: leave it out")
        if self.algorithm != "rloo" and self.critic == "none":
            raise ValueError(f"{self.algorithm} needs a critic: set critic to shared or adapter")
        if self.algorithm == "reinforce" and self.epochs > 1:
            raise ValueError("reinforce is on-policy: set epochs to 1, or algorithm to ppo")
        if self.prompts_per_step * self.samples_per_prompt < 2:  # whitened, or against its own mean, it is zero
            raise ValueError("one completion a step has none to compare it with: raise prompts_per_step")
        return self


StageName = Literal["sft", "reward", "rl"]
STAGES: tuple[StageName, ...] = ("sft", "reward", "rl")


class Recipe(Section):
    """A complete run. A stage runs if its section is there."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    tuning: Literal["lora", "full"] = "lora"
    """Adapters on one shared base; or a whole model for each role, trained whole: the conventional way."""
    checkpoint_activations: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, more time."""
    checkpoint_every: Positive = 20
    """Steps of a stage from one checkpoint to the next; a run that was interrupted goes on from the newest."""
    base: Base
    lora: Lora = Lora()
    data: Data = Data()
    sft: Sft | None = None
    reward: Reward | None = None
    rl: Rl | None = None

    @model_validator(mode="after")
    def _runs_something(self) -> "Recipe":
        if not self.stages:
            raise ValueError("no stage to run: add a section sft, reward or rl")
        if self.rl and not self.rl.reward.function and not self.reward:
            raise ValueError("rl has no reward: add a section reward, or rl.reward.function: FILE.py:NAME")
        if self.tuning == "full" and self.base.quantization != "none":
            raise ValueError(
                "full tuning cannot train 4-bit weights: set base.quantization: none, or tuning: lora"
            )
        return self

    @property
    def critic(self) -> Literal["shared", "adapter", "none"]:
        """The critic in use, the default resolved."""
        assert self.rl is not None
        if self.rl.critic is not None:
            return self.rl.critic
        if self.rl.algorithm == "rloo":
            return "none"
        return "shared" if self.tuning == "lora" else "adapter"

    @property
    def stages(self) -> tuple[StageName, ...]:
        """The stages to run, in order."""
        return tuple(stage for stage in STAGES if getattr(self, stage) is not None)

    @property
    def sha256(self) -> str:
        """Of all that it says beyond the defaults: a key that a later version adds does not change it."""
        said = self.model_dump(mode="json", exclude_defaults=True)
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as resolved, defaults included: reading it again gives an equal recipe."""
        text: str = yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)
        return text


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe, apply `KEY=VALUE` overrides, resolve its paths and check it.

    A relative path is looked up beside the recipe first, then in the working folder.

    Raises:
        UserError: unreadable file, broken YAML, unknown key, impossible value.
    """
    path = Path(path)
    content = plain_yaml.read_mapping(path)
    for override in overrides or []:
        _apply_override(content, override)
    _replace_origin(content, overrides or [])
    _resolve_paths(content, path.parent)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise _explain(error, path) from None


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not KEY=VALUE", remedy="For example rl.algorithm=ppo.")
    try:
        value = plain_yaml.parse(text)
    except ValueError as error:
        what = f"value {reprlib.repr(text)} is not valid YAML: {error}"
        raise UserError(what, where=key, remedy="Quote it as YAML would.") from None
    *parents, last = key.split(".")
    if parents and parents[0] in STAGES and content.get(parents[0]) is None:
        remedy = f"Add `{parents[0]}: {{}}` to the recipe first."
        raise UserError(f"the recipe has no section {parents[0]}", where=override, remedy=remedy)
    for parent in parents:
        content = content.setdefault(parent, {})
        if not isinstance(content, dict):
            raise UserError(f"{parent} is a value, not a section", where=override, remedy="Check the key.")
    content[last] = value


def _replace_origin(content: dict[str, Any], overrides: list[str]) -> None:
    """Where overrides name an origin of the base, take the recipe's other one out, with what only goes with it."""
    said = [override.partition("=")[0].split(".") for override in overrides]
    keys = {key[1] for key in said if key[0] == "base" and len(key) > 1}
    named, base = keys & ORIGINS.keys(), content.get("base")
    if not named or not isinstance(base, dict):
        return
    for origin in (ORIGINS.keys() - named) & {key for key, value in base.items() if value is not None}:
        for key in (origin, *ORIGINS[origin]):
            if key not in keys:
                base.pop(key, None)


def _resolve_paths(content: dict[str, Any], folder: Path) -> None:
    """Make the paths in a recipe absolute where they exist; the loaders name what is missing."""

    def resolve(section: Any, key: str) -> None:
        text = section.get(key) if isinstance(section, dict) else None
        if not isinstance(text, str) or "\0" in text:
            return
        file, colon, name = text.partition(".py:")
        file += ".py" if colon else ""
        try:
            given = Path(os.path.expanduser(file))  # Path's own raises for the home of nobody
            for candidate in (folder / given, given):
                if candidate.exists():
                    section[key] = str(candidate.resolve()) + (f":{name}" if colon else "")
                    return
        except OSError:  # a name too long to be a path
            return

    resolve(content.get("base"), "model")
    resolve(content.get("data"), "path")
    rl = content.get("rl")
    resolve(rl.get("reward") if isinstance(rl, dict) else None, "function")


def _explain(error: ValidationError, path: Path) -> UserError:
    """The first complaint of pydantic in the recipe's own words, with the nearest valid key."""
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(part for part in location if part.isidentifier() or part.isdigit())
    where = f"{path}: {key}" if key else str(path)
    if first["type"] == "extra_forbidden":
        valid = list(_on_the_way(location)[0].model_fields)
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        remedy = (
            f"Did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"Valid keys: {', '.join(valid)}."
        )
        return UserError("unknown key", where=where, remedy=remedy)
    if first["type"] == "missing":
        return UserError(
            "missing", where=where, remedy="Add this key; recipes/quickstart.yaml shows a complete recipe."
        )
    message = first["msg"].removeprefix("Value error, ")
    what = f"{message[0].lower()}{message[1:]}"
    if first["type"] == "value_error":  # of several keys together, by a validator above: what is wrong, what to do
        what, _, remedy = what.partition(": ")
        return UserError(what, where=where, remedy=f"{remedy[0].upper()}{remedy[1:]}.")
    return UserError(
        f"{what} (the value is {reprlib.repr(first['input'])})", where=where, remedy=_remedy(first, location)
    )


def _remedy(complaint: Any, location: list[str]) -> str:
    """What to write in place of an impossible value: the word that was meant, or what the key is by default."""
    if complaint["type"] == "literal_error":
        valid = re.findall(r"'([^']*)'", complaint["ctx"]["expected"])
        near = difflib.get_close_matches(str(complaint["input"]), valid, n=1, cutoff=0.7)
        if near:
            return f"Did you mean {near[0]}?"
    _, field = _on_the_way(location)
    if field is None or field.is_required() or field.default is None or isinstance(field.default, Section):
        return "recipes/quickstart.yaml shows a complete recipe."
    return f"The default is {field.default}."


def _on_the_way(location: list[str]) -> tuple[type[Section], FieldInfo | None]:
    """The innermost section and the last key that pydantic's location of a complaint leads through."""
    section: type[Section] = Recipe
    field: FieldInfo | None = None
    for part in location:
        if part not in section.model_fields:
            break
        field = section.model_fields[part]
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = [option for option in options if isinstance(option, type) and issubclass(option, Section)]
        if not inner:
            break
        section = inner[0]
    return section, field
