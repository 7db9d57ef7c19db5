"""What every measured process shares: its clock, its peak memory, its inputs, and the JSON line that it ends with.

The baselines run in environments of their own, with other versions of torch and transformers, and are started by path.
So this file imports only what all of them have, and libraries only where they are used.
"""

import time

STARTED = time.perf_counter()  # before all else: importing the libraries is part of the wall time

import argparse  # noqa: E402
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
KL_COEF = 0.05
TOLERANCE = 1e-2  # of logits: beyond it, a program does not compute the same model


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
        """Record an evaluation that has just ended and took this many seconds."""
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
        """The JSON line's figures of the steps, of which the first `warm_up` are not measured."""
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
    """What prepare.py wrote: model folder, prompts as token ids, labels, label tokens, and logits to compare with."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def trl_arguments(description: str) -> argparse.Namespace:
    """The command line of both versions of TRL."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--micro_batch", type=int, default=0, help="samples per backward pass; 0: the whole batch")
    parser.add_argument("--ppo_epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--response_length", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--eval_steps", type=int, default=0, help="evaluate every this many steps; 0: never")
    parser.add_argument("--until", type=float, default=2.0, help="stop at this held-out accuracy")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.micro_batch = arguments.micro_batch or arguments.batch
    return arguments


def load_tokenizer(inputs: dict, **options):
    """The tokenizer of the inputs' model."""
    from transformers import PreTrainedTokenizerFast

    file = f"{inputs['model_folder']}/tokenizer.json"
    special = {"eos_token": inputs["eos_token"], "pad_token": inputs["pad_token"]}
    return PreTrainedTokenizerFast(tokenizer_file=file, **special, **options)


def peak_memory_bytes() -> int:
    """The most memory this process has held.

    On Linux a new process inherits its parent's peak, so whoever starts this one must be small.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


def emit(figures: dict, packages: tuple[str, ...]) -> None:
    """Print the JSON line that ends a process's output: the figures, peak memory, threads and versions."""
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
    # Only for this import: the project's modules have plain names, which must not shadow a library's.
    sys.path.append(str(ROOT))
    try:
        import rewards
        import tasks
    finally:
        sys.path.remove(str(ROOT))
    return rewards.reward_function(tasks.get("MR"))


def label_logits(causal_lm, prompts: list[list[int]], label_tokens: list[int], batch: int = 16):
    """(prompts, labels) logits of the labels' first tokens after each prompt, by a plain forward pass in eval mode.

    causal_lm: a Llama causal language model of transformers, with or without adapters.
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


def timed_accuracy(causal_lm, inputs: dict, clock: Clock) -> float:
    """`held_out_accuracy`, recorded by the clock."""
    began = time.perf_counter()
    score = held_out_accuracy(causal_lm, inputs)
    clock.evaluated(score, time.perf_counter() - began)
    print(f"step {len(clock.steps)}: held-out {score:.3f}", file=sys.stderr, flush=True)
    return score


def check_same_model(causal_lm, inputs: dict) -> None:
    """Raises SystemExit unless this program's model gives the logits that prepare.py recorded."""
    import torch

    expected = torch.tensor(inputs["check_logits"])
    prompts = [row["ids"] for row in inputs["held_out"][: len(expected)]]
    difference = float((label_logits(causal_lm, prompts, inputs["label_tokens"]) - expected).abs().max())
    if not difference < TOLERANCE:
        raise SystemExit(f"{inputs['model']}: this program's logits differ by {difference:.3g} from the project's")
