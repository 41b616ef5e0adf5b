"""Questions made without a model, and a page's requests made without a browser."""

from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from perl.data.records import Turn
from perl.rating.app import RatingApp
from perl.rating.log import RatingLog
from perl.rating.questions import Drawn, Question
from perl.server.guard import Guard

CHAT = (Turn("user", "A latte, please."),)
TOKEN = "secret"
HOST = "127.0.0.1:8010"


def drawn(text: str, role: str = "policy") -> Drawn:
    """Return a completion of a role with made-up sampling settings."""
    return Drawn(text, role, "base", None if role == "base" else "adapter", 1.0, 8, 5, 0, 1)


def one(text: str = "What size?", role: str = "policy") -> Question:
    return Question(CHAT, "d1", (drawn(text, role),), "random")


def two(first: str = "What size?", second: str = "No.") -> Question:
    return Question(CHAT, "d1", (drawn(first), drawn(second, "sft")), "random")


class Made:
    """Replaces `Questions`: returns the given questions, one per draw."""

    roles = ("base", "sft", "policy")
    is_text = False

    def __init__(self, *questions: Question) -> None:
        self.left = list(questions)

    def draw(self, completions: int, known: set[str]) -> list[Question]:
        return [self.left.pop(0)]

    def draw_for(self, context: Any, completions: int) -> Question:
        return Question(context, None, (drawn("Hello!"),), "typed")


def page(file: Path | RatingLog, questions: Any, raters: tuple[str, ...] = ()) -> TestClient:
    """Return a client whose requests have the cookie and the Origin of a page in a browser."""
    log = RatingLog(file) if isinstance(file, Path) else file
    app = RatingApp(questions, log, raters, "runs/tiny").routes()
    client = TestClient(Guard(app, token=TOKEN), f"http://{HOST}", headers={"Origin": f"http://{HOST}"})
    client.cookies.set("token", TOKEN)
    return client
