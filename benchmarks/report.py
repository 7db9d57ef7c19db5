"""From what the measured processes print to tables in Markdown. Plain data in, text out.

A record is one process: `benchmark`, `program`, `conditions`, `repeat`, `seed`, `data`, `model`, `machine`, `command`,
`date` and `busy` (the share of the CPUs that other programs took just before it), and either its figures (`result`) or
`failed`, why it has none.
"""

import json
from collections.abc import Callable

TARGETS = (0.80, 0.85)
TITLES = {
    "a": "PPO: seconds per sample and peak memory",
    "b": "Scoring: samples per second",
    "c": "Share of the machine's float32 matrix rate that a training step reaches",
    "d": "Growth with batch size, prompt length and demonstrations",
    "e": "Seconds to a held-out accuracy on MR",
}
LIKE_FOR_LIKE, DEFAULT, SCORING = "ours, like for like", "ours, default", "ours"
LESS_MEMORY = "ours, like for like, 512 tokens at once"
SHORT_ANSWERS, COMPILED = "ours, answers end with the label", "ours, default, compiled"
NOTHING = "-"


def last_json(output: str) -> dict:
    """The last line of a process's output that is a JSON object. ValueError if there is none."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except json.JSONDecodeError:
                continue
    raise ValueError("the output has no line with a JSON object")


def key(record: dict) -> str:
    """What makes two records the same measurement, so that the later one replaces the earlier one: on one processor."""
    names = ("benchmark", "program", "conditions", "seed", "repeat")
    return json.dumps([record["machine"]["cpu"], *(record[name] for name in names)])


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """`old` with `new` in the places of the same measurements, and what is new at the end."""
    return list({key(record): record for record in [*old, *new]}.values())


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def spread(values: list[float], digits: int = 3) -> str:
    """One value, or the smallest and the largest, with so many significant digits."""
    low, high = (plain(value, digits) for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def plain(value: float, digits: int) -> str:
    """`value` with so many significant digits and no exponent; what stands before the point is never cut."""
    before = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if not before and value:
        before = int(f"{value:e}".split("e")[1]) + 1
    return f"{value:.{max(digits - before, 0)}f}"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def reached(evaluations: list[dict], target: float) -> dict | None:
    """The first evaluation whose score is at least `target`, or None."""
    return next((moment for moment in evaluations if moment["score"] >= target), None)


def seconds_to(target: float, name: str) -> Callable[[list[dict], dict], str]:
    """A column: the seconds of that name at which the target was reached, for every run."""

    def column(results: list[dict], beside: dict) -> str:
        moments = [reached(result["evaluations"], target) for result in results]
        return ", ".join("not reached" if m is None else f"{m[name]:.0f}" for m in moments)

    return column


def samples_to(target: float) -> Callable[[list[dict], dict], str]:
    """A column: the samples after which the target was reached, for every run."""

    def column(results: list[dict], beside: dict) -> str:
        moments = [(reached(r["evaluations"], target), r["samples"] / len(r["step_seconds"])) for r in results]
        return ", ".join(NOTHING if m is None else f"{m['step'] * size:.0f}" for m, size in moments)

    return column


def times(name: str, program: str) -> Callable[[list[dict], dict], str]:
    """A column: how many times this program's mean figure is another's under the same conditions."""

    def column(results: list[dict], beside: dict) -> str:
        if not beside.get(program):
            return NOTHING
        ratio = mean([r[name] for r in results]) / mean([r[name] for r in beside[program]])
        return f"{plain(ratio, 2)} x"

    return column


def of(name: str, digits: int = 3, scale: float = 1.0) -> Callable[[list[dict], dict], str]:
    """A column: a figure of every run, as a spread."""
    return lambda results, beside: spread([scale * result[name] for result in results], digits)


def same_answers(results: list[dict], beside: dict) -> str:
    """A column: the share of prompts that got the same label as this project gives them."""
    if not beside.get(SCORING):
        return NOTHING
    mine, theirs = beside[SCORING][0]["answers"], results[0]["answers"]
    return f"{sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine):.3f}"


def rate(result: dict) -> float:
    """Necessary operations per second over the measured steps."""
    return sum(result["operations"][1:]) / sum(result["step_seconds"][1:])


def best_rate(result: dict) -> float:
    return max(result["matrix_rates"].values())


GIGA = 1e-9
MEMORY = {"peak GB": of("peak_memory_bytes", 3, GIGA)}
COST = {"s per sample": of("seconds_per_sample"), **MEMORY, "prompt tokens": of("prompt_tokens")}
SCORED = {
    "samples per s": of("samples_per_second"),
    "s per sample": lambda results, beside: spread([r["seconds"] / r["samples"] for r in results]),
    **MEMORY,
    "prompt tokens": of("prompt_tokens"),
    "accuracy": of("score"),
}
COLUMNS: dict[str, dict[str, Callable[[list[dict], dict], str]]] = {
    "a": {
        **COST,
        "response tokens": of("response_tokens", 2),
        "time, like for like = 1": times("seconds_per_sample", LIKE_FOR_LIKE),
        "time, default = 1": times("seconds_per_sample", DEFAULT),
    },
    "b": {**SCORED, "rate, ours = 1": times("samples_per_second", SCORING), "same answers": same_answers},
    "c": {
        "TFLOP per step": lambda results, beside: spread([1e-12 * mean(r["operations"][1:]) for r in results]),
        "s per step": lambda results, beside: spread([mean(r["step_seconds"][1:]) for r in results]),
        "GFLOP per s": lambda results, beside: spread([GIGA * rate(r) for r in results]),
        "torch.mm, GFLOP per s": lambda results, beside: spread([GIGA * best_rate(r) for r in results]),
        "share": lambda results, beside: spread([rate(r) / best_rate(r) for r in results], 2),
    },
    "d": COST,
    "d shots": SCORED,
    "e": {
        **{
            f"{100 * target:.0f}%: {shown}": seconds_to(target, name)
            for target in TARGETS
            for shown, name in (("training s", "train_seconds"), ("run s", "run_seconds"), ("wall s", "wall_seconds"))
        },
        **{f"{100 * target:.0f}%: samples": samples_to(target) for target in TARGETS},
        "best": lambda results, beside: spread([max(m["score"] for m in r["evaluations"]) for r in results]),
        "samples": lambda results, beside: ", ".join(str(result["samples"]) for result in results),
        **MEMORY,
    },
}


def render(records: list[dict]) -> str:
    """All tables, each with what it was measured on and the commands that its rows name by number."""
    kinds: dict[tuple, list[dict]] = {}
    for record in records:
        # Within one benchmark, tables differ by what varies; and two processors have nothing to do with one another.
        kind = record["benchmark"], tuple(record["conditions"]), record["machine"]["cpu"]
        kinds.setdefault(kind, []).append(record)
    parts = []
    for benchmark, names, cpu in sorted(kinds):
        parts.append(section(TITLES[benchmark], kinds[benchmark, names, cpu], columns_of(benchmark, names)))
    return "\n\n".join(parts) + "\n"


def columns_of(benchmark: str, names: tuple[str, ...]) -> dict[str, Callable[[list[dict], dict], str]]:
    """The figures of a table whose conditions have these names."""
    return COLUMNS[f"{benchmark} {names[-1]}" if names and f"{benchmark} {names[-1]}" in COLUMNS else benchmark]


def section(title: str, records: list[dict], columns: dict) -> str:
    """One table: a row per program, conditions and seed, its repeats together."""
    rows: dict[tuple, list[dict]] = {}
    for record in records:
        rows.setdefault((tuple(record["conditions"].items()), record["seed"], record["program"]), []).append(record)
    # By condition and then by program, each in the order in which it was first measured.
    places = list(dict.fromkeys(conditions for conditions, _, _ in rows))
    commands: list[str] = []
    lines = []
    for (conditions, seed, program), group in sorted(rows.items(), key=lambda item: places.index(item[0][0])):
        beside = {
            other: [record["result"] for record in found if "result" in record]
            for (same, its_seed, other), found in rows.items()
            if (same, its_seed) == (conditions, seed)
        }
        commands += [command for command in {record["command"]: None for record in group} if command not in commands]
        numbers = sorted({commands.index(record["command"]) + 1 for record in group})
        if beside[program]:
            figures = [column(beside[program], beside) for column in columns.values()]
        else:
            figures = [f"failed: {group[0]['failed']}", *[NOTHING] * (len(columns) - 1)]
        named = f"[{', '.join(map(str, numbers))}]"
        taken = [record["busy"] for record in group if record["busy"] is not None]
        others = spread(taken, 2) if taken else NOTHING
        lines.append([program, *(str(value) for _, value in conditions), *figures, others, str(seed), named])
    names = [name.replace("_", " ") for name in records[0]["conditions"]]
    measured_on = sorted({described(record) for record in records})
    listed = "\n".join(f"[{i}] {command}" for i, command in enumerate(commands, 1))
    body = table(["program", *names, *columns, "CPU taken by others", "seed", "command"], lines)
    return f"### {title}\n\n" + "\n".join(measured_on) + f"\n\n{body}\n\n```text\n{listed}\n```"


def described(record: dict) -> str:
    """Machine, threads, model and data of a record."""
    machine = record["machine"]
    threads = record.get("result", {}).get("threads", "unknown")
    return (
        f"{machine['cpu']}, {machine['cpus']} logical CPUs, {machine['memory_gb']} GB, threads: {threads}. "
        f"{record['model']}, {record['data']}."
    )
