"""The model card of an exported model: what it is, how it is asked, what it was trained on and how good it is."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import prompts
from engine.exporting import Exported
from engine.folders import EMBEDDED
from machine import manifests
from machine.errors import ModelError
from run.history import evaluations
from tasks import Task

EMBEDDED_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
METHODS = {"ppo": "PPO", "sft": "supervised fine-tuning (SFT)", "head": "a classification head"}
CITATION = Path(__file__).resolve().parents[1] / "CITATION.cff"
PROJECT = "NLU by reinforcement learning"


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder says of one of its checkpoints; empty without such a folder.

    Attributes:
        about: run.json, with `arguments`.
        summary: summary.json, of a run that has ended.
        moments: the held-out metrics of every evaluation, in order, each with its `step`.
        step: the checkpoint's; None if it does not say.
    """

    about: dict = field(default_factory=dict)
    summary: dict = field(default_factory=dict)
    moments: list[dict] = field(default_factory=list)
    step: int | None = None

    @property
    def arguments(self) -> dict:
        return self.about.get("arguments", {})


def read_run(checkpoint: Path) -> RunFacts:
    """The facts about a checkpoint of a run. Raises ModelError for a run's file that cannot be read; DataError."""
    run = checkpoint.resolve().parent
    if not (run / "run.json").is_file() or not (run / "arguments.json").is_file():
        return RunFacts()
    read = {}
    for name in ("run.json", "arguments.json", "summary.json"):
        try:
            read[name] = json.loads((run / name).read_text(encoding="utf-8")) if (run / name).exists() else {}
        except (OSError, ValueError) as error:
            raise ModelError(
                f"{run / name} cannot be read ({error}); copy it again from where it was written"
            ) from error
    about = read["run.json"] | {"arguments": read["arguments.json"]}
    step = (manifests.read(checkpoint) or {}).get("step")
    return RunFacts(about, read["summary.json"], evaluations(run), step)


def known_base(exported: Exported, checkpoint: str, facts: RunFacts) -> Exported:
    """With the name of the model that a run began with, where the checkpoint has all weights and no base."""
    if exported.base != checkpoint:
        return exported
    return replace(exported, base=facts.arguments.get("train_model_name", exported.base))


def card(name: str, task: Task, exported: Exported, facts: RunFacts, snippet: str, head: bool = False) -> str:
    """README.md of an exported folder. name: as people will load it. head: it is a classification head."""
    parts = [
        _front_matter(exported, head),
        f"# {Path(name).name}\n",
        _about(task, exported, facts, head),
        "## Use it\n",
        f"```python\n{snippet}\n```\n",
        "" if head else _beside(name),
        "## Task\n",
        _task(task, facts, head),
        "## Results\n",
        _results(task, facts),
        "## How to cite\n",
        _citation(),
    ]
    return "\n".join(part for part in parts if part)


def _front_matter(exported: Exported, head: bool) -> str:
    import yaml

    content = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if head else "text-generation",
        "tags": ["text-classification", "natural-language-understanding"],
    }
    base = EMBEDDED_ON_HUB if exported.base == EMBEDDED else exported.base
    if base.count("/") == 1 and not Path(base).exists() and not Path(base).is_absolute():  # a name on the hub
        content = {"base_model": base} | content
    return f"---\n{yaml.safe_dump(content, sort_keys=False)}---\n"


def _about(task: Task, exported: Exported, facts: RunFacts, head: bool) -> str:
    kind = "model with a classification head" if head else "causal language model"
    text = f"A {kind} for the task {task.name}: `{_base(exported)}`"
    method = METHODS.get(facts.summary.get("method", ""))
    text += f", trained with {method}" if method else ""
    text += f". One folder holds all of it: {exported.parameters:,} parameters in {exported.dtype}.\n"
    notice = of_bits(facts)
    return f"{text}\n{notice[0].upper()}{notice[1:]}.\n" if notice else text


def of_bits(facts: RunFacts) -> str:
    """A sentence for an adapter that was trained on quantized weights; else empty."""
    for bits in (8, 4):
        if facts.arguments.get(f"load_in_{bits}bit"):
            return (
                f"it was trained on {bits}-bit weights and is merged into the base model's full ones, so its answers "
                f"can differ a little from those of the {bits}-bit model"
            )
    return ""


def _base(exported: Exported) -> str:
    """The base model as people know it; of a folder its own name, as its path is of no use elsewhere."""
    return Path(exported.base).name if Path(exported.base).exists() else exported.base


def _beside(name: str) -> str:
    return (
        f"{PROJECT} asks the same, and also shortens long texts and breaks up marks of the chat template inside them:\n"
        f'\n```text\nbash scripts/inference.sh --from_local True --train_model_name {name} --text "..."\n```\n'
    )


def _task(task: Task, facts: RunFacts, head: bool) -> str:
    lines = []
    if task.number:
        lines.append(f"The answer is a number from {task.words[0]} to {task.words[-1]}.\n")
    elif head:
        lines.append(f"The labels are {prompts.listed(tuple(f'`{label}`' for label in task.labels))}.\n")
    else:
        lines += ["| label | answer |", "|---|---|"]
        lines += [f"| {_cell(label)} | {_cell(word)} |" for label, word in zip(task.labels, task.words)] + [""]
    if not head:
        example = {"label": None} | {name: f"{{{name}}}" for name in task.fields}
        use_CoT = bool(facts.arguments.get("use_CoT"))
        prompt = f"{prompts.instruction_of(task, use_CoT)}\n{prompts.row_text(task, example)}"
        lines += ["The prompt:\n", *(f"    {line}" for line in prompt.splitlines()), ""]
    return "\n".join(lines)


def _results(task: Task, facts: RunFacts) -> str:
    """The held-out metrics of this checkpoint beside those before training."""
    moment = next((m for m in facts.moments if m["step"] == facts.step), None)
    if moment is None:
        return (
            "This folder was exported from a checkpoint without an evaluation of its own: "
            "`bash scripts/inference.sh` with `--task` measures it.\n"
        )
    arguments, summary = facts.arguments, facts.summary
    of_this = bool(summary) and facts.moments[-1]["step"] == facts.step  # summary.json is about the last evaluation
    details = summary.get("details", {}).get(task.name, summary)  # of several tasks each has its own
    intervals, majority = (details.get(name, {}) if of_this else {} for name in ("intervals", "majority"))
    first, moment = (_of_task(task, figures) for figures in (facts.moments[0], moment))
    if not of_this and "accuracy" in moment and details.get("confusion"):
        intervals = {"accuracy": _of_proportion(moment["accuracy"], sum(map(sum, details["confusion"])))}
    names = [name for name in (*task.metrics, "score", "invalid_rate") if name in moment]
    lines = ["| held-out | before training | this model | 95% interval | majority class |", "|---|---|---|---|---|"]
    for name in dict.fromkeys(names):
        low, high = intervals.get(name) or (None, None)
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        most = f"{majority[name]:.3f}" if name in majority else ""
        lines.append(f"| {name} | {first.get(name, float('nan')):.3f} | {moment[name]:.3f} | {interval} | {most} |")
    if summary.get("best_step") == facts.step != summary.get("steps"):
        lines += ["", "The step was chosen by this score on the same rows, so it is a little too high."]
    facts_ = {
        "answers": arguments.get("answer_space"),
        "step": facts.step,
        "rows per step": arguments.get("batch_sentence_num"),
        "learning rate": arguments.get("learning_rate"),
        "seed": arguments.get("seed"),
        "task version": facts.about.get("task_version"),
        "hash of the training rows": facts.about.get("data_hash"),
        "hash of the held-out rows": facts.about.get("held_out_hash"),
    }
    lines += ["", "| run | |", "|---|---|"]
    lines += [f"| {name} | {_cell(str(value))} |" for name, value in facts_.items() if value not in (None, "")]
    return "\n".join(lines) + "\n"


def _of_proportion(share: float, rows: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share of so many rows, for a checkpoint whose single answers were not kept."""
    from scipy.stats import binomtest

    return tuple(binomtest(round(share * rows), rows).proportion_ci(method="wilson"))


def _of_task(task: Task, figures: dict[str, float]) -> dict[str, float]:
    """One task's own figures of an evaluation, which may be of several."""
    own = {name.removeprefix(f"{task.name}/"): value for name, value in figures.items() if f"{task.name}/" in name}
    return own or figures


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _citation() -> str:
    """The paper of CITATION.cff in BibTeX."""
    import yaml

    paper = yaml.safe_load(CITATION.read_text(encoding="utf-8"))["references"][0]
    authors = " and ".join(f"{a['family-names']}, {a['given-names']}" for a in paper["authors"])
    entry = {
        "title": paper["title"].strip(),
        "author": authors,
        "booktitle": paper["collection-title"],
        "pages": f"{paper['start']}--{paper['end']}",
        "year": paper["year"],
        "url": paper["url"],
    }
    lines = [f"  {name} = {{{value}}}," for name, value in entry.items()]
    key = f"{paper['authors'][0]['family-names'].lower()}-etal-{paper['year']}"
    return "\n".join(["```bibtex", f"@inproceedings{{{key},", *lines, "}", "```", ""])
