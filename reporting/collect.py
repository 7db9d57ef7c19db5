"""Reads the runs below a folder: their summaries, histories and predictions; what cannot be read is named and left out.

A run of several tasks gives one result for each. The evaluation before training is a zero-shot result, if the model had
no adapter yet and inference.py was not asked the same.
"""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import tasks
from evaluation import metrics, predictions
from reporting.results import START, Collection, Result, asked
from run.folder import ROOT, folder_of
from tasks import Task

PROMPT_END = 600  # characters of each prompt that are kept
METHODS = {"zero-shot": "zero-shot", "few-shot": "few-shot", "sft": "SFT", "ppo": "PPO", "trained": "adapter"}
# Arguments that may differ between runs of one method: they do not change what is learned or answered.
NOT_A_SETTING = {
    "seed", "output_dir", "report_to", "resume", "task", "train_model_name", "from_local", "config", "split",
    "submission", "tokens_per_micro_batch", "save_methods", "save_freq", "checkpoint_rate", "eval_steps",
    "save_total_limit", "answer_space", "policy_gradient", "num_shots", "use_CoT", "do_sample", "strict_format",
}  # fmt: skip
PROMPTING = ("eval_size", "data_path", "max_prompt_length", "max_response_length", "same_shots", "load_in_8bit")


def collect(root: Path) -> Collection:
    """All runs below a folder, in the order of their names. What cannot be read is left out and named."""
    found = Collection([], [], [], [])
    raw: list[tuple[Path, dict]] = []
    for folder in folders(root):
        place = folder.relative_to(root).as_posix()
        if not (folder / "summary.json").exists():
            left = how_far(folder)
            if left:
                found.unfinished.append((place, left))
                found.training.append((f"{place} (unfinished)", read_lines(folder / "history.jsonl", found.skipped)))
            continue
        try:
            raw.append((folder, read_summary(folder / "summary.json")))
        except (OSError, ValueError) as error:
            found.skipped.append(f"{folder / 'summary.json'} {error}")
    known = {folder.resolve(): summary for folder, summary in raw}
    starts: list[Result] = []
    for folder, summary in raw:
        place = folder.relative_to(root).as_posix()
        history = read_lines(folder / "history.jsonl", found.skipped)
        found.training.append((place, history))
        several = len(summary.get("tasks") or ()) > 1
        for name in summary["tasks"] if several else [summary["task"]]:
            try:
                result, start = read_result(folder, place, summary, tasks.get(name), several, history, known)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                found.skipped.append(f"{folder / 'summary.json'} is not as a run writes it ({error!r})")
                continue
            found.results.append(result)
            starts += [start] if start else []
    own = {asked(result) for result in found.results if result.kind == "zero-shot"}
    for start in starts:
        key = asked(start)
        if key not in own:  # greedy answers to the same rows: one run's are those of all
            own.add(key)
            found.results.append(start)
    name_labels(found.results)
    for result in found.results:
        read_answers(result, found.skipped)
    return found


def folders(root: Path) -> Iterable[Path]:
    """Every folder of a run below (or at) root, sorted."""
    for path, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith(".") and name != "wandb")
        if {"summary.json", "arguments.json"} & set(files) or f".{predictions.FILE}" in files:
            yield Path(path)


def how_far(folder: Path) -> str:
    """How far an unfinished run came; empty for the top folder of several tasks' answers, if all of them are there."""
    try:
        named = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))["task"].split(",")
        several = [t for n in named for t in (tasks.suite(n) if n in tasks.SUITES else [tasks.get(n.strip())])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        several = []
    done = [task for task in several if (folder / folder_of(task) / "summary.json").exists()]
    if done:
        missing = [task.name for task in several if task.in_suite_score and task not in done]
        return f"{len(done)} tasks answered, without {', '.join(missing)}" if missing else ""
    steps = [line["step"] for line in read_lines(folder / "history.jsonl", [])]
    if steps:
        return f"stopped, or still running, after step {steps[-1]}"
    unfinished = folder / predictions.UNFINISHED
    return f"{len(unfinished.read_bytes().splitlines())} rows answered" if unfinished.exists() else "no step yet"


def read_summary(path: Path) -> dict:
    """A run's summary.json. ValueError says what is wrong with it."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"is no JSON ({error})") from error
    kinds = {"method": str, "task": str, "model": str, "seed": int, "metrics": dict, "arguments": dict}
    for name, kind in kinds.items():
        if not isinstance(summary, dict) or not isinstance(summary.get(name), kind):
            raise ValueError(f"has no {name!r}, or not as a run writes it")
    moments = summary["metrics"]
    if "after" not in moments or not all(
        isinstance(m, dict) and all(isinstance(v, int | float) for v in m.values()) for m in moments.values()
    ):
        raise ValueError("has no numbers of the moment 'after' in 'metrics'")
    if summary["method"] not in METHODS:
        raise ValueError(f"has the unknown method {summary['method']!r}")
    for name in summary.get("tasks") or [summary["task"]]:
        tasks.get(name)
    return summary


def read_lines(
    path: Path, skipped: list[str], needed: tuple[str, ...] = ("step",), keep: Callable[[dict], dict] | None = None
) -> list[dict]:
    """The lines of a JSON Lines file, without `keep` of numbers only; none if it is missing, or cannot be read."""
    if not path.exists():
        return []
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n"):
                break  # cut off by a kill
            try:
                line = json.loads(text)
                missing = [name for name in needed if name not in line]
                if missing:
                    raise ValueError(f"no {missing[0]!r} in it")
                if keep is None and not all(isinstance(value, int | float) for value in line.values()):
                    raise ValueError("a value that is no number")
            except (ValueError, TypeError, AttributeError) as error:
                skipped.append(f"{path} line {number} cannot be read ({error})")
                return []
            lines.append(keep(line) if keep else line)
    return lines


def read_result(
    folder: Path, place: str, summary: dict, task: Task, several: bool, history: list[dict], known: dict[Path, dict]
) -> tuple[Result, Result | None]:
    """A run's result for one task, and that of its evaluation before training where that is a zero-shot result."""
    given, method = summary["arguments"], METHODS[summary["method"]]
    training = summary["method"] in ("sft", "ppo")
    adapter_of = origin(summary, known)
    model, past = lineage(summary, known)
    kind = f"few-shot {given.get('num_shots', '')}".strip() if method == "few-shot" else method
    if method == "adapter":  # answered by inference.py
        kind = f"{past} {Path(summary['model']).name}/" if adapter_of else "trained adapter"
    elif past:
        kind = f"{past} + {kind}"
    how = [given.get("answer_space") or "labels"]
    settings = {n: v for n, v in given.items() if (n not in NOT_A_SETTING if training else n in PROMPTING)}
    if method == "adapter" and adapter_of:
        before = adapter_of["arguments"]
        how += [f"trained with {before['answer_space']}"] if before.get("answer_space") not in how else []
        how += [before["policy_gradient"]] if before.get("policy_gradient") else []
    elif given.get("policy_gradient"):
        how.append(given["policy_gradient"])
    if adapter_of:
        earlier = {n: v for n, v in adapter_of["arguments"].items() if n not in {*NOT_A_SETTING, *PROMPTING}}
        settings |= {f"earlier {name}": value for name, value in earlier.items()}
    manner = ["chain of thought"] if given.get("use_CoT") else []
    manner += ["strict format"] if given.get("strict_format") else []
    manner += ["sampled answers"] if given.get("do_sample") else []
    trained_on = f" on {summary['task']}" if several else ""
    moments = {
        moment: {name.removeprefix(f"{task.name}/"): value for name, value in figures.items()
                 if not several or name.startswith(f"{task.name}/")}
        for moment, figures in summary["metrics"].items()
    }  # fmt: skip
    settings["eval_size"] = 400 if settings.get("eval_size") is None else settings["eval_size"]
    if how[0] == "labels" and not given.get("use_CoT"):
        settings.pop("max_response_length", None)
    steps = summary.get("steps") or 0
    result = Result(
        place=place, folder=folder / folder_of(task) if several else folder, kind=kind,
        method=f"{kind}{trained_on} ({', '.join(how + manner)})", model=model, task=task,
        version=summary.get("task_version") or (task.version if several else None),
        split=summary.get("split") or "validation",
        seed=(adapter_of or summary)["seed"] if method == "adapter" else summary["seed"], settings=settings,
        metrics=moments["after"], best=moments.get("best", {}).get("score"),
        before=moments.get("before", {}).get("score"),
        details=summary.get("details", {}).get(task.name, {}) if several else summary,
        samples=summary.get("samples") or 0, seconds=summary.get("train_seconds") or summary.get("seconds"),
        memory=summary.get("peak_memory_bytes"), history=history,
        samples_per_step=(summary.get("samples") or 0) / steps if steps else 0.0,
    )  # fmt: skip
    if not training or "before" not in moments or past or (given.get("from_local") and not whole_model(model)):
        return result, None
    start = replace(
        result, place=f"{place}{START}", kind="zero-shot", metrics=moments["before"], history=[], samples=0,
        method=f"zero-shot ({', '.join([how[0], *manner])})", best=None, before=None, memory=None,
        seconds=next((line["eval/seconds"] for line in history if "eval/seconds" in line), None),
        details={name: value for name, value in result.details.items() if name in ("majority", "labels")},
        settings={name: value for name, value in settings.items() if name in PROMPTING},
    )  # fmt: skip
    return result, start


def origin(summary: dict, known: dict[Path, dict]) -> dict | None:
    """The summary of the run whose adapter a run started from or asked; None if it started from a whole model."""
    if not summary["arguments"].get("from_local"):
        return None
    places = (Path(summary["model"]), ROOT / summary["model"])
    return next((known[p.resolve().parent] for p in places if p.resolve().parent in known), None)


def lineage(summary: dict, known: dict[Path, dict]) -> tuple[str, str]:
    """The model that a run's adapters stand on, and the methods that they were trained by: `SFT + PPO`."""
    methods: list[str] = []
    while (before := origin(summary, known)) is not None and len(methods) < len(known):
        methods.insert(0, METHODS[before["method"]])
        summary = before
    return summary["model"], " + ".join(methods)


def whole_model(model: str) -> bool:
    """Whether a local folder is there, and is no adapter."""
    places = (Path(model), ROOT / model)
    return any(p.is_dir() for p in places) and not any((p / "adapter_config.json").exists() for p in places)


def name_labels(results: list[Result]) -> None:
    """Give the tasks whose labels stand in their data the labels that the runs name."""
    for result in results:
        if not result.task.labels and not result.task.number:
            same = [other.details.get("labels") for other in results if other.task.name == result.task.name]
            result.task = replace(result.task, labels=tuple(next(filter(None, same), ())))


def read_answers(result: Result, skipped: list[str]) -> None:
    """Read a result's predictions, unless they are not those that its metrics were computed from."""
    name = predictions.BEFORE if result.place.endswith(START) else predictions.FILE
    needed = ("id", "prompt", "answer", "label", "gold")
    lines = read_lines(
        result.folder / name, skipped, needed, lambda line: {**line, "prompt": str(line["prompt"])[-PROMPT_END:]}
    )
    result.answers = lines or None
    if not lines or not result.scored:
        return
    try:
        rows, labels, yes = result.scored_rows()
        found = metrics.score(result.task, rows, labels, yes)
    except (ValueError, TypeError) as error:
        if not result.task.candidates:
            skipped.append(f"{result.folder / name} is left out: {error}")
            result.answers = None
        return
    if any(abs(found[metric] - result.metrics[metric]) > 1e-6 for metric in result.task.metrics):
        skipped.append(f"{result.folder / name} is left out: its answers do not give the metrics of summary.json")
        result.answers = None
