"""A server with vLLM's endpoints on transformers and peft, in a thread, with faults to switch on.

It samples requests one by one, without a cache, with weights that peft loads from the adapter's folder, and shares
no code with the sampler that calls it.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

FAULTS = (
    "base served",
    "stale",
    "stale cache",
    "loads nothing",
    "dropped",
    "raw log-probs",
    "logits",
    "slow",
    "half answers",
    "cut answers",
    "no log-probs",
    "wrong scale",
    "refuses",
    "fails",
    "wants a key",
    "another server",
)


class FakeVllm:
    """One server.

    Attributes:
        fault: one of `FAULTS`, or none.
        loaded: names and folders of the loaded adapters.
        asked: the bodies of all requests for completions.
    """

    def __init__(self, folder: Path, max_model_len: int = 128) -> None:
        self._folder, self._max_len = folder, max_model_len
        self._lock = threading.Lock()
        self.fault = ""
        self.asked: list[dict[str, Any]] = []
        self.unloaded: list[str] = []
        self.port = 0
        self.restart()

    def restart(self) -> None:
        """Forget all adapters, as a new process does."""
        self.loaded: dict[str, str] = {}
        self._base = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32).eval()
        self._peft: PeftModel | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve requests inside this context."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                models = [{"id": "base", "root": str(fake._folder), "parent": None}]
                models += [{"id": name, "root": path, "parent": "base"} for name, path in fake.loaded.items()]
                self.answer(200, {"data": models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(*fake.answer(self.path, body))

            def answer(self, status: int, content: Any) -> None:
                refused = {"wants a key": 401, "another server": 404}
                if fake.fault in refused:
                    status, content = refused[fake.fault], {"error": fake.fault}
                data = json.dumps(content).encode()
                if fake.fault == "half answers" and self.path in ("/v1/completions", "/classify"):
                    data = data[: len(data) // 2]
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        class Listener(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                """Ignore clients that disconnect."""

        with Listener(("127.0.0.1", self.port), Handler) as server:
            self.port = server.server_port
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            if path == "/v1/load_lora_adapter":
                return self._load(body["lora_name"], body["lora_path"])
            if path == "/v1/unload_lora_adapter":
                self.unloaded.append(body["lora_name"])
                return (200, "") if self.loaded.pop(body["lora_name"], None) else (404, "cannot be found")
        self.asked.append(body)
        if self.fault == "slow":
            time.sleep(1.2)
        if self.fault == "fails":
            return 500, {"error": "EngineDeadError"}
        return self._complete(body)

    def _load(self, name: str, folder: str) -> tuple[int, Any]:
        if not Path(folder, "adapter_config.json").exists():
            return 404, "No adapter found"
        if name in self.loaded:
            return 400, "has already been loaded"
        if self.fault == "loads nothing":
            return 200, "Success"
        if self._peft is None:
            self._peft = PeftModel.from_pretrained(self._base, folder, adapter_name=name).eval()
        elif name not in self._peft.peft_config:
            self._peft.load_adapter(folder, adapter_name=name)
        self.loaded[name] = folder
        return 200, "Success"

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        if body["model"] != "base" and (body["model"] not in self.loaded or self.fault == "dropped"):
            return 404, "does not exist"
        if self.fault == "refuses" or len(body["prompt"]) + body["max_tokens"] > self._max_len:
            return 400, f"maximum context length is {self._max_len}"
        with self._lock, torch.no_grad():
            ids, log_probs = self._drawn(body)
        if self.fault == "cut answers":
            ids, log_probs = ids[:1], log_probs[:1]
        ended = ids[-1] in body["stop_token_ids"]
        choice = {
            "token_ids": ids,
            "prompt_token_ids": body["prompt"],
            "logprobs": None if self.fault == "no log-probs" else {"token_logprobs": log_probs},
            "finish_reason": "stop" if ended else "length",
        }
        return 200, {"choices": [choice]}

    def _drawn(self, body: dict[str, Any]) -> tuple[list[int], list[float]]:
        generator = torch.Generator().manual_seed(body["seed"])
        drawn: list[int] = []
        log_probs: list[float] = []
        for _ in range(body["max_tokens"]):
            logits = self._logits(body["model"], [*body["prompt"], *drawn])
            warm = (logits / body["temperature"]).log_softmax(-1)
            token = int(torch.multinomial(warm.exp(), 1, generator=generator))
            said = {"raw log-probs": logits.log_softmax(-1), "logits": logits + 100}.get(self.fault, warm)
            drawn.append(token)
            log_probs.append(float(said[token]))
            if token in body["stop_token_ids"]:
                break
        return drawn, log_probs

    def _logits(self, name: str, ids: list[int]) -> torch.Tensor:
        """Return the next token's logits from an adapter, or from the switched-on fault."""
        earlier = next((one for one in reversed(self._of_the_policy()) if one != name), name)
        stale = self.fault == "stale" or (self.fault == "stale cache" and len(ids) % 2)
        name = earlier if stale else name
        if name == "base" or self.fault == "base served":
            return self._as_base(ids)
        assert self._peft is not None
        if self._peft.active_adapter != name:
            self._peft.set_adapter(name)
        logits = self._peft(torch.tensor([ids])).logits[0, -1]
        return 2 * logits - self._as_base(ids) if self.fault == "wrong scale" else logits

    def _as_base(self, ids: list[int]) -> torch.Tensor:
        with self._peft.disable_adapter() if self._peft else nullcontext():
            return self._base(torch.tensor([ids])).logits[0, -1]

    def _of_the_policy(self) -> list[str]:
        return [name for name in (self._peft.peft_config if self._peft else {}) if name.startswith("policy")]
