"""OpenAI's API: its format, the library's values, and errors in OpenAI's format."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import perl
from perl.completion import Completion
from perl.data.records import Turn
from perl.library import LoadedRun
from perl.server import openai
from perl.server.guard import Guard
from perl.server.openai import openai_app
from perl.server.openai_requests import Generation
from perl.server.worker import Worker
from tests.exported import make, recipe_on

CHAT = [{"role": "user", "content": "A latte, please."}]


@pytest.fixture(scope="module")
def run(tiny_llama: Path, mixed_data: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """Return a run whose roles have random weights."""
    return perl.load_run(make(tmp_path_factory.mktemp("runs") / "out", recipe_on(tiny_llama, mixed_data)))


@pytest.fixture
def client(run: LoadedRun) -> Iterator[TestClient]:
    with TestClient(Guard(openai_app(run)), "http://127.0.0.1:8000") as client:
        yield client


def post(client: TestClient, path: str, **body: Any) -> Any:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(client: TestClient, path: str, **body: Any) -> list[Any]:
    text = client.post(path, json={**body, "stream": True}).text
    said = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert said.pop() == "[DONE]"
    return [json.loads(line) for line in said]


def test_the_models_are_the_roles_and_the_reward_model(client: TestClient) -> None:
    models = client.get("/v1/models").json()
    assert models["object"] == "list"
    assert [one["id"] for one in models["data"]] == ["base", "sft", "policy", "reward"]
    assert client.get("/v1/models/sft").json() == models["data"][1]
    assert client.get("/v1/models/gpt").json()["error"]["code"] == "model_not_found"
    unknown = client.get("/v1/embeddings")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, None)
    assert unknown.json()["error"]["message"] == "there is nothing at GET /v1/embeddings"


def test_a_chat_is_completed_as_the_library_completes_it(client: TestClient, run: LoadedRun) -> None:
    content = [{"type": "text", "text": "A latte, "}, {"type": "text", "text": "please."}]
    parts = [{"role": "user", "content": content}]
    body = {"model": "sft", "max_completion_tokens": 12, "temperature": 0.7, "seed": 3, "n": 2, "top_p": 1}
    answer = post(client, "/v1/chat/completions", messages=parts, **body)
    expected = run.draw([(Turn("user", "A latte, please."),)] * 2, "sft", 12, 0.7, 3)
    assert answer["object"] == "chat.completion"
    assert [choice["message"] for choice in answer["choices"]] == [
        {"role": "assistant", "content": one.text} for one in expected
    ]
    assert [choice["finish_reason"] for choice in answer["choices"]] == [
        "stop" if one.ended else "length" for one in expected
    ]
    drawn = sum(one.tokens for one in expected)
    prompt = expected[0].prompt_tokens
    assert answer["usage"] == {
        **{"prompt_tokens": prompt, "completion_tokens": drawn},
        "total_tokens": prompt + drawn,
    }


def test_texts_are_completed(client: TestClient, run: LoadedRun) -> None:
    answer = post(client, "/v1/completions", model="base", prompt=["A latte", "Tea"], max_tokens=5, seed=1)
    assert [one["text"] for one in answer["choices"]] == run.generate(
        ["A latte", "Tea"], "base", max_new_tokens=5, seed=1
    )
    coldest = {"model": "base", "prompt": "A latte", "max_tokens": 8, "temperature": 0}
    texts = {post(client, "/v1/completions", **coldest, seed=seed)["choices"][0]["text"] for seed in range(3)}
    assert len(texts) == 1, "temperature 0 takes the likeliest token"


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_says_the_same_piece_by_piece(seed: int, client: TestClient) -> None:
    body = {"model": "policy", "messages": CHAT, "max_tokens": 50, "seed": seed}
    whole = post(client, "/v1/chat/completions", **body)
    pieces = events(client, "/v1/chat/completions", **body, stream_options={"include_usage": True})
    *said, counted = pieces
    (expected,) = whole["choices"]
    assert {one["object"] for one in pieces} == {"chat.completion.chunk"}
    assert "".join(one["choices"][0]["delta"]["content"] for one in said) == expected["message"]["content"]
    assert [one["choices"][0]["finish_reason"] for one in said][-1] == expected["finish_reason"]
    assert counted["usage"] == whole["usage"]
    assert len(said) > 2 or whole["usage"]["completion_tokens"] < 48


def test_a_stop_sequence_ends_and_no_beginning_of_it_is_streamed() -> None:
    settings = Generation(None, None, 1, 0, stop=("END", "stop"))
    assert settings.cut(Completion("one END two", True, 5, 5)) == ("one ", "stop")
    assert settings.cut(Completion("one", False, 5, 5)) == ("one", "length")
    assert settings.settled(Completion("one EN", False, 5, 5)) == "one"
    assert settings.settled(Completion("one END", False, 5, 5)) == "o"
    assert settings.settled(Completion("EN", False, 5, 5)) == ""  # shorter than what is held back
    assert Generation(None, None, 1, 0, ()).settled(Completion("caf\ufffd", False, 5, 5)) == "caf"


def test_a_stop_sequence_in_a_stream(client: TestClient) -> None:
    body = {"model": "base", "prompt": "A latte", "max_tokens": 40, "seed": 5}
    text = post(client, "/v1/completions", **body)["choices"][0]["text"]
    stop = text[20:23]
    pieces = events(client, "/v1/completions", **body, stop=stop)
    assert "".join(one["choices"][0]["text"] for one in pieces) == text[: text.index(stop)]
    assert pieces[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", ["/score", "/v1/score"])
def test_scores_are_the_reward_models(path: str, client: TestClient, run: LoadedRun) -> None:
    answers = ["What size?", "No."]
    answer = post(client, path, model="reward", text_1=CHAT, text_2=answers)
    scores, chances = (run.score([CHAT, CHAT], answers, probability=which) for which in (False, True))
    assert answer["object"] == "list"
    assert answer["data"] == [
        {"index": index, "object": "score", "score": pytest.approx(score), "probability": pytest.approx(chance)}
        for index, (score, chance) in enumerate(zip(scores, chances, strict=True))
    ]
    texts = post(client, path, model="reward", text_1=["A latte", "Tea"], text_2=answers)["data"]
    assert [one["score"] for one in texts] == pytest.approx(run.score(["A latte", "Tea"], answers))


@pytest.mark.parametrize(
    ("path", "change", "status", "what"),
    [
        ("/v1/completions", {"model": "gpt-4"}, 404, "models: base, sft, policy"),
        ("/v1/completions", {"model": "reward"}, 404, "no model 'reward'"),
        ("/v1/completions", {"prompt": [1, 2]}, 400, "prompt"),
        ("/v1/completions", {"prompt": ""}, 400, "prompt is empty"),
        ("/v1/completions", {"prompt": []}, 400, "0 completions"),
        ("/v1/completions", {"max_tokens": 0}, 400, "max_tokens"),
        ("/v1/completions", {"max_tokens": 256}, 400, "context is 256 tokens"),
        ("/v1/completions", {"max_tokens": 256, "stream": True}, 400, "context is 256 tokens"),
        ("/v1/completions", {"temperature": -1}, 400, "temperature"),
        ("/v1/completions", {"n": 2, "stream": True}, 400, "2 completions"),
        ("/v1/completions", {"n": 64, "prompt": ["a", "b"]}, 400, "128 completions"),
        ("/v1/completions", {"top_p": 0.9}, 400, "top_p"),
        ("/v1/completions", {"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ("/v1/completions", {"top_k": 5}, 400, "top_k"),
        ("/v1/completions", {"suffix": "."}, 400, "suffix"),
        ("/v1/chat/completions", {"messages": []}, 400, "prompt is empty"),
        ("/v1/chat/completions", {"messages": [{"role": "boss", "content": "a"}]}, 400, "unknown role 'boss'"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            400,
            "a list",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
            400,
            "content is null",
        ),
        ("/v1/chat/completions", {"messages": CHAT, "tools": [{}]}, 400, "tools"),
        ("/v1/chat/completions", {"messages": CHAT, "response_format": {"type": "json_object"}}, 400, "response_"),
        ("/score", {"model": "reward", "text_1": ["a", "b"], "text_2": "c"}, 400, "2 prompts, text_2 1"),
        ("/score", {"model": "policy", "text_1": "a", "text_2": "c"}, 404, "no model 'policy'"),
        ("/v1/embeddings", {}, 404, "nothing at POST /v1/embeddings"),
    ],
)
def test_what_cannot_be_done_is_an_error_in_openais_form(
    path: str, change: dict[str, Any], status: int, what: str, client: TestClient
) -> None:
    usual = {"prompt": "A latte"} if path == "/v1/completions" else {}
    answer = client.post(path, json={"model": "base", **usual, **change})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert what in error["message"]


def test_pages_elsewhere_cannot_ask(client: TestClient) -> None:
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
        assert client.get("/v1/models", headers=headers).status_code == 403
    answer = client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


def test_where_the_queue_is_full_one_is_asked_to_come_again(
    run: LoadedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, gate = Worker(places=1), threading.Event()
    monkeypatch.setattr(openai, "Worker", lambda: worker)
    with TestClient(openai_app(run), "http://127.0.0.1:8000") as client:
        waiting = worker.submit(gate.wait)
        for stream in (False, True):
            body = {"model": "base", "prompt": "A latte", "stream": stream}
            answer = client.post("/v1/completions", json=body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["error"]["code"] == "overloaded"
        gate.set()
        assert waiting.result()
