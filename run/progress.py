"""What people see of a training run while it goes on, and the figures and episodes that it leaves in its folder."""

import time
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import prompts
from machine.terminal import progress_bar, time_left
from run.history import append_episodes, append_history, episodes, history
from tasks import Task

GROUPS = ("objective/", "policy/", "value/", "eval/", "time/", "train/")
IN_A_LINE = {  # figure -> its name in the line of a step
    "objective/reward": "reward",
    "objective/accuracy": "accuracy",
    "objective/invalid_rate": "invalid",
    "objective/entropy": "entropy",
    "objective/kl": "KL",
    "train/loss": "loss",
    "train/accuracy": "accuracy",
    "train/token_accuracy": "token accuracy",
}
SHARES = "objective/share/"
SAMPLED = 2  # episodes that are kept of a step
SAMPLED_EVERY, SAMPLED_STEPS = 10, 100  # of so many steps at most; a longer run samples less often
SHOWN_CHARACTERS = 600  # of a row's text on the terminal


class RunCallback(TrainerCallback):
    """Writes history.jsonl and episodes.jsonl, and says how far the run is.

    Every step and every evaluation is a line. On a terminal a bar stays below the lines; elsewhere a line ends with the
    time that is left. The first and the last sample episodes are shown, those in between are in episodes.jsonl alone.
    """

    def __init__(self, folder: Path, tokenizer, several: bool = False):
        """several: the run is of several tasks, so what is of one of them names it."""
        self.folder, self.tokenizer, self.several = folder, tokenizer, several
        self.trainer = None  # set once the trainer exists
        self.bar = None
        self.started: tuple[int, float] | None = None  # the first step of this process, and when it began
        self.lines: int | None = None  # in history.jsonl, once it is written to
        self.seen: dict | None = None  # the first of the trainer's episodes when they were last looked at
        self.kept: int | None = None  # the last step in episodes.jsonl, once that is known; negative: there is none
        self.shown = False  # whether an episode was shown

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = progress_bar(state.max_steps, state.global_step, unit="step")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = self.started or (state.global_step, time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(1)

    def on_log(self, args, state, control, logs=None, **kwargs):
        figures = {name: value for name, value in logs.items() if name.startswith(GROUPS)}
        if not figures or not state.is_world_process_zero:
            return
        new = self._new_episodes()
        records = [episode_record(episode, self.tokenizer, self.several) for episode in new]
        self._keep(records, state)  # before the figures: an evaluation that history.jsonl has is not done again
        self.lines = (len(history(self.folder)) if self.lines is None else self.lines) + 1
        evaluated = any(name.startswith("eval/") for name in figures)
        task = "" if evaluated or self.trainer is None else self.trainer.step_task
        append_history(self.folder, state.global_step, figures, task)
        self.say(step_line(state.global_step, state.max_steps, figures, task) + self._time_left(state))
        if not self.shown or state.global_step >= state.max_steps:
            for episode, record in zip(new, records):
                self.say(episode_text(episode["task"], episode["row"], record))
            self.shown = self.shown or bool(new)

    def say(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is None or self.bar.disable:
            print(text, flush=True)
        else:
            self.bar.write(text)

    def _time_left(self, state) -> str:
        remaining = state.max_steps - state.global_step
        if self.started is None or self.bar is None or not self.bar.disable or remaining <= 0:
            return ""
        first_step, began = self.started
        done = state.global_step - first_step
        return f"  {time_left((time.perf_counter() - began) / done * remaining)}" if done else ""

    def _new_episodes(self) -> list[dict]:
        """Of the first few rows one episode each, if the trainer has made new episodes since the last call."""
        made = self.trainer.episodes if self.trainer is not None else []
        if not made or made[0] is self.seen:
            return []
        self.seen, by_row = made[0], {}
        for episode in made:  # there may be many samples of a row
            by_row.setdefault(id(episode["row"]), episode)
        return list(by_row.values())[:SAMPLED]

    def _keep(self, records: list[dict], state) -> None:
        """Add episodes to episodes.jsonl if enough steps have passed since the last ones, or this is the last step."""
        if self.kept is None:
            self.kept = max((line["step"] for line in episodes(self.folder)), default=-SAMPLED_EVERY)
        every = max(SAMPLED_EVERY, -(-state.max_steps // SAMPLED_STEPS))
        due = self.kept + (1 if state.global_step >= state.max_steps else every)
        if records and (state.global_step >= due or self.kept < 0):
            append_episodes(self.folder, state.global_step, records)
            self.kept = state.global_step


def episode_record(episode: dict, tokenizer, several: bool = False) -> dict:
    """An episode as people read it: the row's id, prompt without special tokens, answer, gold answer and reward; under
    `extra` what reward functions say of it, if they do. several: with the task's name."""
    task, row = episode["task"], episode["row"]
    return {
        **({"task": task.name} if several else {}),
        "id": row["id"],
        "prompt": tokenizer.decode(episode["prompt"], skip_special_tokens=True).strip(),
        "answer": episode["answer"],
        "gold": str(row["label"]) if task.number or row["label"] is None else task.words[row["label"]],
        "reward": episode["reward"],
        **({"extra": episode["extra"]} if "extra" in episode else {}),
    }


def episode_text(task: Task, row: dict, record: dict) -> str:
    """What the row asks, the answer, the gold answer and the reward, for a terminal."""
    text = prompts.row_text(task, row)
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS // 2]} ... {text[-SHOWN_CHARACTERS // 2 :]}"
    asked = "\n".join(f"  | {line}" for line in text.splitlines())
    return f"{asked}\n  answer: {record['answer']!r}   gold: {record['gold']}   reward: {record['reward']:+.2f}"


def step_line(step: int, total: int, figures: dict[str, float], task: str = "") -> str:
    """The figures of one step, or of one evaluation, in one line. task: of the step, where it is one of several."""
    if task:
        figures = {name.replace(f"objective/{task}/", "objective/", 1): value for name, value in figures.items()}
    evaluated = {name[5:]: value for name, value in figures.items() if name.startswith("eval/")}
    if evaluated:
        shown = "  ".join(f"{name} {value:.3f}" for name, value in evaluated.items() if name != "seconds")
        return f"step {step}/{total}  held-out: {shown}  ({evaluated.get('seconds', 0):.0f} s)"
    shown = "".join(f"  {name} {figures[figure]:.3f}" for figure, name in IN_A_LINE.items() if figure in figures)
    shares = [(name.removeprefix(SHARES), share) for name, share in figures.items() if name.startswith(SHARES)]
    largest = sorted(shares, key=lambda pair: -pair[1])[:4]
    listed = " ".join(f"{word} {share:.2f}" for word, share in largest)
    return f"step {step}/{total}{f'  {task}' if task else ''}{shown}" + (f"  [{listed}]" if listed else "")


def quiet_trainer(trainer) -> None:
    """Take off Trainer's own printer and bar; RunCallback has both."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
