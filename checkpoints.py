"""What the trainers of ppo.py and sft.py share: evaluation on held-out rows, and the run's checkpoint folders."""

import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from engine import Engine


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says at which step, why, and where the last checkpoint lies."""


class RunTrainer:
    """Stands before a Trainer in a class's bases.

    The class sets `engine` (on the model in training), `evaluation` (`(engine) -> dict` of held-out figures, whose
    `score` decides what is best) and `on_save` (called with every checkpoint's folder before it counts as written);
    its arguments have `save_methods` ("step" or "epoch") and `epoch_offset` (the number of the first epoch).
    """

    engine: Engine
    evaluation: Callable[[Engine], dict[str, float]]
    on_save: Callable[[Path], None]

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Run `evaluation` on the current weights; its figures are logged as eval/<name>, the best ones are saved."""
        self.model.eval()
        started = time.perf_counter()
        metrics = {f"{metric_key_prefix}/{name}": value for name, value in self.evaluation(self.engine).items()}
        metrics[f"{metric_key_prefix}/seconds"] = time.perf_counter() - started
        self.log(dict(metrics))
        score = metrics.get(f"{metric_key_prefix}/score")
        if score is not None and (self.state.best_metric is None or score > self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = score, self.state.global_step
            self._write_folder("best", self.save_model)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs) -> int:
        """Not counted: Trainer's formula does not know what is left out of the forward."""
        return 0

    def last_checkpoint(self) -> Path | None:
        """The checkpoint of this run with the most steps; None if there is none yet."""
        # A hidden folder is one that was being written when the run was stopped.
        states = Path(self.args.output_dir).glob("[!.]*/trainer_state.json")
        return max((state.parent for state in states), key=self.step_of, default=None)

    @staticmethod
    def step_of(checkpoint: Path | None) -> int:
        """How many steps a checkpoint has behind it; 0 for None."""
        return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] if checkpoint else 0

    def _last_checkpoint_text(self) -> str:
        checkpoint = self.last_checkpoint()
        return f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"

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
            for part in (Path(folder) / f"checkpoint-{self.state.global_step}").iterdir():
                part.rename(Path(folder) / part.name)
            (Path(folder) / f"checkpoint-{self.state.global_step}").rmdir()

        self._write_folder(name, write)

    def _write_folder(self, name: str, write: Callable[[str], None]) -> None:
        """Write a folder of the run aside and move it into its place, so that it is there whole or not at all."""
        run = Path(self.args.output_dir)
        run.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=run, prefix=f".{name}-"))
        try:
            with warnings.catch_warnings():
                # peft asks the hub whether the base's vocabulary was changed; it was not, and there may be no hub.
                warnings.filterwarnings("ignore", message="Unable to fetch remote file|Could not find a config file")
                write(str(aside))
            self.on_save(aside)
            aside.chmod(0o755)
            if (run / name).exists():
                old = Path(tempfile.mkdtemp(dir=run, prefix=f".old-{name}-"))
                os.replace(run / name, old)
                os.replace(aside, run / name)
                shutil.rmtree(old)
            else:
                os.replace(aside, run / name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
