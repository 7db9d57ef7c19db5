"""A server's answers to a task's rows: asked for by several threads, kept as they come, and read as predictions.

responses.jsonl has a line for every answer, in the order in which they came: what was paid for is there, whatever ends
the run, and is never asked for again.
"""

import contextlib
import json
import math
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import rewards
from evaluation.endpoint import Endpoint, EndpointError, GivenUp, Prompt, Reply
from evaluation.predictions import Prediction
from machine.errors import ArgumentError
from machine.files import append_lines, read_json_lines
from machine.terminal import Progress
from tasks import Task
from tasks.labels import fold

FILE = "responses.jsonl"
GRACE = 15.0  # seconds for which the answers that are on their way are waited for when a run is stopped
THOUGHT_END = "</think>"  # some servers leave a model's thoughts in front of its answer
AMBIGUOUS = 0.01  # of a token's probability that several labels may share, as "n" of "negative" and "neutral"


@dataclass(frozen=True)
class Response:
    """A line of responses.jsonl.

    Attributes:
        row: the number of the row among those asked, from 0; the run's prompts are fixed by run.json.
        id: the row's own.
        text, finish, input_tokens, output_tokens, model: as in Reply.
        probabilities: of every label; None where the server gives none.
    """

    row: int
    id: object
    text: str
    finish: str
    input_tokens: int | None
    output_tokens: int | None
    model: str
    probabilities: list[float] | None


@dataclass(frozen=True)
class Reader:
    """How a task's replies are read.

    chat: the server began the assistant's turn, so the reply holds the tag that prompts otherwise begin it with.
    """

    task: Task
    chat: bool
    use_CoT: bool
    strict_format: bool

    @property
    def wants_probabilities(self) -> bool:
        """Whether probabilities of tokens say something about labels: not behind an analysis, and not of numbers."""
        return bool(self.task.words) and not self.task.number and not self.use_CoT

    def answer_start(self, text: str) -> int:
        """Where the text begins that `rewards.parse` takes: behind a thought and the first tag, if they are there."""
        if not self.chat:
            return 0
        opening = rewards.ANALYSIS if self.use_CoT else rewards.JUDGEMENT
        thought = text.rfind(THOUGHT_END)
        start = thought + len(THOUGHT_END) if thought >= 0 else 0
        tag = text.find(opening, start)
        return tag + len(opening) if tag >= 0 else start

    def response(self, number: int, row: dict, reply: Reply) -> Response:
        probabilities = None
        if self.wants_probabilities:
            probabilities = label_probabilities(self.task, reply, self.answer_start(reply.text))
        tokens = reply.input_tokens, reply.output_tokens
        return Response(number, row["id"], reply.text, reply.finish, *tokens, reply.model, probabilities)

    def prediction(self, response: Response) -> Prediction:
        text = response.text[self.answer_start(response.text) :]
        ended = response.finish == "stop"
        how = dict(strict_format=self.strict_format, use_CoT=self.use_CoT)
        label = rewards.parse(self.task, text, ended, **how)
        if response.probabilities is None:
            return Prediction(text, label)
        return Prediction(text, label, response.probabilities[-1], np.array(response.probabilities))


def label_probabilities(task: Task, reply: Reply, start: int) -> list[float] | None:
    """(labels,) probabilities of a task's words, from the candidates for the token in which the answer begins.

    A candidate counts for the label that it is or begins. What remains is scaled to a sum of 1; a word that is not
    among the candidates has 0. None where the server names no candidates, or where labels begin alike.
    start: where the answer begins in the reply's text.
    """
    start += len(reply.text[start:]) - len(reply.text[start:].lstrip())
    before, others = candidates_at(reply, start)
    totals, shared = [0.0] * len(task.words), 0.0
    for other, log_probability in others.items():
        labels = labels_begun(task, other.removeprefix(before).lstrip() if other.startswith(before) else "")
        chance = math.exp(min(0.0, log_probability))
        if len(labels) > 1:
            shared += chance
        for label in labels:
            totals[label] += chance
    total = sum(totals)
    return [value / total for value in totals] if total > 0 and shared <= AMBIGUOUS * total else None


def candidates_at(reply: Reply, start: int) -> tuple[str, dict[str, float]]:
    """The candidates for the token at this position of the text, and what of that token stands before it but for white
    space (as ">" in "> yes"); no candidates if that is not known."""
    begin = 0
    for token, others in reply.candidates:
        if start >= len(reply.text) or not reply.text.startswith(token, begin):
            break  # the tokens are not those of the text
        if begin + len(token) > start:
            return token[: start - begin].strip(), others
        begin += len(token)
    return "", {}


def labels_begun(task: Task, text: str) -> set[int]:
    """The labels whose word a token is, begins, or contains as a whole word at its beginning."""
    if not text:
        return set()
    folded, whole = fold(text), rewards.parse(task, text)
    found = {label for label, word in enumerate(task.words) if fold(word).startswith(folded)}
    return found if whole is None else found | {whole}


def kept(path: Path) -> dict[int, Response]:
    """The responses of an earlier start, by row; a line that was cut off is removed from the file. Raises ArgumentError
    for a line that is none."""
    if not path.exists():
        return {}
    try:
        lines = list(read_json_lines(path, lambda line: asdict(Response(**line))))
    except ValueError as error:
        raise ArgumentError(f"{error}; all that is removed is asked, and paid, again") from error
    data = path.read_bytes()
    os.truncate(path, data.rfind(b"\n") + 1)
    return {line["row"]: Response(**line) for line in lines}


def ask_all(
    server: Endpoint,
    reader: Reader,
    rows: list[dict],
    prompts: list[Prompt],
    path: Path,
    concurrency: int,
    opening: Reply | None = None,
) -> list[Response]:
    """The responses to all prompts, in their order; each is added to the file at `path` when it comes, and what is
    there already is not asked again.

    opening: the first prompt's reply, if it was asked before. Raises EndpointError, which says how many are kept.
    """
    task, found, lock = reader.task, kept(path), threading.Lock()

    def keep(number: int, reply: Reply) -> None:
        response = reader.response(number, rows[number], reply)
        with lock:
            append_lines(path, [json.dumps(asdict(response), ensure_ascii=False)])
            found[number] = response

    def ask(number: int) -> None:
        keep(number, server.ask(prompts[number], f"row {rows[number]['id']} of {task.name}"))

    if opening is not None and 0 not in found:
        keep(0, opening)
    todo = [number for number in range(len(prompts)) if number not in found]
    with Progress(task.name, "row", len(prompts), len(found)) as progress:
        try:
            if todo and not server.answered:
                ask(todo.pop(0))  # alone: it finds out what the server takes
                progress.advance(1)
            in_threads(ask, todo, concurrency, server, progress.advance)
        except EndpointError as error:
            raise EndpointError(
                f"{error}; {len(found)} of {len(prompts)} answers are kept: go on with --resume {path.parent}"
            ) from error
    return [found[number] for number in range(len(prompts))]


def in_threads(
    ask: Callable[[int], None], todo: list[int], concurrency: int, server: Endpoint, advance: Callable[[int], None]
) -> None:
    """Call `ask` for all numbers, so many at a time, and `advance(1)` after each. The first error ends it.

    Whatever ends it, a signal too: answers that are on their way are waited for, but not for long. They are paid for.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    for number in todo:
        waiting.put(number)

    def work() -> None:
        with contextlib.suppress(queue.Empty, GivenUp):
            while not server.stopping.is_set():
                number = waiting.get_nowait()
                try:
                    ask(number)
                except GivenUp:
                    raise
                except BaseException as error:
                    done.put(error)
                    return
                done.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(concurrency, len(todo)))]
    try:
        for thread in threads:
            thread.start()
        for _ in todo:
            error = done.get()
            if error is not None:
                raise error
            advance(1)
    except BaseException:
        server.give_up()
        raise
    finally:
        end = time.monotonic() + GRACE
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
