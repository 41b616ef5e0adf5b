"""Exports a role to a folder that peft or transformers loads without the run and without PERL.

adapter_config.json  adapter_model.safetensors   an adapter; a head is the module `score`
config.json          model.safetensors           a whole model, if merged or under full tuning
tokenizer*  chat_template.jinja                  for scoring roles, a dialogue ends at the token they score at
generation_config.json                           for language models: end tokens and sampling settings
perl.json                                        the stamp: provenance, and a reward model's scale
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
    check_classifier,
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

COMPARED_ROWS = 16
"""Held-out rows on which an exported model's scores are compared with the run's."""


def export_role(
    session: Session, role: Role, stage: StageName, folder: Path, whole: bool, rank: int | None = None
) -> Exported:
    """Export a role of a finished stage; return a description of the export.

    Args:
        folder: a new or empty folder.
        whole: write a whole model; under LoRA, the adapter is merged into a copy of the base.
        rank: convert the adapter to LoRA of this rank; the session is unusable afterwards.

    Raises:
        UserError: the role cannot be exported in this form.
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
            remedy="Use perl-rlhf score or serve, or train the reward model without it.",
        )
    if scores and not whole:
        check_classifier(session.roles, session.base.name, session.recipe.base.trust_remote_code)
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
        for weights in unfinished.glob("*.safetensors"):  # safetensors makes its files readable by the owner only
            weights.chmod((unfinished / "README.md").stat().st_mode)
    return exported


def _load(session: Session, role: Role) -> Role:
    """Load a role; return the role whose weights it computes with.

    A critic that is only a head reads the policy's trunk, so it is exported with the policy's weights.
    """
    session.load(role)
    if session.roles.weights(role):
        return role
    session.load(Role.POLICY)
    return Role.POLICY


def _whole_model(session: Session, role: Role, trunk: Role, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return the role as one of transformers' models: a causal LM or a sequence classifier."""
    roles = session.roles
    if isinstance(roles, SharedBase):
        lm = merge(session.base.load(), roles, trunk)  # the shared base is not changed
    else:
        with roles.role(trunk):
            lm = roles.model()
    if role not in roles.heads:
        lm.generation_config = _generation(session, role, tokenizer)
        return lm
    # So that pipelines return the probability for log-odds, and any other score unchanged.
    log_odds = session.stamp(role).reward_is_probability
    label, problem_type = ("thumb up", "multi_label_classification") if log_odds else (str(role), "regression")
    return classifier(roles, lm, role, label, problem_type, tokenizer)


def _generation(session: Session, role: Role, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """Return start and end tokens, and for a policy RL's sampling, without transformers' default top-k of 50."""
    chat, rl = session.base.chat, session.recipe.rl
    sampling: dict[str, Any] = {}
    if role is Role.POLICY:
        assert rl is not None
        sampling = {"do_sample": True, "temperature": rl.temperature, "top_k": 0, "top_p": 1.0}
    for name, token in zip(("decoder_start_token_id", "forced_bos_token_id"), _start_ids(session), strict=False):
        sampling[name] = token
    return GenerationConfig(eos_token_id=sorted(chat.end_ids), pad_token_id=tokenizer.pad_token_id, **sampling)


def _start_ids(session: Session) -> tuple[int, ...]:
    """Return the tokens that an encoder-decoder's decoder starts with; empty for other models."""
    backbone = session.roles.backbone
    if not backbone.encodes_prompts:
        return ()
    return backbone.config.decoder_start_token_id, *session.base.chat.first_ids


@torch.no_grad()
def _largest_difference(
    session: Session, role: Role, trunk: Role, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """Return the largest difference of transformers' scores of held-out text from the run's; None without rows.

    Rows that the run cuts are left out: transformers does not cut them.
    """
    chat, differences = session.base.chat, []
    is_cut = role in session.reward_members
    longest = session.max_length("reward") if is_cut else session.base.context_length
    for context, answer in answered(session)[:COMPARED_ROWS]:
        ids = chat.row(context, answer).ids
        if len(ids) > longest:
            continue
        ours = session.roles(trunk, *left_pad([ids], chat.pad_id, session.device), head=role).scores_B
        row, is_text = messages((*context, answer)), answer.speaker == "text"
        text = f"{row}{text_end(tokenizer)}" if is_text else tokenizer.apply_chat_template(row, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=is_text, return_tensors="pt").to(session.device)
        differences.append(float((model(**inputs).logits[:, 0] - ours).abs()))
    return max(differences, default=None)
