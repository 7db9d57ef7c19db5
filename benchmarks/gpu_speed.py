"""PPO's seconds, tokens, share of the matrix rate, memory and host waits for a model of one shape; and TRL's.

    .venv/bin/python -m benchmarks.gpu_speed --shape 1.5B                 ppo.py, several kinds of answers
    .venv/bin/python -m benchmarks.gpu_speed --shape 1.5B --program trl   GRPOTrainer on the same rows

The weights are random, so answers of any tokens never end by themselves: free answers have 16 tokens in both programs,
an analysis has 96. Operations are those of the matrix products of all tokens that went through the network, padding
included, attention's own products left out. After the measured steps one step more counts what waited for the card: in
the whole step, and in its updates.
"""

from benchmarks import common  # first: its clock starts here  # isort: skip

import argparse
import contextlib
import gc
import io
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import torch

import ppo
from benchmarks import gpu_models, report
from benchmarks.operations import llama
from benchmarks.ours_ppo import ClockCallback, clock_trainer
from training import ppo_trainer
from training.ppo_step import Step

SAMPLED = ("--policy_gradient", "sampled")
MODES = {
    "expected": (),
    "sampled": SAMPLED,
    "free": (*SAMPLED, "--answer_space", "free"),
    "CoT": (*SAMPLED, "--use_CoT", "True"),
}
WARM_UP, MEASURED = 1, 2  # steps; then one that counts waits
ANSWER_TOKENS = 16
SIZES = {  # prompts per step and samples per prompt
    "tiny": (2, 2),
    "135M": (32, 16),
    "1.5B": (16, 16),
    "7B": (8, 16),
}


class Waits:
    """Counts the operations that wait for a card, as torch warns of them; in `updates` those within the updates."""

    def __init__(self):
        self.steps = self.updates = 0
        self._seen: list = []
        self._stack = contextlib.ExitStack()

    def begin(self) -> None:
        self._seen = self._stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        update = Step.update

        def counted(step, add_gradient):
            def add(*rows):
                before = self._count()
                try:
                    return add_gradient(*rows)
                finally:
                    self.updates += self._count() - before

            return update(step, add)

        Step.update = counted
        self._stack.callback(setattr, Step, "update", update)
        torch.cuda.set_sync_debug_mode("warn")
        self._stack.callback(torch.cuda.set_sync_debug_mode, "default")

    def end(self) -> None:
        self.steps = self._count()
        self._stack.close()

    def _count(self) -> int:
        return sum("synchronizing CUDA operation" in str(warning.message) for warning in self._seen)


class Operations:
    """Counts the multiplications and additions of a network's matrix products, as operations.py does by formula."""

    def __init__(self, network):
        self.count, self._sizes = 0, llama(network.causal_lm.config, common.LORA["r"])
        run_blocks, run_prefix, logits = network.run_blocks, network.run_prefix, network.logits

        def blocks(ids, positions, mask, cache, read=None):
            self._add(ids.numel(), ids.numel() if read is None else len(read))
            return run_blocks(ids, positions, mask, cache, read)

        def prefix(ids):
            self._add(len(ids), 0)
            return run_prefix(ids)

        def head(states, vocabulary=None):
            columns = network.head.weight.shape[0] if vocabulary is None else len(vocabulary)
            self.count += (4 if states.requires_grad else 2) * states.numel() * columns
            return logits(states, vocabulary)

        network.run_blocks, network.run_prefix, network.logits = blocks, prefix, head

    def _add(self, tokens: int, read: int) -> None:
        """A forward of so many tokens and, where a graph is kept, its backward: the frozen weights have no gradient."""
        frozen, lora = self._sizes.frozen_uses(tokens, read), self._sizes.lora_uses(tokens, read)
        self.count += 4 * frozen + 6 * lora if torch.is_grad_enabled() else 2 * (frozen + lora)


class CardCallback(ClockCallback):
    """The clock, which waits for the card; what is counted in every step; and in the last one, what waits."""

    def __init__(self):
        super().__init__(None, until=2.0, time_limit=float("inf"))
        self.waits = Waits() if torch.cuda.is_available() else None
        self.tokens: list[int] = []  # pushed through the network, by step
        self.operations: list[int] = []
        self.counter: Operations | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        network = self.trainer.engine.network
        if state.global_step == 0:
            self.counter = Operations(network)
        if state.global_step == WARM_UP:
            gpu_models.forget_peak()
        if state.global_step == WARM_UP + MEASURED:
            self.memory = gpu_models.peak_memory()
            if self.waits is not None:
                self.waits.begin()
        self._before = network.tokens_computed, self.counter.count
        gpu_models.wait()
        super().on_step_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM_UP + MEASURED + 1 and self.waits is not None:
            self.waits.end()
        gpu_models.wait()
        super().on_step_end(args, state, control, **kwargs)
        tokens, operations = self._before
        self.tokens.append(self.trainer.engine.network.tokens_computed - tokens)
        self.operations.append(self.counter.count - operations)


def measured_steps(figures: list[float]) -> list[float]:
    return figures[WARM_UP : WARM_UP + MEASURED]


def ours(shape: str, mode: str, rate: float) -> dict:
    """The figures of ppo.py with one kind of answers."""
    prompts, samples = SIZES[shape]
    callback, trainer_class = CardCallback(), ppo_trainer.PPOTrainer
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    command = [*MODES[mode], "--batch_sentence_num", str(prompts), "--max_steps", str(WARM_UP + MEASURED + 1)]
    command += ["--repeat_time", str(samples)] if mode != "expected" else []
    command += ["--eval_size", "2", "--report_to", "none", "--output_dir", str(folder)]
    clock_trainer(callback, whole_answers=True)
    try:
        with gpu_models.in_place_of_loading(shape), contextlib.redirect_stdout(sys.stderr):
            ppo.main(command)
    finally:
        ppo_trainer.PPOTrainer = trainer_class
        shutil.rmtree(folder)
    seconds, network = sum(measured_steps(callback.clock.steps)), callback.trainer.engine.network
    per_step = prompts * (1 if mode == "expected" else samples)
    return {
        "prompts": prompts,
        "samples_per_prompt": 1 if mode == "expected" else samples,
        "seconds_per_sample": seconds / MEASURED / per_step,
        "tokens_per_second": sum(measured_steps(callback.tokens)) / seconds,
        "operations_per_step": sum(measured_steps(callback.operations)) / MEASURED,
        "share_of_rate": sum(measured_steps(callback.operations)) / seconds / rate,
        "peak_memory_bytes": callback.memory,
        "rows": "plain" if network.plain else "packed" if network.packed else "padded",
        "waits": callback.waits and {"step": callback.waits.steps, "updates": callback.waits.updates},
        "step_seconds": [round(step, 3) for step in callback.clock.steps],
    }


def trl(shape: str, answer_tokens: int, checkpointing: bool) -> dict:
    """The figures of GRPOTrainer on as many rows and samples."""
    from benchmarks import trl_grpo  # here: TRL takes seconds to import

    prompts, samples = SIZES[shape]
    arguments = trl_grpo.GRPOArguments(
        rows=prompts * (WARM_UP + MEASURED),
        batch_sentence_num=prompts,
        num_generations=samples,
        micro_batch=samples,
        max_completion_length=answer_tokens,
        gradient_checkpointing=checkpointing,
    )
    gpu_models.forget_peak()
    output = io.StringIO()
    with gpu_models.in_place_of_loading(shape), contextlib.redirect_stdout(output):
        trl_grpo.run(arguments)
    figures = report.last_json(output.getvalue())
    return {
        "prompts": prompts,
        "samples_per_prompt": samples,
        "seconds_per_sample": figures["seconds_per_sample"],
        "response_tokens": figures["response_tokens"],
        "peak_memory_bytes": gpu_models.peak_memory(),
        "step_seconds": figures["step_seconds"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="135M", choices=SIZES)
    parser.add_argument("--program", default="ours", choices=("ours", "trl"))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES, help="of ours")
    arguments = parser.parse_args()
    shape = arguments.shape
    if arguments.program == "trl":
        work = {
            ("TRL 1.14.0 GRPO", "free"): lambda: trl(shape, ANSWER_TOKENS, True),
            ("TRL 1.14.0 GRPO, no gradient checkpointing", "free"): lambda: trl(shape, ANSWER_TOKENS, False),
        }
    else:
        rate = gpu_models.matrix_rate()
        gpu_models.say(part="c", program="torch.mm", shape=shape, operations_per_second=rate)
        work = {("ours", mode): lambda mode=mode: ours(shape, mode, rate) for mode in arguments.modes}
    for (program, mode), run in work.items():
        row = dict(part="d" if arguments.program == "trl" else "c", program=program, shape=shape, mode=mode)
        try:
            gpu_models.say(**row, **run())
        # Out of memory, or anything else, in one of them is a line; the others go on.
        except (Exception, SystemExit) as error:
            gpu_models.say(**row, failed=gpu_models.reason(error))
        gc.collect()
        gpu_models.forget_peak()


if __name__ == "__main__":
    main()
