"""One CUDA card, proven with one command: what runs on it, how exact, how fast, in how much memory.

    bash benchmarks/run.sh gpu                 at most ten minutes; writes benchmarks/gpu.json and gpu.md
    bash benchmarks/run.sh gpu --shape tiny    the same on a CPU with a tiny model, to see that it runs

a: every test that needs a card. b: the engine against the plain forward. c: PPO's speed and memory. d: the same work by
TRL and lm-evaluation-harness. e: operations that wait for the card. f: MR with the embedded model to 85%. No hub is
needed: but for f the weights are random. Each part is a process with a time limit. One that fails, runs out of memory
or of time is a line of the table, and the next part goes on.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.report import last_json, table  # noqa: E402
from machine import hardware  # noqa: E402
from machine.files import write_atomically  # noqa: E402

WORK = Path("benchmarks/.work")
LM_EVAL = ROOT / "benchmarks" / ".envs" / "lm-eval-0.4.13"
MINUTES = 10
NO_CARD = "skipped: no CUDA device"
TITLES = {
    "a": "Tests that need a card",
    "b": "The engine against the plain forward: distance from exact numbers",
    "c": "PPO: speed and memory",
    "d": "The same work by other programs",
    "e": "Operations that wait for the card, in one step",
    "f": "MR with the embedded model to 85%",
}


@dataclass(frozen=True)
class Part:
    """One process. seconds: it is ended after that. card: it needs one."""

    name: str
    title: str
    command: tuple[str, ...]
    seconds: int
    card: bool = False
    prepare: tuple[str, ...] = ()
    environment: Path | None = None  # of its interpreter; it is left out if that is not there


def parts(shape: str | None) -> list[Part]:
    """In the order of what is wanted most, should the time not be enough."""
    shapes = [shape] if shape else ["135M", "1.5B", "7B"]
    module = ("-m", "benchmarks.gpu_speed")
    speed = [
        Part("c", f"ppo.py, {name}", (*module, "--shape", name), seconds)
        for name, seconds in zip(shapes, (80, 100, 130))
    ]
    trl = [
        Part("d", f"GRPOTrainer, {name}", (*module, "--shape", name, "--program", "trl"), seconds)
        for name, seconds in zip(shapes, (40, 60, 80))
    ]
    exact = ("-m", "benchmarks.gpu_exactness", "--shape", shapes[0])
    return [
        Part("a", "tests", ("-m", "pytest", "-q", "-m", "cuda", "--color=no", "tests"), 90, card=True),
        Part("b", "exactness", exact, 90),
        *speed,
        *trl,
        to_85(shape),
        *scoring(),
    ]


def to_85(shape: str | None) -> Part:
    command = ("-m", "benchmarks.ours_ppo", "--until", "0.85", "--time_limit", "90", "--", "--task", "MR")
    command += ("--eval_steps", "8", "--eval_size", "400")
    return Part("f", "ppo.py --task MR", command, 120, card=shape == "tiny")


def scoring() -> Iterator[Part]:
    """Ours and lm-evaluation-harness's, on the same prompts with the embedded model."""
    inputs, folder = str(WORK / "training-seed0-4-rows-4-held-out.json"), str(WORK / "scoring-0-shots-400-rows")
    prepare = ("-m", "benchmarks.prepare", "training", inputs, "--rows", "4", "--held_out", "4")
    prepare += ("+", "scoring", folder, "--rows", "400", "--shots", "0")
    asked = ("--prompts", f"{folder}/own.jsonl", "--choices", "negative,positive")
    yield Part("d", "scoring, ours", ("-m", "benchmarks.ours_score", *asked), 60, card=True, prepare=prepare)
    theirs = ("benchmarks/lm_eval_score.py", "--inputs", inputs, *asked, "--batch", "64")
    yield Part("d", "scoring, lm-eval 0.4.13", theirs, 60, card=True, environment=LM_EVAL)


def card() -> str | None:
    """The card's name and memory; None without one. Asked of a process of its own: this one stays small."""
    program = "import torch; c = torch.cuda; print(c.is_available() and (c.get_device_name(), c.mem_get_info()[1]))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    if not said.startswith("("):
        return None
    name, _, memory = said.strip("()").rpartition(", ")
    return f"{name.strip(chr(39))}, {int(memory) / 1e9:.0f} GB"


def settings() -> dict[str, str]:
    off = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    return {**os.environ, **off, "TOKENIZERS_PARALLELISM": "false", "WANDB_MODE": "disabled"}


def run(command: tuple[str, ...], interpreter: str, seconds: float, log: Path) -> tuple[str, str | None]:
    """What a process printed, and why it did not end well, or None. It is ended, with all it started, when its time is
    up."""
    with open(log, "w+", encoding="utf-8") as errors, open(log.with_suffix(".out"), "w+", encoding="utf-8") as output:
        process = subprocess.Popen(
            [interpreter, *command], cwd=ROOT, env=settings(), stdout=output, stderr=errors, start_new_session=True
        )
        try:
            code = process.wait(max(seconds, 1))
            failed = f"exit code {code}, see {log}" if code else None
        except subprocess.TimeoutExpired:
            failed = f"not done after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        return output.read(), failed


def rows_of(part: Part, output: str) -> list[dict]:
    """The measurements in what a process printed."""
    if part.command[0] != "-m" or not part.command[1].startswith("benchmarks.gpu_"):
        try:
            return [{"part": part.name, "program": part.title, **last_json(output)}]
        except ValueError:
            lines = output.strip().splitlines()
            return [{"part": part.name, "program": part.title, "said": lines[-1]}] if lines else []
    found = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    # A step's waits are measured with its speed, and shown by themselves.
    return found + [
        {"part": "e", **{name: row[name] for name in ("program", "shape", "mode", "waits")}}
        for row in found
        if "waits" in row
    ]


def measure(part: Part, seconds: float, has_card: bool, log: Path) -> list[dict]:
    """The rows of a part; one that could not be measured says why."""
    row = {"part": part.name, "program": part.title}
    if part.card and not has_card:
        return [row | {"failed": NO_CARD}]
    if part.environment and not part.environment.is_dir():
        return [row | {"failed": f"skipped: {part.environment.name} is not there; `bash benchmarks/run.sh b` makes it"}]
    if seconds < 5:
        return [row | {"failed": "skipped: the time was up"}]
    began = time.monotonic()
    interpreter = str(part.environment / "bin" / "python") if part.environment else sys.executable
    if part.prepare:
        _, failed = run(part.prepare, sys.executable, seconds, log.with_name("gpu-prepare.log"))
        if failed:
            return [row | {"failed": f"its inputs: {failed}"}]
    output, failed = run(part.command, interpreter, min(part.seconds, seconds) - (time.monotonic() - began), log)
    rows = rows_of(part, output)
    return rows + [row | {"failed": failed}] if failed else rows


def number(value, digits: int = 3) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "-" if value is None else str(value)


COLUMNS = {
    "a": {"program": "", "said": "result"},
    "b": {
        "shape": "", "format": "", "layout": "", "quantity": "", "error": "distance", "tolerance": "allowed",
        "ok": "within",
    },
    "c": {
        "shape": "", "mode": "answers", "prompts": "", "samples_per_prompt": "samples", "seconds_per_sample":
        "s per sample", "tokens_per_second": "tokens per s", "share_of_rate": "share of the matrix rate",
        "peak_memory_gb": "peak GB", "rows": "",
    },
    "d": {
        "program": "", "shape": "", "seconds_per_sample": "s per sample", "ours": "ours, free = 1", "response_tokens":
        "answer tokens", "samples_per_second": "samples per s", "peak_memory_gb": "peak GB",
    },
    "e": {"shape": "", "mode": "answers", "in_step": "in the step", "in_updates": "in its updates"},
    "f": {"program": "", "training": "training s", "run": "run s", "accuracy": ""},
}  # fmt: skip


def shown(row: dict, rows: list[dict]) -> dict:
    """A row with what the tables show beside its own figures."""
    extra = {}
    if "peak_memory_bytes" in row:
        extra["peak_memory_gb"] = row["peak_memory_bytes"] / 1e9
    if row["part"] == "d" and row.get("seconds_per_sample"):
        same = [r for r in rows if r["part"] == "c" and (r.get("shape"), r.get("mode")) == (row["shape"], "free")]
        ours = same[0].get("seconds_per_sample") if same else None
        extra["ours"] = row["seconds_per_sample"] / ours if ours else None
    if row["part"] == "e":
        waits = row["waits"] or {"step": NO_CARD, "updates": NO_CARD}
        extra |= {"in_step": waits["step"], "in_updates": waits["updates"]}
    if row.get("evaluations"):
        last = row["evaluations"][-1]
        extra |= {"training": last["train_seconds"], "run": last["run_seconds"], "accuracy": last["score"]}
    return row | extra


def document(record: dict) -> str:
    """The Markdown of a whole record."""
    lines = ["# One card", "", f"Generated by `bash benchmarks/run.sh gpu`: do not edit. {record['machine']}, "]
    lines[-1] += f"{record['date']}, {record['seconds']:.0f} s."
    rates = [row for row in record["rows"] if row.get("program") == "torch.mm"]
    if rates:
        best = max(row["operations_per_second"] for row in rates)
        lines += ["", f"Matrix rate (`torch.mm`): {best / 1e12:.3g} TFLOP/s."]
    for name, title in TITLES.items():
        rows = [row for row in record["rows"] if row["part"] == name and row.get("program") != "torch.mm"]
        measured = [shown(row, record["rows"]) for row in rows if "failed" not in row]
        lines += ["", f"## {name}: {title}", ""]
        if measured:
            columns = COLUMNS[name]
            header = [title or key.replace("_", " ") for key, title in columns.items()]
            lines += [table(header, [[number(row.get(key)) for key in columns] for row in measured]), ""]
        for row in rows:
            if "failed" in row:
                what = ", ".join(str(row[k]) for k in ("program", "shape", "mode", "format", "layout") if k in row)
                lines.append(f"- {what}: {row['failed']}")
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def problems(rows: list[dict]) -> list[str]:
    """What did not go as it must: failures, numbers that are too far away, waits within an update."""
    found = [
        f"{row['part']}: {row['failed']}" for row in rows if not row.get("failed", "skipped").startswith("skipped")
    ]
    found += [f"b: {row['format']}, {row['layout']}: {row['quantity']}" for row in rows if row.get("ok") is False]
    found += [
        f"e: {row['shape']}, {row['mode']}: {row['waits']['updates']} waits within an update"
        for row in rows
        if row["part"] == "e" and (row["waits"] or {}).get("updates")
    ]
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.sh gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=("tiny", "135M", "1.5B", "7B"), help="only this one; default: all but tiny")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything")
    parser.add_argument("--output", type=Path, help="folder of gpu.json and gpu.md; default: benchmarks/")
    parser.add_argument("--list", action="store_true", help="measure nothing, print the commands")
    return parser.parse_args()


def main() -> None:
    arguments, began = parse(), time.monotonic()
    chosen = parts(arguments.shape)
    if arguments.list:
        for part in chosen:
            python = f"{part.environment.relative_to(ROOT)}/bin/python" if part.environment else ".venv/bin/python"
            print(shlex.join([python, *part.command]))
        return
    found = card()
    if found is None and arguments.shape != "tiny":
        print("run.sh gpu: error: there is no CUDA device here; --shape tiny runs on a CPU", file=sys.stderr)
        raise SystemExit(2)
    folder = arguments.output or ROOT / (WORK if arguments.shape == "tiny" else "benchmarks")
    for place in (folder, ROOT / WORK):
        place.mkdir(parents=True, exist_ok=True)
    record = {"machine": found or f"{hardware.processor()}, no CUDA device", "date": time.strftime("%Y-%m-%d")}
    record |= {"seconds": 0.0, "rows": []}
    for i, part in enumerate(chosen):
        left = 60 * arguments.minutes - (time.monotonic() - began)
        rows = measure(part, left, found is not None, ROOT / WORK / f"gpu-{i}.log")
        record["rows"] += rows
        record["seconds"] = time.monotonic() - began
        for row in rows:
            print(f"{part.name} {part.title}: {json.dumps({k: v for k, v in row.items() if k != 'part'})}", flush=True)
        for name, text in (("gpu.json", json.dumps(record, indent=1) + "\n"), ("gpu.md", document(record))):
            write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))
    wrong = problems(record["rows"])
    print(f"\n{document(record)}\n{folder / 'gpu.json'}, {folder / 'gpu.md'}")
    if wrong:
        raise SystemExit("run.sh gpu: " + "; ".join(wrong))


if __name__ == "__main__":
    main()
