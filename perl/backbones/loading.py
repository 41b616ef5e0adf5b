"""Loading a base from a hub id, a folder (safetensors only) or just a configuration."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from perl.backbones import backbone_of
from perl.backbones.backbone import Backbone, has_own_code
from perl.backbones.base import Base, weights_sha256
from perl.backbones.decoder import REMEDY
from perl.backbones.four_bit import four_bit_config, keep_layout, weights_of
from perl.backbones.hub import only_in_cache, why_not_asked
from perl.errors import LOADING, UserError, machine_fault
from perl.system.progress import console

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""Files of pickled weights, which can run arbitrary code when loaded, and are never loaded."""


def load_base(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    four_bit: bool = False,
    random_seed: int | None = None,
    trust_remote_code: bool = False,
    generates: bool = True,
) -> tuple[Base, PreTrainedModel]:
    """Load a model and its tokenizer from the hub or a folder.

    Args:
        random_seed: if given, only the configuration is read, and the weights are random.
        trust_remote_code: whether Python code that comes with the model may run.
        generates: whether the model must be able to generate completions.

    Raises:
        UserError: the model does not exist or is not supported, weights are missing or pickled, there is no
            tokenizer or it has more tokens than the model has embeddings, or the model's own code is not trusted.
        MachineError: there is not enough memory, or no permission to read the files.
    """
    where = f"base.model {model}"

    def load() -> PreTrainedModel:
        backbone = backbone_of(load_config(model, trust_remote_code, generates))
        if random_seed is None:
            return _load_weights(backbone, model, dtype, device, four_bit)
        try:
            return _random_weights(backbone, dtype, device, random_seed)
        except Exception as error:  # as in `random_base`
            raise _refusal(error, f"not {backbone.kind}", where) from None

    lm = load()
    return _base(model, where, lm, load_tokenizer(model, trust_remote_code), load), lm


def random_base(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Base, PreTrainedModel]:
    """Create a base with random weights from a configuration, with a tokenizer of its vocabulary's size.

    Raises:
        UserError: the configuration is not that of a generating model.
    """
    where = "base.config"

    def load() -> PreTrainedModel:
        backbone = backbone_of(without_own_code(AutoConfig.for_model(**config)))
        backbone.require("generation", where)
        backbone.prepare(where)
        return _random_weights(backbone, dtype, device, seed)

    try:
        lm = load()
    except UserError:
        raise
    except Exception as error:  # an invalid configuration can fail anywhere in the model's own code
        remedy = "Set model_type (such as llama) and that model's own keys."
        raise _refusal(error, "not the configuration of a causal LM", where, remedy) from None
    name, size = f"random {config.get('model_type')}", lm.get_input_embeddings().weight.shape[0]
    return _base(name, f"base.model {name}", lm, numbered_tokens(size), load), lm


def _random_weights(backbone: Backbone, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        return backbone.new_model(dtype)


def _base(
    name: str,
    where: str,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    load: Callable[[], PreTrainedModel],
) -> Base:
    embeddings = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        what = f"the tokenizer has {len(tokenizer)} tokens, the model only {embeddings} embeddings"
        raise UserError(what, where=where, remedy="Use the tokenizer that belongs to this model.")
    backbone = backbone_of(lm.config)
    backbone.check(lm, where)
    return Base(
        name=name,
        tokenizer=tokenizer,
        chat=backbone.chat_format(lm, tokenizer),
        sha256=weights_sha256(lm),
        parameters=sum(weights_of(parameter) for parameter in lm.parameters()),
        context_length=backbone.context_length(lm),
        load=load,
    )


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model."""
    where, remedy = f"base.model {model}", "Put tokenizer.json and tokenizer_config.json next to the weights."
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raise many kinds of exceptions for a missing or broken file
        raise _refusal(error, "no usable tokenizer", where, remedy) from None
    if not tokenizer("hello", add_special_tokens=False)["input_ids"]:  # silently created without files
        raise UserError("no usable tokenizer: it has no tokens for text", where=where, remedy=remedy)
    return tokenizer


def has_chat_format(model: str) -> bool:
    """Return whether a model has a chat template; False if it cannot be read, which loading reports later."""
    try:
        return load_tokenizer(model).chat_template is not None
    except UserError:
        return False


def load_config(model: str, trust_remote_code: bool = False, generates: bool = True) -> Any:
    """Load a model's configuration, with its own code only if trusted, which is announced to the user.

    Args:
        generates: whether the model must be able to generate completions.
    """
    where = f"base.model {model}"
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        remedy = f"{REMEDY} A relative path is looked up next to the recipe, then in the working directory."
        raise UserError("no such folder", where=where, remedy=remedy)
    if trust_remote_code:
        warning = f"Python code that comes with {model} may run now: the recipe sets base.trust_remote_code: true."
        console.print(warning, style="yellow", markup=False)
    not_asked = "" if Path(model).is_dir() else why_not_asked()
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken configuration raises many kinds of exceptions
        if not_asked and only_in_cache(error):
            what = "no such model: no such folder, none in the cache, and the hub was not queried, because"
            remedy = f"Check the name, and the network (set HTTPS_PROXY for a proxy). {REMEDY}"
            raise UserError(f"{what} {not_asked}", where=where, remedy=remedy) from None
        raise _refusal(error, "not a model", where) from None
    if not trust_remote_code:
        config = without_own_code(config)
    backbone = backbone_of(config)
    if generates:
        backbone.require("generation", where)
    backbone.prepare(where)
    return config


def without_own_code(config: Any) -> Any:
    """Remove the references to Python code that comes with the model from a configuration."""
    vars(config).pop("auto_map", None)
    return config


def _load_weights(
    backbone: Backbone, model: str, dtype: torch.dtype, device: torch.device, four_bit: bool
) -> PreTrainedModel:
    where, config = f"base.model {model}", backbone.config
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # refused below, with their names
    if four_bit:
        backbone.require("4bit", "base.quantization")
        options |= {"quantization_config": four_bit_config(dtype), "device_map": str(device)}
    if not any(Path(model).glob("*.safetensors")):
        for pickle in sorted(file.name for pattern in PICKLES for file in Path(model).glob(pattern)):
            raise _pickled(pickle, where)
    try:
        with _no_pickles(where), torch.random.fork_rng():
            torch.manual_seed(0)  # a classifier's head may be new
            lm, info = backbone.auto_class.from_pretrained(
                model, config=config, trust_remote_code=has_own_code(config), **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, SafetensorError) as error:
        raise _refusal(error, "cannot be loaded", where) from None
    assert isinstance(lm, PreTrainedModel)
    made = {name for name, _ in lm.named_parameters() if backbone.in_head(lm, name)}
    missing = sorted(set(info["missing_keys"]) - made)
    if missing:
        what = f"{len(missing)} weights are not in its files, including {missing[0]}"
        raise UserError(what, where=where, remedy="Complete the files: missing weights would be random.")
    for name, saved, expected in sorted(one for one in info["mismatched_keys"] if one[0] not in made):
        shapes = f"{name} is {tuple(saved)} in the files, but should be {tuple(expected)}"
        remedy = "Use the config.json that they were saved with."
        raise UserError(f"the weights are not those of its config.json: {shapes}", where=where, remedy=remedy)
    keep_layout(lm)
    try:
        return lm if four_bit else lm.to(device)
    except RuntimeError as error:
        raise _refusal(error, "cannot be moved to the device", where) from None


@contextlib.contextmanager
def _no_pickles(where: str) -> Iterator[None]:
    """Prevent unpickling inside the context: an index or a configuration may name pickles next to safetensors."""

    def refuse(file: Any, *_: Any, **__: Any) -> NoReturn:
        raise _pickled(str(file), where)

    with mock.patch.object(torch, "load", refuse):
        yield


def _pickled(file: str, where: str) -> UserError:
    return UserError(
        f"cannot be loaded: its weights are a pickle ({Path(file).name}), which can run any code when loaded",
        where=where,
        remedy="If you trust their origin, convert them once: AutoModelForCausalLM.from_pretrained(FOLDER)"
        ".save_pretrained(FOLDER) in transformers writes model.safetensors.",
    )


def numbered_tokens(size: int) -> PreTrainedTokenizerFast:
    """Create a tokenizer for random weights: bytes, then numbered tokens up to `size`."""
    names = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names = [*names, *(f"<{index}>" for index in range(len(names), size))][:size]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def _refusal(error: Exception, what: str, where: str, remedy: str = REMEDY) -> UserError:
    """Return the error for a library's exception: a machine fault, untrusted code, or otherwise `what`."""
    if fault := machine_fault(error, LOADING):
        return fault
    if "trust_remote_code" in str(error):
        remedy = "Read that code; if you trust it, set base.trust_remote_code: true, otherwise use another base."
        return UserError("it comes with Python code of its own, which is not run", where=where, remedy=remedy)
    first, _, rest = str(error).strip().partition("\n")
    second = rest.strip().partition("\n")[0] if first.endswith(":") else ""  # the first line only introduces it
    return UserError(f"{what}: {f'{first} {second}'.strip()[:300]}", where=where, remedy=remedy)
