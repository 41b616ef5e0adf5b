"""Questions without a model, and a page's requests without a browser."""

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
    """A completion of a role, at made-up settings."""
    return Drawn(text, role, "base", None if role == "base" else "adapter", 1.0, 8, 5, 0, 1)


def one(text: str = "What size?", role: str = "policy") -> Question:
    return Question(CHAT, "d1", (drawn(text, role),), "random")


def two(first: str = "What size?", second: str = "No.") -> Question:
    return Question(CHAT, "d1", (drawn(first), drawn(second, "sft")), "random")


class Made:
    """Stands for `Questions`: gives these, one draw each."""

    roles = ("base", "sft", "policy")
    is_text = False

    def __init__(self, *questions: Question) -> None:
        self.left = list(questions)

    def draw(self, completions: int, known: set[str]) -> list[Question]:
        return [self.left.pop(0)]

    def draw_for(self, context: Any, completions: int) -> Question:
        return Question(context, None, (drawn("Hello!"),), "typed")


def page(file: Path | RatingLog, questions: Any, raters: tuple[str, ...] = ()) -> TestClient:
    """What a page in a browser sends: with the cookie, and an Origin."""
    log = RatingLog(file) if isinstance(file, Path) else file
    app = RatingApp(questions, log, raters, "runs/tiny").routes()
    client = TestClient(Guard(app, token=TOKEN), f"http://{HOST}", headers={"Origin": f"http://{HOST}"})
    client.cookies.set("token", TOKEN)
    return client
