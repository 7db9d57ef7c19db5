"""What a terminal shows of a training run."""

from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from run.history import append_history, history
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


def quiet_trainer(trainer) -> None:
    """Take off Trainer's own printer and bar; RunCallback has both."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
