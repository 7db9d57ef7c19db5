"""Reads the runs below a folder: their summaries, histories and predictions. What cannot be read is named and left out.

A run of several tasks gives a result for each of them. The evaluation before training counts as a zero-shot result if
the model had no adapter yet and inference.py was not asked the same.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import tasks
from evaluation import metrics, predictions
from reporting.files import by_task, checked_answer, read_figures, read_lines, read_summary
from reporting.results import (
    ADAPTER,
    FEW_SHOT,
    HEAD,
    METHODS,
    PPO,
    SFT,
    START,
    TRAINED,
    ZERO_SHOT,
    Collection,
    Result,
    setup,
)
from run.folder import ROOT, folder_of
from tasks import Task, own

# Arguments that may differ between runs of one method: they do not change what is learned or answered.
NOT_A_SETTING = {
    "advantage",
    "answer_space",
    "checkpoint_rate",
    "config",
    "do_sample",
    "eval_steps",
    "from_local",
    "full",
    "gradient_checkpointing",
    "loss_on",
    "micro_batch",
    "num_shots",
    "number_answer",
    "output_dir",
    "policy_gradient",
    "report_to",
    "resume",
    "save_freq",
    "save_methods",
    "save_total_limit",
    "seed",
    "split",
    "strict_format",
    "submission",
    "success_order",
    "task",
    "tokens_per_micro_batch",
    "train_model_name",
    "use_CoT",
}
# What runs did before they had these arguments.
SINCE = {
    "balance_tasks": False,
    "clip_range_high": None,
    "datafolder_path": "",
    "entropy_end": None,
    "kl_target": 0.0,
    "label_smoothing": 0.0,
    "load_in_4bit": False,
    "number_target": "nearest",
    "reward": "",
    "reward_weights": "",
}
PROMPTING = (
    "eval_size", "data_path", "max_prompt_length", "max_response_length", "same_shots", "load_in_8bit", "load_in_4bit"
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A finished run."""

    name: str  # its folder, relative to --runs
    folder: Path
    summary: dict
    history: list[dict]
    adapter_of: dict | None  # the summary of the run whose adapter this one started from or asked
    model: str  # the model that the adapters stand on
    past: str  # the methods that trained the adapter before: "SFT + PPO"

    @property
    def arguments(self) -> dict:
        return self.summary["arguments"]

    @property
    def method(self) -> str:
        return METHODS[self.summary["method"]]

    @property
    def several(self) -> bool:
        return len(self.summary.get("tasks") or ()) > 1

    @property
    def tasks(self) -> list[str]:
        return self.summary["tasks"] if self.several else [self.summary["task"]]

    def task(self, name: str) -> Task:
        """The task of this name; one of somebody's own stands in the run's folder."""
        return own.task_of_run(self.folder / name.replace("/", "-") if self.several else self.folder, name)


def collect(root: Path) -> Collection:
    """All runs below a folder, in the order of their names. What cannot be read is left out and named."""
    found = Collection([], [], [], [])
    summaries: dict[Path, dict] = {}
    for folder in run_folders(root):
        path = folder / "summary.json"
        if not path.exists():
            add_unfinished(found, folder, folder.relative_to(root).as_posix())
            continue
        try:
            summaries[folder] = read_summary(path)
        except (OSError, ValueError) as error:
            found.skipped.append(f"{path} {error}")
    known = {folder.resolve(): summary for folder, summary in summaries.items()}
    starts: list[Result] = []
    for folder, summary in summaries.items():
        name = folder.relative_to(root).as_posix()
        history = read_figures(folder / "history.jsonl", found.skipped)
        found.training += by_task(name, history)
        run = Run(name, folder, summary, history, origin(summary, known), *lineage(summary, known))
        for task in run.tasks:
            try:
                result = read_result(run, run.task(task))
                starts += before_training(run, result)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                found.skipped.append(f"{folder / 'summary.json'} is not as a run writes it ({error!r})")
                continue
            found.results.append(result)
    add_starts(found.results, starts)
    name_labels(found.results)
    for result in found.results:
        read_answers(result, found.skipped)
    return found


def add_unfinished(found: Collection, folder: Path, name: str) -> None:
    """Note an unfinished run, unless nothing is missing of it."""
    left = how_far(folder)
    if left:
        found.unfinished.append((name, left))
        found.training += by_task(f"{name} (unfinished)", read_figures(folder / "history.jsonl", found.skipped))


def add_starts(results: list[Result], starts: list[Result]) -> None:
    """Add zero-shot results of training runs, one of those that ask the same: greedy answers do not differ."""
    asked = {setup(result) for result in results if result.kind == ZERO_SHOT}
    for start in starts:
        if setup(start) not in asked:
            asked.add(setup(start))
            results.append(start)


def run_folders(root: Path) -> Iterable[Path]:
    """Every folder of a run below (or at) root, sorted."""
    for path, inside, files in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith(".") and name != "wandb")
        if {"summary.json", "arguments.json", predictions.UNFINISHED} & set(files):
            yield Path(path)


def how_far(folder: Path) -> str:
    """How far an unfinished run came; empty for the top folder of several tasks' answers, if all of them are there."""
    try:
        names = json.loads((folder / "arguments.json").read_text(encoding="utf-8"))["task"].split(",")
        several = [t for n in names for t in (tasks.suite(n) if n in tasks.SUITES else [tasks.get(n.strip())])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        several = []
    done = [task for task in several if (folder / folder_of(task) / "summary.json").exists()]
    if done:
        missing = [task.name for task in several if task.in_suite_score and task not in done]
        return f"{len(done)} tasks answered, without {', '.join(missing)}" if missing else ""
    steps = [line["step"] for line in read_figures(folder / "history.jsonl", [])]
    if steps:
        return f"stopped, or still running, after step {steps[-1]}"
    unfinished = folder / predictions.UNFINISHED
    return f"{len(unfinished.read_bytes().splitlines())} rows answered" if unfinished.exists() else "no step yet"


def read_result(run: Run, task: Task) -> Result:
    """A run's result for one task."""
    summary = run.summary
    moments = {moment: figures_of(task, figures, run.several) for moment, figures in summary["metrics"].items()}
    training = (run.method == ADAPTER and run.adapter_of) or summary
    trained_on = f" on {training['task']}" if len(training.get("tasks") or ()) > 1 else ""
    samples, steps = summary.get("samples") or 0, summary.get("steps") or 0
    kind = kind_of(run)
    return Result(
        run=run.name,
        folder=run.folder / folder_of(task) if run.several else run.folder,
        kind=kind,
        method=f"{kind}{trained_on} ({', '.join([*answer_space(run), *manner(run, task)])})",
        model=run.model,
        task=task,
        version=summary.get("task_version") or (task.version if run.several else None),
        split=summary.get("split") or "validation",
        seed=training["seed"],
        settings=settings_of(run),
        metrics=moments["after"],
        best=moments.get("best", {}).get("score"),
        before=moments.get("before", {}).get("score"),
        details=summary.get("details", {}).get(task.name, {}) if run.several else summary,
        samples=samples,
        seconds=summary.get("train_seconds") or summary.get("seconds"),
        memory=summary.get("peak_memory_bytes"),
        tokens=summary.get("tokens"),
        cost=summary.get("cost"),
        history=run.history,
        samples_per_step=samples / steps if steps else 0.0,
        together=tuple(run.tasks),
    )


def before_training(run: Run, result: Result) -> list[Result]:
    """The evaluation before training as a result of its own, if it is a zero-shot one."""
    adapter = run.past or (run.arguments.get("from_local") and not whole_model(run.model))
    if run.method not in (SFT, PPO) or "before" not in run.summary["metrics"] or adapter:
        return []
    style = ", ".join([answer_space(run)[0], *manner(run, result.task)])
    return [
        replace(
            result,
            run=f"{run.name}{START}",
            kind=ZERO_SHOT,
            method=f"{ZERO_SHOT} ({style})",
            settings={name: value for name, value in result.settings.items() if name in PROMPTING},
            metrics=figures_of(result.task, run.summary["metrics"]["before"], run.several),
            best=None,
            before=None,
            details={name: value for name, value in result.details.items() if name in ("majority", "labels")},
            samples=0,
            seconds=next((line["eval/seconds"] for line in run.history if "eval/seconds" in line), None),
            memory=None,
            history=[],
        )
    ]


def figures_of(task: Task, figures: dict[str, float], several: bool) -> dict[str, float]:
    """One task's metrics; in a run of several tasks the task's name stands before each."""
    start = f"{task.name}/"
    return {n.removeprefix(start): value for n, value in figures.items() if not several or n.startswith(start)}


def kind_of(run: Run) -> str:
    """The method, with the number of demonstrations, or with what trained the adapter before."""
    if run.method == ADAPTER:  # answered by inference.py
        return f"{run.past} {Path(run.summary['model']).name}/" if run.adapter_of else "trained adapter"
    kind = f"{FEW_SHOT} {run.arguments.get('num_shots', '')}".strip() if run.method == FEW_SHOT else run.method
    return f"{run.past} + {kind}" if run.past else kind


def answer_space(run: Run) -> list[str]:
    """The answer space, and those of the training that are not the same; the objective of the training. Of a
    classification head, which has no answer space, the weights that were trained."""
    if HEAD in (run.method, METHODS[(run.adapter_of or run.summary)["method"]]):
        return ["all weights" if (run.adapter_of or run.summary)["arguments"].get("full") else "LoRA"]
    how = [run.arguments.get("answer_space") or "labels"]
    training = run.arguments
    if run.method == ADAPTER and run.adapter_of:
        training = run.adapter_of["arguments"]
        how += [f"trained with {training['answer_space']}"] if training.get("answer_space") not in how else []
    return how + objective(training)


def objective(training: dict) -> list[str]:
    """What was trained on, as far as it is not what every older run of the method has done: the policy gradient, the
    order of MaxRL, how advantages are estimated if not as usual, what SFT's loss is on."""
    samples = training.get("repeat_time") or 1
    usual = ("", None, "leave_one_out" if samples > 1 else "critic")
    names = [training["policy_gradient"]] if training.get("policy_gradient") else []
    names += [f"MaxRL {training['success_order']:g}"] if training.get("success_order", 1) != 1 else []
    names += [training["advantage"]] if training.get("advantage") not in usual else []
    names += [f"loss on {training['loss_on']}"] if training.get("loss_on") not in (None, "answer") else []
    return names


def manner(run: Run, task: Task) -> list[str]:
    """Departures from greedy answers without an analysis in the usual format, by the probabilities as they are; of
    numbers, from their mean."""
    names = {"use_CoT": "chain of thought", "strict_format": "strict format", "do_sample": "sampled answers"}
    names |= {"endpoint": "by a server"}
    given = run.arguments
    found = [name for argument, name in names.items() if given.get(argument)]
    found += [f"{given['calibration']} calibration"] if given.get("calibration", "none") != "none" else []
    compared = answer_space(run)[0] in ("labels", "score") and not given.get("do_sample")
    likeliest = given.get("number_answer", "likeliest") == "likeliest"  # which is what older runs answered
    return [*found, "likeliest number"] if task.number and compared and likeliest else found


def settings_of(run: Run) -> dict:
    """The arguments that change what is learned or answered, and those of the training before."""
    given = run.arguments
    if run.method in TRAINED:
        since = SINCE if run.method in (SFT, PPO) else {}
        settings = {name: value for name, value in (since | given).items() if name not in NOT_A_SETTING}
    else:
        settings = {name: value for name, value in (SINCE | given).items() if name in PROMPTING}
    if run.adapter_of:
        earlier = SINCE | run.adapter_of["arguments"]
        told = {n: v for n, v in earlier.items() if n not in {*NOT_A_SETTING, *PROMPTING}}
        settings |= {f"earlier {name}": value for name, value in told.items()}
        settings["earlier objective"] = ", ".join(objective(earlier))
    settings["eval_size"] = 400 if settings.get("eval_size") is None else settings["eval_size"]
    if answer_space(run)[0] in ("labels", "LoRA", "all weights") and not given.get("use_CoT"):
        settings.pop("max_response_length", None)
    return settings


def origin(summary: dict, known: dict[Path, dict]) -> dict | None:
    """The summary of the run whose adapter a run started from or asked; None if it started from a whole model."""
    if not summary["arguments"].get("from_local"):
        return None
    paths = (Path(summary["model"]), ROOT / summary["model"])
    return next((known[p.resolve().parent] for p in paths if p.resolve().parent in known), None)


def lineage(summary: dict, known: dict[Path, dict]) -> tuple[str, str]:
    """The model that a run's adapters stand on, and the methods that they were trained by: `SFT + PPO`."""
    methods: list[str] = []
    while (before := origin(summary, known)) is not None and len(methods) < len(known):
        methods.insert(0, METHODS[before["method"]])
        summary = before
    return summary["model"], " + ".join(methods)


def whole_model(model: str) -> bool:
    """Whether it is a local folder of a model, not of an adapter."""
    paths = (Path(model), ROOT / model)
    return any(p.is_dir() for p in paths) and not any((p / "adapter_config.json").exists() for p in paths)


def name_labels(results: list[Result]) -> None:
    """Give the tasks whose labels are defined by their data the labels that the runs name."""
    for result in results:
        if not result.task.labels and not result.task.number:
            same = [other.details.get("labels") for other in results if other.task.name == result.task.name]
            result.task = replace(result.task, labels=tuple(next(filter(None, same), ())))


def read_answers(result: Result, skipped: list[str]) -> None:
    """Read a result's predictions, unless they are not those that its metrics were computed from."""
    path = result.folder / (predictions.BEFORE if result.run.endswith(START) else predictions.FILE)
    lines = read_lines(path, skipped, checked_answer)
    result.answers = lines or None
    if not lines or not result.scored:
        return
    try:
        found = metrics.score(result.task, *result.scored_rows())
    except (ValueError, TypeError) as error:
        if not result.task.candidates:
            skipped.append(f"{path} is left out: {error}")
            result.answers = None
        return
    if any(abs(found[metric] - result.metrics[metric]) > 1e-6 for metric in result.task.metrics):
        skipped.append(f"{path} is left out: its answers do not give the metrics of summary.json")
        result.answers = None
