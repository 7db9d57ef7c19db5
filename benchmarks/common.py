"""What every measured process shares: its clock, its peak memory, the inputs it reads, the JSON line it ends with.

The baselines run in environments of their own, with other versions of torch and transformers, and start by path, so
this file imports only what is in all of them, and torch only where it is used.
"""

import time

STARTED = time.perf_counter()  # first of all: importing the libraries is part of the wall time

import json  # noqa: E402
import platform  # noqa: E402
import resource  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from importlib import metadata  # noqa: E402
from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
LORA = {
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "bias": "none",
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
KL_COEF = 0.05  # wherever a KL is paid for
TOLERANCE = 1e-2  # of logits: above it, a program does not compute the same model


class Clock:
    """Seconds of the steps, and the held-out accuracies with the seconds it took to reach them.

    wall_seconds counts from the start of the process, run_seconds is the same without the evaluations, and
    train_seconds counts the steps alone.
    """

    def __init__(self):
        self.steps: list[float] = []
        self.evaluations: list[dict] = []
        self.evaluating = 0.0

    def evaluated(self, score: float, seconds: float) -> None:
        """Note an evaluation that has just ended and took so many seconds."""
        self.evaluating += seconds
        wall = time.perf_counter() - STARTED
        self.evaluations.append(
            {
                "step": len(self.steps),
                "score": score,
                "train_seconds": round(sum(self.steps), 2),
                "run_seconds": round(wall - self.evaluating, 2),
                "wall_seconds": round(wall, 2),
            }
        )

    def figures(self, samples_per_step: int, warm_up: int = 1) -> dict:
        """What the JSON line says of the steps; the first `warm_up` of them are not measured."""
        measured = self.steps[warm_up:]
        samples = samples_per_step * len(measured)
        return {
            "seconds_per_sample": sum(measured) / samples if samples else None,
            "step_seconds": [round(seconds, 3) for seconds in self.steps],
            "samples_measured": samples,
            "samples": samples_per_step * len(self.steps),
            "evaluations": self.evaluations,
        }


def read_inputs(path: str) -> dict:
    """What prepare.py wrote: model folder, prompts as token ids, labels, label tokens, and logits to check with."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def peak_memory_bytes() -> int:
    """The most memory this process has held.

    Linux hands the parent's peak down to a new process, so that whoever starts this one must be small.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def emit(figures: dict, packages: tuple[str, ...]) -> None:
    """End the process's output with one JSON line: the figures, peak memory, threads and versions."""
    import torch

    line = {
        **figures,
        "peak_memory_bytes": peak_memory_bytes(),
        "wall_seconds": round(time.perf_counter() - STARTED, 2),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }
    print(json.dumps(line), flush=True)


def rule_reward() -> Callable[..., list[float]]:
    """The project's reward of MR answers: (completions, label, ended) -> floats; +1 correct, -1 wrong, -3 no answer."""
    # Only for this import: the project's modules have plain names, which must not stand in a library's way.
    sys.path.append(str(ROOT))
    try:
        import rewards
        import tasks
    finally:
        sys.path.remove(str(ROOT))
    return rewards.reward_function(tasks.get("MR"))


def label_logits(causal_lm, prompts: list[list[int]], label_tokens: list[int], batch: int = 16):
    """(prompts, labels) logits of the labels' first tokens after every prompt, by a plain forward in eval mode.

    causal_lm: a Llama causal language model of transformers; its blocks may carry adapters.
    """
    import torch

    causal_lm.eval()
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    result = torch.zeros(len(prompts), len(label_tokens))
    with torch.no_grad():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([prompts[i] + [0] * (width - len(prompts[i])) for i in rows])
            mask = torch.tensor([[1] * len(prompts[i]) + [0] * (width - len(prompts[i])) for i in rows])
            hidden = causal_lm.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
            last = hidden[torch.arange(len(rows)), mask.sum(1) - 1]
            result[rows] = (last @ causal_lm.lm_head.weight[label_tokens].T).float()
    return result


def held_out_accuracy(causal_lm, inputs: dict) -> float:
    """Share of the held-out rows whose label's first token is the most probable among the labels'."""
    rows = inputs["held_out"]
    logits = label_logits(causal_lm, [row["ids"] for row in rows], inputs["label_tokens"])
    gold = [row["label"] for row in rows]
    return sum(guess == label for guess, label in zip(logits.argmax(-1).tolist(), gold)) / len(rows)


def check_same_model(causal_lm, inputs: dict) -> None:
    """SystemExit unless this program's model gives the logits that prepare.py noted."""
    import torch

    noted = torch.tensor(inputs["check_logits"])
    prompts = [row["ids"] for row in inputs["held_out"][: len(noted)]]
    difference = float((label_logits(causal_lm, prompts, inputs["label_tokens"]) - noted).abs().max())
    if not difference < TOLERANCE:
        raise SystemExit(f"{inputs['model']}: this program's logits differ by {difference:.3g} from the project's")
