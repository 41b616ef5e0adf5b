"""What a policy is given and asked for: prompts, sampling, where its reward comes from; and answers to read."""

import random
from collections.abc import Sequence

import torch

from perl.data.records import Prompt
from perl.errors import UserError
from perl.results import Answer, Sample
from perl.rl.rewards.base import RewardContext
from perl.rl.rewards.combination import CombinedReward
from perl.rl.rewards.function import messages
from perl.rl.rewards.model import RewardModel
from perl.rl.rollout import EncodedPrompts
from perl.rl.rollouts import everyones, roll_out
from perl.rl.samplers.local import Sampling
from perl.roles.roles import Role
from perl.stages.session import Session
from perl.system.seeds import derived_seed
from perl.system.typed_json import made


def encode_prompts(session: Session, prompts: Sequence[Prompt]) -> EncodedPrompts:
    """Prompts as tokens.

    Raises:
        UserError: a prompt leaves no room for an answer in the base's context; a kind of prompt is mixed with
            another.
    """
    settings, chat = session.recipe.rl, session.base.chat
    assert settings is not None
    room = session.base.context_length - settings.max_new_tokens
    limit = settings.max_prompt_length
    if room < 1 or (limit is not None and limit > room):
        raise UserError(
            f"the base's context is {session.base.context_length} tokens: no room for prompts of {limit or 1} and "
            f"answers of {settings.max_new_tokens}",
            where="rl.max_new_tokens",
            remedy="Lower rl.max_new_tokens or rl.max_prompt_length.",
        )
    text = [prompt.context[-1].speaker == "text" for prompt in prompts]
    if any(text) != all(text):
        raise UserError(
            f"the prompts are of two kinds, {sum(text)} of plain text and {len(text) - sum(text)} of messages, "
            "whose answers end differently",
            where=f"data.source {session.recipe.data.source}",
            remedy="Write all prompts as text, or all as messages.",
        )
    ids, cut = [chat.context(prompt.context) for prompt in prompts], 0
    for index, prompt in enumerate(prompts):
        if limit is not None and len(ids[index]) > limit:
            ids[index], cut = chat.context(prompt.context, limit), cut + 1
    longest = max(range(len(ids)), key=lambda index: len(ids[index]))
    if len(ids[longest]) > room:
        raise UserError(
            f"a prompt has {len(ids[longest])} tokens, the base has room for {room} beside the answer",
            where=f"prompt of dialogue {prompts[longest].dialogue[:60]!r}",
            remedy=f"Shorten it, or set rl.max_prompt_length (at most {room}) to cut older context.",
        )
    return EncodedPrompts(list(prompts), ids, cut)


def prompts_of(session: Session, prompts: EncodedPrompts, step: int) -> list[int]:
    """A step's prompts: all are seen once before any is seen again; a prompt's answers stand side by side."""
    settings, count = session.recipe.rl, len(prompts)
    assert settings is not None
    per_step, each = settings.prompts_per_step, settings.samples_per_prompt
    if session.trial is not None:
        longest = sorted(range(count), key=lambda index: -len(prompts.ids[index]))
        return [longest[place % count] for place in range(per_step) for _ in range(each)]

    def shuffled(passed: int) -> list[int]:
        seed = derived_seed(session.recipe.seed, "order", passed)
        return random.Random(seed).sample(range(count), count)

    places = range(step * per_step, (step + 1) * per_step)
    orders = {passed: shuffled(passed) for passed in {place // count for place in places}}
    return [orders[place // count][place % count] for place in places for _ in range(each)]


def reward_source(session: Session) -> CombinedReward:
    """The reward of a recipe: the weighted sum of its parts."""
    settings, context = session.recipe.rl, reward_context(session)
    assert settings is not None
    return CombinedReward([(part.source(context), part.weight) for part in settings.reward_parts])


def reward_context(session: Session) -> RewardContext:
    """What the parts of a reward may be made from."""

    def model() -> RewardModel:
        settings, ends = session.recipe.rl, how_to_sample(session).end_ids
        assert settings is not None
        session.load(Role.REWARD)
        return RewardModel(session.roles, session.stamp(Role.REWARD), settings.micro_batch_size, ends)

    return RewardContext([*session.train.prompts, *session.held_out.prompts], model)


def how_to_sample(session: Session) -> Sampling:
    """As the recipe says; whether answers are text or turns of agents decides what ends them."""
    settings, chat = session.recipe.rl, session.base.chat
    assert settings is not None
    if session.trial is not None:  # answers as long as they can get
        return Sampling(
            settings.max_new_tokens,
            settings.temperature,
            (),
            chat.pad_id,
            settings.micro_batch_size,
            abridged=session.trial.abridged,
        )
    ends = chat.ends(session.train.prompts[0].context)
    return Sampling(settings.max_new_tokens, settings.temperature, ends, chat.pad_id, settings.micro_batch_size)


def draw_samples(
    session: Session, reward: CombinedReward, roles: Sequence[Role], prompts: EncodedPrompts
) -> list[Sample]:
    """One answer of each role to each prompt, with its reward and the judge's verdict, for people to read."""
    settings, judge = session.recipe.rl, session.held_out.judge
    assert settings is not None
    answers: list[dict[str, Answer]] = [{} for _ in prompts.prompts]
    for role in roles:
        generator = torch.Generator(session.device).manual_seed(derived_seed(session.recipe.seed, "samples", 0))
        mine = roll_out(session, reward, role, prompts, how_to_sample(session), generator)
        drawn, _ = everyones(session, prompts, mine)
        gold = judge(prompts.prompts, drawn.texts) if judge is not None else None
        for index, text in enumerate(drawn.texts):
            verdict = None if gold is None else float(gold[index])
            answers[index][role] = Answer(text=text, reward=float(drawn.rewards_B[index]), gold=verdict)
    return [
        made(Sample, {"prompt": messages(prompt.context), "answers": given})
        for prompt, given in zip(prompts.prompts, answers, strict=True)
    ]
