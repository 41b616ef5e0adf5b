"""OpenAI's API over the single base of a run: base, SFT and policy as models, the reward model as a scorer.

It is for trying a run out, also with a chat front end; use vLLM in production. Scores have vLLM's format.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from perl.completion import Completion
from perl.data.records import Context
from perl.errors import UserError
from perl.library import LoadedRun
from perl.server.bodies import body_of
from perl.server.openai_requests import MAX_ROWS, ChatRequest, CompletionRequest, Generation, ScoreRequest
from perl.server.worker import RETRY_AFTER, BusyError, Worker

REWARD = "reward"


class UnknownModelError(HTTPException):
    """Raised for a name that is not one of the models here."""


@dataclass(frozen=True)
class Form:
    """How one of the two endpoints names and wraps generated text."""

    object: str
    stream_object: str
    prefix: str
    whole: Callable[[str], dict[str, Any]]
    piece: Callable[[str], dict[str, Any]]


CHAT = Form(
    "chat.completion",
    "chat.completion.chunk",
    "chatcmpl",
    lambda text: {"message": {"role": "assistant", "content": text}, "logprobs": None},
    lambda text: {"delta": {"role": "assistant", "content": text}, "logprobs": None},
)
TEXT = Form(
    "text_completion",
    "text_completion",
    "cmpl",
    lambda text: {"text": text, "logprobs": None},
    lambda text: {"text": text, "logprobs": None},
)


def openai_app(run: LoadedRun) -> Starlette:
    """Create the ASGI application."""
    api = _Api(run)
    post = {
        "/v1/chat/completions": api.chat,
        "/v1/completions": api.complete,
        "/v1/score": api.score,
        "/score": api.score,
    }
    return Starlette(
        routes=[
            Route("/v1/models", api.models),
            Route("/v1/models/{name}", api.model),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in post.items()),
        ],
        exception_handlers={HTTPException: _error, UserError: _error, BusyError: _error},
        lifespan=api.worker.lifespan,
    )


class _Api:
    def __init__(self, run: LoadedRun) -> None:
        self.worker, self._run, self._started = Worker(), run, int(time.time())
        self._roles = [str(role) for role in run.policies]
        self._names = [*self._roles, *([REWARD] if run.results.reward is not None else [])]

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self._names]})

    async def model(self, request: Request) -> Response:
        return JSONResponse(self._model(self._known(request.path_params["name"], self._names)))

    async def chat(self, request: Request) -> Response:
        return await self._generate(await body_of(request, ChatRequest), CHAT)

    async def complete(self, request: Request) -> Response:
        return await self._generate(await body_of(request, CompletionRequest), TEXT)

    async def score(self, request: Request) -> Response:
        """Return each answer's raw score, as vLLM does, and in addition the calibrated probability."""
        asked = await body_of(request, ScoreRequest)
        self._known(asked.model, [REWARD])
        answered = asked.answered()
        scores = await self.worker.run(lambda: self._run.score_answers(answered))
        data = [
            {"index": index, "object": "score", "score": one.score, "probability": one.probability}
            for index, one in enumerate(scores)
        ]
        return JSONResponse({**self._head("score", "list", REWARD), "data": data})

    async def _generate(self, asked: ChatRequest | CompletionRequest, form: Form) -> Response:
        role, settings = self._known(asked.model, self._roles), asked.generation()
        contexts = [context for context in asked.contexts() for _ in range(settings.n)]
        if not 0 < len(contexts) <= (1 if asked.stream else MAX_ROWS):
            most = "a stream has 1" if asked.stream else f"1 to {MAX_ROWS} are allowed"
            raise HTTPException(400, f"{len(contexts)} completions are requested; {most}")
        if asked.stream:
            return await self._stream(asked, contexts[0], role, settings, form)
        drawn = await self.worker.run(
            lambda: self._run.draw(contexts, role, settings.max_tokens, settings.temperature, settings.seed)
        )
        choices = []
        for index, one in enumerate(drawn):
            text, reason = settings.cut(one)
            choices.append({"index": index, **form.whole(text), "finish_reason": reason})
        prompts = sum(one.prompt_tokens for one in drawn[:: settings.n])
        usage = _usage(prompts, sum(one.tokens for one in drawn))
        return JSONResponse({**self._head(form.prefix, form.object, role), "choices": choices, "usage": usage})

    async def _stream(
        self,
        asked: ChatRequest | CompletionRequest,
        context: Context,
        role: str,
        settings: Generation,
        form: Form,
    ) -> Response:
        """Stream server-sent events, one for every few tokens."""

        def pieces() -> Iterator[Completion]:
            arguments = settings.max_tokens, settings.temperature, settings.seed
            for one in self._run.pieces(context, role, *arguments):
                yield one
                if settings.stops(one.text):
                    return

        head, drawn = self._head(form.prefix, form.stream_object, role), self.worker.stream(pieces)
        first = await anext(drawn)  # invalid requests are refused here, before the stream starts

        async def events() -> AsyncIterator[str]:
            said, last = "", first
            piece: Completion | None = first
            while piece is not None:
                last, text = piece, settings.settled(piece)
                if text.startswith(said) and text != said:
                    yield _event(head, [{"index": 0, **form.piece(text[len(said) :]), "finish_reason": None}])
                    said = text
                piece = await anext(drawn, None)
            text, reason = settings.cut(last)
            yield _event(head, [{"index": 0, **form.piece(text[len(said) :]), "finish_reason": reason}])
            if asked.include_usage:
                yield _event(head, [], usage=_usage(last.prompt_tokens, last.tokens))
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    def _known(self, name: str, names: list[str]) -> str:
        if name not in names:
            raise UnknownModelError(404, f"there is no model {name!r} here; models: {', '.join(names) or 'none'}")
        return name

    def _model(self, name: str) -> dict[str, object]:
        return {"id": name, "object": "model", "created": self._started, "owned_by": "perl-rlhf"}

    def _head(self, prefix: str, kind: str, model: str) -> dict[str, object]:
        return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def _event(head: dict[str, object], choices: list[dict[str, object]], **more: object) -> str:
    return f"data: {json.dumps({**head, 'choices': choices, **more}, ensure_ascii=False)}\n\n"


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _error(request: Request, error: Exception) -> Response:
    """Return an error in OpenAI's format."""
    headers, code = None, None
    match error:
        case UnknownModelError():
            status, message, code = error.status_code, error.detail, "model_not_found"
        case BusyError():
            status, message, headers = 503, "too many requests are waiting", {"Retry-After": str(RETRY_AFTER)}
            code = "overloaded"
        case HTTPException(status_code=404):
            status, message = 404, f"there is nothing at {request.method} {request.url.path}"
        case HTTPException():
            status, message = error.status_code, error.detail
        case _:
            status, message = 400, str(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return JSONResponse(body, status, headers)
