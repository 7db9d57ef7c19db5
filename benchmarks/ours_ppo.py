"""One measured run of ppo.py: its own command line, with a clock on its steps and evaluations.

    .venv/bin/python -m benchmarks.ours_ppo --inputs FILE -- --max_steps 3 --batch_sentence_num 16

What follows `--` goes to ppo.py. A step's seconds are those of rollout, updates and optimizer. `--matrix_rate` also
counts the step's operations and measures the machine's matrix rate. `--whole_answers`: in free mode an answer does not
end with its label but, as TRL's, at the end-of-sequence token or the maximum length. `--compiled`: see compiled.py.
"""

from benchmarks import common  # first: its clock starts here  # isort: skip

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import TrainerCallback

import ppo
from benchmarks.compiled import compile_elementwise
from benchmarks.operations import llama, training_operations
from engine.batches import common_prefix
from evaluation.answer_spaces import AnswerFormat
from run.history import history
from training import ppo_trainer

SHAPES = ((256, 576, 1536), (1024, 576, 1536), (1024, 1024, 1024), (2048, 2048, 2048))
TRIES = 10


class WholeAnswers(AnswerFormat):
    """An answer does not end with its label."""

    def stop_rule(self, early: bool = False):
        return lambda text: False


class ClockCallback(TrainerCallback):
    """Times ppo.py's steps, records its evaluations, and stops it at an accuracy or a time limit."""

    def __init__(self, inputs: dict | None, until: float, time_limit: float):
        self.clock, self.trainer = common.Clock(), None
        self.inputs, self.until, self.time_limit = inputs, until, time_limit
        self.prompts: list[list[list[int]]] = []  # of every step
        self.first_step = 0.0  # seconds from the start of the process, with the evaluation before training

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()
        if not self.clock.steps:
            self.first_step = self.began - common.STARTED

    def on_step_end(self, args, state, control, **kwargs):
        self.clock.steps.append(time.perf_counter() - self.began)
        self.prompts.append([episode["prompt"] for episode in self.trainer.episodes])
        if self.inputs is not None:
            size = args.per_device_train_batch_size
            start = size * (len(self.clock.steps) - 1)
            rows = [row["ids"] for row in self.inputs["train"][start : start + size]]
            distinct = self.prompts[-1][:: len(self.prompts[-1]) // size]
            if rows and distinct[: len(rows)] != rows:
                raise SystemExit("ppo.py did not take the rows of --inputs")
        if time.perf_counter() - common.STARTED > self.time_limit:
            control.should_training_stop = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.clock.evaluated(metrics["eval/score"], metrics["eval/seconds"])
        if metrics["eval/score"] >= self.until:
            control.should_training_stop = True


def matrix_rate() -> dict[str, float]:
    """Operations per second of torch.mm in float32 by shape, the best of TRIES; takes about a second altogether."""
    rates = {}
    for rows, inner, columns in SHAPES:
        a, b = torch.rand(rows, inner), torch.rand(inner, columns)
        best = float("inf")
        for _ in range(TRIES):
            began = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - began)
        rates[f"{rows}x{inner}x{columns}"] = 2 * rows * inner * columns / best
    return rates


def parse() -> tuple[argparse.Namespace, list[str]]:
    """This program's arguments, and those of ppo.py."""
    own = sys.argv[1:]
    own, passed = (own[: own.index("--")], own[own.index("--") + 1 :]) if "--" in own else (own, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", default="", help="check that these rows are taken")
    parser.add_argument("--matrix_rate", action="store_true")
    parser.add_argument("--whole_answers", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--until", type=float, default=2.0, help="stop at this held-out accuracy")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="seconds")
    return parser.parse_args(own), passed


def clock_trainer(callback: ClockCallback, whole_answers: bool) -> None:
    """From now on ppo.py's trainer has the callback."""

    class Clocked(ppo_trainer.PPOTrainer):
        def __init__(self, callbacks=(), **named):
            if whole_answers:
                given = named["answer_format"].items()
                named["answer_format"] = {n: WholeAnswers(f.task, f.use_CoT, f.strict_format) for n, f in given}
            super().__init__(callbacks=[*callbacks, callback], **named)
            callback.trainer = self

    ppo_trainer.PPOTrainer = Clocked


def operations_of_steps(trainer, steps: list[list[list[int]]]) -> list[int]:
    """The operations of every step, from its prompts."""
    network = llama(trainer.model.config, common.LORA["r"])
    labels, passes = len(trainer.tasks[0].label_words), trainer.args.ppo_epochs

    def operations(prompts: list[list[int]]) -> int:
        lengths = [len(prompt) for prompt in prompts]
        return training_operations(network, lengths, common_prefix(prompts), labels, passes)["total"]

    return [operations(prompts) for prompts in steps]


def main() -> None:
    arguments, passed = parse()
    inputs = common.read_inputs(arguments.inputs) if arguments.inputs else None
    if arguments.compiled:
        compile_elementwise()
    callback = ClockCallback(inputs, arguments.until, arguments.time_limit)
    clock_trainer(callback, arguments.whole_answers)
    # At the start and at the end, because the load of the machine may change.
    rates = [matrix_rate()] if arguments.matrix_rate else []
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            ppo.main([*passed, "--report_to", "none", "--output_dir", str(folder)])
        lines = history(folder)
    finally:
        shutil.rmtree(folder)
    trainer = callback.trainer
    figures = callback.clock.figures(trainer.args.per_device_train_batch_size * trainer.samples_per_prompt)
    figures["first_step_seconds"] = round(callback.first_step, 2)
    lengths = [line["objective/response_length"] for line in lines if "objective/response_length" in line]
    figures["response_tokens"] = sum(lengths) / len(lengths) if lengths else 1.0  # summed over all labels: one token
    shown = [len(prompt) for prompts in callback.prompts for prompt in prompts]
    figures["prompt_tokens"] = sum(shown) / len(shown)
    figures["micro_batch_tokens"] = trainer.engine.tokens_per_micro_batch
    if arguments.matrix_rate:
        rates.append(matrix_rate())
        figures["matrix_rates"] = {shape: max(rate[shape] for rate in rates) for shape in rates[0]}
        figures["operations"] = operations_of_steps(trainer, callback.prompts)
    common.emit(figures, ("torch", "transformers", "peft"))


if __name__ == "__main__":
    main()
