"""What a person sees of a training run: the progress bar, a line per step, history.jsonl, and the dashboards."""

import importlib
import json
import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from tasks import Task

EPISODES_SHOWN, EPISODES_EVERY = 2, 10  # so many sample episodes at step 1 and every so many steps
GROUPS = ("objective/", "policy/", "value/", "eval/", "time/", "train/")


class RunCallback(TrainerCallback):
    """One line per step, sample episodes every few steps, and every figure in history.jsonl."""

    def __init__(self, folder: Path, task: Task, tokenizer):
        self.folder, self.task, self.tokenizer = folder, task, tokenizer
        self.trainer = None  # set once the trainer exists
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            from tqdm.auto import tqdm

            self.bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, unit="step")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        figures = {name: value for name, value in logs.items() if name.startswith(GROUPS)}
        if not figures:
            return
        append_history(self.folder, state.global_step, figures)
        self.say(step_line(state.global_step, state.max_steps, figures))
        trained = any(name.startswith(("objective/", "train/loss")) for name in figures)
        if trained and self.trainer is not None and state.global_step % EPISODES_EVERY == 1:
            for episode in self.trainer.episodes[:EPISODES_SHOWN]:
                self.say(self.episode_text(episode))

    def say(self, text: str) -> None:
        if self.bar is None:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def episode_text(self, episode: dict) -> str:
        """Prompt, answer, gold and reward of one episode, as a reader wants them."""
        prompt = self.tokenizer.decode(episode["prompt"]).strip()
        gold = gold_text(episode.get("task", self.task), episode["row"]["label"])
        return (
            "  | " + prompt.replace("\n", "\n  | ") + f"\n  answer: {episode['answer']!r}   gold: {gold}"
            f"   reward: {episode['reward']:+.2f}"
        )


def gold_text(task: Task, label) -> str:
    """A label as the model should have answered it."""
    return str(label) if task.number or label is None else task.words[label]


def step_line(step: int, total: int, figures: dict[str, float]) -> str:
    """The figures of one step, or of one evaluation, in one line."""
    evaluated = {name[5:]: value for name, value in figures.items() if name.startswith("eval/")}
    if evaluated:
        shown = "  ".join(f"{name} {value:.3f}" for name, value in evaluated.items() if name != "seconds")
        return f"step {step}/{total}  held-out: {shown}  ({evaluated.get('seconds', 0):.0f} s)"
    names = {"objective/reward": "reward", "objective/accuracy": "accuracy", "objective/invalid_rate": "invalid",
             "objective/entropy": "entropy", "objective/kl": "KL", "policy/loss": "loss",
             "train/loss": "loss", "train/token_accuracy": "token accuracy"}  # fmt: skip
    shown = "  ".join(f"{short} {figures[name]:.3f}" for name, short in names.items() if name in figures)
    shares = sorted(
        ((name.rsplit("/", 1)[-1], share) for name, share in figures.items() if name.startswith("objective/share/")),
        key=lambda pair: -pair[1],
    )
    listed = " ".join(f"{word} {share:.2f}" for word, share in shares[:4])
    return f"step {step}/{total}  {shown}" + (f"  [{listed}]" if listed else "")


def append_history(folder: Path, step: int, figures: dict[str, float]) -> None:
    """One line of history.jsonl: the step and its figures."""
    line = json.dumps({"step": step, **figures})
    with open(folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def trim_history(folder: Path, step: int) -> None:
    """Before a resume: drop the lines after the checkpoint's step, which will be written again."""
    path = folder / "history.jsonl"
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if line and json.loads(line)["step"] <= step]
        aside = path.with_suffix(".new")
        aside.write_text("".join(line + "\n" for line in kept))
        os.replace(aside, path)


def prepare_reporting(report_to: str, folder: Path) -> list[str]:
    """Set up the dashboards; returns Trainer's `report_to`.

    Every tracker gets the figures under their own names: transformers would put `train/` before each. Without an API
    key wandb writes an offline run into the run's folder, which `wandb sync` uploads later.
    """
    integration_utils.rewrite_logs = dict
    if report_to == "none":
        return []
    if report_to == "wandb":
        os.environ.setdefault("WANDB_DIR", str(folder))
        os.environ.setdefault("WANDB_PROJECT", "nlu")
        os.environ.setdefault("WANDB_SILENT", "true")
        if not _has_wandb_key():
            os.environ.setdefault("WANDB_MODE", "offline")
    if report_to == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return [report_to]


def _has_wandb_key() -> bool:
    """Whether wandb would find an API key. Looked up here: asking wandb fixes its mode before it can be chosen."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def log_figures(report_to: str, folder: Path, config: dict, figures: dict[str, float]) -> None:
    """Send the figures of a run that does not train, which has one point in time, to its dashboard."""
    prepare_reporting(report_to, folder)
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
            for name, value in figures.items():
                writer.add_scalar(name, value, 0)
    elif report_to != "none":  # wandb, and trackio, which has the same calls
        dashboard = importlib.import_module(report_to)
        project = os.environ.get("WANDB_PROJECT", "nlu")
        dashboard.init(project=project, name=folder.name, config=config)
        dashboard.log(figures)
        dashboard.finish()


class EpisodeTable(TrainerCallback):
    """A wandb table of episodes that grows with every evaluation."""

    def __init__(self, run_callback: RunCallback):
        self.run_callback, self.rows = run_callback, []

    def on_evaluate(self, args, state, control, **kwargs):
        import wandb

        if wandb.run is None or not state.is_world_process_zero or self.run_callback.trainer is None:
            return
        callback = self.run_callback
        for episode in callback.trainer.episodes[:8]:
            prompt = callback.tokenizer.decode(episode["prompt"])
            gold = gold_text(episode.get("task", callback.task), episode["row"]["label"])
            self.rows.append([state.global_step, prompt, episode["answer"], gold, episode["reward"]])
        table = wandb.Table(columns=["step", "prompt", "answer", "gold", "reward"], data=self.rows)
        wandb.log({"episodes": table, "train/global_step": state.global_step})


def table_callbacks(report_to: str, run_callback: RunCallback) -> list[TrainerCallback]:
    """The episode table, where there is a dashboard that shows tables."""
    return [EpisodeTable(run_callback)] if report_to == "wandb" else []


def history(folder: Path) -> list[dict]:
    """The lines of history.jsonl; none before the first evaluation."""
    if not (folder / "history.jsonl").exists():
        return []
    return [json.loads(line) for line in (folder / "history.jsonl").read_text(encoding="utf-8").splitlines()]


def evaluations(folder: Path) -> list[dict[str, float]]:
    """The held-out metrics of every evaluation so far, in order, with its `step`."""
    return [
        {"step": line["step"], **{n[5:]: v for n, v in line.items() if n.startswith("eval/") and n != "eval/seconds"}}
        for line in history(folder)
        if any(name.startswith("eval/") for name in line)
    ]


def train_seconds(folder: Path) -> float:
    """Seconds spent on rollouts and updates, over all resumes; evaluation and loading are not in it."""
    return sum(line.get("time/seconds_per_step", 0.0) for line in history(folder))


def before_after_table(moments: dict[str, dict[str, float]]) -> str:
    """The held-out metrics by moment, as text."""
    names = [name for name in moments["before"] if name != "step"]
    width = max(map(len, names)) + 2
    lines = ["", "held-out".ljust(width) + "".join(f"{moment:>12}" for moment in moments)]
    lines += [
        name.ljust(width) + "".join(f"{m.get(name, float('nan')):12.3f}" for m in moments.values()) for name in names
    ]
    return "\n".join(lines)


def quiet_trainer(trainer) -> None:
    """Take off Trainer's own printer and bar; RunCallback has both."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
