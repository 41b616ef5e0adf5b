"""The page's server: what it asks, what it saves."""

import getpass
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from perl.data.jsonl import parse_row
from perl.data.rows import RowError, usable_text
from perl.errors import MachineError, UserError
from perl.rating.log import Opinion, RatingLog
from perl.rating.questions import Question, Questions
from perl.rating.summary import summarize
from perl.rl.rewards.function import messages
from perl.server.bodies import body_of
from perl.server.worker import BusyError, Worker
from perl.system.typed_json import as_json

RETRY_AFTER = 5
"""Seconds after which a page that was refused may ask again."""
MAX_NAME = 60
PAGE = {
    "/": ("perl.rating", "page.html", "text/html"),
    "/page.js": ("perl.rating", "page.js", "text/javascript"),
    "/page.css": ("perl.rating", "page.css", "text/css"),
    "/report.css": ("perl.report", "page.css", "text/css"),
}


@dataclass(frozen=True)
class Ask:
    """What a page wants: a question on held-out prompts, or on a conversation that was typed.

    Attributes:
        completions: 1, or 2 side by side.
        besides: ids of questions that the page has.
        skipped: those of them that this rater does not want.
        typed: chat messages, or a text.
    """

    rater: str
    completions: int = 1
    besides: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    typed: str | list[dict[str, str]] | None = None


@dataclass(frozen=True)
class Rate:
    """What a rater says of a question: see `Opinion`."""

    rater: str
    question: str
    label: bool | None = None
    better: int | None = None
    correction: str | None = None


@dataclass(frozen=True)
class Undo:
    """Take back what this rater said last."""

    rater: str


class RatingApp:
    """The routes, and what they share.

    Args:
        raters: the names that may rate; none: any name.
        title: of the page: which run this is.
    """

    def __init__(self, questions: Questions, log: RatingLog, raters: Sequence[str], title: str) -> None:
        self._questions, self._log, self._raters, self._title = questions, log, list(raters), title
        self._worker = Worker()
        self._known = {one.question.id: one.question for one in log.entries.values()}
        self._skipped: dict[str, set[str]] = defaultdict(set)

    def routes(self) -> Starlette:
        """The ASGI application."""
        post = {"/api/next": self.next, "/api/rate": self.rate, "/api/undo": self.undo}
        return Starlette(
            routes=[
                *(Route(path, _static(*where)) for path, where in PAGE.items()),
                Route("/api/state", self.state),
                *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
            ],
            exception_handlers={HTTPException: _refused, UserError: _refused, BusyError: _busy},
            lifespan=self._worker.lifespan,
        )

    async def state(self, _: Request) -> Response:
        """What the page shows beside the question."""
        return self._answer()

    async def next(self, request: Request) -> Response:
        """A question that this rater has not answered; one that somebody else has answered comes first."""
        ask = await body_of(request, Ask)
        rater, wanted = self._rater(ask.rater), min(max(ask.completions, 1), 2)
        self._skipped[rater].update(ask.skipped)
        if ask.typed is not None:
            try:
                context = parse_row({"prompt": ask.typed})[0].context
            except RowError as error:
                raise HTTPException(400, f"the conversation: {error}") from None
            typed = await self._worker.run(lambda: self._questions.draw_for(context, wanted))
            self._known[typed.id] = typed
            return self._answer(typed)
        question = self._waiting(rater, wanted, ask.besides)
        if question is None:
            known = set(self._known)
            drawn = await self._worker.run(lambda: self._questions.draw(wanted, known))
            self._known |= {one.id: one for one in drawn}
            question = self._waiting(rater, wanted, ask.besides) or drawn[0]
        return self._answer(question)

    async def rate(self, request: Request) -> Response:
        """Save what a rater says; the answer comes when it is on disk."""
        rate = await body_of(request, Rate)
        question = self._known.get(rate.question)
        if question is None:
            raise HTTPException(409, "this question is not known: the server was restarted; reload the page")
        self._log.add(question, self._rater(rate.rater), Opinion(rate.label, rate.better, rate.correction))
        return self._answer()

    async def undo(self, request: Request) -> Response:
        """Take back a rater's last rating, and ask again."""
        rater = self._rater((await body_of(request, Undo)).rater)
        question = self._log.undo(rater)
        if question is None:
            raise HTTPException(409, "there is nothing to undo")
        self._known[question.id] = question
        return self._answer(question)

    def _waiting(self, rater: str, completions: int, besides: Sequence[str]) -> Question | None:
        """The first known question that this rater has neither answered nor skipped."""
        answered = {one.mark.question for one in self._log.entries.values() if one.mark.rater == rater}
        not_wanted = answered | self._skipped[rater] | set(besides)
        for key, question in self._known.items():
            if (
                key not in not_wanted
                and len(question.completions) == completions
                and question.chosen_by != "typed"
            ):
                return question
        return None

    def _rater(self, name: str) -> str:
        try:
            name = usable_text(name, "the name").strip()
        except RowError as error:
            raise HTTPException(400, str(error)) from None
        if not 0 < len(name) <= MAX_NAME:
            raise HTTPException(400, f"give a name of 1 to {MAX_NAME} characters")
        if self._raters and name not in self._raters:
            raise HTTPException(400, f"{name} is none of the raters: {', '.join(self._raters)}")
        return name

    def _answer(self, question: Question | None = None) -> Response:
        """What is known, and a question to show: without what would tell whose completions these are."""
        state: dict[str, object] = {
            "title": self._title,
            "file": str(self._log.file),
            "raters": self._raters,
            "default_rater": _user(),
            "text": self._questions.is_text,
            "summary": as_json(summarize(self._log.entries.values(), self._questions.roles)),
        }
        if question is not None:
            state["question"] = {
                "id": question.id,
                "prompt": messages(question.context),
                "completions": [one.text for one in question.completions],
                "typed": question.chosen_by == "typed",
            }
        return JSONResponse(state)


def _static(package: str, name: str, media_type: str) -> Callable[[Request], Response]:
    text = files(package).joinpath(name).read_text(encoding="utf-8")

    def send(_: Request) -> Response:
        return Response(text, media_type=media_type)

    return send


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "me"


async def _refused(_: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    return JSONResponse({"error": str(error)}, 507 if isinstance(error, MachineError) else 400)


async def _busy(_: Request, error: Exception) -> Response:
    headers = {"Retry-After": str(RETRY_AFTER)}
    return JSONResponse({"error": "too many wait for completions"}, 503, headers)
