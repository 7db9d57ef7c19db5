"""What inference.py, fewshot.py and classify.py leave of their answers: summaries, leaderboard files, suite scores."""

import time
from dataclasses import replace
from pathlib import Path

import tasks
from evaluation import asking
from evaluation.jobs import Job, suites_named
from machine import processes
from machine.files import write_json
from run.answer_options import answers_text
from run.arguments import Arguments, as_dict
from run.folder import data_hash, folder_of, write_summary


def write_results(
    arguments: Arguments,
    job: Job,
    folder: Path,
    method: str,
    answers: list,
    majority: tuple[int | float, str],
    started: float,
    details: dict,
) -> dict:
    """Say what came out of one task's answers, and write its leaderboard file and summary. Returns the summary; {}
    beside the main process.

    majority: the most frequent label, and what it was counted in. started: time.perf_counter() before the answers.
    details: what else the summary holds: `shots`, and how many prompts were `shortened`.
    """
    from evaluation import scores

    if not processes.is_main():
        return {}
    task, rows, shortened = job.task, job.rows, details["shortened"]
    figures = {"invalid_rate": [answer.label for answer in answers].count(None) / len(answers)}
    details = {"split": arguments.split, "rows": len(rows), **details}
    print(f"\n{task.name}, {arguments.split}, {len(rows)} rows, {method}, {answers_text(arguments, [task])}")
    if job.labelled:
        figures = scores.score(task, rows, answers)
        details |= scores.details(task, rows, answers, majority[0])
        print(scores.metrics_text(task, figures, details, majority[1]))
    else:
        print(f"no labels, so no score; {figures['invalid_rate']:.1%} of the answers are invalid")
        if Path(arguments.data_path or ".").is_file():
            asking.write_table(folder / asking.TABLE, task, rows, answers)
            print(f"{folder / asking.TABLE} has every row's label, and the probabilities of all labels.")
    if task.note:
        print(f"({task.note})")
    if shortened:
        print(f"{shortened} prompts were shortened to {arguments.max_prompt_length} tokens.")
    if job.whole_split and task.submission:
        write_leaderboard_file(folder / task.submission, job, answers, majority[0])
    asked = replace(arguments, task=task.name, train_model_name=job.model)
    details |= {"data_hash": data_hash(rows), "seconds": round(time.perf_counter() - started, 1)}
    return write_summary(folder, method, task, asked, {"after": figures, "best": figures}, **details)


def write_leaderboard_file(path: Path, job: Job, answers: list, majority: int | float) -> None:
    """Write and check a task's leaderboard file; a missing answer is filled in with the majority label."""
    from evaluation import leaderboard, scores

    labels, last_label = [answer.label for answer in answers], scores.last_label_probabilities(answers)
    filled = leaderboard.write_submission(path, job.task, job.rows, labels, majority, last_label)
    leaderboard.check_submission(path, job.task, job.rows)
    print(f"Leaderboard file {path}: {filled} of its answers were filled in, as the model gave no valid one.")


def finish(arguments: Arguments, jobs: list[Job], top: Path, summaries: dict[str, dict], several: bool) -> None:
    """The suites' scores and zips, the dashboard, and where everything lies."""
    from evaluation import leaderboard

    scored = {name: summary["metrics"]["after"] for name, summary in summaries.items()}
    figures = {
        f"eval/{name}/{metric}" if several else f"eval/{metric}": value
        for name, metrics in scored.items()
        for metric, value in metrics.items()
    }
    for suite in tasks.SUITES:
        counted = {task.name for task in tasks.suite(suite) if task.in_suite_score}
        if counted <= {name for name, metrics in scored.items() if "score" in metrics}:
            of_suite = {name: metrics for name, metrics in scored.items() if name in counted}
            figures[f"eval/{suite}/score"] = write_suite_score(top, suite, of_suite, arguments.train_model_name)
        if arguments.submission and suite in suites_named(arguments):
            files = [top / folder_of(job.task) / job.task.submission for job in jobs if job.task.suite == suite]
            leaderboard.write_suite_zip(top / f"{suite}.zip", suite, files)
            print(f"\n{suite} leaderboard zip, complete and checked: {top / suite}.zip")
    each = "for each task " if several else ""
    print(f"\n{top} holds {each}predictions.jsonl (every prompt and answer) and summary.json.")
    if arguments.report_to == "none":
        return
    from run import dashboards

    method = next(iter(summaries.values()))["method"]
    dashboards.log_figures(arguments.report_to, top, as_dict(arguments), figures, method)


def write_suite_score(top: Path, suite: str, of_tasks: dict[str, dict], model: str) -> float:
    """Write <suite>.json and print the suite's score; returns the score."""
    from evaluation import metrics

    score = metrics.suite_score(suite, of_tasks)
    write_json(top / f"{suite}.json", {"suite": suite, "score": score, "tasks": of_tasks, "model": model})
    print(f"\n{suite} score: {100 * score:.1f} (mean over {suite}'s tasks, diagnostic sets not counted)")
    return score
