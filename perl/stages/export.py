"""A role as a folder of its own, which peft or transformers loads without the run and without PERL.

adapter_config.json  adapter_model.safetensors   an adapter; a head is the module `score`
config.json          model.safetensors           merged, or under full tuning: a whole model
tokenizer*  chat_template.jinja                  of scoring roles: a dialogue ends where they were trained to read
generation_config.json                           of language models: what ends a completion, and the sampling
perl.json                                        the stamp: what it belongs to, and a reward model's scale
README.md                                        the model card
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from perl.backbones.padding import left_pad
from perl.errors import UserError
from perl.recipe import StageName
from perl.report.model_card import Exported, model_card
from perl.rl.rewards.function import messages
from perl.roles.as_lora import check_convertible
from perl.roles.export_formats import (
    classifier,
    generating_tokenizer,
    merge,
    save_adapter,
    save_model,
    scoring_tokenizer,
    text_end,
)
from perl.roles.role import Role
from perl.roles.saved import STAMP
from perl.roles.shared_base import SharedBase
from perl.stages.conversion import answered, convert
from perl.stages.session import Session
from perl.system.files import whole_folder, write_whole

COMPARED = 16
"""Held-out rows on which a merged model's scores are compared with the run's own."""


def export_role(
    session: Session, role: Role, stage: StageName, folder: Path, whole: bool, rank: int | None = None
) -> Exported:
    """Write a role of a finished stage; return what was written.

    Args:
        folder: new, or empty.
        whole: a whole model: under LoRA the adapter is added to a copy of the base.
        rank: of LoRA, in the place of the adapter as it is; the session is of no use then.

    Raises:
        UserError: the adapter cannot be written in this form.
    """
    if rank is not None:
        assert isinstance(session.roles, SharedBase)
        check_convertible(session.roles.adapter, rank)
    trunk = _load(session, role)
    scores = role in session.roles.heads
    for term in session.roles.asked_score_terms if role in session.roles.score_terms else ():
        raise UserError(
            f"peft and transformers have no head with {term}",
            where=f"reward.{term}",
            remedy="Score with perl-rlhf score or serve, or train the reward model without it.",
        )
    chat = session.base.chat
    tokenizer = scoring_tokenizer(chat) if scores else generating_tokenizer(chat)
    end = "tokenizer.eos_token" if text_end(tokenizer) else ""
    prompts = session.train.prompts
    is_text = bool(prompts) and all(prompt.context[-1].speaker == "text" for prompt in prompts)
    exported = Exported(role, stage, whole, scores, is_text, end, _start_ids(session))
    if rank is not None:
        session, conversion = convert(session, role, trunk, rank)
        exported = replace(exported, conversion=conversion)
    with whole_folder(folder.resolve()) as unfinished:
        tokenizer.save_pretrained(unfinished)
        shutil.copyfile(session.saved(role) / STAMP, unfinished / STAMP)
        if whole:
            model = _whole_model(session, role, trunk, tokenizer)
            if scores:
                difference = _largest_difference(session, role, trunk, model, tokenizer)
                exported = replace(exported, difference=difference)
            save_model(model, unfinished)
        else:
            assert isinstance(session.roles, SharedBase)
            save_adapter(session.roles, role, trunk, session.base.name, unfinished)
            if not scores:
                _generation(session, role, tokenizer).save_pretrained(unfinished)
        write_whole(unfinished / "README.md", model_card(session, exported))
        for weights in unfinished.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
            weights.chmod((unfinished / "README.md").stat().st_mode)
    return exported


def _load(session: Session, role: Role) -> Role:
    """Load a role; return the one whose weights it computes with.

    A critic that is only a head reads the policy's trunk: it is exported with the policy's weights.
    """
    session.load(role)
    if session.roles.weights(role):
        return role
    session.load(Role.POLICY)
    return Role.POLICY


def _whole_model(session: Session, role: Role, trunk: Role, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The role as one of transformers' own models: a causal LM, or a sequence classifier."""
    roles = session.roles
    if isinstance(roles, SharedBase):
        lm = merge(session.base.load(), roles, trunk)  # the shared base stays as it is
    else:
        with roles.role(trunk):
            lm = roles.model()
    if role not in roles.heads:
        lm.generation_config = _generation(session, role, tokenizer)
        return lm
    # Of log-odds pipelines then give the probability; another score they give as it is.
    log_odds = session.stamp(role).reward_is_probability
    label, problem_type = ("thumb up", "multi_label_classification") if log_odds else (str(role), "regression")
    return classifier(roles, lm, role, label, problem_type, tokenizer)


def _generation(session: Session, role: Role, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """What begins and ends a completion; a policy samples as in RL, without transformers' top-k of 50."""
    chat, rl = session.base.chat, session.recipe.rl
    sampling: dict[str, Any] = {}
    if role is Role.POLICY:
        assert rl is not None
        sampling = {"do_sample": True, "temperature": rl.temperature, "top_k": 0, "top_p": 1.0}
    for name, token in zip(("decoder_start_token_id", "forced_bos_token_id"), _start_ids(session), strict=False):
        sampling[name] = token
    return GenerationConfig(eos_token_id=sorted(chat.end_ids), pad_token_id=tokenizer.pad_token_id, **sampling)


def _start_ids(session: Session) -> tuple[int, ...]:
    """What the decoder of an encoder-decoder is given before an answer; else nothing."""
    backbone = session.roles.backbone
    if not backbone.encodes_prompts:
        return ()
    return backbone.config.decoder_start_token_id, *session.base.chat.first_ids


@torch.no_grad()
def _largest_difference(
    session: Session, role: Role, trunk: Role, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """How far transformers' scores of held-out rows, from text, are from the run's own; None without rows."""
    chat, differences = session.base.chat, []
    for context, answer in answered(session)[:COMPARED]:
        ids = chat.row(context, answer).ids
        if len(ids) > session.base.context_length:
            continue
        ours = session.roles(trunk, *left_pad([ids], chat.pad_id, session.device), head=role).scores_B
        row, is_text = messages((*context, answer)), answer.speaker == "text"
        text = f"{row}{text_end(tokenizer)}" if is_text else tokenizer.apply_chat_template(row, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=is_text, return_tensors="pt").to(session.device)
        differences.append(float((model(**inputs).logits[:, 0] - ours).abs()))
    return max(differences, default=None)
