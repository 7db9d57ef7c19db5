"""One measured run of lm-evaluation-harness 0.4.13 (Hugging Face backend): multiple choice on the prompts of a file.

    benchmarks/.envs/lm-eval-0.4.13/bin/python benchmarks/lm_eval_score.py --inputs FILE --prompts FILE \\
        --choices negative,positive --batch 16

The task is a YAML file, written beside the prompts. Seconds are those of `simple_evaluate`: tokenization is included,
model loading is not, and the bootstrap of its error bars is switched off.
"""

import common  # first: its clock starts here  # isort: skip

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM

WARM_UP = 2  # prompts


def write_task(prompts: Path, choices: list[str]) -> str:
    """Write a task folder beside the prompts. Returns the name of its one task."""
    name = f"mr_{prompts.stem}"
    folder = prompts.parent / name
    folder.mkdir(exist_ok=True)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(prompts.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "label",
        "doc_to_choice": choices,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with prompt and label")
    parser.add_argument("--choices", required=True, help="the labels' spellings, separated by commas")
    parser.add_argument("--batch", type=int, default=16)
    arguments = parser.parse_args()
    inputs = common.read_inputs(arguments.inputs)
    name = write_task(arguments.prompts, arguments.choices.split(","))
    with contextlib.redirect_stdout(sys.stderr):
        tokenizer = common.load_tokenizer(inputs)
        model = AutoModelForCausalLM.from_pretrained(inputs["model_folder"], dtype=torch.float32)
        common.check_same_model(model, inputs)
        if torch.cuda.is_available():  # as this project's own scoring
            model = model.to("cuda", torch.bfloat16)
        scorer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=arguments.batch, max_length=8192)
        manager = TaskManager(include_path=str(arguments.prompts.parent / name), include_defaults=False)
        settings = dict(tasks=[name], task_manager=manager, bootstrap_iters=0)
        simple_evaluate(scorer, limit=WARM_UP, **settings)
        began = time.perf_counter()
        results = simple_evaluate(scorer, **settings)
        seconds = time.perf_counter() - began
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    totals = [[float(response[0]) for response in sample["filtered_resps"]] for sample in samples]
    prompts = [json.loads(line)["prompt"] for line in arguments.prompts.read_text(encoding="utf-8").splitlines()]
    lengths = [len(ids) for ids in tokenizer(prompts, add_special_tokens=False).input_ids]
    figures = {
        "samples": len(samples),
        "seconds": seconds,
        "samples_per_second": len(samples) / seconds,
        "prompt_tokens": sum(lengths) / len(lengths),
        "score": results["results"][name]["acc,none"],
        "answers": "".join(str(max(range(len(row)), key=row.__getitem__)) for row in totals),
    }
    common.emit(figures, ("torch", "transformers", "lm_eval"))


if __name__ == "__main__":
    main()
