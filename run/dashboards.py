"""Dashboards: wandb, TensorBoard and trackio get a run's figures, wandb also a table of episodes."""

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

from run.progress import GROUPS, RunCallback, episode_record

EPISODES = 8  # in the table, of each evaluation


def project() -> str:
    """The project of all runs in wandb and trackio."""
    return os.environ.get("WANDB_PROJECT", "nlu")


def prepare_reporting(report_to: str, folder: Path) -> list[str]:
    """Set up the dashboard; returns Trainer's `report_to`, which is empty for wandb: WandbRun writes there.

    Every tracker gets the figures under their own names; transformers would put `train/` before each. Without an API
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
    """The folder of wandb's files: WANDB_DIR, or else the run's folder."""
    return os.environ.get("WANDB_DIR") or str(folder)


def _has_wandb_key() -> bool:
    """Whether wandb would find an API key. Asking wandb itself would fix its mode before it can be chosen."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def log_figures(report_to: str, folder: Path, config: dict, figures: dict[str, float], method: str) -> None:
    """Send the figures of a run that does not train, and so has one step, to its dashboard."""
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
        except Exception as error:  # everything is computed and written; a dashboard is no reason to fail
            print(f"{report_to}: {first_line(error)}. The figures are in {folder}/summary.json.")


class WandbRun(TrainerCallback):
    """Sends the figures, and a table of episodes that grows with every evaluation, to one wandb run over all resumes.

    Runs are grouped by task; their job type is the method (ppo or sft). Whatever fails in wandb costs one line of
    warning and the dashboard, never the run. A point's step is the number of its line in history.jsonl, so what is
    sent again after a resume replaces what is there. With WANDB_LOG_MODEL=end, as for transformers' own callback,
    best/ becomes an artifact of a run that ends well.
    """

    def __init__(self, run_callback: RunCallback, method: str):
        self.run_callback, self.method = run_callback, method
        self.run, self.rows, self.failed = None, [], False

    def on_train_begin(self, args, state, control, **kwargs):
        if self.run is not None or self.failed or not state.is_world_process_zero:
            return
        try:
            self._start()
        except Exception as error:
            self.run_callback.say(f"wandb: {first_line(error)}. The run is kept offline, for `wandb sync`.")
            self._try(lambda: self._start("offline"))
        for group in GROUPS:  # methods see unequal numbers of samples in a step
            axis = "train/samples" if group == "eval/" else "train/global_step"
            self._try(lambda name=f"{group}*", axis=axis: self.run.define_metric(name, step_metric=axis))

    def _start(self, mode: str | None = None) -> None:
        folder = self.run_callback.folder
        about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        self.run = importlib.import_module("wandb").init(
            project=project(),
            name=folder.name,
            id=about["id"],
            resume="allow",
            group=about["task"],
            job_type=self.method,
            config={name: about[name] for name in ("arguments", "versions", "data_hash", "task_version")},
            mode=mode,
            reinit="finish_previous",
            dir=wandb_folder(folder),
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        figures = {name: value for name, value in logs.items() if name.startswith(GROUPS)}
        if figures:
            self.on_train_begin(args, state, control)  # a finished run that is resumed only evaluates
            self._send(state.global_step, figures)

    def on_evaluate(self, args, state, control, **kwargs):
        callback = self.run_callback
        if self.run is None or callback.trainer is None:
            return
        columns = ["step", *(["task"] if callback.several else []), "prompt", "answer", "gold", "reward"]
        for episode in callback.trainer.episodes[:EPISODES]:
            record = episode_record(episode, callback.tokenizer, callback.several)
            self.rows.append([state.global_step, *(record[name] for name in columns[1:])])
        table = importlib.import_module("wandb").Table(columns=columns, data=self.rows)
        self._send(state.global_step, {"episodes": table})

    def _send(self, step: int, figures: dict) -> None:
        self._try(lambda: self.run.log({**figures, "train/global_step": step}, step=self.run_callback.lines))

    def close(self, code: int = 0) -> None:
        """Finish the wandb run; with an exit code other than 0 the dashboard shows it as failed."""
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
            with contextlib.suppress(Exception, SystemExit):  # or wandb would fail once more at exit
                importlib.import_module("wandb").teardown()


def first_line(error: Exception) -> str:
    """The first line of an error's message; the error's type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def wandb_callbacks(report_to: str, run_callback: RunCallback, method: str) -> list[TrainerCallback]:
    """The callback that writes to wandb, if wandb is the dashboard."""
    return [WandbRun(run_callback, method)] if report_to == "wandb" else []
