"""A classification head on an encoder or a decoder: the baseline that needs no prompt.

    bash scripts/classify.sh                                  LoRA and a head on the embedded model, on MR
    bash scripts/classify.sh --full_finetuning True --train_model_name FacebookAI/roberta-large
    bash scripts/classify.sh --split test --eval_size 0 --from_local True --train_model_name model/MR/<run>/best

The model is transformers' AutoModelForSequenceClassification (engine/classifier.py says what its head is). It reads a
row's texts without instruction or chat template (evaluation/classifying.py); a number task gets one output that is
trained by squared error. With `--split` a trained head answers that split, and nothing is trained.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from engine.folders import HEAD, head_labels, write_head
from evaluation import jobs, outcome
from machine import processes
from machine.errors import ArgumentError, ModelError
from run import faults
from run.arguments import get_task, one_of, parse
from run.folder import lock, make_folder
from run.parser import fixed, option
from tasks import Task, splits
from training.arguments import FULL_LEARNING_RATE, TrainArguments, check_batch, check_training, fill_in_epochs
from training.data import TaskData, load_rows

STEPS = 72  # of 8 rows: as many rows as ppo.py's and sft.py's defaults see
LEARNING_RATE = 1e-3  # of LoRA and head; docs/results/recipes.md has the search


@dataclass
class HeadArguments(TrainArguments):
    """What a classification head takes beside the arguments of all training."""

    batch_sentence_num: int = option(8, "training", "rows per step")
    learning_rate: float | None = option(
        None, "training", f"learning rate; default: {LEARNING_RATE:g}, or {FULL_LEARNING_RATE:g} with --full_finetuning"
    )
    max_steps: int | None = option(
        None, "training", f"number of steps; 0: all epochs; default: {STEPS} without --end_epoch"
    )
    split: str = option("", "run", "validation or test: answer it with a trained head; default: train one")
    # A head gives a probability for each label, once: there is nothing to generate, sample or repeat.
    use_CoT: bool = fixed(False)
    answer_space: str = fixed("labels")
    number_answer: str = fixed("")
    model_temperature: float = fixed(1.0)
    max_response_length: int = fixed(0)
    repeat_time: int = fixed(1)
    load_in_8bit: bool = fixed(False)
    load_in_4bit: bool = fixed(False)
    submission: bool = fixed(False)

    @property
    def number_format(self) -> str:
        return self.dtype  # that is computed in: autocast rounds all weights, which are kept in float32


def check(arguments: HeadArguments) -> Task:
    """The task; refuses what cannot be run, and fills in defaults. Raises ArgumentError."""
    task = get_task(arguments)
    if processes.LAUNCHED_FOR in processes.SHARDING:
        raise ArgumentError(
            f"{processes.LAUNCHED_FOR} shards the weights, and classify.py keeps the whole model in each process; "
            "launch it with scripts/accelerate/processes.yaml"
        )
    trained = arguments.from_local and (Path(arguments.train_model_name) / HEAD).exists()
    if arguments.split:
        one_of("split", arguments.split, splits.CHOICES)
        if arguments.resume and (Path(arguments.resume) / "run.json").exists():
            raise ArgumentError(f"--resume {arguments.resume} is a run that trains; leave it out with --split")
        if not trained:
            raise ArgumentError(
                f"--split {arguments.split} asks a trained head, and --train_model_name {arguments.train_model_name} "
                "is none; give --from_local True and a folder such as model/<task>/<run>/best"
            )
        return task
    if trained:
        raise ArgumentError(
            f"--train_model_name {arguments.train_model_name} is a trained head; add --split validation to evaluate "
            "it, or name the model to train a new one on"
        )
    if task.answered_by:
        raise ArgumentError(f"--task {task.name} has no training data; train on {task.answered_by} and answer it with "
                            f"--task {task.name} --split validation")  # fmt: skip
    if arguments.learning_rate is None:
        arguments.learning_rate = FULL_LEARNING_RATE if arguments.full_finetuning else LEARNING_RATE
    fill_in_epochs(arguments)
    if arguments.max_steps is None:
        arguments.max_steps = STEPS
    check_training(arguments)
    return task


def main(argv: list[str] | None = None) -> None:
    arguments = parse(HeadArguments, __doc__.splitlines()[0], argv)
    with faults.guard("classify.py") as guard:
        task = check(arguments)
        if arguments.split:
            evaluate(arguments, task, guard)
            return
        data = load_rows(arguments, task, splits.task_path(task, arguments.data_path))
        check_batch(arguments, len(data.train), task.name)
        train(arguments, data, guard)


def train(arguments: HeadArguments, data: TaskData, guard: faults.Guard) -> None:
    """Build, train, evaluate and save. What goes wrong, `guard` turns into one sentence."""
    # Not at the top: these import torch and transformers, which takes seconds, and bad input is refused without them.
    import transformers

    from engine import models
    from engine.classifier import Classifier
    from evaluation import classifying
    from machine.memory import OF_ALL_WEIGHTS, inference_token_budget, training_token_budget
    from training import training_run
    from training.head_trainer import HeadTrainer

    # 1. inputs
    task, tokenizer = data.task, load_tokenizer(arguments)
    fill_in_length(arguments, task, [*data.train, *data.held_out], tokenizer)
    train_inputs, shortened = classifying.build_inputs(task, data.train, tokenizer, arguments.max_prompt_length)
    inputs, shortened_too = classifying.build_inputs(task, data.held_out, tokenizer, arguments.max_prompt_length)
    data.held_out_prompts = [row["input_ids"] for row in inputs]

    # 2. model
    transformers.set_seed(arguments.seed)  # of the new head
    model = load_model(arguments, task, tokenizer)
    arguments.tokens_per_micro_batch = arguments.tokens_per_micro_batch or training_token_budget(
        model, copies=OF_ALL_WEIGHTS * arguments.full_finetuning
    )

    # 3. run
    run = training_run.TrainingRun("head", arguments, task, [data], tokenizer, guard)
    run.announce(shortened + shortened_too, "classification head")

    # 4. trainer
    evaluation = training_run.HeldOutEvaluation(
        arguments, [data], run.folder, answer=lambda classifier, part: classifying.predict(classifier, task, inputs)
    )
    trainer = HeadTrainer(
        Classifier(model, tokenizer, inference_token_budget(model), models.number_format(arguments.dtype)),
        trainer_config(arguments, run.folder, train_inputs),
        [{**encoded, "labels": classifying.target(task, row)} for encoded, row in zip(train_inputs, data.train)],
        evaluate_with=evaluation,
        on_save=lambda folder: write_head(folder, task.name, task.labels),
        callbacks=run.callbacks,
    )
    trainer.episodes = evaluation.episodes

    # 5. train, save
    run.train(trainer)
    run.finish(trainer, arguments.batch_sentence_num, arguments.data_path, "classify.sh")


def load_tokenizer(arguments: HeadArguments):
    """The model's tokenizer. Raises ModelError."""
    from engine import classifier

    how = arguments.from_local, arguments.trust_remote_code
    return classifier.load_tokenizer(arguments.train_model_name, *how)


def fill_in_length(arguments: HeadArguments, task: Task, rows: list[dict], tokenizer) -> None:
    """--max_prompt_length by the data, if it is not given. Raises ModelError."""
    from engine import classifier
    from evaluation import classifying, prompt_length

    def measure(rows: list[dict]) -> list[int]:
        inputs, _ = classifying.build_inputs(task, rows, tokenizer, prompt_length.WHOLE)
        return [len(row["input_ids"]) for row in inputs]

    if arguments.max_prompt_length is None:
        how = arguments.from_local, arguments.trust_remote_code
        limit = classifier.length_limit(arguments.train_model_name, *how, tokenizer)
        arguments.max_prompt_length = prompt_length.of_task(task, rows, measure, limit)


def load_model(arguments: HeadArguments, task: Task, tokenizer):
    """The model to train, or with `--split` the one to ask. Raises ModelError."""
    import torch

    from engine import classifier, models

    name, how = arguments.train_model_name, (arguments.from_local, arguments.trust_remote_code)
    # All weights are kept in float32: an update is lost in bfloat16's rounding.
    dtype = torch.float32 if arguments.full_finetuning else models.number_format(arguments.dtype)
    model, new = classifier.load(name, *how, task.labels, tokenizer, dtype)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest and arguments.max_prompt_length > longest:
        raise ModelError(
            f"--max_prompt_length {arguments.max_prompt_length} is more than the {longest} tokens that {name} can "
            "read; lower it"
        )
    if arguments.full_finetuning or arguments.split:
        return model
    return classifier.with_new_adapter(model, new, **arguments.lora)


def trainer_config(arguments: HeadArguments, folder: Path, inputs: list[dict]):
    """The HeadConfig of these arguments for these training rows; a step is one batch."""
    import torch

    from engine.models import number_format
    from training.head_trainer import HeadConfig, micro_batch
    from training.training_run import trainer_settings

    settings = trainer_settings(arguments, folder, len(inputs))
    batch = arguments.batch_sentence_num // processes.count()
    longest = max(len(row["input_ids"]) for row in inputs)
    micro = micro_batch(batch, longest, arguments.tokens_per_micro_batch)
    return HeadConfig(
        **settings,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=batch // micro,
        warmup_steps=settings["max_steps"] // 20,
        bf16=number_format(arguments.dtype) == torch.bfloat16,
        label_names=["labels"],
    )


def evaluate(arguments: HeadArguments, task: Task, guard: faults.Guard) -> None:
    """Answer a split with a trained head; the run's folder is what inference.py's would be."""
    job = jobs.load_jobs(arguments, [task])[0]
    task, labels = job.task, head_labels(Path(job.model))
    if labels != task.labels:
        told, wanted = (", ".join(names) or "numbers" for names in (labels, task.labels))
        raise ArgumentError(f"--train_model_name {job.model} answers {told}, but --task {task.name} needs {wanted}")
    majority = splits.majority_label(task, job.rows, arguments.data_path) if job.labelled else (0, "")
    from engine import models
    from engine.classifier import Classifier
    from evaluation import classifying, predictions
    from machine.memory import inference_token_budget

    started = time.perf_counter()
    tokenizer = load_tokenizer(arguments)
    fill_in_length(arguments, task, job.rows, tokenizer)
    inputs, shortened = classifying.build_inputs(task, job.rows, tokenizer, arguments.max_prompt_length)
    model = load_model(arguments, task, tokenizer)
    with contextlib.ExitStack() as held:
        folder = guard.folder = processes.broadcast_from_main(lambda: open_folder(arguments, task, held))
        print(models.device_line(arguments.dtype))
        budget = arguments.tokens_per_micro_batch or inference_token_budget(model)
        classifier = Classifier(model, tokenizer, budget, models.number_format(arguments.dtype))
        found = classifying.predict(classifier, task, inputs)
        ids = [row["input_ids"] for row in inputs]
        predictions.write(folder, task, job.rows, ids, found, tokenizer, first=False)
        details = {"shots": 0, "shortened": shortened}
        outcome.write_results(arguments, job, folder, "trained", found, majority, started, details)
        print(f"\n{folder} holds predictions.jsonl (every row and answer) and summary.json.")


def open_folder(arguments: HeadArguments, task: Task, held: contextlib.ExitStack) -> Path:
    """The folder of a split's answers, a new one or that of `--resume`; closed to others as long as `held` is open."""
    folder = Path(arguments.resume) if arguments.resume else make_folder(arguments, task)
    held.enter_context(lock(folder))
    return folder


if __name__ == "__main__":
    processes.run(main)
