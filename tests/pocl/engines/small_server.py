"""A completions server of a bigram model, as vLLM's answers, that misbehaves as it is told."""

import itertools
import json
import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

VOCABULARY = 1_000


class SmallServer(ThreadingHTTPServer):
    """Attributes that make it misbehave are set while it runs."""

    daemon_threads = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reseed(seed)
        self.how = ""
        self.asked: list[dict[str, Any]] = []
        self.busy = self.most_busy = 0
        self.refuse_next: list[tuple[int, dict[str, str]]] = []
        self.hang_up_next = 0
        self.pause = 0.0
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """Who asks may leave before the answer comes."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def reseed(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.table = (3 * torch.randn(VOCABULARY, VOCABULARY, generator=generator)).log_softmax(-1)


@contextmanager
def serving(seed: int = 0) -> Iterator[SmallServer]:
    server = SmallServer(seed)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: SmallServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "big", "max_model_len": 128}, {"id": "other"}]})

    def do_POST(self) -> None:
        server = self.server
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.keys.add(self.headers.get("Authorization"))
        with server.lock:
            server.asked.append(question)
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            refusal = server.refuse_next.pop(0) if server.refuse_next else None
            hangs_up = server.hang_up_next > 0
            server.hang_up_next -= hangs_up
        try:
            time.sleep(server.pause)
            if hangs_up:
                self.close_connection = True
            elif refusal:
                self.reply({"error": f"busy, {self.headers.get('Authorization')}"}, *refusal)
            else:
                self.complete(question)
        finally:
            with server.lock:
                server.busy -= 1

    def complete(self, question: dict[str, Any]) -> None:
        how, ids, k = self.server.how, question["prompt"], question.get("prompt_logprobs")
        if how == "max_logprobs" and (k or 0) > 5:
            message = f"Requested prompt logprobs of {k}, which is greater than max allowed: 5"
            return self.reply({"error": {"message": message}}, 400)
        if how == "no_json":
            return self.reply(b"<html>a proxy</html>")
        choice: dict[str, Any] = {"text": ""}
        last = self.table(ids[-1], 5 if how == "fewer" else 50)
        if question.get("logprobs") and how != "writes_nothing":
            best = list(last.values())[: question["logprobs"]]
            choice["logprobs"] = {"top_logprobs": [{f"token_id:{i}": entry["logprob"] for i, entry in enumerate(best)}]}
        if k is not None and how != "no_prompt_logprobs":
            choice["prompt_logprobs"] = [None, *self.of_prompt(ids, k)]
        if question.get("return_token_ids"):
            answer, token = [], ids[-1]
            for _ in range(question["max_tokens"]):
                token = int(self.server.table[token].argmax())
                answer.append(token)
                if token in question["stop_token_ids"]:
                    break
            choice["token_ids"] = answer
        return self.reply({"choices": [choice]})

    def of_prompt(self, ids: list[int], k: int) -> list[Any]:
        how = self.server.how
        positions = []
        for before, token in itertools.pairwise(ids):
            found = self.table(before, min(k, 5) if how == "fewer" else k)
            own = float(self.server.table[before, token])
            rank = int((self.server.table[before] > own).sum()) + 1
            found.setdefault(str(token), {"logprob": own, "rank": rank, "decoded_token": self.text(token)})
            positions.append(found)
        if how == "shifted":  # the right tokens under the numbers of the position behind
            positions = [
                {str(ids[i + 1]): {"logprob": -5.0, "rank": 400, "decoded_token": None}}
                | positions[min(i + 1, len(positions) - 1)]
                for i in range(len(positions))
            ]
        if how == "one_off":  # the list begins one token late
            positions = [*positions[1:], positions[-1]]
        for found in positions:
            entries = list(found.values())
            if how == "nan":
                entries[0]["logprob"] = math.nan
            if how == "tempered":
                for entry in entries:
                    entry["logprob"] = entry["logprob"] * 2
            if how == "logits":
                for entry in entries:
                    entry["logprob"] = entry["logprob"] + 20
            if how == "padded":
                found["1003"] = {"logprob": -9.0, "rank": 1, "decoded_token": ""}
        return positions

    def table(self, before: int, k: int) -> dict[str, Any]:
        values, ids = self.server.table[before].topk(k)
        return {
            str(token): {"logprob": value, "rank": place + 1, "decoded_token": self.text(token)}
            for place, (value, token) in enumerate(zip(values.tolist(), ids.tolist(), strict=True))
        }

    def text(self, token: int) -> str:
        names = ("<pad>", "<eos>", "<unk>")
        shift = 1 if self.server.how == "other_tokenizer" else 0
        return names[token] if token < 3 else f"\u0120w{token - 3 + shift}"
