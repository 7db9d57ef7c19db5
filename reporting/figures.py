"""The report's pictures, as PNG with a transparent background and mid-tones, readable on white and on black."""

import io
import textwrap
from collections.abc import Callable

import numpy as np

from evaluation import metrics
from reporting.comparison import cells
from reporting.results import Group, Result, rank, task_title
from reporting.tables import majority_score

GREY = "#7d7d7d"
COLOURS = ("#3987e5", "#d95926", "#199e70", "#9085e9", "#c98500", "#d55181", "#008300", "#e66767", "#7d7d7d")
STYLE = {
    "font.size": 9,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.titlecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "axes.titlesize": 9.5,
    "legend.fontsize": 8,
}
COLLAPSED = 0.95  # share of one label in two consecutive training steps that is called a collapse
BINS = 10  # of the reliability plot
MOST_IN_TABLE = 30  # labels in a figure of gold by predicted ones
WIDEST = 12  # inches of panels side by side


def draw(panels: int, fill: Callable, width: float = 3.4, height: float = 2.9) -> bytes:
    """A PNG of `panels` axes of this size in inches, side by side up to WIDEST; `fill` gets the list of the axes."""
    from matplotlib import rc_context  # takes a second, which a report without figures does not need
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, max(1, int(WIDEST / width)))
    lines = -(-panels // columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * lines), layout="constrained", dpi=140)
        FigureCanvasAgg(figure)
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for unused in axes[panels:]:
            unused.remove()
        fill(list(axes[:panels]))
        picture = io.BytesIO()
        figure.savefig(picture, format="png", transparent=True, metadata={"Software": None})
    return picture.getvalue()


def title(text: str) -> str:
    """Text wrapped to fit above one of several panels."""
    return textwrap.fill(text, 34)


def scores(groups: list[Group]) -> bytes | None:
    """Every task's score by method, with its 95% interval; a grey line is the majority class. None for one group."""
    keys = list(dict.fromkeys(group.key for group in groups))
    methods = [method for _, method in sorted({(rank(group), group.method) for group in groups})]
    if len(groups) < 2:
        return None

    def colour(method: str) -> str:
        return COLOURS[methods.index(method) % len(COLOURS)]

    def fill_task(ax, line: int, same_task: list[Group]) -> None:
        often = majority_score(same_task, "score")
        if often is not None:
            ax.plot([100 * often] * 2, [line - 0.42, line + 0.42], color=GREY, linewidth=2.5, alpha=0.5)
        for group in same_task:
            cell = cells(group)["score"]
            y = line + 0.8 * ((methods.index(group.method) + 0.5) / len(methods) - 0.5)
            if cell.interval:
                ends = [100 * end for end in cell.interval]
                ax.plot(ends, [y, y], color=colour(group.method), linewidth=1.2, alpha=0.7)
            ax.plot(100 * cell.mean, y, "o", color=colour(group.method), markersize=4.5)

    def fill(axes):
        (ax,) = axes
        for line, key in enumerate(keys):
            fill_task(ax, line, [group for group in groups if group.key == key])
        ax.set_yticks(range(len(keys)), [task_title(key, keys) for key in keys])
        ax.set_ylim(len(keys) - 0.45, -0.55)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("score, times 100 (grey: the majority class)")
        points = [ax.plot([], [], "o", color=colour(method), label=method)[0] for method in methods]
        ax.figure.legend(handles=points, loc="outside lower left", ncols=3)

    height = 0.9 + len(keys) * (0.2 + 0.11 * len(methods)) + 0.08 * len(methods)
    return draw(1, fill, width=8.0, height=height)


def mean_and_range(results: list[Result], name: str) -> tuple[list[float], ...]:
    """Samples seen, and mean, minimum and maximum over the runs, at the points that all runs with a curve have."""
    curves = [curve for curve in (dict(result.curve(name)) for result in results) if curve]
    shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    values = [[curve[x] for curve in curves] for x in shared]
    return shared, [float(np.mean(v)) for v in values], [min(v) for v in values], [max(v) for v in values]


def learning_curves(groups: list[Group]) -> bytes | None:
    """Held-out score, and reward in training, by samples seen; bands from the lowest to the highest seed."""
    shown = {"eval/score": "held-out score", "objective/reward": "reward in training"}
    curves = {
        name: {group.method: found for group in groups if len((found := mean_and_range(group.results, name))[0]) > 1}
        for name in shown
    }
    names = [name for name in shown if curves[name]]
    if not names:
        return None
    methods = list(dict.fromkeys(method for name in names for method in curves[name]))

    def fill(axes):
        for ax, name in zip(axes, names):
            for method, (x, mean, low, high) in curves[name].items():
                colour = COLOURS[methods.index(method) % len(COLOURS)]
                ax.plot(x, mean, color=colour, label=method, marker="o" if len(x) < 12 else None, markersize=3.5)
                ax.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)
            scale_samples(ax, [max(x) for x, *_ in curves[name].values()])
            ax.set_title(shown[name])
        lines = {line.get_label(): line for ax in axes for line in ax.get_lines()}
        axes[0].figure.legend(lines.values(), lines.keys(), loc="outside lower left", ncols=len(names))

    return draw(len(names), fill, width=4.6, height=3.2 + 0.1 * len(methods))


def scale_samples(ax, seen: list[float]) -> None:
    """Label the axis of samples seen, and make it logarithmic if one curve is much longer than another."""
    ax.set_xlabel("training samples seen")
    if max(seen) <= 8 * min(seen):
        return
    start = min(seen) / 8  # the scale is linear up to here, logarithmic beyond
    ax.set_xscale("symlog", linthresh=start)
    ax.set_xlim(left=0)
    powers = [10**k for k in range(9) if start <= 10**k < max(seen)]
    ax.set_xticks([0, *powers], ["0", *(f"{power:,}" for power in powers)])
    ax.minorticks_off()
    ax.set_xlabel("training samples seen (logarithmic)")


def confusion(groups: list[Group]) -> bytes | None:
    """Gold by predicted label: the shares of each gold label, and the counts summed over the runs. None for tasks with
    more labels than a figure has room for."""
    tables = []
    for group in groups:
        counts = [counts for counts in map(confusion_counts, group.results) if counts is not None]
        if counts and len({c.shape for c in counts}) == 1 and len(counts[0]) <= MOST_IN_TABLE:
            tables.append((group, sum(counts)))
    if not tables:
        return None

    def fill(axes):
        for ax, (group, counts) in zip(axes, tables):
            labels = [
                label.replace("$", r"\$") for label in (*group.first.task.labels, "invalid")
            ]  # $ begins a formula
            if not counts[:, -1].any():
                labels, counts = labels[:-1], counts[:, :-1]
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
            ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
            for (y, x), share in np.ndenumerate(shares):
                colour = "white" if share > 0.7 else "#1a1a1a"  # the cell's own background is opaque
                ax.text(x, y, f"{share:.0%}\n{counts[y, x]}", ha="center", va="center", color=colour, fontsize=7.5)
            ax.set_xticks(range(len(labels)), labels, rotation=20, ha="right")
            ax.set_yticks(range(len(shares)), labels[: len(shares)])
            ax.grid(False)
            ax.spines[:].set_visible(False)
            ax.set_xlabel("answer")
            ax.set_ylabel("gold")
            ax.set_title(title(group.method + (f", {len(group.results)} runs" if len(group.results) > 1 else "")))

    size = max(len(group.first.task.labels) for group, _ in tables)
    return draw(len(tables), fill, width=2.2 + 0.55 * size, height=1.7 + 0.5 * size)


def confusion_counts(result: Result) -> np.ndarray | None:
    """(classes, classes + 1) counts of one result; None if there are no classes, or no counts."""
    if result.task.number or not result.task.labels:
        return None
    if result.answers is not None:
        rows, labels, _ = result.answered_rows()
        return metrics.confusion_counts(result.task, rows, labels)
    stored = result.details.get("confusion")
    return None if stored is None else np.array(stored)


def reliability_points(results: list[Result]) -> tuple[np.ndarray, np.ndarray, np.ndarray, float] | None:
    """Mean probability of the predicted label, accuracy and count of every non-empty bin (of BINS), and the expected
    calibration error (https://arxiv.org/abs/1706.04599), over the rows of all results.

    Only for tasks with two labels: the file holds the probability of the last one. None if there are no probabilities.
    """
    probabilities, right = [], []
    for result in results:
        if result.answers is None or len(result.task.labels) != 2:
            return None
        for line in result.answers:
            if "probability_of_last_label" in line and line["label"] is not None:
                last = line["probability_of_last_label"]
                probabilities.append(last if line["label"] == result.task.labels[-1] else 1 - last)
                right.append(line["label"] == line["gold"])
    if not probabilities:
        return None
    predicted, correct = np.array(probabilities), np.array(right, dtype=float)
    bins = np.minimum((predicted * BINS).astype(int), BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    kept = count > 0
    confidence, accuracy = (np.bincount(bins, v, BINS)[kept] / count[kept] for v in (predicted, correct))
    return confidence, accuracy, count[kept], float(np.sum(count[kept] * abs(confidence - accuracy)) / count.sum())


def reliability(groups: list[Group]) -> bytes | None:
    """Accuracy by the probability of the predicted label; the dotted line is perfect calibration."""
    points = [(group, found) for group in groups if (found := reliability_points(group.results)) is not None]
    if not points:
        return None

    def fill(axes):
        for ax, (group, (confidence, accuracy, count, error)) in zip(axes, points):
            ax.plot([0, 1], [0, 1], color=GREY, linestyle=":", linewidth=1.2)
            ax.plot(confidence, accuracy, color=COLOURS[0], zorder=2)
            sizes = 12 + 120 * count / count.sum()
            ax.scatter(confidence, accuracy, s=sizes, color=COLOURS[0], zorder=3, clip_on=False)
            ax.set_xlim(0.45, 1.02)
            ax.set_ylim(-0.03, 1.03)
            ax.set_xlabel("probability of the answer")
            ax.set_ylabel("accuracy")
            ax.set_title(f"{title(group.method)}\ncalibration error {error:.3f}")

    return draw(len(points), fill, width=2.8)


def collapsed(history: list[dict]) -> bool:
    """Whether one label had nearly all answers in two consecutive training steps."""
    most = [max(shares.values()) >= COLLAPSED for line in history if (shares := label_shares(line))]
    return any(a and b for a, b in zip(most, most[1:]))


def label_shares(line: dict) -> dict[str, float]:
    start = f"objective/{line['task']}/share/" if "task" in line else "objective/share/"
    return {name.removeprefix(start): share for name, share in line.items() if name.startswith(start)}


def label_share_plot(runs: list[tuple[str, list[dict]]]) -> bytes | None:
    """The share of each label (at most the six largest) by training step; runs are given as (name, history)."""
    if not runs:
        return None

    def fill(axes):
        for ax, (name, history) in zip(axes, runs):
            steps = [(line["step"], label_shares(line)) for line in history if label_shares(line)]
            names = sorted({label for _, shares in steps for label in shares})
            largest = sorted(names, key=lambda label: -max(shares.get(label, 0.0) for _, shares in steps))[:6]
            for number, label in enumerate(sorted(largest)):
                values = [shares.get(label, 0.0) for _, shares in steps]
                ax.plot([step for step, _ in steps], values, color=COLOURS[number], label=label)
            ax.set_ylim(-0.03, 1.03)
            ax.set_xlabel("training step")
            ax.set_ylabel("share of answers")
            ax.set_title(title(name))
            ax.legend(loc="best")

    return draw(len(runs), fill)
