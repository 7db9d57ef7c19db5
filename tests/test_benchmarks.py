"""The parts of benchmarks/ that compute without measuring: operations, tables, JSON lines, turns."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

import tasks
from benchmarks import operations, plan, report
from benchmarks.common import Clock
from engine.batches import common_prefix
from reporting import collect
from training.sampler import StratifiedSampler

# --------------------------------------------------------------------------------------------------------- operations


def test_operations_of_a_hand_computed_step():
    network = operations.Network(layers=2, hidden=2, query=2, linears=((2, 3), (2, 5)), feed_forward=1, rank=1)
    # Prompts of 3 and 4 tokens that share 2: 2 + 1 + 2 = 5 tokens, 3 + 3 + 7 = 13 pairs of query and key.
    counted = operations.training_operations(network, [3, 4], prefix=2, label_tokens=2)
    assert counted == {
        # All layers but the last block's feed-forward layer for 5 tokens, that one for the 2 that are read.
        "blocks": 4 * (6 + 10 + 6) * 5 + 4 * 10 * 2,
        "lora": 6 * (5 + 7 + 5) * 5 + 6 * 7 * 2,
        "attention": 12 * 2 * 2 * 13,
        "vocabulary": 2 * 4 * 2 * 2,
        "total": 520 + 594 + 624 + 32,
    }
    twice = operations.training_operations(network, [3, 4], prefix=2, label_tokens=2, passes=2)
    assert twice == {name: 2 * count for name, count in counted.items()}


def test_attention_counts_the_pairs_of_a_causal_mask():
    network = operations.Network(layers=3, hidden=8, query=8, linears=((8, 8),), feed_forward=1, rank=2)
    prefix, lengths = 5, [7, 6, 11]
    pairs = int(torch.ones(prefix, prefix).tril().sum())
    pairs += sum(int(torch.ones(length, length).tril()[prefix:].sum()) for length in lengths)
    counted = operations.training_operations(network, lengths, prefix, label_tokens=2)
    assert counted["attention"] == 3 * 3 * 4 * 8 * pairs


def test_the_network_of_a_model_has_the_parameters_that_the_model_has():
    model = tiny_model()
    network = operations.llama(model.config, rank=4)
    linears = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in name]
    assert network.frozen_uses(1, 1) == sum(linear.weight.numel() for linear in linears)
    assert network.lora_uses(1, 1) == sum(4 * sum(linear.weight.shape) for linear in linears)
    inner = [linear for name, linear in model.named_modules() if "layers.1.mlp." in name and linear in linears]
    assert network.frozen_uses(3, 1) == 3 * network.frozen_uses(1, 1) - 2 * sum(x.weight.numel() for x in inner)
    assert (network.layers, network.hidden) == (2, 32)


def test_a_prompt_that_is_all_prefix_is_refused():
    network = operations.Network(layers=1, hidden=2, query=2, linears=((2, 3),), feed_forward=1, rank=1)
    with pytest.raises(ValueError, match="3 tokens is not longer than the shared prefix of 3"):
        operations.training_operations(network, [5, 3], prefix=3, label_tokens=2)


def test_a_batch_of_one_prompt_leaves_a_token_outside_the_prefix():
    network = operations.Network(layers=1, hidden=2, query=2, linears=((2, 3),), feed_forward=1, rank=1)
    prompts = [[4, 5, 6]]
    counted = operations.training_operations(network, [3], common_prefix(prompts), label_tokens=2)
    assert (
        counted["blocks"] == 4 * 6 * 1
    )  # one block, whose feed-forward layer is all it has, for the token before the answer


# --------------------------------------------------------------------------------------------------------- JSON lines


def test_the_last_json_line_is_read_whatever_stands_around_it():
    output = 'loading {"half": \n{"seconds": 1}\n{"seconds": 2, "text": "a\\nb"}\n{not json\nbye\n'
    assert report.last_json(output) == {"seconds": 2, "text": "a\nb"}


@pytest.mark.parametrize("output", ["", "no figures\n", "{broken\n", '["a list"]\n'])
def test_output_without_a_json_line_is_refused(output):
    with pytest.raises(ValueError, match="no line with a JSON object"):
        report.last_json(output)


def test_the_clock_leaves_the_warm_up_and_the_evaluations_out():
    clock = Clock()
    clock.steps = [9.0, 2.0, 4.0]
    clock.evaluated(0.75, seconds=5.0)
    figures = clock.figures(samples_per_step=4)
    assert figures["seconds_per_sample"] == 6.0 / 8
    assert (figures["samples_measured"], figures["samples"]) == (8, 12)
    (moment,) = figures["evaluations"]
    assert (moment["step"], moment["score"], moment["train_seconds"]) == (3, 0.75, 15.0)
    assert moment["wall_seconds"] - moment["run_seconds"] == pytest.approx(5.0, abs=0.02)


def test_without_a_measured_step_there_is_no_figure():
    clock = Clock()
    clock.steps = [1.0]
    assert clock.figures(4)["seconds_per_sample"] is None


# ------------------------------------------------------------------------------------------------------------- tables


def record(program: str, repeat: int = 0, benchmark: str = "a", seed: int = 0, conditions=None, **result) -> dict:
    return {
        "benchmark": benchmark,
        "program": program,
        "conditions": conditions or {"batch": 16},
        "seed": seed,
        "repeat": repeat,
        "data": "MR",
        "model": "a model",
        "machine": {"cpu": "a processor", "cpus": 2, "memory_gb": 8.0},
        "command": f"run {program}",
        "date": "2000-01-01 00:00",
        "busy": 0.05,
        "result": {"threads": 2, "peak_memory_bytes": 1_500_000_000, "prompt_tokens": 122.5, **result},
    }


def cells(text: str, program: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {program} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_cost_table_compares_programs_under_the_same_conditions():
    figures = dict(response_tokens=2.0)
    records = [
        record(report.DEFAULT, seconds_per_sample=0.25, **figures),
        record(report.LIKE_FOR_LIKE, seconds_per_sample=0.5, **figures),
        record("TRL", 0, seconds_per_sample=3.0, **figures),
        record("TRL", 1, seconds_per_sample=5.0, **figures),
        record("TRL", 0, conditions={"batch": 32}, seconds_per_sample=7.0, **figures),
    ]
    text = report.render(records)
    assert "a processor, 2 logical CPUs, 8.0 GB, threads: 2. a model, MR." in text
    assert cells(text, "TRL") == [
        "TRL",
        "16",
        "3.00 to 5.00",
        "1.50",
        "122",
        "2.0",
        "8.0 x",
        "16 x",
        "0.050",
        "0",
        "[3]",
    ]
    assert "[3] run TRL" in text
    assert "| TRL | 32 | 7.00 | 1.50 | 122 | 2.0 | - | - | 0.050 | 0 | [3] |" in text  # nothing to compare with


def test_a_failed_measurement_is_a_row_that_says_so():
    failed = record("TRL")
    del failed["result"]
    text = report.render([{**failed, "failed": "exit code 1"}])
    assert cells(text, "TRL")[2] == "failed: exit code 1"
    assert "threads: unknown" in text


def test_scoring_shows_the_share_of_equal_answers():
    figures = dict(samples=4, seconds=2.0, score=0.5)
    both = dict(benchmark="b", conditions={"prompt": "own", "rows": 4, "shots": 0})
    text = report.render(
        [
            record("ours", samples_per_second=8.0, answers="0110", **figures, **both),
            record("other", samples_per_second=2.0, answers="0111", **figures, **both),
        ]
    )
    header = cells(text, "program")
    row = dict(zip(header, cells(text, "other"), strict=True))
    assert (row["same answers"], row["rate, ours = 1"], row["samples per s"]) == ("0.750", "0.25 x", "2.00")


def test_the_share_leaves_the_warm_up_out():
    result = dict(operations=[9, 30e9, 50e9], step_seconds=[5.0, 1.0, 1.0], matrix_rates={"a": 60e9, "b": 80e9})
    text = report.render([record(report.DEFAULT, benchmark="c", **result)])
    row = dict(zip(cells(text, "program"), cells(text, report.DEFAULT), strict=True))
    assert (row["GFLOP per s"], row["torch.mm, GFLOP per s"], row["share"]) == ("40.0", "80.0", "0.50")


def test_time_to_an_accuracy_is_that_of_the_first_evaluation_that_has_it():
    def moment(step: int, score: float) -> dict:
        return {"step": step, "score": score, "train_seconds": 10.0 * step, "run_seconds": 11.0, "wall_seconds": 12.0}

    evaluations = [moment(0, 0.5), moment(2, 0.81), moment(4, 0.79), moment(6, 0.84)]
    assert report.reached(evaluations, 0.80)["step"] == 2
    assert report.reached(evaluations, 0.85) is None
    result = dict(evaluations=evaluations, samples=192, step_seconds=[1.0] * 6)
    text = report.render([record(report.DEFAULT, benchmark="e", **result)])
    row = dict(zip(cells(text, "program"), cells(text, report.DEFAULT), strict=True))
    assert (row["80%: training s"], row["80%: samples"], row["best"]) == ("20", "64", "0.840")
    assert (row["85%: training s"], row["85%: samples"]) == ("not reached", "-")


def test_a_whole_command_has_its_own_table():
    evaluations = [dict(step=0, score=0.6), dict(step=2, score=0.9)]
    result = dict(evaluations=evaluations, step_seconds=[2.0, 3.0], first_step_seconds=7.5, wall_seconds=20.0)
    text = report.render([record(report.DEFAULT, benchmark="e", conditions={"command": "ppo.py"}, **result)])
    row = dict(zip(cells(text, "program"), cells(text, report.DEFAULT), strict=True))
    assert (row["first step after s"], row["steps s"], row["whole command s"]) == ("7.50", "5.00", "20.0")
    assert row["score"] == "0.900"


def test_growth_has_a_table_for_each_thing_that_grows():
    cost = dict(benchmark="d", seconds_per_sample=1.0)
    scored = dict(samples=4, seconds=2.0, score=0.5, samples_per_second=2.0)
    records = [
        record(report.DEFAULT, conditions={"batch": 8}, **cost),
        record(report.DEFAULT, conditions={"batch": 16, "prompt_tokens_about": 128}, **cost),
        record("ours", benchmark="d", conditions={"rows": 4, "shots": 16}, **scored),
    ]
    text = report.render(records)
    assert text.count(f"### {report.TITLES['d']}") == 3
    assert "| program | batch | prompt tokens about | s per sample |" in text
    assert "| program | rows | shots | samples per s |" in text


@pytest.mark.parametrize(
    "values, digits, text",
    [
        ([1.23456], 3, "1.23"),
        ([0.012345], 3, "0.0123"),
        ([123.4], 3, "123"),
        ([1.0, 2.0], 2, "1.0 to 2.0"),
        ([1.001, 1.002], 3, "1.00"),
        ([0.0], 2, "0.00"),
        ([12345.0], 3, "12345"),
        ([-0.5], 2, "-0.50"),
    ],
)
def test_spread(values, digits, text):
    assert report.spread(values, digits) == text


def test_a_cell_cannot_break_the_table():
    assert report.table(["a"], [["x | y"]]).splitlines()[-1] == "| x \\| y |"


def test_the_committed_tables_are_those_of_the_measurements():
    folder = Path(report.__file__).parent
    records = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    written = (folder / "results.md").read_text(encoding="utf-8")
    assert written == report.document(records), "results.md is not current; benchmarks/run.sh --table writes it"


# ------------------------------------------------------------------------------------------------------ what is run


def test_a_measurement_that_is_repeated_replaces_the_old_one_alone():
    old = [record("A", seconds=1), record("A", 1, seconds=2), record("B", seconds=3)]
    new = record("A", 1, seconds=9)
    assert report.merged(old, [new]) == [old[0], new, old[2]]


def test_measurements_of_two_processors_stay_apart():
    there = record("ours, default", seconds_per_sample=2.0, response_tokens=1.0)
    here = record("ours, default", seconds_per_sample=1.0, response_tokens=1.0)
    here["machine"] = {**here["machine"], "cpu": "another"}
    both = report.merged([there], [here])
    assert both == [there, here]
    text = report.render(both)
    assert text.count("### PPO") == 2 and "another, 2 logical CPUs" in text and "1.0 x | 0.050" in text


def make_plan(**changes) -> plan.Plan:
    settings = dict(seeds=(0, 1), repeats=2, steps=3, learning_rates=("1e-4", "2e-4"), time_limit=60)
    return plan.Plan(**{**settings, **changes})


def test_programs_take_turns():
    jobs = plan.in_turns(list(plan.cost_jobs(make_plan(batches=(16,), ppo_epochs=(1,)))), repeats=2)
    programs = [job.program for job in jobs]
    assert programs[: len(programs) // 2] == programs[len(programs) // 2 :]
    assert len(set(programs)) == len(programs) // 2 == 8
    assert [job.repeat for job in jobs] == [0] * 8 + [1] * 8


@pytest.mark.parametrize("name", plan.JOBS)
@pytest.mark.parametrize("changes", [{}, plan.QUICK], ids=["whole", "quick"])
def test_no_two_jobs_of_a_benchmark_are_the_same_measurement(name, changes):
    jobs = list(plan.JOBS[name](make_plan(**changes)))
    keys = {json.dumps([job.program, job.conditions, job.seed, job.repeat]) for job in jobs}
    assert len(keys) == len(jobs) > 0
    inputs = {argument for job in jobs for argument in job.command if argument.startswith(str(plan.WORK))}
    written = {arguments[1] for job in jobs for arguments in job.prepare}
    assert all(any(path.startswith(place) for place in written) for path in inputs)


def test_all_programs_of_the_cost_benchmark_get_the_same_work():
    for job in plan.cost_jobs(make_plan()):
        command = dict(zip(job.command, job.command[1:]))
        assert command["--inputs"] == job.prepare[0][1]
        assert int(command["--ppo_epochs"]) == job.conditions["ppo_epochs"]
        assert int(command.get("--batch") or command["--batch_sentence_num"]) == job.conditions["batch"]
        assert int(command.get("--steps") or command["--max_steps"]) == 3
        if job.program != report.DEFAULT:
            assert int(command.get("--response_length") or command["--max_response_length"]) == 8


def test_several_answers_to_each_prompt_are_compared_in_a_table_of_their_own():
    jobs = list(plan.group_jobs(make_plan()))
    assert {json.dumps(job.conditions) for job in jobs} == {'{"prompts": 4, "answers_per_prompt": 16}'}
    for job in jobs:
        command = dict(zip(job.command, job.command[1:]))
        assert command["--seed"] == "0" and command["--batch_sentence_num"] == "4"
        assert (command.get("--repeat_time") or command["--num_generations"]) == "16"
        assert command.get("--max_steps", "3") == "3" and command.get("--rows", "12") == "12"
    figures = dict(response_tokens=2.0, conditions=jobs[0].conditions)
    text = report.render(
        [
            record(report.SAMPLED, seconds_per_sample=0.1, **figures),
            record(report.SAMPLED_WHOLE, seconds_per_sample=0.2, **figures),
            record(plan.GRPO, seconds_per_sample=2.0, **figures),
        ]
    )
    row = dict(zip(cells(text, "program"), cells(text, plan.GRPO), strict=True))
    assert (row["prompts"], row["answers per prompt"]) == ("4", "16")
    assert (row["time, sampled = 1"], row["time, whole answers = 1"]) == ("20 x", "10 x")


# ------------------------------------------------------------------------------------------------------------ TRL GRPO


def test_grpo_trains_a_step_and_leaves_runs_that_the_reports_read(tmp_path, model_folder, data_root, capsys):
    from benchmarks import trl_grpo

    folder = tmp_path / "run"
    trl_grpo.main(
        ["--task", "SST", "--data_path", str(data_root), "--from_local", "True"]
        + ["--train_model_name", str(model_folder), "--output_dir", str(folder), "--rows", "2"]
        + ["--batch_sentence_num", "2", "--num_generations", "2", "--micro_batch", "2", "--max_completion_length", "2"]
    )
    figures = report.last_json(capsys.readouterr().out)
    assert figures["samples"] == 4 and len(figures["step_seconds"]) == 1 and 1 <= figures["response_tokens"] <= 2
    found = collect.collect(tmp_path)
    assert not found.skipped and not found.unfinished
    results = {result.method: result for result in found.results}
    assert set(results) == {"TRL GRPO (free)", "TRL GRPO (labels)"}
    free, masked = results.values()
    assert free.folder == folder and len(free.answers) == len(masked.answers) == 12
    assert masked.metrics["invalid_rate"] == 0 and free.samples == 4 and free.memory > 0
    assert free.settings["learning_rate"] == 1e-6 and "micro_batch" not in free.settings
    (line,) = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    assert line["step"] == 1 and -3 <= line["objective/reward"] <= 1
    assert (folder / "adapter" / "adapter_model.safetensors").exists()


def test_grpo_takes_the_rows_in_the_order_of_ppo():
    from benchmarks import trl_grpo

    rows = [{"id": i, "label": i % 2} for i in range(10)]
    order = list(islice(StratifiedSampler([0, 1] * 5, 3), 6))
    assert [row["id"] for row in trl_grpo.rows_in_order(rows, 3, 6)] == order


@pytest.mark.parametrize(
    "options, said",
    [
        (("--rows", "99"), "--rows 99: there are 48 training rows"),
        (("--micro_batch", "3"), "--micro_batch 3 must divide"),
        (("--num_generations", "0"), "--num_generations 0 must be"),
        (("--task", "no"), "--task no"),
    ],
)
def test_grpo_refuses_sizes_that_do_not_fit_in_one_sentence(options, said, data_root, capsys):
    from benchmarks import trl_grpo

    with pytest.raises(SystemExit) as stopped:
        trl_grpo.main(["--task", "SST", "--data_path", str(data_root), *options])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and last.startswith("trl_grpo.py: error: ") and said in last


def test_an_answer_that_trl_cut_off_counts_only_if_it_is_complete():
    from benchmarks import trl_grpo

    reward = trl_grpo.TaskReward(tasks.get("MR"), eos_token=2)
    answers = ["positive", "positive", "positive</Judgement>"]
    # The first one was cut off, so it may be a longer word's beginning.
    values = reward(completions=answers, completion_ids=[[7], [7, 2], [7, 8, 9]], label=[1, 1, 0], prompts=[])
    assert values == [-3.0, 1.0, -1.0]
    assert reward.figures() == {"objective/reward": -1.0, "objective/response_length": 2.0}
