"""`export`: a role as a folder of its own, which peft or transformers loads without the run and without PERL.

adapter_config.json  adapter_model.safetensors   an adapter; a head is the module `score`
config.json          model.safetensors           merged, or under full tuning: a whole model
tokenizer*  chat_template.jinja                  for scoring roles a dialogue ends where they were trained to read
generation_config.json                           of language models: what ends an answer, how it was sampled
perl.json                                        the stamp: what it belongs to, and how RL used a reward model
README.md                                        the model card
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from perl.backbones.encoder import EncoderHead
from perl.backbones.padding import left_pad
from perl.errors import UserError
from perl.recipe import Recipe, StageName
from perl.report.model_card import TITLES, Exported, card
from perl.rl.rewards.sources import messages
from perl.roles.export_formats import (
    classifier,
    generating_tokenizer,
    merge,
    save_adapter,
    save_model,
    scoring_tokenizer,
    text_end,
)
from perl.roles.roles import Role
from perl.roles.saved import STAMP
from perl.roles.shared_base import SharedBase
from perl.runs.folder import RunFolder
from perl.stages.session import Session, open_run
from perl.system.files import user_named, whole_folder, write_whole
from perl.system.progress import console

STAGES: dict[Role, StageName] = {Role.SFT: "sft", Role.REWARD: "reward", Role.POLICY: "rl", Role.CRITIC: "rl"}
"""The stage in which each role is trained."""
COMPARED = 16
"""Held-out rows whose scores by a merged model are compared with the run's own."""


def export(run: Path, role: str, folder: Path, merged: bool) -> None:
    """Write a role of a finished stage as a folder that others can load.

    Args:
        run: the run folder.
        role: `sft`, `reward`, `policy` or `critic`.
        folder: new, or empty.
        merged: add the adapter to a copy of the base, and write the whole model. Under full tuning a role is a
            whole model either way.

    Raises:
        UserError: no such run or role, its stage is not finished, the folder is in use, or nobody could load
            what was asked for.
    """
    who = _role(role)
    recipe = RunFolder(run).recipe()
    _check_folder(folder)
    _check_run(recipe, run, who)
    whole = merged or recipe.tuning == "full"
    _check_form(recipe, whole)
    session = open_run(run)
    trunk = _load(session, who)
    scores = who in session.roles.heads
    chat = session.base.chat
    tokenizer = scoring_tokenizer(chat) if scores else generating_tokenizer(chat)
    end = "tokenizer.eos_token" if text_end(tokenizer) else ""
    made = Exported(who, STAGES[who], whole, scores, _is_text(session), end, tokenizer.pad_token_id)
    with user_named(folder), whole_folder(folder.resolve()) as unfinished:
        tokenizer.save_pretrained(unfinished)
        shutil.copyfile(session.saved(who) / STAMP, unfinished / STAMP)
        if whole:
            model = _whole_model(session, who, trunk, tokenizer)
            if scores:
                made = replace(made, difference=_largest_difference(session, who, trunk, model, tokenizer))
            save_model(model, unfinished)
        else:
            assert isinstance(session.roles, SharedBase)
            save_adapter(session.roles, who, trunk, session.base.name, unfinished)
            if not scores:
                _generation(session, who, tokenizer).save_pretrained(unfinished)
        write_whole(unfinished / "README.md", card(session, made))
        for weights in unfinished.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
            weights.chmod((unfinished / "README.md").stat().st_mode)
    _say(session, made, folder)


def _role(name: str) -> Role:
    if name not in list(STAGES):
        remedy = f"It is {', '.join(list(STAGES)[:-1])} or {list(STAGES)[-1]}."
        raise UserError(f"no role {name!r} to export", where="ROLE", remedy=remedy)
    return Role(name)


def _check_folder(folder: Path) -> None:
    with user_named(folder):
        if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
            what = "is not empty" if folder.is_dir() else "is a file"
            raise UserError(what, where=str(folder), remedy="Name a new folder, or remove this one.")


def _check_run(recipe: Recipe, run: Path, role: Role) -> None:
    stage = STAGES[role]
    if stage not in recipe.stages:
        has = ", ".join(str(r) for r, s in STAGES.items() if s in recipe.stages)
        remedy = f"Its recipe has no section {stage}. Roles it can have: {has}."
        raise UserError(f"the run has no {role}", where=str(run), remedy=remedy)
    if role is Role.CRITIC and recipe.critic == "none":
        assert recipe.rl is not None
        remedy = "Only reinforce and ppo train a critic."
        raise UserError(f"the run has no critic: {recipe.rl.algorithm} needs none", where=str(run), remedy=remedy)
    if RunFolder(run).result(stage) is None:
        remedy = "Run the recipe again with the same --out: it goes on from where it stopped."
        raise UserError(f"{stage} is not finished", where=str(run), remedy=remedy)


def _check_form(recipe: Recipe, whole: bool) -> None:
    """Refuse what could be written but not be loaded as what was trained."""
    if not whole and recipe.base.random_init:
        raise UserError(
            "the base's weights were drawn at random for this run: no name or folder leads others to them",
            where="base.random_init",
            remedy="Export with --merge: the whole model.",
        )
    if whole and recipe.base.quantization == "4bit":
        raise UserError(
            "the adapter was trained beside 4-bit weights; merged into unrounded ones it would be another model",
            where="--merge",
            remedy="Export the adapter (without --merge), and load its base in 4 bits (NF4) as the card says.",
        )


def _load(session: Session, role: Role) -> Role:
    """Load a role; return the one whose weights it computes with.

    A critic that is only a head reads the policy's trunk: it is exported with the policy's weights.
    """
    session.load(role)
    if session.roles.weights(role):
        return role
    session.load(Role.POLICY)
    return Role.POLICY


def _is_text(session: Session) -> bool:
    """Whether the run's rows are plain text, without a chat format."""
    prompts = session.train.prompts
    return bool(prompts) and all(prompt.context[-1].speaker == "text" for prompt in prompts)


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
    # As it was trained: log-odds, of which pipelines give the probability; or a number, which they give as it is.
    thumbs = session.stamp(role).reward_is_probability
    label, problem_type = ("thumb up", "multi_label_classification") if thumbs else (str(role), "regression")
    head = roles.heads[role]
    assert isinstance(head, nn.Linear | EncoderHead)
    return classifier(lm, head, label, problem_type, tokenizer)


def _generation(session: Session, role: Role, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """What ends an answer; a policy samples as it did in RL, without transformers' top-k of 50."""
    chat, rl = session.base.chat, session.recipe.rl
    sampling: dict[str, Any] = {}
    if role is Role.POLICY:
        assert rl is not None
        sampling = {"do_sample": True, "temperature": rl.temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(eos_token_id=sorted(chat.end_ids), pad_token_id=tokenizer.pad_token_id, **sampling)


@torch.no_grad()
def _largest_difference(
    session: Session, role: Role, trunk: Role, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> float | None:
    """How far a classifier's scores of held-out rows, from text and by transformers alone, are from the run's own.

    None where no answers are held out to compare.
    """
    records, chat = session.held_out, session.base.chat
    rated = [(one.context, one.answer) for one in records.ratings]
    differences = []
    for context, answer in (rated or [(one.context, one.better) for one in records.comparisons])[:COMPARED]:
        ids = chat.row(context, answer).ids
        if len(ids) > session.base.context_length:
            continue
        ours = session.roles(trunk, *left_pad([ids], chat.pad_id, session.device), head=role).scores_B
        row, is_text = messages((*context, answer)), answer.speaker == "text"
        text = f"{row}{text_end(tokenizer)}" if is_text else tokenizer.apply_chat_template(row, tokenize=False)
        inputs = tokenizer(text, add_special_tokens=is_text, return_tensors="pt").to(session.device)
        differences.append(float((model(**inputs).logits[:, 0] - ours).abs()))
    return max(differences, default=None)


def _say(session: Session, made: Exported, folder: Path) -> None:
    form = "a whole model" if made.whole else "an adapter"
    said = f"Written: {folder}: the {TITLES[made.role]}, {form}; README.md there says how to load it."
    console.print(said, markup=False)
    if made.difference is not None:
        dtype = session.recipe.base.dtype
        said = f"Its scores by transformers ({dtype}) differ from the run's by at most {made.difference:.1g}."
        console.print(said, markup=False)
    if not made.whole and Path(session.base.name).exists():
        said = (
            f"It needs its base, {session.base.name}: a folder of this machine, which others do not have. "
            "Where they have it elsewhere, base_model_name_or_path in adapter_config.json is to name it. "
            + ("" if session.recipe.base.quantization == "4bit" else "To give it away whole, export with --merge.")
        )
        console.print(said, style="yellow", markup=False)
