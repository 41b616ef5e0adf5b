"""Reads Taskmaster Coffee and Ticketing: the dialogues and rated turns released with the PERL paper.

A rated turn has its context and its answer as JSON strings; a dialogue has API calls as annotations of the
utterance that caused them. Both become the same turns: `call NAME {"argument": "value"}` by the agent,
`{"NAME":{…}}` by the API.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from perl.data.pairs import without_repeats
from perl.data.records import CALL, Demonstration, Problem, Prompt, Rating, Records, Speaker, Turn
from perl.data.rows import (
    RowError,
    binary_label,
    first_user_key,
    list_of,
    no_usable_row,
    object_with,
    parsed,
    shown,
    sifted,
    strict_json,
    usable_text,
)
from perl.errors import UserError

Domain = Literal["coffee", "ticketing"]
RELEASES: dict[Domain, str] = {"coffee": "TM-4-2024", "ticketing": "TM-3-2020"}
"""The folder of each domain in the public repository."""

_SPEAKERS: dict[str, Speaker] = {"user": "user", "agent": "agent", "assistant": "agent"}
_R = TypeVar("_R", Rating, Demonstration)


def read_taskmaster(folder: Path, domain: Domain, every_row: bool = False) -> Records:
    """Read a checkout of the repository, or its folder of this domain.

    Demonstrations are Coffee's dialogues, and those of Ticketing's answers that are rated up. Prompts are the
    contexts of the ratings.

    Args:
        every_row: include repeated ratings of a (context, answer), and answers rated both up and down.

    Raises:
        UserError: a folder is missing or has no usable row.
    """
    release = _release(folder, domain)
    ratings, problems = _read(release / "reward", rated_turn, domain)
    if not every_row:
        ratings = without_repeats(ratings)
    if domain == "coffee":
        demonstrations, bad = _read(release / "data", whole_dialogue, domain)
        problems += bad
    else:
        liked = (rating for rating in ratings if rating.label and rating.answer.text)
        demonstrations = [Demonstration(rating.context, (rating.answer,), rating.dialogue) for rating in liked]
    # A few rated turns have an empty context, which cannot be a prompt.
    prompts = {rating.context: Prompt(rating.context, rating.dialogue) for rating in ratings if rating.context}
    return Records(
        demonstrations=demonstrations, ratings=ratings, prompts=list(prompts.values()), problems=problems
    )


def rated_turn(row: object, domain: Domain) -> Rating:
    """Parse one rated turn in the published format.

    Args:
        row: an object with `context` and `generation`, both JSON strings, and `reward`, 1.0 or 0.0.
        domain: prefix of the dialogue's key.

    Raises:
        RowError: the row does not fit.
    """
    fields = object_with(row, ("context", "generation", "reward"))
    turns = list_of(strict_json(usable_text(fields["context"], "context")), "context")
    context = tuple(_turn(turn, f"context[{i}]") for i, turn in enumerate(turns))
    answer = _turn(strict_json(usable_text(fields["generation"], "generation")), "generation")
    if answer.speaker != "agent":
        raise RowError(f"generation is by {answer.speaker}; a turn by the agent expected")
    return Rating(context, answer, binary_label(fields["reward"], "reward"), first_user_key(context, domain))


def whole_dialogue(row: object, domain: Domain) -> Demonstration:
    """Parse one dialogue in the published format: the context ends with the first user turn.

    Invalid JSON in API calls and responses is kept as text.

    Raises:
        RowError: the row does not fit.
    """
    utterances = list_of(object_with(row, ("utterances",))["utterances"], "utterances")
    turns = [turn for i, utterance in enumerate(utterances) for turn in _utterance(utterance, f"utterances[{i}]")]
    first = next((i for i, turn in enumerate(turns) if turn.speaker == "user"), len(turns))
    context, answer = tuple(turns[: first + 1]), tuple(turns[first + 1 :])
    if not any(turn.speaker == "agent" for turn in answer):
        raise RowError("the agent says nothing after the first user turn")
    return Demonstration(context, answer, first_user_key(context, domain))


def _call_turn(name: str, arguments: object) -> Turn:
    """Return an API call as an agent turn; arguments that are a string are kept as they are."""
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Turn("agent", usable_text(f"{CALL}{name} {text}", "call"))


def _compact(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _turn(turn: object, name: str) -> Turn:
    """Parse one turn of a rated row's context, or its generation."""
    if isinstance(turn, dict) and len(turn) == 2:
        match turn:
            case {"role": "agent", "api": dict(api)} if len(api) == 1:
                ((call, arguments),) = api.items()
                if isinstance(arguments, dict):
                    return _call_turn(call, arguments)
            case {"role": "api", "response": dict(response)}:
                return Turn("api", usable_text(_compact(response), "response"))
            case {"role": "user" | "agent" as role, "text": str(text)}:
                return Turn(_SPEAKERS[role], usable_text(text, name))
    raise RowError(f"{name} is {shown(turn)}; a text by user or agent, one api call, or a response expected")


def _utterance(utterance: object, name: str) -> Iterator[Turn]:
    """Yield what was said, then the calls and responses that it caused."""
    fields = object_with(utterance, ("speaker", "text"), name)
    speaker, text = fields["speaker"], usable_text(fields["text"], f"{name}.text")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise RowError(f"{name} has the unknown speaker {shown(speaker)}; user or assistant expected")
    if not text.strip():
        raise RowError(f"{name}.text is empty")
    yield Turn(_SPEAKERS[speaker], text)
    yield from _calls(list_of(fields.get("annotations") or [], f"{name}.annotations"), f"{name}.annotations")


def _calls(annotations: list[object], name: str) -> Iterator[Turn]:
    """Yield the turns of `api_call`, `request` (absent without arguments), `api_response` and `response`."""
    call = response = None
    arguments: object = {}
    for annotation in annotations:
        fields = object_with(annotation, ("name", "value"), name)
        part, value = fields["name"], usable_text(fields["value"], f"{name}.value")
        if call is not None and part != "request":
            yield _call_turn(call, arguments)
            call, arguments = None, {}
        if part == "api_call":
            call = value
        elif part == "request" and call is not None:
            arguments = _json_or_text(value)
        elif part == "api_response":
            response = value
        elif part == "response" and response is not None:
            yield _response_to(response, _json_or_text(value))
            response = None
        else:
            raise RowError(f"{name} has {shown(part)} out of place")
    if call is not None:
        yield _call_turn(call, arguments)


def _json_or_text(value: str) -> object:
    """Return the parsed value, or the string itself if it is not JSON, such as `{"id": ""latte-12""}`."""
    try:
        return strict_json(value, strict=False)
    except RowError:
        return value


def _response_to(name: str, response: object) -> Turn:
    text = response if isinstance(response, str) else _compact(response)  # text that is not JSON is kept
    return Turn("api", usable_text(f"{{{_compact(name)}:{text}}}", "response"))


# Files.


def _release(folder: Path, domain: Domain) -> Path:
    """Return the domain's folder: this one, or the one in this checkout."""
    name = RELEASES[domain]
    release = folder if name in (folder.name, folder.resolve().name) else folder / name
    for part in ("reward", "data") if domain == "coffee" else ("reward",):
        if not (release / part).is_dir():
            remedy = (
                f"Run `perl-rlhf data fetch taskmaster-{domain}`, or set data.path to a checkout of "
                f"github.com/google-research-datasets/Taskmaster, which has {name}/{part}."
            )
            raise UserError(f"there is no folder {name}/{part}", where=str(folder), remedy=remedy)
    return release


def _read(folder: Path, parse: Callable[[object, Domain], _R], domain: Domain) -> tuple[list[_R], list[Problem]]:
    """Read all rows of a folder's files, in the files' order."""
    rows, problems = sifted(row for path in sorted(folder.glob("*.json")) for row in _rows(path, parse, domain))
    if not rows:
        raise no_usable_row(problems, str(folder), "Fetch the data again, or check data.path.")
    return rows, problems


def _rows(path: Path, parse: Callable[[object, Domain], _R], domain: Domain) -> Iterator[_R | Problem]:
    try:
        values = list_of(strict_json(path.read_text(encoding="utf-8")), "the file")
    except (RowError, OSError, UnicodeDecodeError) as error:
        yield Problem(str(path), str(error))
        return
    for index, value in enumerate(values):
        yield parsed(f"{path}[{index}]", parse, value, domain)
