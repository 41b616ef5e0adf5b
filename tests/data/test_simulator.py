"""The coffee simulator: agent and judge agree, ratings have the given noise, and a seed reproduces everything."""

import json
import re
from collections import Counter, defaultdict
from itertools import islice
from random import Random

import pytest

from perl.data.records import Prompt, Records
from perl.data.simulator.acts import WORDINGS, Act, parse, render
from perl.data.simulator.agent import MISTAKES
from perl.data.simulator.dialogues import LONGEST, moments, play, rated
from perl.data.simulator.judge import Mistake, judge, judge_turn
from perl.data.simulator.shop import MENU, OFF_MENU, Shop
from perl.data.simulator.source import corpus, simulate
from perl.data.simulator.state import KINDS, Kind, State

DIALOGUES = [play(seed, skill=0.5) for seed in range(1500)]

SAID = {"drink": "latte", "size": "large", "milk": "oat", "extra": "vanilla"}
ASK = State(said={"drink": "latte", "size": "large"})
READ = State(said=SAID)
CALL = State("confirmed", SAID)
TELL = State("answered", SAID, (), {"status": "ok", "price": "4.50", "minutes": "5"})
OFFER = State("answered", SAID, ("oat",), {"status": "sold out", "milk": "oat"})
BYE = State("closing", SAID)
GOOD_CALL = 'call order {"drink": "latte", "size": "large", "milk": "oat", "extra": "vanilla"}'


@pytest.fixture(scope="module")
def records() -> Records:
    return simulate(seed=3, dialogues=300, ratings=3000, prompts=1200, skill=0.5, noise=0.1)


def test_every_turn_is_judged_as_the_agent_meant_it() -> None:
    seen: defaultdict[str, set[Mistake | None]] = defaultdict(set)
    for dialogue in DIALOGUES:
        for step in dialogue.steps:
            text = dialogue.turns[step.at].text
            assert judge_turn(step.state, text).mistake == step.mistake, (step, text)
            seen[step.state.due].add(step.mistake)
    assert seen == {kind: {None, *mistakes} for kind, mistakes in MISTAKES.items()}


@pytest.mark.parametrize(
    ("state", "text"),
    [
        (ASK, "what milk would you like, oat, soy, whole or skim?"),
        (ASK, "which milk do you want? we have oat or soy."),
        (State(said={"milk": "oat"}), "and the drink? you can have mocha, chai or tea."),
        (State(said={"milk": "oat"}), "what size would you like, small, medium or large?"),
        (READ, "so that is a large latte with oat milk and vanilla, right?"),
        (CALL, GOOD_CALL),
        (CALL, 'call order {"extra": "vanilla", "milk": "oat", "size": "large", "drink": "latte"}'),
        (TELL, "that is 4.50 dollars and takes 5 minutes."),
        (OFFER, "sorry, oat is sold out. we have soy, whole or skim."),
        (BYE, "thank you, goodbye!"),
    ],
)
def test_right_turns(state: State, text: str) -> None:
    assert judge_turn(state, text).right


@pytest.mark.parametrize(
    ("state", "text", "mistake"),
    [
        (READ, "so that is a large mocha with oat milk and vanilla, right?", Mistake.WRONG_ITEM),
        (State(said={**ASK.said, "milk": "soy"}), "you want a large latte with soy milk and cream, correct?",
         Mistake.WRONG_ITEM),
        (CALL, GOOD_CALL.replace("oat", "soy"), Mistake.WRONG_ITEM),
        (OFFER, "sorry, soy is sold out. we have whole or skim.", Mistake.WRONG_ITEM),
        (ASK, "what milk would you like, oat, almond or skim?", Mistake.NOT_OFFERED),
        (ASK, "what milk would you like, small, medium or large?", Mistake.NOT_OFFERED),
        (ASK, "what milk would you like, oat, oat or oat?", Mistake.NOT_OFFERED),
        (READ, "you want a huge latte with oat milk and vanilla, correct?", Mistake.NOT_OFFERED),
        (CALL, GOOD_CALL.replace("vanilla", "pumpkin"), Mistake.NOT_OFFERED),
        (OFFER, "sorry, oat is sold out. we have oat, whole or skim.", Mistake.NOT_OFFERED),
        (READ, "so that is a large latte with oat milk, right?", Mistake.FORGOTTEN),
        (READ, "so that is a large drink with oat milk and vanilla, right?", Mistake.FORGOTTEN),
        (CALL, GOOD_CALL.replace(', "milk": "oat"', ""), Mistake.FORGOTTEN),
        (ASK, "what size would you like, small, medium or large?", Mistake.ALREADY_SAID),
        (CALL, "you want a large latte with oat milk and vanilla, correct?", Mistake.ALREADY_SAID),
        (BYE, "which milk do you want? we have oat or soy.", Mistake.ALREADY_SAID),
        (ASK, "you want a large latte, correct?", Mistake.TOO_EARLY),
        (ASK, 'call order {"drink": "latte", "size": "large"}', Mistake.TOO_EARLY),
        (READ, GOOD_CALL, Mistake.TOO_EARLY),
        (CALL, GOOD_CALL[:-1], Mistake.MALFORMED),
        (CALL, GOOD_CALL.replace("size", "cup"), Mistake.MALFORMED),
        (CALL, GOOD_CALL.replace("order", "buy"), Mistake.MALFORMED),
        (CALL, GOOD_CALL.replace('"large"', "3"), Mistake.MALFORMED),
        (CALL, GOOD_CALL.replace("{", '{"drink": "latte", '), Mistake.MALFORMED),
        (CALL, 'call order [["drink", "latte"], ["size", "large"]]', Mistake.MALFORMED),
        (TELL, "that is 4.50 dollars and takes 6 minutes.", Mistake.WRONG_NUMBER),
        (TELL, "that is 4.00 dollars and takes 5 minutes.", Mistake.WRONG_NUMBER),
        (CALL, "that is 4.50 dollars and takes 5 minutes.", Mistake.OUT_OF_PLACE),
        (OFFER, "that is 4.50 dollars and takes 5 minutes.", Mistake.OUT_OF_PLACE),
        (CALL, "sorry, oat is sold out. we have soy, whole or skim.", Mistake.OUT_OF_PLACE),
        (TELL, "thank you, goodbye!", Mistake.OUT_OF_PLACE),
        (TELL, GOOD_CALL, Mistake.OUT_OF_PLACE),
        (ASK, "what milk would you", Mistake.UNCLEAR),
    ],
)  # fmt: skip
def test_every_mistake_is_named(state: State, text: str, mistake: Mistake) -> None:
    assert judge_turn(state, text).mistake is mistake


@pytest.mark.parametrize("text", ["", " ", "\n", "yes", "?", "call", "thank you, goodbye! thank you, goodbye!",
                                  "THANK YOU, GOODBYE!", "what what what", "you want a , correct?", "é\x00{}[]",
                                  "call order " + "[" * 5000, "a " * 5000])  # fmt: skip
def test_garbage_is_wrong_everywhere(text: str) -> None:
    for state in (ASK, READ, CALL, TELL, OFFER, BYE):
        assert judge_turn(state, text).mistake in (Mistake.UNCLEAR, Mistake.MALFORMED)


def test_wordings_are_read_as_one_act_only() -> None:
    acts: dict[Kind, Act] = {
        "ask": Act("ask", slot="milk", options=("oat", "soy")),
        "read": Act("read", order={"size": "large", "extra": "vanilla"}),
        "offer": Act("offer", word="oat", options=("soy", "whole", "skim")),
        "tell": Act("tell", price="4.50", minutes="5"),
        "bye": Act("bye"),
    }
    rng = Random(0)
    for kind, act in acts.items():
        texts = {render(act, rng) for _ in range(50)}
        assert len(texts) == len(WORDINGS[kind])
        assert all(parse(text) == act for text in texts)


def test_the_shop_answers_orders() -> None:
    shop = Shop(frozenset({"oat"}), minutes=4)
    order = {"drink": "mocha", "size": "large", "milk": "soy"}
    assert shop.order(order) == {"status": "ok", "price": "5.00", "minutes": "4"}
    assert shop.order({**order, "extra": "cream"})["price"] == "5.50"
    assert shop.order({**order, "milk": "oat"}) == {"status": "sold out", "milk": "oat"}
    for broken in (None, {"drink": "mocha"}, {**order, "size": "huge"}):
        assert shop.order(broken) == {"status": "error"}


def test_the_same_seed_gives_the_same_records(records: Records) -> None:
    again = simulate(seed=3, dialogues=300, ratings=3000, prompts=1200, skill=0.5, noise=0.1)
    other = simulate(seed=4, dialogues=300, ratings=3000, prompts=1200, skill=0.5, noise=0.1)
    assert again == records
    assert other.demonstrations != records.demonstrations
    assert corpus(3, 20) == corpus(3, 20)


def test_records_share_no_dialogue(records: Records) -> None:
    demonstrations = [record.dialogue for record in records.demonstrations]
    prompts = [record.dialogue for record in records.prompts]
    ratings = {record.dialogue for record in records.ratings}
    pretraining = [record.dialogue for record in corpus(3, 300)]
    other = [record.dialogue for record in simulate(4, 50, 0, 50, 0.5, 0.1).demonstrations]
    everything = [*demonstrations, *prompts, *ratings, *pretraining, *other]
    assert len(everything) == len(set(everything))
    assert (len(demonstrations), len(prompts), len(records.ratings)) == (300, 1200, 3000)


def test_ratings_are_gold_with_noise_and_balanced(records: Records) -> None:
    n = len(records.ratings)
    assert 0.08 < sum(r.label != r.gold for r in records.ratings) / n < 0.12
    assert 0.45 < sum(r.label for r in records.ratings) / n < 0.55
    assert 0.45 < sum(bool(r.gold) for r in records.ratings) / n < 0.55


def test_ratings_cover_every_act_and_every_mistake() -> None:
    seen: Counter[object] = Counter()
    pairs: defaultdict[str, set[bool]] = defaultdict(set)
    ratings = rated(seed=1, ratings=2000, skill=0.5, noise=0.1)
    states = [state for _, _, state in islice(moments(1, 0.5), 1000) for _ in range(2)]
    for rating, state in zip(ratings, states, strict=True):
        verdict = judge_turn(state, rating.answer.text)
        assert rating.gold is verdict.right
        seen.update([state.due, verdict.mistake])
        pairs[rating.dialogue].add(rating.label)
    assert all(seen[kind] > 200 for kind in KINDS)
    assert all(seen[mistake] > 20 for mistake in Mistake)
    assert sum(len(labels) == 2 for labels in pairs.values()) > 300


def test_prompts_end_before_every_kind_of_turn_and_carry_their_state(records: Records) -> None:
    states = [State.from_json(prompt.columns["state"]) for prompt in records.prompts]
    assert all(count > 100 for count in Counter(state.due for state in states).values())
    for prompt, state in zip(records.prompts, states, strict=True):
        assert json.loads(json.dumps(prompt.columns)) == prompt.columns
        assert State.from_json(prompt.columns["state"]) == state
        assert prompt.context[-1].speaker in ("user", "api")
        # The context has all that was said and all that the API returned.
        words = set(re.findall(r"[a-z]+|[0-9.]*\d", " ".join(turn.text for turn in prompt.context)))
        assert words.issuperset(state.said.values())
        assert words.issuperset(state.sold_out)
        assert words.issuperset(" ".join(state.response.values()).split())


def test_the_judge_reads_the_prompts_state_even_after_arrow() -> None:
    nulls = {**dict.fromkeys(MENU), **ASK.said}  # Arrow gives every row the keys of all
    plain = Prompt((), "a", {"state": ASK.to_json()})
    filled = Prompt((), "b", {"state": {**ASK.to_json(), "said": nulls, "response": None}})
    right = "what milk would you like, oat, soy, whole or skim?"
    assert judge([plain, filled, plain], [right, right, "bye"]) == [1.0, 1.0, 0.0]


def test_dialogues_are_short_and_their_vocabulary_small() -> None:
    turns = [turn for dialogue in DIALOGUES for turn in dialogue.turns]
    text = "\n".join(turn.text for turn in turns)
    assert text.isascii()
    assert text == text.lower()
    assert len(set(re.findall(r"[a-z]+|[0-9.]*\d", text))) < 250
    assert max(len(turn.text.split()) for turn in turns if turn.speaker == "agent") < 25
    assert all(sum(len(turn.text.split()) for turn in d.turns) < 180 for d in DIALOGUES)
    assert max(len(dialogue.steps) for dialogue in DIALOGUES) == LONGEST


def test_a_value_belongs_to_one_slot() -> None:
    values = [value for table in (MENU, OFF_MENU) for slot in table.values() for value in slot]
    assert len(values) == len(set(values))


def test_a_perfect_agent_is_always_right_and_finishes() -> None:
    perfect = [play(seed, skill=1.0) for seed in range(300)]
    assert all(step.mistake is None for dialogue in perfect for step in dialogue.steps)
    finished = [dialogue.steps[-1].state.phase == "closing" for dialogue in perfect]
    assert sum(finished) > 0.9 * len(perfect)
