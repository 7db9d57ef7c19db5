"""Measures this project and the programs that do the same work, and prints and stores the tables.

    bash benchmarks/run.sh                    everything: hours
    bash benchmarks/run.sh a e --seeds 0 1 2  some of it
    bash benchmarks/run.sh --quick            everything with as little work as possible, to see that it runs
    bash benchmarks/run.sh --table            measure nothing: print the tables and write results.md

a: PPO's seconds per sample and memory compared with TRL. b: scoring compared with lm-evaluation-harness. c: share of
the matrix rate. d: growth with batch size, prompt length and demonstrations. e: seconds to an accuracy. Every
measurement is a process of its own, on the CPU; programs take turns (A B A B). This process stays small: on Linux a new
process inherits the peak memory of the one that starts it.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import environments, report  # noqa: E402
from benchmarks.plan import JOBS, QUICK, WORK, Job, Plan, in_turns  # noqa: E402
from machine import hardware  # noqa: E402
from machine.files import write_atomically  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results.json"
MODEL = "SmolLM2-135M-Instruct, float32, LoRA r=16 alpha=32 on all linear layers"
PROCESS_LIMIT = 4 * 3600  # seconds


def machine() -> dict:
    """What the figures depend on: the processor's name, the number of logical CPUs, and the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": hardware.processor(), "cpus": os.cpu_count(), "memory_gb": round(memory / 1e9, 1)}


def busy(seconds: float = 2.0) -> float | None:
    """Share of the CPU time that other programs take at the moment; None if the system does not tell."""
    times = []
    for wait in (seconds, 0.0):
        if not Path("/proc/stat").is_file():
            return None
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        times.append((sum(ticks), ticks[3] + ticks[4]))  # idle, and idle while waiting for a disk
        time.sleep(wait)
    total, idle = times[1][0] - times[0][0], times[1][1] - times[0][1]
    return round(1 - idle / total, 2) if total else None


def shown(job: Job, threads: int) -> str:
    """A job's command as it can be typed in the checkout."""
    interpreter = f"benchmarks/.envs/{job.environment}/bin/python" if job.environment else ".venv/bin/python"
    return (f"OMP_NUM_THREADS={threads} " if threads else "") + shlex.join([interpreter, *job.command])


def child_environment(threads: int) -> dict[str, str]:
    """Variables of a measured process: on the CPU, off the network, quiet."""
    off = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "PYTHONNOUSERSITE"), "1")
    settings = {**os.environ, **off, "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    settings |= {"WANDB_MODE": "disabled"}
    if threads:
        settings |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return settings


def measure(job: Job, threads: int, log: Path) -> dict:
    """Run a job. Returns its record."""
    interpreter = environments.python(job.environment) if job.environment else Path(sys.executable)
    record = {name: value for name, value in asdict(job).items() if name not in ("prepare", "environment", "command")}
    record |= {"command": shown(job, threads), "model": MODEL, "machine": machine()}
    record |= {"date": time.strftime("%Y-%m-%d %H:%M"), "busy": busy()}
    print(f"\n{record['command']}", flush=True)
    with open(log, "w", encoding="utf-8") as errors:
        try:
            done = subprocess.run(
                [str(interpreter), *job.command],
                cwd=ROOT,
                env=child_environment(threads),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=PROCESS_LIMIT,
            )
        except subprocess.TimeoutExpired:
            return record | {"failed": f"took more than {PROCESS_LIMIT} s"}
    if done.returncode:
        return record | {"failed": f"exit code {done.returncode}, see {log.relative_to(ROOT)}"}
    try:
        return record | {"result": report.last_json(done.stdout)}
    except ValueError as error:
        return record | {"failed": str(error)}


def store(path: Path, records: list[dict]) -> None:
    """Write the records, and their tables beside them, whole or not at all."""
    for target, text in (
        (path, json.dumps(records, indent=1) + "\n"),
        (path.with_suffix(".md"), report.document(records)),
    ):
        write_atomically(target, lambda file, text=text: file.write(text.encode()))


def prepare(jobs: list[Job], threads: int) -> None:
    """Write the inputs and create the environments of all jobs before the first one is measured."""
    wanted = dict.fromkeys(arguments for job in jobs for arguments in job.prepare)
    if wanted:
        command = [sys.executable, "-m", "benchmarks.prepare"]
        command += [word for arguments in wanted for word in ("+", *arguments)]
        if subprocess.run(command, cwd=ROOT, env=child_environment(threads)).returncode:
            raise SystemExit(f"run.py: error: {shlex.join(command[1:])} failed")
    for name in sorted({job.environment for job in jobs} - {""}):
        environments.python(name)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="*", choices=[*JOBS, []], metavar="a b c d e", help="which; default all")
    parser.add_argument("--quick", action="store_true", help="as little work as possible; kept apart from the results")
    parser.add_argument("--table", action="store_true", help="measure nothing, print and write the tables")
    parser.add_argument("--list", action="store_true", help="measure nothing, print the commands")
    parser.add_argument("--programs", nargs="+", default=[], help="only those whose names contain one of these")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of benchmark e; the others take the first")
    parser.add_argument("--repeats", type=int, default=2, help="of benchmarks a to c; e is never repeated")
    parser.add_argument("--steps", type=int, default=3, help="PPO steps of a run, the first one to warm up")
    parser.add_argument("--learning_rates", nargs="+", default=["2e-4"], help="of TRL in benchmark e")
    parser.add_argument("--time_limit", type=int, default=3600, help="seconds of each run of TRL in benchmark e")
    parser.add_argument("--threads", type=int, default=0, help="of every process; default: what torch chooses")
    arguments = parser.parse_args()
    if arguments.steps < 2 or arguments.repeats < 1:
        parser.error("--steps must be at least 2 (the first is not measured), and --repeats at least 1")
    return arguments


def chosen_jobs(arguments: argparse.Namespace, chosen: list[str]) -> list[Job]:
    """The jobs of the chosen benchmarks in the order in which they are measured. SystemExit if there are none."""
    plan = Plan(
        seeds=tuple(arguments.seeds),
        repeats=arguments.repeats,
        steps=arguments.steps,
        learning_rates=tuple(arguments.learning_rates),
        time_limit=arguments.time_limit,
    )
    if arguments.quick:
        plan = replace(plan, **QUICK)
    jobs = []
    for name in chosen:
        found = list(JOBS[name](plan))
        if arguments.programs:
            found = [job for job in found if any(part in job.program for part in arguments.programs)]
        jobs += in_turns(found, plan.repeats if name in "abc" else 1)
    if not jobs:
        raise SystemExit(
            f"run.py: error: --programs {' '.join(arguments.programs)} matches no program of {' '.join(chosen)}"
        )
    return jobs


def print_commands(jobs: list[Job], threads: int) -> None:
    for inputs in dict.fromkeys(found for job in jobs for found in job.prepare):
        print(shlex.join([".venv/bin/python", "-m", "benchmarks.prepare", *inputs]))
    print("\n".join(shown(job, threads) for job in jobs))


def measure_all(jobs: list[Job], threads: int, path: Path, records: list[dict]) -> tuple[list[dict], int]:
    """Measure and store every job. Returns all records, and how many of the jobs failed."""
    try:
        prepare(jobs, threads)
    except environments.EnvironmentProblem as error:
        raise SystemExit(f"run.py: error: {error}") from error
    failed = 0
    for number, job in enumerate(jobs, 1):
        record = measure(job, threads, ROOT / WORK / f"{job.benchmark}-{number}.log")
        said = record.get("failed") or json.dumps(
            {k: v for k, v in record["result"].items() if k not in ("answers", "versions", "evaluations")}
        )
        print(f"[{number}/{len(jobs)}] {job.program} {job.conditions}: {said}", flush=True)
        failed += "failed" in record
        records = report.merged(records, [record])
        store(path, records)
    return records, failed


def main() -> None:
    arguments = parse()
    chosen = sorted(set(arguments.benchmarks)) or list(JOBS)
    jobs = chosen_jobs(arguments, chosen)
    if arguments.list:
        print_commands(jobs, arguments.threads)
        return
    path = ROOT / WORK / "results-quick.json" if arguments.quick else RESULTS
    (ROOT / WORK).mkdir(parents=True, exist_ok=True)
    records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    failed = 0
    if not arguments.table:
        records, failed = measure_all(jobs, arguments.threads, path, records)
    elif records:
        store(path, records)
    print("\n" + report.render([record for record in records if record["benchmark"] in chosen]))
    print(f"All measurements: {path}; the tables: {path.with_suffix('.md')}")
    if failed:
        raise SystemExit(f"run.py: {failed} of {len(jobs)} measurements failed")


if __name__ == "__main__":
    main()
