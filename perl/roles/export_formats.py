"""Roles in the form that peft, transformers and servers of adapters load without PERL.

peft also loads what `perl.roles.saved` writes, beside the run's base and tokenizer. Here a role becomes a folder
of its own: the tokenizer writes the rows that the role was trained on, the padding token is not an end token, and
every layer has an adapter, as TGI requires.
"""

import copy
import errno
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perl.backbones.chat import ChatFormat
from perl.backbones.template import ASKED, scoring_template
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase
from perl.system.files import write_tensors

PAD = "<|pad|>"
"""Added where a tokenizer has no padding token, or one that also ends rows."""


def generating_tokenizer(chat: ChatFormat) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer for generation."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def scoring_tokenizer(chat: ChatFormat) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer that writes dialogues as a reward model read them in training.

    transformers' sequence classifiers read the score at the last token whose id is not the padding's. So padding
    must not be an end token, and nothing may follow the end of the agent's turn, where many templates write a
    newline.
    """
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.padding_side = "right"
    if chat.pad_id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.pad_id)
    else:  # an ordinary token will not do: once it is special, text is cut at it before BPE
        tokenizer.add_special_tokens({"pad_token": PAD})
    written = tokenizer.apply_chat_template(chat.template.messages(ASKED), tokenize=False)
    if written != "".join(chat.template.row(ASKED)):
        tokenizer.chat_template = scoring_template(tokenizer.get_chat_template(), chat.template)
    return tokenizer


def text_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What has to follow a plain text: the end token, unless the tokenizer adds it."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return "" if ids[-1:] == [tokenizer.eos_token_id] else str(tokenizer.eos_token)


def save_adapter(roles: SharedBase, role: Role, trunk: Role, base: str, folder: Path) -> None:
    """Write an adapter as peft reads it, and where possible as servers do.

    Args:
        role: whose head is written, if it has one.
        trunk: whose adapter is written.
        base: the base's name or folder.

    Raises:
        UserError: peft would not read it as what it is.
    """
    scores = role in roles.heads
    tensors = roles.adapter.export(trunk, folder, base, roles.head_modules if scores else None)
    if scores:
        tensors |= roles.head_weights(role)
    write_tensors(folder / roles.weights_file, {roles.prefix + name: tensor for name, tensor in tensors.items()})


@torch.no_grad()
def merge(fresh: PreTrainedModel, roles: SharedBase, role: Role) -> PreTrainedModel:
    """Add a role's adapter to a base's weights in place, in fp32, rounded once to the base's dtype.

    Args:
        fresh: the base, loaded once more.

    Raises:
        UserError: the adapters add to something else than weights.
    """
    for name, delta in roles.adapter.deltas(role):
        weight = fresh.get_parameter(name)
        weight.copy_(weight.float() + delta)
    return fresh


def classifier(
    roles: Roles,
    lm: PreTrainedModel,
    role: Role,
    label: str,
    problem_type: str,
    tokenizer: PreTrainedTokenizerBase,
) -> PreTrainedModel:
    """A model's trunk and a role's head, as transformers' sequence classifier of that architecture.

    Args:
        label: the name of the only class.
        problem_type: transformers'; pipelines return the score under `regression`, its sigmoid under
            `multi_label_classification`.
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
