"""Reward functions: found by `--reward`, and called as TRL's GRPOTrainer calls them (docs/rewards.md).

A function takes keyword arguments alone: `prompts`, `completions`, `completion_ids`, `trainer_state`, `log_extra`,
`log_metric`, and every column of the dataset. It returns a number for each completion, or None where it has no opinion.
Nothing here imports torch, so a function that cannot be used is refused before that takes its seconds.
"""

import asyncio
import functools
import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType

from machine.errors import ArgumentError, TrainingError

GIVEN = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
NOT_COLUMNS = ("prompt", "completion", "completion_ids")  # which TRL keeps to itself
CONVERSATIONS = re.compile(r"(typing\.)?list\[(typing\.)?list\[", re.IGNORECASE)
Failing = Callable[[str], AbstractContextManager]  # in it, whatever is raised becomes an error with this name


# -------------------------------------------------------------------------------------------------------- the functions


def name_of(function: Callable) -> str:
    """What a function is called in messages, as TRL names it."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def is_async(function: Callable) -> bool:
    """Whether calling the function gives something to await."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(function.__call__)


def takes_conversations(function: Callable) -> bool:
    """Whether a function says that its completions are lists of messages, as those of trl.rewards do."""
    try:
        parameter = inspect.signature(function).parameters.get("completions")
    except (TypeError, ValueError):  # it has no signature
        return False
    return parameter is not None and CONVERSATIONS.match(str(parameter.annotation)) is not None


def arguments_of(function: Callable, given: dict) -> dict:
    """What a function is called with: `given`, its texts as conversations of one message if it takes those."""
    if not takes_conversations(function):
        return given
    prompts = [[{"role": "user", "content": text}] for text in given["prompts"]]
    completions = [[{"role": "assistant", "content": text}] for text in given["completions"]]
    return given | {"prompts": prompts, "completions": completions}


def ask(functions: Sequence[Callable], given: dict, failing: Failing) -> list[list[float | None]]:
    """What every function says of every completion. given: keyword arguments for all of them.

    Those that are asynchronous run side by side. TrainingError for a function that raises (see `failing`), or does not
    return one finite number or None for each completion.
    """
    count = len(given["completions"])
    found: dict[int, list] = {}
    waiting = [i for i, function in enumerate(functions) if is_async(function)]
    for i, function in enumerate(functions):
        if i not in waiting:
            with failing(f"the reward function {name_of(function)}"):
                found[i] = numbers(function(**arguments_of(function, given)), count, function)

    async def one(function: Callable) -> list:
        with failing(f"the reward function {name_of(function)}"):
            return numbers(await function(**arguments_of(function, given)), count, function)

    async def all_of_them() -> list[list]:
        return await asyncio.gather(*(one(functions[i]) for i in waiting))

    if waiting:
        answers = asyncio.run_coroutine_threadsafe(all_of_them(), event_loop(os.getpid())).result()
        found |= zip(waiting, answers)
    return [found[i] for i in range(len(functions))]


@functools.cache
def event_loop(process: int) -> asyncio.AbstractEventLoop:
    """The loop that awaits asynchronous functions, in a thread of its own. It is one for the whole run, so that a
    function may keep a connection open. process: a fork has none of its parent's threads."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="reward functions", daemon=True).start()
    return loop


def numbers(values: Iterable, count: int, function: Callable) -> list[float | None]:
    """The values as floats; TrainingError unless they are `count` finite numbers or None.

    A number is also a bool, one of numpy's, or a tensor of one element.
    """
    values = list(values) if isinstance(values, Iterable) else values
    try:
        if any(isinstance(value, str | bytes) for value in values):
            raise TypeError
        found = [None if value is None else float(value) for value in values]
    except (TypeError, ValueError, RuntimeError):
        found = []
    if len(found) != count or not all(value is None or math.isfinite(value) for value in found):
        what = f"{len(values)} for {count}: {values[:5]}" if isinstance(values, list) else repr(values)
        raise TrainingError(
            f"the reward function {name_of(function)} must return one finite number per completion, or None for no "
            f"opinion; it returned {what}"
        )
    return found


def combine(found: list[list[float | None]], weights: Sequence[float]) -> list[float | None]:
    """Of every completion the weighted sum over the functions that gave a number; None if none did."""
    totals = []
    for of_completion in zip(*found):
        parts = [weight * value for weight, value in zip(weights, of_completion) if value is not None]
        totals.append(sum(parts) if parts else None)
    return totals


# ------------------------------------------------------------------------------------------------ --reward, its weights


def check(reward: str, reward_weights: str) -> str:
    """`--reward` with absolute paths. ArgumentError for what names no file or package, or for weights that do not fit;
    nothing is imported."""
    if not reward:
        if reward_weights:
            raise ArgumentError(f"--reward_weights {reward_weights} weighs what --reward names; give that too")
        return ""
    items = [_check_item(item.strip()) for item in reward.split(",")]
    weights = weights_of(reward_weights)
    if weights is not None and len(weights) != len(items) + 1:
        raise ArgumentError(
            f"--reward_weights {reward_weights} must be {len(items) + 1} numbers: the weight of the task's own reward, "
            f"then one for each of the {len(items)} of --reward; without --reward_weights the task's own is left out"
        )
    return ",".join(items)


def _check_item(item: str) -> str:
    place, _, function = item.rpartition(":")
    if not place or not function.isidentifier():
        raise ArgumentError(f"--reward {item} must name a function as file.py:function or package.module:function")
    if place.endswith(".py"):
        path = Path(place).expanduser().absolute()
        if not path.is_file():
            raise ArgumentError(f"--reward {item}: there is no file {path}; give the path of a Python file")
        return f"{path}:{function}"
    top = place.split(".")[0]
    if not all(part.isidentifier() for part in place.split(".")) or importlib.util.find_spec(top) is None:
        raise ArgumentError(
            f"--reward {item}: there is no package {top}; give file.py:function, or install the package"
        )
    return item


def weights_of(reward_weights: str) -> list[float] | None:
    """The numbers of `--reward_weights`; None if it is empty. Raises ArgumentError."""
    if not reward_weights:
        return None
    try:
        weights = [float(number) for number in reward_weights.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(map(math.isfinite, weights)):
        raise ArgumentError(f"--reward_weights {reward_weights} must be numbers such as 1,0.5")
    return weights


def load(reward: str, *columns: Iterable[str]) -> list[Callable]:
    """The functions that a checked `--reward` names. columns: of each task's rows.

    Raises ArgumentError if a module cannot be imported, or if a function is missing or takes other arguments.
    """
    functions = []
    for item in reward.split(",") if reward else []:
        place, _, name = item.rpartition(":")
        function = getattr(_import(place, item), name, None)
        if not callable(function):
            problem = f"there is no {name} in {place}" if function is None else f"{name} is no function"
            raise ArgumentError(f"--reward {item}: {problem}; name one that is defined there")
        for names in columns:
            _check_signature(function, item, [*GIVEN, *names])
        functions.append(function)
    return functions


def _import(place: str, item: str) -> ModuleType:
    """The module of a dotted name or a path. What lies beside a file, it can import."""
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        sys.path.append(str(path.parent))  # at the end: it hides no module of this project
        spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}, line {frame.lineno}"
        if isinstance(error, SyntaxError):
            where = f"{error.filename}, line {error.lineno}"
        reason = str(error).strip().splitlines()[:1]
        said = f"{type(error).__name__}: {reason[0]}" if reason else type(error).__name__
        raise ArgumentError(f"--reward {item}: importing {place} raised {said} ({where}); correct it") from error


def _check_signature(function: Callable, item: str, names: Iterable[str]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**dict.fromkeys(names))
    except TypeError as error:
        raise ArgumentError(
            f"--reward {item}: {error}; it is called with {', '.join(dict.fromkeys(names))}, as keyword arguments: "
            "name those it needs, and let it take the others as **columns"
        ) from error


def file_hashes(reward: str, functions: list[Callable]) -> dict[str, str]:
    """The SHA-256 of the file that each function of a checked `--reward` is written in, where there is one."""
    hashes = {}
    for item, function in zip(reward.split(","), functions):
        path = Path(item.rpartition(":")[0])
        if path.suffix != ".py":
            while isinstance(function, functools.partial):
                function = function.func
            try:
                path = Path(inspect.getsourcefile(function if hasattr(function, "__code__") else type(function)) or "")
            except TypeError:
                continue
        if path.is_file():
            hashes[item] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes
