"""The frozen base: loaded once, from a hub id, a folder or a bare configuration, and told apart by its hash."""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from perl.backbones.chat import ChatFormat
from perl.backbones.encoder import WRITES, EncoderFormat, in_head, is_encoder, position_room
from perl.backbones.ends import configured_ends
from perl.backbones.four_bit import four_bit_config, keep_layout, scales, weights_of
from perl.backbones.hub import only_in_cache, why_not_asked
from perl.errors import UserError, machine_fault
from perl.system.progress import console

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
"""What files of pickled weights are called. They run code when they are read, so they never are."""
REMEDY = "Give a hub id such as Qwen/Qwen2.5-0.5B, or a folder with config.json and model.safetensors."


@dataclass(frozen=True)
class Base:
    """What is known of the base besides its weights, and how it writes dialogues."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    chat: ChatFormat
    sha256: str
    """Of the weights as loaded; see `weights_sha256`."""
    parameters: int
    context_length: int
    """The longest sequence the base takes, in tokens."""
    load: Callable[[], PreTrainedModel]
    """Loads (or draws) the same weights once more."""


def load_base(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    four_bit: bool = False,
    random_seed: int | None = None,
    trust_remote_code: bool = False,
    encoders: bool = False,
) -> tuple[Base, PreTrainedModel]:
    """Load a causal LM and its tokenizer from the hub or a folder; safetensors only.

    Where `encoders` will do too, of one its sequence classifier is loaded, whose head is new.

    With a `random_seed` only the configuration is read, and the weights are drawn at random.
    With `trust_remote_code` Python code that comes with the model may run.

    Raises:
        UserError: no such model, not one that will do, weights missing or pickled, no tokenizer, a tokenizer with
            more tokens than the model has embeddings, or code of its own that is not trusted.
        MachineError: no memory for it, or no permission to read it.
    """
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():
        raise UserError("no such folder", where=f"base.model {model}", remedy=REMEDY)

    def load() -> PreTrainedModel:
        if random_seed is None:
            return _load_weights(model, dtype, device, four_bit, trust_remote_code, encoders)
        config = load_config(model, trust_remote_code, encoders)
        try:
            return _random_weights(config, dtype, device, random_seed)
        except Exception as error:  # as in `random_base`
            raise _refusal(error, "not a causal LM", f"base.model {model}") from None

    lm = load()
    return _base(model, lm, load_tokenizer(model, trust_remote_code), load), lm


def random_base(
    config: dict[str, Any], dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Base, PreTrainedModel]:
    """A base of random weights from a configuration alone, with a tokenizer of its vocabulary's size.

    Raises:
        UserError: the configuration is not one of a causal LM.
    """

    def load() -> PreTrainedModel:
        made = without_own_code(AutoConfig.for_model(**config))
        if is_encoder(made):
            raise _no_writer(str(config.get("model_type")), "base.config")
        return _random_weights(made, dtype, device, seed)

    try:
        lm = load()
    except UserError:
        raise
    except Exception as error:  # a configuration that makes no sense fails anywhere in the model's own code
        remedy = "Give model_type (such as llama) and that model's own keys."
        raise _refusal(error, "not the configuration of a causal LM", "base.config", remedy) from None
    name = f"random {config.get('model_type')}"
    return _base(name, lm, numbered_tokens(lm.get_input_embeddings().weight.shape[0]), load), lm


def _base(
    name: str, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, load: Callable[[], PreTrainedModel]
) -> Base:
    embeddings = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only {embeddings} embeddings",
            where=f"base.model {name}",
            remedy="Use the tokenizer that belongs to this model.",
        )
    if not is_encoder(lm.config):
        _check_causal(lm, name)
    parameters = sum(weights_of(parameter) for parameter in lm.parameters())
    chat, context_length = chat_format(lm, tokenizer)
    return Base(name, tokenizer, chat, weights_sha256(lm), parameters, context_length, load)


def chat_format(lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[ChatFormat, int]:
    """How dialogues are written for a base, and the longest sequence that it takes."""
    if is_encoder(lm.config):
        return EncoderFormat(tokenizer, position_room(lm)), position_room(lm)
    room = int(getattr(lm.config.get_text_config(), "max_position_embeddings", 2**31))
    return ChatFormat(tokenizer, configured_ends(lm, tokenizer)), room


@torch.no_grad()
def _check_causal(lm: PreTrainedModel, name: str) -> None:
    """BERT and its like pass for language models, but read what comes after a token too."""
    ids_BL = torch.tensor([[0, 1, 2], [0, 1, 3]], device=lm.get_input_embeddings().weight.device)
    logits_BLV = lm.eval()(input_ids=ids_BL).logits.float()
    if not torch.allclose(logits_BLV[0, :2], logits_BLV[1, :2], rtol=1e-2, atol=1e-2):
        raise UserError(
            f"{type(lm).__name__} is not causal: what it says of a token depends on later ones",
            where=f"base.model {name}",
            remedy="Use a causal LM; of a BERT-like one, a configuration with is_decoder: true.",
        )


def _random_weights(config: Any, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        lm = auto_class(config).from_config(config, dtype=dtype, trust_remote_code=has_own_code(config))
    assert isinstance(lm, PreTrainedModel)
    return lm


def auto_class(config: Any) -> Any:
    """The class of transformers' that makes a base of this configuration."""
    return AutoModelForSequenceClassification if is_encoder(config) else AutoModelForCausalLM


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model."""
    where, remedy = f"base.model {model}", "Put tokenizer.json and tokenizer_config.json beside the weights."
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            model, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raise all sorts of things for a missing or broken file
        raise _refusal(error, "no usable tokenizer", where, remedy) from None
    if not tokenizer("hello", add_special_tokens=False)["input_ids"]:  # made of no files, and without complaint
        raise UserError("no usable tokenizer: it has no tokens for text", where=where, remedy=remedy)
    return tokenizer


def load_config(model: str, trust_remote_code: bool = False, encoders: bool = False) -> Any:
    """The configuration of a causal LM, or of an encoder where that will do.

    It names code of its own only if that is trusted, which is said aloud.
    """
    where = f"base.model {model}"
    if trust_remote_code:
        said = f"Python code that comes with {model} may run now: the recipe says base.trust_remote_code: true."
        console.print(said, style="yellow", markup=False)
    not_asked = "" if Path(model).is_dir() else why_not_asked()
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # a broken configuration raises all sorts of things
        if not_asked and only_in_cache(error):
            raise UserError(
                f"not a model that is here: no such folder, none in the cache, and the hub was not asked, because "
                f"{not_asked}",
                where=where,
                remedy=f"Check the name, and the network (a proxy is told by HTTPS_PROXY). {REMEDY}",
            ) from None
        raise _refusal(error, "not a model", where) from None
    if not trust_remote_code:
        config = without_own_code(config)
    architectures = config.architectures or []
    if is_encoder(config):
        if not encoders:
            raise _no_writer(", ".join(architectures) or config.model_type, where)
        config.num_labels = 1
    elif any(not name.endswith(WRITES) for name in architectures):
        raise UserError(f"not a causal LM but {', '.join(architectures)}", where=where, remedy=REMEDY)
    return config


def _no_writer(what: str, where: str) -> UserError:
    return UserError(
        f"{what} is an encoder: it reads texts in both directions and cannot write any",
        where=where,
        remedy="Train only a reward model on it (a recipe with no section but reward), or give a causal LM; of a "
        "BERT-like one, a configuration with is_decoder: true.",
    )


def has_own_code(config: Any) -> bool:
    """Whether a configuration names Python code that comes with the model and is trusted: see `load_config`."""
    return hasattr(config, "auto_map")


def without_own_code(config: Any) -> Any:
    """The configuration, in which Python code that comes with the model is not named."""
    vars(config).pop("auto_map", None)
    return config


def _load_weights(
    model: str, dtype: torch.dtype, device: torch.device, four_bit: bool, trust_remote_code: bool, encoders: bool
) -> PreTrainedModel:
    where = f"base.model {model}"
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are refused below, with their names
    config = load_config(model, trust_remote_code, encoders)
    if four_bit and is_encoder(config):
        raise UserError(
            "4-bit weights are for causal LMs: an encoder's head would be rounded with the rest",
            where="base.quantization",
            remedy="Set base.quantization: none; encoders are small.",
        )
    if four_bit:
        options |= {"quantization_config": four_bit_config(dtype), "device_map": str(device)}
    if not any(Path(model).glob("*.safetensors")):
        for pickle in sorted(file.name for pattern in PICKLES for file in Path(model).glob(pattern)):
            raise _pickled(pickle, where)
    try:
        with _no_pickles(where), torch.random.fork_rng():
            torch.manual_seed(0)  # an encoder's head may be new
            lm, info = auto_class(config).from_pretrained(
                model, config=config, trust_remote_code=trust_remote_code, **options
            )
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, SafetensorError) as error:
        raise _refusal(error, "cannot be loaded", where) from None
    assert isinstance(lm, PreTrainedModel)
    made = {name for name, _ in lm.named_parameters() if is_encoder(config) and in_head(lm, name)}
    missing = sorted(set(info["missing_keys"]) - made)
    if missing:
        raise UserError(
            f"{len(missing)} weights are not in its files, {missing[0]} among them",
            where=where,
            remedy="Complete the files: missing weights would be random.",
        )
    for name, there, here in sorted(one for one in info["mismatched_keys"] if one[0] not in made):
        raise UserError(
            f"the weights are not those of its config.json: {name} is {tuple(there)} in the files, but should be "
            f"{tuple(here)}",
            where=where,
            remedy="Put the config.json beside them that they were saved with.",
        )
    keep_layout(lm)
    return lm if four_bit else lm.to(device)


@contextlib.contextmanager
def _no_pickles(where: str) -> Iterator[None]:
    """Inside, nothing is unpickled: an index or a configuration may name such files beside the safetensors."""

    def refuse(file: Any, *_: Any, **__: Any) -> NoReturn:
        raise _pickled(str(file), where)

    with mock.patch.object(torch, "load", refuse):
        yield


def _pickled(file: str, where: str) -> UserError:
    return UserError(
        f"cannot be loaded: its weights are a pickle ({Path(file).name}), which can run any code when it is read",
        where=where,
        remedy="If you trust their origin, convert them once: AutoModelForCausalLM.from_pretrained(FOLDER)"
        ".save_pretrained(FOLDER) in transformers writes model.safetensors.",
    )


def weights_sha256(
    model: nn.Module,
    whole: Callable[[Tensor], Tensor] = Tensor.detach,
    base_name: Callable[[str], str | None] = str,
) -> str:
    """SHA-256 over name, dtype, shape and bytes of every weight of the base.

    Args:
        whole: gives all of a weight that may be spread over processes.
        base_name: a weight's name before adapters were put in; None for an adapter's.
    """
    digest = hashlib.sha256()
    named: dict[str, Tensor] = {
        own: tensor
        for name, tensor in (*model.named_parameters(), *scales(model))
        if (own := base_name(name)) is not None
    }
    for name, weight in sorted(named.items()):
        tensor = whole(weight)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def numbered_tokens(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer for random weights: byte-sized characters, then as many numbered tokens as fit."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<pad>", "<end>", *alphabet]
    names = [*names, *(f"<{index}>" for index in range(len(names), size))][:size]
    tokenizer = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def _refusal(error: Exception, what: str, where: str, remedy: str = REMEDY) -> UserError:
    """What a library's exception comes to: a fault of the machine, code that is not trusted, or else `what`."""
    if fault := machine_fault(error):
        return fault
    if "trust_remote_code" in str(error):
        return UserError(
            "it comes with Python code of its own, which is not run",
            where=where,
            remedy="Read that code; if you trust it set base.trust_remote_code: true, else use another base.",
        )
    return UserError(f"{what}: {_first_line(error)}", where=where, remedy=remedy)


def _first_line(error: BaseException) -> str:
    """What an error says in its first line; in its second too where the first only announces it."""
    first, _, rest = str(error).strip().partition("\n")
    second = rest.strip().partition("\n")[0] if first.endswith(":") else ""
    return f"{first} {second}".strip()[:300]
