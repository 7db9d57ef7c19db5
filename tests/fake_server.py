"""A server on loopback that speaks OpenAI's API as it is told to: well, badly or not at all."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def chat(text: str | None, finish: str = "stop", tokens: tuple[int, int] | None = (100, 5), **message) -> dict:
    """A chat completion's body. message: more of it, as `refusal`."""
    choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
    return {"object": "chat.completion", "model": "fake-2026", "choices": [choice], **usage(tokens)}


def completion(text: str, finish: str = "stop", tokens: tuple[int, int] | None = (100, 5)) -> dict:
    choice = {"index": 0, "finish_reason": finish, "text": text}
    return {"object": "text_completion", "model": "fake-2026", "choices": [choice], **usage(tokens)}


def usage(tokens: tuple[int, int] | None) -> dict:
    return {"usage": dict(zip(("prompt_tokens", "completion_tokens"), tokens))} if tokens else {}


def with_logprobs(body: dict, *tokens: tuple[str, dict[str, float]]) -> dict:
    """The body with every token of its text and the candidates in its place: {token: log-probability}."""
    content = [
        {"token": t, "logprob": top.get(t, -99.0), "top_logprobs": [{"token": o, "logprob": p} for o, p in top.items()]}
        for t, top in tokens
    ]
    body["choices"][0]["logprobs"] = {"content": content}
    return body


def error(status: int, message: str, code: str | None = None, param: str | None = None, **headers: str) -> tuple:
    """An error of the API: (status, body, headers)."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return status, {"error": {"message": message, "type": "error", "param": param, "code": code}}, named


CUT, HANG = "cut", "hang"  # the connection ends in the middle of a body; no answer before the server is closed


class FakeServer:
    """`answer(path, request)` gives the body as a dict or bytes, (status, body, headers), CUT or HANG."""

    def __init__(self, answer: Callable[[str, dict], object]):
        self.answer, self.requests, self.keys = answer, [], []
        self.closing, lock = threading.Event(), threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args) -> None:
                pass

            def do_GET(self) -> None:
                self.send(fake.answer(self.path, {}))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    fake.requests.append(request)
                    fake.keys.append(self.headers["authorization"])
                self.send(fake.answer(self.path, request))

            def send(self, answer) -> None:
                if answer == HANG:
                    fake.closing.wait()
                    self.close_connection = True
                    return
                if answer == CUT:
                    self.send_response(200)
                    self.send_header("content-length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choices"')
                    self.close_connection = True
                    return
                status, body, headers = answer if isinstance(answer, tuple) else (200, answer, {})
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in {"content-type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()


@contextlib.contextmanager
def serving(answer) -> Iterator[FakeServer]:
    """A fake server that gives `answer`: a function, or a list of answers for one request after the other."""
    if isinstance(answer, list):
        left = iter(answer)
        server = FakeServer(lambda path, request: next(left))
    else:
        server = FakeServer(answer)
    server.thread.start()
    try:
        yield server
    finally:
        server.close()
