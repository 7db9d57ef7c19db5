"""What the trainers share: evaluation on held-out rows, checkpoints, resume."""

import contextlib
import os
import pickle
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from engine import models
from engine.engine import Engine
from machine import manifests, processes, sharding
from machine.errors import TrainingError
from machine.files import fsync_folder, remove_folder
from run.checkpoints import ADAPTER_FILE, OLD_BEST, STATE_FILE, checkpoints_of, run_id, step_of
from run.faults import Stopped

PICKLE = "training_args.bin"  # Trainer writes it; nothing reads it, and unpickling it would run code


class RunTrainer:
    """Stands before a Trainer in a class's bases.

    The class sets the attributes below; its arguments have `save_methods` ("step" or "epoch") and `epoch_offset` (the
    number of the first epoch).

    Attributes:
        engine: on the model in training; a classification head's is a Classifier.
        evaluation: `(engine) -> dict` of held-out figures, whose `score` decides what is best.
        at_once: around the evaluation after the last step: in it a signal ends the run at once.
        on_save: called with every checkpoint's folder before it counts as written.
        samples_per_step: of all processes.
        step_task: the name of the task that the last step's rows were of, where a step takes one of several.
    """

    engine: Engine
    evaluation: Callable[[Engine], dict[str, float]]
    on_save: Callable[[Path], None]
    samples_per_step: int
    step_task: str = ""
    at_once: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    saved_step: int | None = None  # of the last checkpoint that was written or loaded

    def train_from(self, checkpoint: Path | None) -> None:
        """Train up to `max_steps`, from a checkpoint if there is one; one with so many steps is only loaded.

        TrainingError for a checkpoint that could only be loaded by running code from it.
        """
        sharding.hide_frozen(self.model)
        if checkpoint is None:
            self.train()
            return
        self.saved_step = step_of(checkpoint)
        if self.saved_step < self.args.max_steps:
            try:
                self.train(resume_from_checkpoint=str(checkpoint))
            except pickle.UnpicklingError as error:
                raise TrainingError(
                    f"{checkpoint} holds a file that is loaded only by running code from it, which is not done "
                    f"({str(error).splitlines()[0]}); this program did not write it"
                ) from error
        else:  # Trainer would do one more step
            self._load_from_checkpoint(str(checkpoint))
            self.state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Run `evaluation` on the current weights; its figures are logged as eval/<name>, the best ones are saved."""
        self.model.eval()
        started = time.perf_counter()
        last = self.state.global_step >= self.args.max_steps and processes.count() == 1
        try:
            with self.at_once() if last else contextlib.nullcontext(), self.enough_memory("Lower --max_prompt_length"):
                figures = self.evaluation(self.engine)
        except Stopped:  # nothing is left to train; what is missing is evaluated by a resume
            if self.saved_step != self.state.global_step:
                self._save_checkpoint(self.model_wrapped, None)
            raise
        metrics = {f"{metric_key_prefix}/{name}": value for name, value in figures.items()}
        metrics[f"{metric_key_prefix}/seconds"] = time.perf_counter() - started
        score, best = metrics.get(f"{metric_key_prefix}/score"), self._best_score()
        # Save best/ before logging: a run killed in between evaluates again, and comes to the same best/.
        # Of equal scores the later is the best: where training changed nothing that the score shows, best/ holds what
        # was trained, and not the adapter of step 0.
        if score is not None and (best is None or score >= best):
            self.state.best_metric, self.state.best_global_step = score, self.state.global_step
            self._write_folder("best", self.save_model, score=score)
        self.log({**metrics, **self.so_far()})
        if self.saved_step == self.state.global_step and processes.is_main():
            remove_folder(Path(self.args.output_dir) / OLD_BEST)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def so_far(self) -> dict[str, float]:
        """Figures of every line of the dashboards: samples seen so far, and peak memory."""
        samples = self.state.global_step * self.samples_per_step
        return {"train/samples": samples, "time/peak_memory_bytes": processes.peak_memory_bytes()}

    def _best_score(self) -> float | None:
        """The score of best/; without that folder, the best that the run knows of."""
        manifest = manifests.read(Path(self.args.output_dir) / "best") or {}
        return manifest.get("score", self.state.best_metric)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: Trainer's formula does not know what the engine's forward leaves out."""
        return 0

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of this run with the most steps; None if there is none yet."""
        return max(checkpoints_of(Path(self.args.output_dir)), key=step_of, default=None)

    def failure(self, what: str, way_out: str = "") -> TrainingError:
        """The error that ends the run in this step: what happened, where the last checkpoint lies, and the way out."""
        checkpoint = self.last_checkpoint()
        left = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        text = f"{what} at step {self.state.global_step + 1}; {left}"
        return TrainingError(f"{text}. {way_out}" if way_out else text)

    @contextlib.contextmanager
    def enough_memory(self, way_out: str) -> Iterator[None]:
        """Running out of memory with one row at a time becomes a TrainingError."""
        try:
            yield
        except MemoryError as error:
            raise self.failure(str(error), way_out) from error

    @contextlib.contextmanager
    def named_failure(self, name: str) -> Iterator[None]:
        """Whatever a user's function raises becomes a TrainingError with the function's name and the line."""
        try:
            yield
        except TrainingError:
            raise
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise self.failure(
                f"{name} raised {type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})"
            ) from error

    def _save_checkpoint(self, model, trial) -> None:
        """Trainer's checkpoint, under the run's own names: epoch-<n> where an epoch ends, step-<n> elsewhere."""
        epoch = self.state.epoch or 0.0
        name = f"step-{self.state.global_step}"
        if self.args.save_methods == "epoch" and abs(epoch - round(epoch)) < 1e-6:
            name = f"epoch-{self.args.epoch_offset + round(epoch)}"

        def write(folder: str) -> None:
            run, self.args.output_dir = self.args.output_dir, folder
            try:
                super(RunTrainer, self)._save_checkpoint(model, trial)
            finally:
                self.args.output_dir = run

        self._write_folder(name, write)
        self.saved_step = self.state.global_step
        if not processes.is_main():
            return
        run = Path(self.args.output_dir)
        remove_folder(run / OLD_BEST)
        if self.args.save_total_limit:
            for old in checkpoints_of(run)[: -self.args.save_total_limit]:
                remove_folder(old)

    def _write_folder(self, name: str, write: Callable[[str], None], **about) -> None:
        """Write a folder of the run under another name and rename it, so that it is there whole or not at all.

        TrainingError if it cannot be written (the disk is full, say); nothing of it is left then.
        """
        run = Path(self.args.output_dir)
        aside = None
        try:
            run.mkdir(parents=True, exist_ok=True)
            aside = Path(processes.broadcast_from_main(lambda: tempfile.mkdtemp(dir=run, prefix=f".new-{name}-")))
            with warnings.catch_warnings():
                # peft asks the hub whether the vocabulary was resized; it was not, and there may be no hub.
                warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file")
                write(str(aside))
            processes.all_gather([name])  # a barrier: every process has written its part
            processes.broadcast_from_main(lambda: self._move_into_place(aside, name, about))
        except (OSError, RuntimeError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
            left = ", ".join(path.name for path in checkpoints_of(run)) or "no checkpoint"
            raise TrainingError(
                f"{run / name} could not be written at step {self.state.global_step} ({reason}); what was there is "
                f"untouched: {left}"
            ) from error
        finally:
            if aside is not None and processes.is_main():
                shutil.rmtree(aside, ignore_errors=True)

    def _move_into_place(self, aside: Path, name: str, about: dict) -> None:
        """Complete a folder that was written under another name, and give it its own."""
        run = Path(self.args.output_dir)
        inner = aside / f"checkpoint-{self.state.global_step}"  # Trainer's own name
        if inner.is_dir():
            for part in inner.iterdir():
                part.rename(aside / part.name)
            inner.rmdir()
        (aside / PICKLE).unlink(missing_ok=True)
        self.on_save(aside)
        manifests.write(aside, step=self.state.global_step, run=run_id(run), **about)
        aside.chmod(0o755)
        if name == "best" and self.args.save_strategy != "no" and not (run / OLD_BEST).exists():
            if (run / name).exists():
                os.replace(run / name, run / OLD_BEST)  # until a checkpoint has caught up with the new one
        else:
            remove_folder(run / name)
        os.replace(aside, run / name)
        fsync_folder(run)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Trainer's, but rates and intervals are those of this run's arguments. A checkpoint holds its own run's, and a
        run that goes on for longer would begin with the old schedule's last rate, which is 0."""
        if checkpoint is None:
            return
        self.state.compute_steps(self.args, self.args.max_steps)
        scheduler = self.lr_scheduler
        if not isinstance(scheduler, LambdaLR):  # DeepSpeed's own
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        rates = list(scheduler.base_lrs)
        super()._load_optimizer_and_scheduler(checkpoint)
        before, scheduler.base_lrs = list(scheduler.get_last_lr()), rates
        scheduler._last_lr = [rate * part(scheduler.last_epoch) for rate, part in zip(rates, scheduler.lr_lambdas)]
        for group, rate, initial in zip(self.optimizer.param_groups, scheduler._last_lr, rates):
            group["lr"], group["initial_lr"] = rate, initial
        if before != scheduler._last_lr and processes.is_main():
            print(
                f"The learning rate follows the new arguments from step {self.state.global_step + 1} of "
                f"{self.args.max_steps}: {scheduler._last_lr[0]:g}, where the checkpoint had {before[0]:g}."
            )

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        with models.quiet():  # a bar for every file of a whole model
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        """The adapter's weights alone, from safetensors; Trainer would also load start/ as a second adapter."""
        if isinstance(self.model, PeftModel):
            set_peft_model_state_dict(self.model, load_file(Path(resume_from_checkpoint) / ADAPTER_FILE))
            return
        with models.quiet():  # PPO's value head lies in a file of its own
            super()._load_from_checkpoint(resume_from_checkpoint, model)
