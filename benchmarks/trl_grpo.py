"""One run of TRL's GRPOTrainer on the prompts, rows, reward and adapter of `ppo.py --answer_space free`, as TRL's users
would run it: its own defaults wherever this project has no say.

    .venv/bin/python -m benchmarks.trl_grpo --task MR --seed 0 --output_dir DIR     train, then evaluate
    .venv/bin/python -m benchmarks.trl_grpo --task MR --rows 12 --batch_sentence_num 4      measure three steps

It runs in the project's own environment. With --output_dir the trained adapter answers the held-out rows with any
tokens (summary.json, predictions.jsonl) and among the labels (the same in labels/), greedily and by the code that
evaluates every other method. A step's seconds are from the end of one step to the end of the next one. TRL generates
up to --max_completion_length tokens and cannot stop at a label; with 2 its answers are about as long as this project's.
"""

from benchmarks import common  # first: its clock starts here  # isort: skip

import contextlib
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import GRPOConfig, GRPOTrainer

import prompts
import rewards
from engine import loading, models
from engine.engine import Engine
from evaluation import predict, predictions, scores
from evaluation.answer_spaces import AnswerFormat
from machine.errors import ArgumentError, clear_errors
from run.arguments import get_task
from run.folder import data_hash, make_folder, write_summary
from run.history import append_history
from run.parser import Parser, option
from run.progress import quiet_trainer
from tasks import Task, splits
from training.sampler import StratifiedSampler

ANSWER_TOKENS = 16  # of an evaluated answer at most, as in ppo.py
TRL_LEARNING_RATE = GRPOConfig.__dataclass_fields__["learning_rate"].default


@dataclass
class GRPOArguments:
    """What this program takes; names that ppo.py has too mean the same."""

    task: str = option("MR", "run", "task name, as in tasks/table.py")
    train_model_name: str = option(models.EMBEDDED, "model", "the embedded model, or a hub name")
    from_local: bool = option(False, "model", "True: --train_model_name is a folder with a whole model")
    data_path: str = option("", "run", "file or folder in the task's format, in place of the one below data/")
    text_columns: str = option("", "run", "a table's columns of texts, as subject,body; default: by their names")
    label_column: str = option("", "run", "a table's column of labels; default: by its name")
    output_dir: str = option("", "run", "folder of the run; without one nothing is evaluated")
    seed: int = option(0, "run", "seed of the data order, the sampling and the adapter's initial weights")
    rows: int = option(576, "training", "training rows, each seen once")
    batch_sentence_num: int = option(16, "training", "prompts per step")
    num_generations: int = option(16, "training", "samples per prompt")
    micro_batch: int = option(16, "training", "samples per forward pass")
    max_completion_length: int = option(16, "training", "tokens in a sampled answer")
    learning_rate: float = option(TRL_LEARNING_RATE, "training", "of the adapter")
    gradient_checkpointing: bool = option(True, "training", "TRL's default; False is faster and takes more memory")
    max_prompt_length: int = option(
        prompts.MAX_PROMPT_LENGTH, "answers", "tokens in a prompt; the passage of a longer one is truncated"
    )
    eval_size: int = option(400, "evaluation and saving", "held-out rows to evaluate on; 0: all")


@dataclass
class Answered(GRPOArguments):
    """The arguments as a summary.json has them: with the answer space, and what numbers are answered."""

    answer_space: str = option("free", "answers", "labels or free")
    number_answer: str = option("", "answers", "mean, or in free mode nothing")


class StepCallback(TrainerCallback):
    """Times the steps and writes their figures to history.jsonl, if there is a folder for it."""

    def __init__(self, folder: Path | None, reward: "TaskReward"):
        self.folder, self.reward = folder, reward
        self.clock = common.Clock()

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.clock.steps.append(now - self.began)
        figures = self.reward.figures() | {"time/seconds_per_step": self.clock.steps[-1]}
        shown = "  ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"step {state.global_step}/{state.max_steps}  {shown}", file=sys.stderr, flush=True)
        if self.folder is not None:
            append_history(self.folder, state.global_step, figures)
        self.began = time.perf_counter()


class TaskReward:
    """ppo.py's reward function in the form that TRL calls, with notes of the current step's samples."""

    __name__ = "task_reward"  # TRL asks for it

    def __init__(self, task: Task, eos_token: int):
        self.rule, self.eos_token = rewards.reward_function(task), eos_token
        self.values: list[float] = []
        self.lengths: list[list[int]] = []  # tokens of every answer, by step

    def __call__(self, completions: list[str], completion_ids: list[list[int]], label: list, **unused) -> list[float]:
        ended = [ids[-1] == self.eos_token for ids in completion_ids]
        self.values = self.rule(completions=completions, label=label, ended=ended)
        self.lengths.append([len(ids) for ids in completion_ids])
        return self.values

    def figures(self) -> dict[str, float]:
        """Means over the step's samples, by the names that ppo.py gives them."""
        return {
            "objective/reward": sum(self.values) / len(self.values),
            "objective/response_length": sum(self.lengths[-1]) / len(self.lengths[-1]),
        }


def check(arguments: GRPOArguments) -> None:
    """ArgumentError for sizes that do not divide: TRL's own message would not name these arguments."""
    for name in ("rows", "batch_sentence_num", "num_generations", "micro_batch", "max_completion_length"):
        if getattr(arguments, name) < 1:
            raise ArgumentError(f"--{name} {getattr(arguments, name)} must be greater than 0")
    samples = arguments.batch_sentence_num * arguments.num_generations
    if samples % arguments.micro_batch:
        raise ArgumentError(
            f"--micro_batch {arguments.micro_batch} must divide the {samples} samples of a step (--batch_sentence_num "
            f"times --num_generations)"
        )


def rows_in_order(train: list[dict], seed: int, number: int) -> list[dict]:
    """The first rows of the order in which ppo.py takes them. ArgumentError if there are not so many."""
    if number > len(train):
        raise ArgumentError(f"--rows {number}: there are {len(train)} training rows; give at most as many")
    strata = [round(row["label"]) if isinstance(row["label"], float) else row["label"] for row in train]
    return [train[i] for i in islice(StratifiedSampler(strata, seed), number)]


def prompt_texts(prompt_ids: list[list[int]], tokenizer) -> list[str]:
    """Prompts as TRL takes them, as text. ArgumentError if its tokens would not be the same."""
    texts = tokenizer.batch_decode(prompt_ids, clean_up_tokenization_spaces=False)
    if tokenizer(texts).input_ids != prompt_ids:
        raise ArgumentError("the model's tokenizer does not give a prompt's text its tokens back; choose another model")
    return texts


def trainer_config(arguments: GRPOArguments, folder: str) -> GRPOConfig:
    """TRL's defaults, but for the sizes, the order of the rows, float32, and its output."""
    samples = arguments.batch_sentence_num * arguments.num_generations
    return GRPOConfig(
        output_dir=folder,
        max_steps=arguments.rows // arguments.batch_sentence_num,
        per_device_train_batch_size=arguments.micro_batch,
        gradient_accumulation_steps=samples // arguments.micro_batch,
        num_generations=arguments.num_generations,
        max_completion_length=arguments.max_completion_length,
        learning_rate=arguments.learning_rate,
        temperature=1.0,
        beta=0.0,
        gradient_checkpointing=arguments.gradient_checkpointing,
        shuffle_dataset=False,  # the rows have ppo.py's order
        seed=arguments.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )


def evaluate(
    arguments: GRPOArguments,
    folder: Path,
    task: Task,
    train: list[dict],
    rows: list[dict],
    trainer: GRPOTrainer,
    **cost,
) -> None:
    """Answer the held-out rows with any tokens and among the labels: two folders that reporting/ reads as two runs.

    train: all training rows. trainer: a GRPOTrainer. cost: the training's samples, train_seconds, peak_memory_bytes.
    """
    tokenizer = trainer.processing_class
    prompt_ids, _ = prompts.build_all(task, rows, tokenizer, max_prompt_length=arguments.max_prompt_length)
    engine = Engine(trainer.model.eval(), tokenizer)
    loading.check(engine, arguments.max_prompt_length + ANSWER_TOKENS)
    for space, number_answer, place in (("free", "", folder), ("labels", "mean", folder / "labels")):
        place.mkdir(exist_ok=True)
        answer_format = AnswerFormat(task, number_answer=number_answer)
        found = predict.predict(engine, answer_format, prompt_ids, space, ANSWER_TOKENS)
        predictions.write(place, task, rows, prompt_ids, found, tokenizer, first=False)
        figures = scores.score(task, rows, found)
        print(f"{task.name}, {space}: " + "  ".join(f"{n} {v:.3f}" for n, v in figures.items()), file=sys.stderr)
        write_summary(
            place,
            "trl-grpo",
            task,
            Answered(**asdict(arguments), answer_space=space, number_answer=number_answer),
            {"after": {"step": trainer.state.global_step, **figures}},
            data_hash=data_hash(train),
            held_out_hash=data_hash(rows),
            steps=trainer.state.global_step,
            **cost,
            **scores.details_from_file(place, task, rows, arguments.data_path),
        )


def run(arguments: GRPOArguments) -> None:
    """Train, and evaluate if there is a folder. ArgumentError, DataError, ModelError and PromptError say what is wrong
    with the input."""
    check(arguments)
    path = splits.task_path(get_task(arguments), arguments.data_path)
    task = splits.labelled(get_task(arguments), path)
    train, held_out = splits.train_and_held_out(task, path, arguments.eval_size, arguments.seed)
    rows = rows_in_order(train, arguments.seed, arguments.rows)
    tokenizer = models.load_tokenizer(arguments.train_model_name, arguments.from_local)
    ids, _ = prompts.build_all(task, rows, tokenizer, max_prompt_length=arguments.max_prompt_length)
    data = [{"prompt": text, "label": row["label"]} for text, row in zip(prompt_texts(ids, tokenizer), rows)]
    model = models.load_model(arguments.train_model_name, arguments.from_local)
    folder = make_folder(arguments, task) if arguments.output_dir else None
    set_seed(arguments.seed)
    reward = TaskReward(task, tokenizer.eos_token_id)
    callback = StepCallback(folder, reward)
    with tempfile.TemporaryDirectory(prefix="benchmark-") as aside:
        trainer = GRPOTrainer(
            model,
            reward,
            trainer_config(arguments, aside),
            train_dataset=Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=[callback],
            peft_config=models.lora_config(),
        )
        quiet_trainer(trainer)
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    samples = arguments.batch_sentence_num * arguments.num_generations
    figures = callback.clock.figures(samples)
    measured = [length for lengths in reward.lengths[1:] or reward.lengths for length in lengths]
    figures["response_tokens"] = sum(measured) / len(measured)
    figures["prompt_tokens"] = sum(map(len, ids)) / len(ids)
    if folder is not None:
        trainer.model.save_pretrained(folder / "adapter")
        evaluate(
            arguments, folder, task, train, held_out, trainer,
            samples=figures["samples"],
            train_seconds=sum(callback.clock.steps),
            peak_memory_bytes=common.peak_memory_bytes(),
        )  # fmt: skip
    common.emit(figures, ("torch", "transformers", "trl", "peft"))


def main(argv: list[str] | None = None) -> None:
    parser = Parser(GRPOArguments, __doc__.splitlines()[0], prog="trl_grpo.py")
    arguments = GRPOArguments(**vars(parser.parse_args(argv)))
    with clear_errors("trl_grpo.py"):
        run(arguments)


if __name__ == "__main__":
    main()
