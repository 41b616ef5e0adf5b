"""The page's server: access, saved ratings, and the next question."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from perl.data.jsonl import read_jsonl
from perl.rating.app import RatingApp
from perl.rating.log import RatingLog
from perl.server.guard import Guard
from tests.rating.asking import HOST, TOKEN, Made, one, page, two


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ratings.jsonl"


def ask(client: TestClient, rater: str = "ann", **more: Any) -> Any:
    answer = client.post("/api/next", json={"rater": rater, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["question"]


def rate(client: TestClient, question: Any, rater: str = "ann", **opinion: Any) -> Any:
    answer = client.post("/api/rate", json={"rater": rater, "question": question["id"], **opinion})
    assert answer.status_code == 200, answer.text
    return answer.json()["summary"]


def test_without_the_token_there_is_nothing(file: Path) -> None:
    known = page(file, Made())
    stranger = TestClient(known.app, f"http://{HOST}")
    for path in ("/", "/page.js", "/api/state", "/none", "/?token=wrong", "/?token="):
        answer = stranger.get(path)
        assert (answer.status_code, answer.content) == (403, b"")
        assert "set-cookie" not in answer.headers
    first = stranger.get(f"/?token={TOKEN}")
    assert first.status_code == 200
    assert "HttpOnly; SameSite=Strict" in first.headers["set-cookie"]
    assert stranger.get("/page.js").status_code == 200, "the cookie that the page got has it too"
    assert known.get("/api/state", headers={"Cookie": "", "Authorization": f"Bearer {TOKEN}"}).status_code == 200
    policy = first.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:8010"}, 403),
        ({"Origin": "http://127.0.0.1:9"}, 403),
        ({"Host": "evil.example:8010", "Origin": "http://evil.example:8010"}, 403),
        ({"Host": ""}, 403),
        ({"Host": "[::1", "Origin": "http://[::1"}, 403),
        ({"Host": "localhost:9000", "Origin": "http://localhost:9000"}, 200),
        ({"Content-Type": "text/plain"}, 415),
    ],
)
def test_another_page_cannot_post(headers: dict[str, str], status: int, file: Path) -> None:
    client = page(file, Made(one()))
    body = b'{"rater": "ann"}'
    headers = {"Content-Type": "application/json", "Cookie": f"token={TOKEN}", **headers}
    assert client.post("/api/next", content=body, headers=headers).status_code == status


def test_on_a_port_open_to_others_any_name_of_the_machine_does_but_the_token_stays(file: Path) -> None:
    app = RatingApp(Made(one()), RatingLog(file), [], "runs/tiny").routes()
    client = TestClient(Guard(app, any_host=True, token=TOKEN), "http://gpu.lab.example:8010")
    assert client.get("/").status_code == 403
    assert client.get(f"/?token={TOKEN}").status_code == 200
    body = {"json": {"rater": "ann"}}
    assert client.post("/api/next", **body, headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.post("/api/next", **body, headers={"Origin": "http://gpu.lab.example:8010"}).status_code == 200


def test_a_post_without_an_origin_needs_the_token_in_a_header(file: Path) -> None:
    client = page(file, Made(one()))
    del client.headers["Origin"]
    assert client.post("/api/next", json={"rater": "ann"}).status_code == 403
    client.headers["Authorization"] = f"Bearer {TOKEN}"
    assert client.post("/api/next", json={"rater": "ann"}).status_code == 200


def test_the_page_is_not_told_whose_completions_it_shows(file: Path) -> None:
    client = page(file, Made(two()))
    answer = client.post("/api/next", json={"rater": "ann", "completions": 2}).json()
    assert answer["question"] == {
        "id": two().id,
        "prompt": [{"role": "user", "content": "A latte, please."}],
        "completions": ["What size?", "No."],
        "typed": False,
    }


def test_two_raters_are_asked_the_same_and_their_agreement_is_known(file: Path) -> None:
    client = page(file, Made(one("a"), one("b"), two(), one("c")), ("ann", "bo"))
    for text, ann, bo in (("a", True, True), ("b", False, True)):
        question = ask(client)
        assert question["completions"] == [text]
        rate(client, question, label=ann)
        assert ask(client, "bo") == question
        summary = rate(client, question, "bo", label=bo)
    assert summary["raters"] == {"ann": 2, "bo": 2}
    # Values 1 1 / 0 1: observed 2, expected 6 of 3, so α = 1 - 3 · 2 / 6.
    assert summary["thumbs"] == {"questions": 2, "alpha": 0}
    pair = ask(client, completions=2)
    summary = rate(client, pair, better=0)
    assert summary["roles"] == [
        {"role": "base", "rated": 0, "up": 0, "compared": 0, "won": 0},
        {"role": "sft", "rated": 0, "up": 0, "compared": 1, "won": 0},
        {"role": "policy", "rated": 4, "up": 3, "compared": 1, "won": 1},
    ]
    answer = client.post("/api/next", json={"rater": "cy"})
    assert answer.status_code == 400
    assert "cy is not one of the raters: ann, bo" in answer.json()["error"]


def test_it_goes_on_where_it_was_left(file: Path) -> None:
    log = RatingLog(file)
    client = page(log, Made(one("a"), one("b")))
    rate(client, ask(client), label=True)
    log.close()
    client = page(file, Made(one("c")))
    assert client.get("/api/state").json()["summary"]["raters"] == {"ann": 1}
    assert ask(client, "bo")["completions"] == ["a"], "what ann has rated"
    assert ask(client)["completions"] == ["c"], "not what she has rated"
    answer = client.post("/api/rate", json={"rater": "ann", "question": one("b").id, "label": True})
    assert answer.status_code == 409, "it was shown by the server before, and was not rated"


def test_what_is_on_the_page_or_skipped_is_not_asked_again(file: Path) -> None:
    client = page(file, Made(one("a"), one("b"), one("c")))
    first = ask(client)
    assert ask(client)["id"] == first["id"]
    second = ask(client, besides=[first["id"]])
    assert second["completions"] == ["b"]
    assert ask(client, skipped=[first["id"], second["id"]])["completions"] == ["c"]
    assert ask(client, "bo")["completions"] == ["a"]


def test_undo_asks_again_and_a_typed_conversation_is_rated(file: Path) -> None:
    client = page(file, Made(one("a")))
    assert client.post("/api/undo", json={"rater": "ann"}).status_code == 409
    question = ask(client)
    rate(client, question, label=False)
    assert client.post("/api/undo", json={"rater": "ann"}).json()["question"] == question
    typed = ask(client, typed=[{"role": "user", "content": "<b>Hi</b>"}])
    assert typed["typed"]
    rate(client, typed, correction="Hello.")
    (demonstration,) = read_jsonl(file).demonstrations
    assert demonstration.context[0].text == "<b>Hi</b>"
    assert not read_jsonl(file).ratings


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"[", "not JSON"),
        (b"[]", "the request"),
        (b"[" * 100_000, "nested"),
        (b'{"rater": 1}', "rater"),
        (b'{"rater": " "}', "give a name"),
        (b'{"rater": "a\\u0000"}', "NUL"),
        (b'{"rater": "ann", "typed": [{"role": "boss", "content": "x"}]}', "unknown role 'boss'"),
        (b'{"rater": "ann", "typed": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        (b'{"rater": "ann", "typed": ""}', "prompt is empty"),
        (b'{"rater": "' + b"x" * 1_000_001 + b'"}', "longer than"),
    ],
)
def test_a_broken_request_is_told_what_is_wrong(body: bytes, what: str, file: Path) -> None:
    answer = page(file, Made()).post("/api/next", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 413)
    assert what in answer.json()["error"]


def test_a_disk_that_is_full_is_no_saved(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = page(file, Made(one()))
    question = ask(client)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    answer = client.post("/api/rate", json={"rater": "ann", "question": question["id"], "label": True})
    assert answer.status_code == 507
    assert "No space left on device" in answer.json()["error"]
    monkeypatch.undo()
    assert client.get("/api/state").json()["summary"]["raters"] == {}
    assert file.read_text() == ""
