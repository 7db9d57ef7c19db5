"""A client of any server that speaks OpenAI's API: a prompt goes there, a reply comes back.

What is worth another try (429, 5xx, a lost connection) is tried again with growing pauses. Everything else ends with
one sentence that names the server, what it said and the way out. The key is read from the environment alone, and shown
and written nowhere.
"""

import contextlib
import json
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from machine.errors import UserError

KEY = "OPENAI_API_KEY"
NO_KEY = "none"  # the client sends some key, and a local server reads none
TIMEOUT = 300.0  # seconds for one answer; requests wait in the queue of a server that answers one by one
CONNECT_TIMEOUT = 10.0  # seconds for a connection
ATTEMPTS, FIRST_ATTEMPTS = 8, 3  # requests for one answer; the latter before the server has ever answered
PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before the second attempt, doubled for each further one up to the latter
LONGEST_ASKED = 120.0  # seconds that a server may ask to wait for (Retry-After); a daily limit asks for hours
CHAT_CANDIDATES, TEXT_CANDIDATES, FEW = 20, 5, 5  # the most that OpenAI names per token; others name fewer
BASE_URL = "give the base URL of an OpenAI-compatible API, as a rule .../v1"
SHOWN = 200  # characters of a server's message

Prompt = str | list[dict[str, str]]  # a text to continue, or the turns of a chat


class EndpointError(UserError):
    """A server that gives no usable answer; the message says which, what it said and what to do."""


class Nonsense(ValueError):
    """A reply that is none of the API's; the message says what it is instead."""


class GivenUp(Exception):  # nothing is wrong: somebody else stopped the run
    """The run ends, so an answer is not waited for any longer."""


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        text: as the server sent it; empty for null.
        finish: the API's finish_reason: "stop" if the model itself ended the text, "length", "content_filter", ...
        input_tokens, output_tokens: as the server counts them; None if it does not say.
        model: the model that answered, as the server calls it.
        candidates: for every token of the text itself, and the most probable tokens in its place with their
            log-probabilities; empty where the server gives none.
    """

    text: str
    finish: str
    input_tokens: int | None = None
    output_tokens: int | None = None
    model: str = ""
    candidates: tuple[tuple[str, dict[str, float]], ...] = ()

    @property
    def ended(self) -> bool:
        """Whether the model itself ended the text."""
        return self.finish == "stop"


class Endpoint:
    """One model on one server. The first question finds out which of the optional parameters the server takes, so it
    must be answered before others are asked at the same time; from then on the object may be shared by threads."""

    def __init__(
        self,
        url: str,
        model: str,
        max_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        candidates: bool = True,
        pause: Callable[[float], object] | None = None,
    ):
        """candidates: ask for the probabilities of tokens. pause: waits so many seconds; default: until `give_up`."""
        from openai import OpenAI, Timeout

        self.url, self.model, self.key = url, model, os.environ.get(KEY, "")
        timeout = Timeout(TIMEOUT, connect=CONNECT_TIMEOUT)
        self.client = OpenAI(base_url=url, api_key=self.key or NO_KEY, max_retries=0, timeout=timeout)
        self.parameters: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        if seed is not None:
            self.parameters["seed"] = seed
        self.candidates = CHAT_CANDIDATES if candidates else 0
        self.answered = False  # whether the server has ever answered
        self.stopping = threading.Event()
        self.pause = pause or self.stopping.wait

    def give_up(self) -> None:
        """Let every thread that waits for its next attempt end with GivenUp."""
        self.stopping.set()

    def ask(self, prompt: Prompt, about: str = "") -> Reply:
        """The answer to a prompt. Raises EndpointError; GivenUp after `give_up`. about: which row it is, for errors."""
        import openai

        attempt = 0
        while True:
            try:
                reply = self._ask_once(prompt)
            except (openai.APIError, Nonsense) as error:
                if self._leave_out(error):
                    continue
                attempt += 1
                seconds = self._pause_before(attempt, error)
                if seconds is None:
                    raise EndpointError(self._explain(error, attempt, about)) from error
                self.pause(seconds)
                if self.stopping.is_set():
                    raise GivenUp from error
            else:
                self.answered = True
                return reply

    def _ask_once(self, prompt: Prompt) -> Reply:
        """One request. Raises openai.APIError, Nonsense."""
        import openai

        chat, given = isinstance(prompt, list), dict(self.parameters)
        api = self.client.chat.completions if chat else self.client.completions
        if self.candidates and chat:
            given |= {"logprobs": True, "top_logprobs": self.candidates}
        elif self.candidates:
            given["logprobs"] = min(self.candidates, TEXT_CANDIDATES)
        given |= {"messages" if chat else "prompt": prompt}
        try:
            response = api.with_raw_response.create(model=self.model, **given)
        except openai.BadRequestError as error:
            if error.code == "content_filter":  # of the prompt; that of an answer is a finish_reason
                return Reply("", error.code)
            raise
        return read_reply(response.text, chat)

    def _leave_out(self, error: Exception) -> bool:
        """Whether the error names a parameter that can be left out; it is from now on, and people are told so."""
        if self.answered or getattr(error, "status_code", None) not in (400, 422):
            return False
        said = f"{getattr(error, 'param', '')} {error}"
        if "logprobs" in said and self.candidates:
            self.candidates = FEW if self.candidates > FEW else 0
            return True
        if "max_completion_tokens" in said and "max_tokens" in self.parameters:  # what OpenAI's newer models call it
            self.parameters["max_completion_tokens"] = self.parameters.pop("max_tokens")
            return True
        for name in ("temperature", "seed"):
            if name in said and name in self.parameters:
                print(f"{self.model} takes no {name}: its answers are sampled as the server does it.")
                del self.parameters[name]
                return True
        return False

    def _pause_before(self, attempt: int, error: Exception) -> float | None:
        """The seconds before the next attempt; None if there should be none. attempt: how many there were."""
        status, asked = getattr(error, "status_code", None), retry_after(error)
        limited = status == 429 and getattr(error, "code", None) != "insufficient_quota"
        # A wrong URL and a server that is overloaded look alike until there was one answer.
        passing = limited or (status is not None and (status >= 500 or status in (408, 409)))
        passing = passing or (status is None and self.answered)
        most = ATTEMPTS if self.answered or limited else FIRST_ATTEMPTS
        if not passing or attempt >= most or asked > LONGEST_ASKED:
            return None
        grown = min(PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)
        return max(asked, grown * random.uniform(0.75, 1.0))  # threads that fail together must not return together

    def _explain(self, error: Exception, attempts: int, about: str) -> str:
        """The sentence for an error that stays."""
        import openai

        at, said = f"--endpoint {self.url}", self._said(error)
        tries = f" {attempts} times" if attempts > 1 else ""
        if isinstance(error, Nonsense):
            return f"{at} answers nonsense{tries}: {said}; {BASE_URL}"
        connected = type(error.__cause__).__name__ != "ConnectTimeout"
        if isinstance(error, openai.APITimeoutError) and connected:
            return f"{at} gave no answer within {TIMEOUT:.0f} s{tries}; lower --concurrency, or ask a faster server"
        if isinstance(error, openai.APIConnectionError):
            return f"{at} cannot be reached{tries} ({said}); start the server, or correct the URL"
        status = getattr(error, "status_code", None)
        if status == 401 and not self.key:
            return f"{at} asks for a key ({said}); set {KEY} in the environment"
        if status in (401, 403):
            return f"{at} refuses the key of {KEY} ({said}); set another one in the environment"
        if status == 404:
            return f"{at} answers 404 ({said}); {self._what_is_there()}"
        if status == 429:
            asked = retry_after(error)
            later = f"in {asked:.0f} s, as it asks" if asked > LONGEST_ASKED else "later"
            return f"{at} refuses more requests{tries} ({said}); lower --concurrency, or go on {later}"
        question = f" to {about}" if about and status < 500 else ""
        return f"{at} answers {status}{question}{tries}: {said}"

    def _what_is_there(self) -> str:
        """The way out of a 404: the models of the server, or another URL if it names none."""
        import openai

        with contextlib.suppress(openai.APIError, ValueError, KeyError, TypeError):
            data = json.loads(self.client.models.with_raw_response.list().text)["data"]
            names = ", ".join(sorted(str(model["id"]) for model in data)[:20])
            return f"--train_model_name {self.model} must be one of its models: {names}"
        return f"{BASE_URL}, and a model that it has"

    def _said(self, error: Exception) -> str:
        """What the server said, or why it could not be asked, in one short line without the key."""
        body = getattr(error, "body", None)
        named = [body.get(name) for name in ("message", "detail", "error")] if isinstance(body, dict) else []
        cause = None if isinstance(error, Nonsense) else error.__cause__
        text = str(next(filter(None, named), body) or cause or error)
        if self.key:
            text = text.replace(self.key, KEY)
        return short(text)


def read_reply(text: str, chat: bool) -> Reply:
    """A response's body as a Reply. Raises Nonsense if it is not what the API says."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise Nonsense(f"no JSON but {short(text, 60)!r}") from error
    try:
        (choice, *_) = body["choices"]
        message = choice["message"] if chat else {"content": choice["text"]}
        content = message["content"] if message.get("content") is not None else message.get("refusal") or ""
        usage = body.get("usage") or {}
        if not isinstance(content, str):
            raise TypeError
        return Reply(
            content,
            str(choice.get("finish_reason") or "stop"),
            *(count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens")),
            str(body.get("model") or ""),
            candidates_of(choice.get("logprobs"), chat),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Nonsense(f"no choices with a text but {short(text, 60)!r}") from error


def candidates_of(logprobs: Any, chat: bool) -> tuple[tuple[str, dict[str, float]], ...]:
    """Reply.candidates from a choice's `logprobs`; empty if they are absent or of a form that is not known."""
    try:
        if chat:
            return tuple(
                (token["token"], {other["token"]: float(other["logprob"]) for other in token["top_logprobs"]})
                for token in logprobs["content"]
            )
        return tuple(
            (token, {str(other): float(value) for other, value in (top or {}).items()})
            for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True)
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        return ()


def count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def retry_after(error: Exception) -> float:
    """The seconds that a server asks to wait, in either form of the header; 0 if it asks for none."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return max(0.0, float(headers[name]) * unit)
    with contextlib.suppress(KeyError, ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time())
    return 0.0


def short(text: str, most: int = SHOWN) -> str:
    """A text in one line, and cut if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}..."
