"""The page's server: it asks questions and saves ratings."""

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
from perl.server.worker import RETRY_AFTER, BusyError, Worker
from perl.system.typed_json import as_json

MAX_NAME = 60
PAGE = {
    "/": ("perl.rating", "page.html", "text/html"),
    "/page.js": ("perl.rating", "page.js", "text/javascript"),
    "/page.css": ("perl.rating", "page.css", "text/css"),
    "/report.css": ("perl.report", "page.css", "text/css"),
}


@dataclass(frozen=True)
class Ask:
    """A page's request for a question on held-out prompts, or on a typed conversation.

    Attributes:
        completions: 1, or 2 side by side.
        besides: ids of questions that the page already has.
        skipped: ids of those that this rater has skipped.
        typed: chat messages or a text.
    """

    rater: str
    completions: int = 1
    besides: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    typed: str | list[dict[str, str]] | None = None


@dataclass(frozen=True)
class Rate:
    """A rater's answer to a question; see `Opinion`."""

    rater: str
    question: str
    label: bool | None = None
    better: int | None = None
    correction: str | None = None


@dataclass(frozen=True)
class Undo:
    """A request to undo this rater's last rating."""

    rater: str


class RatingApp:
    """The routes and their shared state.

    Args:
        raters: the names that may rate; empty: any name.
        title: title of the page, which names the run.
    """

    def __init__(self, questions: Questions, log: RatingLog, raters: Sequence[str], title: str) -> None:
        self._questions, self._log, self._raters, self._title = questions, log, list(raters), title
        self._worker = Worker()
        self._known = {one.question.id: one.question for one in log.entries.values()}
        self._skipped: dict[str, set[str]] = defaultdict(set)

    def routes(self) -> Starlette:
        """Create the ASGI application."""
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
        """Return what the page shows in addition to the question."""
        return self._answer()

    async def next(self, request: Request) -> Response:
        """Return a question that this rater has not answered, first one that another rater has answered."""
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
        """Save a rating; the response is sent when it is on disk."""
        rate = await body_of(request, Rate)
        question = self._known.get(rate.question)
        if question is None:
            raise HTTPException(409, "this question is unknown because the server was restarted; reload the page")
        self._log.add(question, self._rater(rate.rater), Opinion(rate.label, rate.better, rate.correction))
        return self._answer()

    async def undo(self, request: Request) -> Response:
        """Undo a rater's last rating, and ask the question again."""
        rater = self._rater((await body_of(request, Undo)).rater)
        question = self._log.undo(rater)
        if question is None:
            raise HTTPException(409, "there is nothing to undo")
        self._known[question.id] = question
        return self._answer(question)

    def _waiting(self, rater: str, completions: int, besides: Sequence[str]) -> Question | None:
        """Return the first known question that this rater has neither answered nor skipped."""
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
            raise HTTPException(400, f"{name} is not one of the raters: {', '.join(self._raters)}")
        return name

    def _answer(self, question: Question | None = None) -> Response:
        """Return the state and a question to show, without anything that reveals whose completions these are."""
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
    return JSONResponse({"error": "too many requests for completions are waiting"}, 503, headers)
