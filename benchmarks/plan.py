"""What is measured: every benchmark as a list of jobs. A job is the command of one process and its inputs."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import report

WORK = Path("benchmarks/.work")
TRL = {"TRL 0.11.4": ("trl-0.11.4", "trl_0_11_4.py"), "TRL 1.12.0": ("trl-1.12.0", "trl_1_12_0.py")}
GRPO = "TRL 1.14.0 GRPO"
LM_EVAL = "lm-eval 0.4.13"
RESPONSE_LENGTH = 8
LIKE_FOR_LIKE = ["--answer_space", "free", "--policy_gradient", "sampled", "--repeat_time", "1"]
LIKE_FOR_LIKE += ["--kl_coef", "0.05", "--max_response_length", str(RESPONSE_LENGTH)]
GROUP_RESPONSE_LENGTH = 16
GROUPED = ["--answer_space", "free", "--policy_gradient", "sampled"]
GROUPED += ["--max_response_length", str(GROUP_RESPONSE_LENGTH)]
CHOICES = {"own": "negative,positive", "short": " negative, positive"}


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    seeds: tuple[int, ...]
    repeats: int
    steps: int  # of PPO, the first one to warm up
    learning_rates: tuple[str, ...]  # of TRL, in benchmark e
    time_limit: int  # seconds for each run of TRL in benchmark e
    batches: tuple[int, ...] = (16,)
    ppo_epochs: tuple[int, ...] = (1, 4)
    micro_batch: int = 4
    group_prompts: int = 4  # of a step with several answers to each prompt
    group_answers: int = 16
    share_batches: tuple[int, ...] = (16, 32)
    growing_batches: tuple[int, ...] = (8, 16, 32, 64, 128)
    prompt_lengths: tuple[int, ...] = (128, 256, 512, 1024)
    growing_shots: tuple[int, ...] = (0, 1, 4, 16)
    growing_rows: int = 400  # scored with them
    shots: tuple[int, ...] = (0, 16)
    rows: int = 400  # scored without demonstrations
    rows_with_shots: int = 64
    harness_batches: tuple[int, ...] = (1, 16, 64)
    harness_batches_with_shots: tuple[int, ...] = (1, 4)
    accuracy_rows: int = 4096
    # TRL's in benchmark e. An evaluation takes it as long as two of these steps.
    accuracy_batch: int = 16
    accuracy_epochs: int = 1
    accuracy_steps: int = 200  # at most
    eval_steps: int = 8
    held_out: int = 400
    ours_to_accuracy: tuple[str, ...] = ()
    whole_command: tuple[str, ...] = ()  # more of its arguments


# As little as possible of every kind of work.
QUICK = dict(
    repeats=1,
    steps=2,
    batches=(2,),
    ppo_epochs=(1,),
    micro_batch=1,
    group_prompts=1,
    group_answers=2,
    share_batches=(2,),
    growing_batches=(2, 4),
    prompt_lengths=(128, 192),
    growing_shots=(0, 1),
    growing_rows=4,
    shots=(0, 1),
    rows=4,
    rows_with_shots=4,
    harness_batches=(2,),
    harness_batches_with_shots=(2,),
    accuracy_rows=16,
    accuracy_batch=2,
    accuracy_steps=1,
    eval_steps=1,
    held_out=4,
    ours_to_accuracy=("--max_steps", "1", "--batch_sentence_num", "2"),
    whole_command=("--max_steps", "1", "--batch_sentence_num", "2", "--eval_size", "4"),
)


@dataclass(frozen=True)
class Job:
    """One process to measure. prepare: its inputs, as arguments of prepare.py."""

    benchmark: str
    program: str
    conditions: dict
    seed: int
    data: str
    command: tuple[str, ...]
    prepare: tuple[tuple[str, ...], ...]
    environment: str = ""  # of a baseline
    repeat: int = 0


def ours(module: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", f"benchmarks.{module}", *arguments)


def training_inputs(seed: int, rows: int, held_out: int = 4) -> tuple[str, tuple[str, ...]]:
    """The file with MR's rows and prompts, and what prepares it; only the rows that are read, as they take memory."""
    path = str(WORK / f"training-seed{seed}-{rows}-rows-{held_out}-held-out.json")
    sizes = ("--seed", str(seed), "--rows", str(rows), "--held_out", str(held_out))
    return path, ("training", path, *sizes)


def scoring_inputs(shots: int, rows: int) -> tuple[str, tuple[str, ...]]:
    folder = str(WORK / f"scoring-{shots}-shots-{rows}-rows")
    return folder, ("scoring", folder, "--shots", str(shots), "--rows", str(rows))


def micro_batched(name: str, plan: Plan) -> str:
    return f"{name}, micro-batches of {plan.micro_batch}"


def cost_jobs(plan: Plan) -> Iterator[Job]:
    """a: the same rows, prompts, adapter, response length and PPO epochs for every program."""
    seed = plan.seeds[0]
    inputs, prepare = training_inputs(seed, plan.steps * max(plan.batches))
    for batch in plan.batches:
        for epochs in plan.ppo_epochs:
            where = dict(
                benchmark="a",
                conditions={"batch": batch, "ppo_epochs": epochs},
                seed=seed,
                data=f"MR, {plan.steps - 1} measured steps after one to warm up, answers of at most "
                f"{RESPONSE_LENGTH} tokens",
                prepare=(prepare,),
            )
            own = ("--", "--seed", str(seed), "--max_steps", str(plan.steps))
            own += ("--batch_sentence_num", str(batch), "--ppo_epochs", str(epochs), "--eval_size", "2")
            theirs = ("--inputs", inputs, "--seed", str(seed), "--steps", str(plan.steps), "--batch", str(batch))
            theirs += ("--ppo_epochs", str(epochs), "--response_length", str(RESPONSE_LENGTH))
            for program, more in (
                (report.DEFAULT, own),
                (report.SHORT_ANSWERS, (*own, *LIKE_FOR_LIKE)),
                (report.LIKE_FOR_LIKE, whole := ("--whole_answers", *own, *LIKE_FOR_LIKE)),
                (report.LESS_MEMORY, (*whole, "--tokens_per_micro_batch", "512")),
            ):
                yield Job(program=program, command=ours("ours_ppo", "--inputs", inputs, *more), **where)
            for name, (environment, script) in TRL.items():
                baseline = dict(environment=environment, **where)
                command = (f"benchmarks/{script}", *theirs)
                yield Job(program=name, command=command, **baseline)
                small = ("--micro_batch", str(plan.micro_batch))
                yield Job(program=micro_batched(name, plan), command=(*command, *small), **baseline)


def group_jobs(plan: Plan) -> Iterator[Job]:
    """a: several sampled answers to each prompt, as the sampled recipe of ppo.py has them, against GRPOTrainer."""
    seed, prompts, answers = plan.seeds[0], plan.group_prompts, plan.group_answers
    inputs, prepare = training_inputs(seed, plan.steps * prompts)
    where = dict(
        benchmark="a",
        conditions={"prompts": prompts, "answers_per_prompt": answers},
        seed=seed,
        data=f"MR, {plan.steps - 1} measured steps after one to warm up, answers of at most {GROUP_RESPONSE_LENGTH} "
        "tokens",
        prepare=(prepare,),
    )
    own = ("--", "--seed", str(seed), "--max_steps", str(plan.steps), "--eval_size", "2", *GROUPED)
    own += ("--batch_sentence_num", str(prompts), "--repeat_time", str(answers))
    for program, more in ((report.SAMPLED, own), (report.SAMPLED_WHOLE, ("--whole_answers", *own))):
        yield Job(program=program, command=ours("ours_ppo", "--inputs", inputs, *more), **where)
    theirs = ("--task", "MR", "--seed", str(seed), "--rows", str(plan.steps * prompts))
    theirs += ("--batch_sentence_num", str(prompts), "--num_generations", str(answers))
    theirs += ("--micro_batch", str(answers), "--max_completion_length")
    faster = ("--gradient_checkpointing", "False")
    for program, more in (
        (GRPO, (str(GROUP_RESPONSE_LENGTH),)),
        (f"{GRPO}, no gradient checkpointing", (str(GROUP_RESPONSE_LENGTH), *faster)),
        (f"{GRPO}, answers of 2 tokens, no gradient checkpointing", ("2", *faster)),
    ):
        yield Job(program=program, command=ours("trl_grpo", *theirs, *more), **where)


def all_cost_jobs(plan: Plan) -> Iterator[Job]:
    """a: one answer per prompt, then several."""
    yield from cost_jobs(plan)
    yield from group_jobs(plan)


def scoring_jobs(plan: Plan) -> Iterator[Job]:
    """b: the same prompts, as text, with and without demonstrations."""
    inputs, training = training_inputs(plan.seeds[0], rows=1)
    for shots in plan.shots:
        rows = plan.rows_with_shots if shots else plan.rows
        folder, prepare = scoring_inputs(shots, rows)
        for prompt, choices in CHOICES.items():
            where = dict(
                benchmark="b",
                conditions={"prompt": prompt, "rows": rows, "shots": shots},
                seed=0,
                data="MR, held-out rows",
                prepare=(training, prepare),
            )
            what = ("--prompts", f"{folder}/{prompt}.jsonl", "--choices", choices)
            yield Job(program=report.SCORING, command=ours("ours_score", *what), **where)
            for batch in plan.harness_batches_with_shots if shots else plan.harness_batches:
                more = ("--inputs", inputs, "--batch", str(batch))
                command = ("benchmarks/lm_eval_score.py", *what, *more)
                program = f"{LM_EVAL}, batches of {batch}"
                yield Job(program=program, command=command, environment="lm-eval-0.4.13", **where)


def share_jobs(plan: Plan) -> Iterator[Job]:
    """c: operations per second in training, compared with torch.mm's."""
    seed = plan.seeds[0]
    inputs, prepare = training_inputs(seed, plan.steps * max(plan.share_batches))
    for batch in plan.share_batches:
        run = ("--", "--seed", str(seed), "--eval_size", "2", "--max_steps", str(plan.steps))
        run += ("--batch_sentence_num", str(batch))
        data = f"MR, {plan.steps - 1} measured steps after one to warm up"
        for program, more in ((report.DEFAULT, ()), (report.COMPILED, ("--compiled",))):
            command = ours("ours_ppo", "--inputs", inputs, "--matrix_rate", *more, *run)
            yield Job("c", program, {"batch": batch}, seed, data, command, (prepare,))


def growth_jobs(plan: Plan) -> Iterator[Job]:
    """d: only this project. Prompts grow by joining MR's sentences; demonstrations are measured in scoring."""
    seed, data = plan.seeds[0], f"MR, {plan.steps - 1} measured steps after one to warm up"
    common = ("--seed", str(seed), "--max_steps", str(plan.steps), "--eval_size", "2", "--batch_sentence_num")
    for batch in plan.growing_batches:
        command = ours("ours_ppo", "--", *common, str(batch))
        yield Job("d", report.DEFAULT, {"batch": batch}, seed, data, command, ())
    batch = plan.batches[0]
    for tokens in plan.prompt_lengths:
        folder = str(WORK / f"long-{tokens}")
        command = ours("ours_ppo", "--", *common, str(batch), "--task", "SST", "--data_path", folder)
        command += ("--max_prompt_length", str(2 * tokens))
        prepare = (("long", folder, "--tokens", str(tokens)),)
        joined = f"MR's sentences joined, {plan.steps - 1} measured steps after one to warm up"
        conditions = {"batch": batch, "prompt_tokens_about": tokens}
        yield Job("d", report.DEFAULT, conditions, seed, joined, command, prepare)
    for shots in plan.growing_shots:
        folder, prepare = scoring_inputs(shots, plan.growing_rows)
        command = ours("ours_score", "--prompts", f"{folder}/own.jsonl", "--choices", CHOICES["own"])
        conditions = {"rows": plan.growing_rows, "shots": shots}
        yield Job("d", report.SCORING, conditions, 0, "MR, held-out rows", command, (prepare,))


def accuracy_jobs(plan: Plan) -> Iterator[Job]:
    """e: training with frequent evaluation until the highest target; TRL on the first seed, up to the time limit; the
    command as users run it, from start to end."""
    until = ("--until", str(max(report.TARGETS)))
    data = f"MR, accuracy on {plan.held_out} held-out rows every so many steps"
    for seed in plan.seeds:
        inputs, prepare = training_inputs(seed, plan.accuracy_rows, plan.held_out)
        command = ours("ours_ppo", "--inputs", inputs, *until, "--", "--seed", str(seed), "--eval_steps")
        command += (str(plan.eval_steps), "--eval_size", str(plan.held_out), *plan.ours_to_accuracy)
        where = dict(benchmark="e", seed=seed, data=data, prepare=(prepare,))
        conditions = dict.fromkeys(("learning_rate", "batch", "ppo_epochs"), "default")
        yield Job(program=report.DEFAULT, conditions=conditions, command=command, **where)
        for name, (environment, script) in TRL.items() if seed == plan.seeds[0] else ():
            for rate in plan.learning_rates:
                command = (f"benchmarks/{script}", "--inputs", inputs, *until, "--seed", str(seed))
                command += ("--time_limit", str(plan.time_limit), "--learning_rate", rate)
                command += ("--batch", str(plan.accuracy_batch), "--ppo_epochs", str(plan.accuracy_epochs))
                command += ("--micro_batch", str(plan.micro_batch))  # its faster form, see a
                command += ("--steps", str(plan.accuracy_steps), "--eval_steps", str(plan.eval_steps))
                conditions = {"learning_rate": rate, "batch": plan.accuracy_batch, "ppo_epochs": plan.accuracy_epochs}
                program = micro_batched(name, plan)
                yield Job(program=program, conditions=conditions, command=command, environment=environment, **where)
        command = ours("ours_ppo", "--", "--seed", str(seed), *plan.whole_command)
        where |= dict(data=f"MR, {plan.held_out} held-out rows before and after", prepare=())
        yield Job(program=report.DEFAULT, conditions={"command": "ppo.py --task MR"}, command=command, **where)


JOBS = {"a": all_cost_jobs, "b": scoring_jobs, "c": share_jobs, "d": growth_jobs, "e": accuracy_jobs}


def in_turns(jobs: list[Job], repeats: int) -> list[Job]:
    """Each group of jobs under the same conditions `repeats` times, its programs in turns (A B A B)."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(json.dumps([job.conditions, job.seed]), []).append(job)
    return [replace(job, repeat=n) for group in groups.values() for n in range(repeats) for job in group]
