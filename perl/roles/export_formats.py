"""Export of roles to formats that peft, transformers and adapter servers load without PERL.

peft also loads what `perl.roles.saved` writes, together with the run's base and tokenizer. An exported folder is
self-contained: the tokenizer formats rows as in training, the padding token is not an end token, and every layer
has an adapter, as TGI requires.
"""

import copy
import errno
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perl.backbones.chat import ChatFormat
from perl.backbones.template import ASKED, scoring_template
from perl.errors import UserError
from perl.private.transformers import has_classifier
from perl.roles.role import Role
from perl.roles.roles import Roles
from perl.roles.shared_base import SharedBase
from perl.system.files import write_tensors

PAD = "<|pad|>"
"""Padding token, added if a tokenizer has none, or one that is also an end token."""


def generating_tokenizer(chat: ChatFormat) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer for generation."""
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def scoring_tokenizer(chat: ChatFormat) -> PreTrainedTokenizerBase:
    """Return a copy of the tokenizer that formats dialogues as in the reward model's training.

    transformers' sequence classifiers read the score at the last token whose id is not the padding's. So padding
    must not be an end token, and nothing may follow the end of the assistant's turn, although many templates write
    a newline there.
    """
    tokenizer = copy.deepcopy(chat.tokenizer)
    tokenizer.padding_side = "right"
    if chat.pad_id in (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id):
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.pad_id)
    else:  # not an ordinary token: once it is special, text is split at it before BPE
        tokenizer.add_special_tokens({"pad_token": PAD})
    written = tokenizer.apply_chat_template(chat.template.messages(ASKED), tokenize=False)
    if written != "".join(chat.template.row(ASKED)):
        tokenizer.chat_template = scoring_template(tokenizer.get_chat_template(), chat.template)
    return tokenizer


def text_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the suffix for a plain text: the end token, unless the tokenizer adds it."""
    ids: list[int] = tokenizer("a")["input_ids"]
    return "" if ids[-1:] == [tokenizer.eos_token_id] else str(tokenizer.eos_token)


def check_classifier(roles: Roles, base: str, trust_remote_code: bool) -> None:
    """Check that a classifier can load the whole trunk from the base's files; only names of weights are read.

    Some store tied embeddings only under the name of the language model's head, which a classifier lacks. Its
    embeddings are then initialized at random, and transformers only logs a warning.

    Args:
        base: name or folder of the base.

    Raises:
        UserError: weights of the trunk are missing.
    """
    if roles.backbone.auto_class is not AutoModelForCausalLM or not has_classifier(roles.backbone.config):
        return
    model, found = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, device_map="meta", output_loading_info=True, trust_remote_code=trust_remote_code
    )
    absent = sorted(key for key in found["missing_keys"] if key.startswith(f"{model.base_model_prefix}."))
    if absent:
        raise UserError(
            f"its files lack {', '.join(absent[:3])}, which a classifier would initialize at random: scores with "
            "the adapter would be meaningless",
            where=f"base.model {base}",
            remedy="Export the whole model with --merge.",
        )


def save_adapter(roles: SharedBase, role: Role, trunk: Role, base: str, folder: Path) -> None:
    """Write an adapter in peft's format, and where possible in that of adapter servers.

    Args:
        role: the role whose head is written, if it has one.
        trunk: the role whose adapter is written.
        base: the base's name or folder.

    Raises:
        UserError: peft cannot read it correctly.
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
        fresh: another copy of the base.

    Raises:
        UserError: the adapters do not amount to a change of weights.
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
    """Build transformers' sequence classifier from a model's trunk and a role's head.

    Args:
        label: the name of the only class.
        problem_type: as in transformers, whose pipelines return the score with `regression`, and its sigmoid with
            `multi_label_classification`.
        tokenizer: from `scoring_tokenizer`; if it has one more token than the model, the model gets one too.

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
    """Write a whole model in transformers' format.

    Raises:
        OSError: the model cannot be written.
    """
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # safetensors wraps the system's error
        raise OSError(errno.EIO, str(error), str(folder)) from None
