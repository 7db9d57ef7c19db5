"""What a person sees of a training run: the progress bar, a line per step, history.jsonl, and the dashboards."""

import contextlib
import importlib
import json
import netrc
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlparse

from transformers import TrainerCallback
from transformers.integrations import integration_utils
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from arguments import ArgumentError
from tasks import Task

EPISODES_SHOWN, EPISODES_EVERY = 2, 10  # so many sample episodes at step 1 and every so many steps
GROUPS = ("objective/", "policy/", "value/", "eval/", "time/", "train/")


class RunCallback(TrainerCallback):
    """One line per step, sample episodes every few steps, and every figure in history.jsonl."""

    def __init__(self, folder: Path, task: Task, tokenizer):
        self.folder, self.task, self.tokenizer = folder, task, tokenizer
        self.trainer = None  # set once the trainer exists
        self.bar = None
        self.lines: int | None = None  # of history.jsonl, once it is written to

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
        self.lines = (len(history(self.folder)) if self.lines is None else self.lines) + 1
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
    """One line of history.jsonl: the step and its figures; on the disk before the checkpoint that counts on it."""
    line = json.dumps({"step": step, **figures})
    with open(folder / "history.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def trim_history(folder: Path, step: int) -> None:
    """Before a resume: drop the lines after the checkpoint's step, which will be written again.

    Raises ArgumentError for a line that cannot be read, unless it is the last one: a kill while it was written.
    """
    if (folder / "history.jsonl").exists():
        aside = folder / ".new-history.jsonl"
        aside.write_text("".join(json.dumps(line) + "\n" for line in history(folder) if line["step"] <= step))
        os.replace(aside, folder / "history.jsonl")


def project() -> str:
    """The project that runs belong to, in wandb and in trackio."""
    return os.environ.get("WANDB_PROJECT", "nlu")


def prepare_reporting(report_to: str, folder: Path) -> list[str]:
    """Set up the dashboards; returns Trainer's `report_to`, without wandb, which WandbRun writes to.

    Every tracker gets the figures under their own names: transformers would put `train/` before each. Without an API
    key wandb writes an offline run into the run's folder, which `wandb sync` uploads later.
    """
    integration_utils.rewrite_logs = dict
    if report_to == "none":
        return []
    if report_to == "wandb":
        os.environ.setdefault("WANDB_SILENT", "true")
        if not _has_wandb_key():
            os.environ.setdefault("WANDB_MODE", "offline")
        return []
    if report_to == "tensorboard":
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard")
    return [report_to]


def wandb_folder(folder: Path) -> str:
    """Where wandb keeps its files: the run's folder, unless the environment says another."""
    return os.environ.get("WANDB_DIR") or str(folder)


def _has_wandb_key() -> bool:
    """Whether wandb would find an API key. Looked up here: asking wandb fixes its mode before it can be chosen."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def log_figures(report_to: str, folder: Path, config: dict, figures: dict[str, float], method: str) -> None:
    """Send the figures of a run that does not train, which has one point in time, to its dashboard."""
    prepare_reporting(report_to, folder)
    if report_to == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        with SummaryWriter(os.environ["TENSORBOARD_LOGGING_DIR"]) as writer:
            for name, value in figures.items():
                writer.add_scalar(name, value, 0)
    elif report_to != "none":  # wandb, and trackio, which has the same calls
        dashboard = importlib.import_module(report_to)
        own = {"dir": wandb_folder(folder), "job_type": method} if report_to == "wandb" else {}
        try:
            dashboard.init(project=project(), name=folder.name, group=config["task"], config=config, **own)
            dashboard.log(figures)
            dashboard.finish()
        except Exception as error:  # the work is done and written; a dashboard is no reason to fail
            print(f"{report_to}: {first_line(error)}. The figures are in {folder}/summary.json.")


class WandbRun(TrainerCallback):
    """The figures, and a table of episodes that grows with every evaluation, in one wandb run over all resumes.

    Runs are grouped by task, their job type is the method (ppo or sft). Whatever fails in wandb costs one line of
    warning and the dashboard, never the run. A point's step is the number of its line in history.jsonl: what is sent
    again after a resume falls on what is there already. With WANDB_LOG_MODEL=end, as for transformers' own callback,
    best/ becomes an artifact of a run that ends well.
    """

    def __init__(self, run_callback: RunCallback, method: str):
        self.run_callback, self.method = run_callback, method
        self.run, self.rows, self.failed = None, [], False

    def on_train_begin(self, args, state, control, **kwargs):
        if self.run is not None or self.failed or not state.is_world_process_zero:
            return
        folder = self.run_callback.folder
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        import wandb

        def start(mode: str | None) -> None:
            self.run = wandb.init(
                project=project(), name=folder.name, id=about["id"], resume="allow",
                group=about["task"], job_type=self.method,
                config={name: about[name] for name in ("arguments", "versions", "data_hash", "task_version")},
                mode=mode, reinit="finish_previous", dir=wandb_folder(folder),
            )  # fmt: skip

        try:
            start(None)
        except Exception as error:
            self.run_callback.say(f"wandb: {first_line(error)}. The run is kept offline, for `wandb sync`.")
            self._try(lambda: start("offline"))
        for group in GROUPS:  # methods see unequal numbers of samples in a step
            axis = "train/samples" if group == "eval/" else "train/global_step"
            self._try(lambda name=f"{group}*", axis=axis: self.run.define_metric(name, step_metric=axis))

    def on_log(self, args, state, control, logs=None, **kwargs):
        figures = {name: value for name, value in logs.items() if name.startswith(GROUPS)}
        if figures:
            self.on_train_begin(args, state, control)  # a finished run that goes on only evaluates
            self._send(state.global_step, figures)

    def on_evaluate(self, args, state, control, **kwargs):
        callback = self.run_callback
        if self.run is None or callback.trainer is None:
            return
        for episode in callback.trainer.episodes[:8]:
            prompt = callback.tokenizer.decode(episode["prompt"])
            gold = gold_text(episode.get("task", callback.task), episode["row"]["label"])
            self.rows.append([state.global_step, prompt, episode["answer"], gold, episode["reward"]])
        columns = ["step", "prompt", "answer", "gold", "reward"]
        table = importlib.import_module("wandb").Table(columns=columns, data=self.rows)
        self._send(state.global_step, {"episodes": table})

    def _send(self, step: int, figures: dict) -> None:
        self._try(lambda: self.run.log({**figures, "train/global_step": step}, step=self.run_callback.lines))

    def close(self, code: int = 0) -> None:
        """Bring what was sent to its end; with another code than 0 the dashboard shows a run that broke off."""
        if self.run is not None:
            if code == 0 and os.environ.get("WANDB_LOG_MODEL", "") in ("end", "checkpoint"):
                self._try(self._keep_best)
            self._try(lambda: self.run.finish(exit_code=code))
            self.run = None

    def _keep_best(self) -> None:
        artifact = importlib.import_module("wandb").Artifact(f"best-{self.run.id}", type="model")
        artifact.add_dir(str(self.run_callback.folder / "best"))
        self.run.log_artifact(artifact)

    def _try(self, action: Callable[[], None]) -> None:
        if self.run is None and self.failed:
            return
        try:
            action()
        except Exception as error:
            if not self.failed:
                self.run_callback.say(f"wandb: {first_line(error)}. The run goes on without it.")
            self.run, self.failed = None, True
            with contextlib.suppress(Exception, SystemExit):  # else it fails once more, at the very end
                importlib.import_module("wandb").teardown()


def first_line(error: Exception) -> str:
    """An error's message without what follows its first line; its kind if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def wandb_callbacks(report_to: str, run_callback: RunCallback, method: str) -> list[TrainerCallback]:
    """What writes to wandb, if that is the dashboard."""
    return [WandbRun(run_callback, method)] if report_to == "wandb" else []


def history(folder: Path) -> list[dict]:
    """The lines of history.jsonl; none before the first evaluation. A last line that was cut off is left out.

    Raises ArgumentError for any other line that is no JSON object with a step.
    """
    path = folder / "history.jsonl"
    if not path.exists():
        return []
    found, texts = [], path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            line["step"] + 0  # a number, in an object
        except (ValueError, TypeError, KeyError):
            if number == len(texts):
                break
            raise ArgumentError(
                f"{path}, line {number} is broken ({text[:40]!r}); put it right, or remove this line and all after it"
            ) from None
        found.append(line)
    return found


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
