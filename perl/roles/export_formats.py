"""Roles in the form that plain peft, plain transformers and servers of adapters load, without PERL.

What `perl.roles.saved` writes loads into peft too, beside the run's own base and tokenizer. Here a role becomes a
folder of its own: the tokenizer writes the rows that the role was trained on, padding is a token that these
libraries tell from the end of a row, and every layer has an adapter, as TGI wants it.
"""

import copy
import errno
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perl.adapters.experts import expert_delta, is_read_as_named
from perl.adapters.lora import name_without_lora
from perl.backbones.chat import ChatFormat
from perl.backbones.scoring_template import ending_with_completion
from perl.backbones.template import ASKED
from perl.errors import UserError
from perl.roles.roles import Role, Roles
from perl.roles.shared_base import SharedBase
from perl.system.files import write_tensors

PAD = "<|pad|>"
"""Added where a tokenizer has no token for padding, or one that also ends rows."""


def generating_tokenizer(chat: ChatFormat) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with its chat template, set up to generate."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def scoring_tokenizer(chat: ChatFormat) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that writes dialogues as a reward model read them in training.

    Sequence classifiers of transformers read the score at the last token that is not padding, by its id. So
    padding must not be what ends a row, and nothing may come after the end of the agent's turn, where many
    templates write a newline: either would move the score to a token that it was not trained on.
    """
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.padding_side = "right"
    if chat.pad_id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.pad_id)
    else:  # an ordinary token will not do: once it is special, text is cut at it before BPE
        tokenizer.add_special_tokens({"pad_token": PAD})
    written = tokenizer.apply_chat_template(chat.template.messages(ASKED), tokenize=False)
    if written != "".join(chat.template.row(ASKED)):
        tokenizer.chat_template = ending_with_completion(tokenizer.get_chat_template(), chat.template)
    return tokenizer


def text_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What has to follow a plain text: the end token, unless the tokenizer writes it itself."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return "" if ids[-1:] == [tokenizer.eos_token_id] else str(tokenizer.eos_token)


def save_adapter(roles: SharedBase, role: Role, trunk: Role, base: str, folder: Path) -> None:
    """Write an adapter in peft's format; that of a language model also in the form that vLLM and TGI load.

    Args:
        role: whose head is written, if it has one.
        trunk: whose adapter is written.
        base: the name or folder that leads to the base.

    Raises:
        UserError: peft would read it as an adapter of other modules.
    """
    tensors: dict[str, Tensor] = {roles.prefix + name: weight for name, weight in roles.weights(trunk).items()}
    scores = role in roles.heads
    roles.write_config(folder, base, scores=scores)
    config = LoraConfig.from_pretrained(str(folder))
    linear = {name: tensor for name, tensor in tensors.items() if not _on_experts(roles, name)}
    if not scores:
        linear |= _zeros_elsewhere(roles, linear)
    config.target_modules = sorted({_module(name, roles.prefix) for name in linear})
    if not is_read_as_named(config, roles.lm):
        raise UserError(
            f"peft would put this adapter elsewhere: it takes shared experts and dense blocks of "
            f"{type(roles.lm).__name__} for experts in an older layout",
            where=roles.lm.name_or_path,
            remedy="Export with --merge: the whole model.",
        )
    tensors |= linear
    if scores:
        tensors |= {roles.prefix + name: weight for name, weight in roles.head_weights(role).items()}
    if config.lora_alpha == int(config.lora_alpha):
        config.lora_alpha = int(config.lora_alpha)  # the type that vLLM and TGI give it
    config.save_pretrained(str(folder))
    write_tensors(folder / roles.weights_file, tensors)


def _zeros_elsewhere(roles: SharedBase, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adapters of zeros for the same modules of all other layers: they change nothing.

    TGI takes the adapters of a kind of module (such as q_proj) only where every layer has one; else it serves the
    bare base without a word (server/text_generation_server/adapters/lora.py, `prepare_weights`).
    """
    modules = dict(roles.lm.named_modules())

    def shape(name: str) -> Any:
        return getattr(getattr(modules.get(_module(name, roles.prefix)), "weight", None), "shape", None)

    found = {}
    for name, tensor in tensors.items():
        for layer in range(roles.lm.config.get_text_config().num_hidden_layers):
            other = re.sub(r"\.\d+\.", f".{layer}.", name, count=1)
            if other not in tensors and shape(other) == shape(name):
                found[other] = torch.zeros_like(tensor)
    return found


def _on_experts(roles: SharedBase, name: str) -> bool:
    """Whether a LoRA weight on disk is of experts, which peft knows by `target_parameters`, and TGI does not."""
    return isinstance(roles.lm.get_submodule(_module(name, roles.prefix)), ParamWrapper)


def _module(name: str, prefix: str) -> str:
    """The module that a LoRA weight on disk is of."""
    return name.removeprefix(prefix).rpartition(".lora_")[0]


@torch.no_grad()
def merge(fresh: PreTrainedModel, roles: SharedBase, role: Role) -> PreTrainedModel:
    """W + s B A in a copy of the base, summed in fp32 and rounded once to the base's dtype.

    Args:
        fresh: the base, loaded once more; it is changed in place.
    """
    for name, layer in roles.lm.named_modules():
        if isinstance(layer, ParamWrapper):
            weight = fresh.get_parameter(name_without_lora(f"{name}.{layer.parameter_name}"))
            weight.copy_(weight.float() + expert_delta(layer, str(role)))
        elif isinstance(layer, LoraLayer):
            weight = fresh.get_parameter(f"{name}.weight")
            weight.copy_(weight.float() + layer.get_delta_weight(str(role)).float())
    return fresh


def classifier(
    roles: Roles,
    lm: PreTrainedModel,
    role: Role,
    label: str,
    problem_type: str,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """The trunk of a model and a role's head, as transformers' sequence classifier of that architecture.

    Args:
        lm: its trunk is used as it is.
        label: the name of the only class.
        problem_type: as transformers has it; pipelines give `regression` as it is, and of
            `multi_label_classification` the sigmoid.
        tokenizer: from `scoring_tokenizer`; where it has a token more than the model, the model gets one too.

    Raises:
        UserError: transformers has no such classifier.
    """
    config = copy.deepcopy(lm.config)
    config.num_labels, config.problem_type = 1, problem_type
    config.id2label, config.label2id = {0: label}, {label: 0}
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model = roles.backbone.classifier(lm, roles.heads[role], config, tokenizer)
    return model.requires_grad_(False).eval()


def save_model(model: PreTrainedModel, folder: Path) -> None:
    """Write a whole model as transformers does.

    Raises:
        OSError: it cannot be written.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # its own name for what the system said
        raise OSError(errno.EIO, str(error), str(folder)) from None
