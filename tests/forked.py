"""Training runs that something happens to. One interpreter imports ppo.py and sft.py once and forks a child per run.

    result = forked.run("ppo", argv, fault=("kill", 7))          # kill -9 before the seventh change to its folder

A fault is a name in FAULTS and its arguments. It comes at a counted moment, never after a time, so that every test run
is the same. The interpreter is a process of its own: forking one in which threads run (pytest's may) is not safe.
"""

import atexit
import builtins
import functools
import gc
import json
import os
import pty
import resource
import select
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
FILES = ("adapter_model.safetensors", "value_head.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "test.step", "test.written"}


# ------------------------------------------------------------------------------------------------------ the tests' side


@dataclass
class Result:
    code: int  # the exit code, or the negative number of the signal that ended it
    text: str  # all that it printed


@functools.cache
def _interpreter() -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NETRC": "/no/such/file"}
    process = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    atexit.register(process.stdin.close)
    return process


def _ask(**request):
    process = _interpreter()
    process.stdin.write(json.dumps(request, default=str) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, "the interpreter of the forked runs has ended"
    return json.loads(answer)


def start(
    script: str, argv: list, output: Path, fault: tuple = (), stdout: str = "file", env: dict | None = None
) -> int:
    """Begin a run; returns its process id. stdout: a file, a terminal, or a pipe that nobody reads (`closed`)."""
    given = {"script": script, "argv": list(map(str, argv)), "output": output, "fault": fault, "stdout": stdout}
    return _ask(**given, env=env or {})


def wait(pid: int) -> int:
    """Wait until a run has ended, or stopped itself (then the code is -SIGSTOP)."""
    return _ask(wait=pid)


def hang_up(pid: int) -> None:
    """Take away a stopped run's terminal; it goes on."""
    _ask(hang_up=pid)


def run(script: str, argv: list, output: Path, fault: tuple = (), **how) -> Result:
    """A whole run; what it prints goes to `output` and into the result."""
    code = wait(start(script, argv, output, fault, **how))
    return Result(code, output.read_text(errors="replace") if output.exists() else "")


# ---------------------------------------------------------------------------------------------------- what a run leaves


def argv(model: Path, data: Path, folder: Path, **more) -> list[str]:
    given = dict(task="SST", data_path=data, train_model_name=model, from_local=True, report_to="none", eval_size=8,
                 batch_sentence_num=8, learning_rate=1e-2, output_dir=folder)  # fmt: skip
    return [part for name, value in {**given, **more}.items() for part in (f"--{name}", str(value))]


def without_times(line: dict) -> dict:
    return {
        name: value
        for name, value in line.items()
        if "seconds" not in name and not name.startswith(("time/", "train_"))
    }


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def lines(folder: Path) -> list[dict]:
    return [without_times(json.loads(line)) for line in (folder / "history.jsonl").read_text().splitlines()]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def contents(folder: Path) -> dict:
    """All of a finished run that does not depend on the clock."""
    from machine import manifests
    from run import checkpoints

    found = {"names": names(folder), "history": lines(folder), "metrics": read(folder / "summary.json")["metrics"]}
    found["episodes"] = (folder / "episodes.jsonl").read_text(encoding="utf-8")
    for inside in (folder / name for name in ("best", *(path.name for path in checkpoints.checkpoints_of(folder)))):
        manifests.verify(inside)
        for name in FILES:
            if (inside / name).exists():
                found[inside.name, name] = (inside / name).read_bytes()
        if inside.name != "best":
            state = read(inside / "trainer_state.json")
            state["log_history"] = [without_times(line) for line in state["log_history"]]
            del state["best_model_checkpoint"]  # a path with the folder's name in it
            del state["stateful_callbacks"]  # whether the trainer was about to stop; a resume does not read it
            found[inside.name, "state"] = state
    return found


# ----------------------------------------------------------------------------------------------------------- the faults


def count_changes(folder: Path, act) -> None:
    """Call `act(number)` before every change that this process makes below the folder, and before every step."""
    seen = 0

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        written = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (written or event in CHANGES):
            return
        place = args[0].decode() if isinstance(args[0], bytes) else str(args[0])
        if place.startswith(str(folder)):
            seen += 1
            act(seen)

    sys.addaudithook(hook)
    import torch

    save = torch.save

    def save_twice(data, file, *args, **kwargs):
        """Half of the file lies there for a moment."""
        save(data, file, *args, **kwargs)
        os.truncate(file, os.path.getsize(file) // 2)
        sys.audit("test.written", str(file))
        save(data, file, *args, **kwargs)

    torch.save = save_twice


def at_step(step: int, act, ends: bool = False) -> None:
    """Call `act()` in a step's middle: when its rollout begins, or (`ends`) when its gradients are there."""
    from training import ppo_trainer, sft_trainer

    for kind in (ppo_trainer.PPOTrainer, sft_trainer.Finetuner):
        original = kind.training_step

        def training_step(self, *args, original=original):
            now = self.state.global_step + 1 == step
            if now and not ends:
                act()
            loss = original(self, *args)
            if now and ends:
                act()
            return loss

        kind.training_step = training_step


def kill(folder: str, number: int) -> None:
    """kill -9 before the change with this number."""
    announce_steps(folder)
    count_changes(Path(folder), lambda seen: seen == number and os.kill(os.getpid(), signal.SIGKILL))


def count(folder: str, file: str) -> None:
    """Nothing happens; the number of changes is written to a file."""
    announce_steps(folder)
    count_changes(Path(folder), lambda seen: Path(file).write_text(str(seen)))


def announce_steps(folder: str) -> None:
    from training import ppo_trainer

    original = ppo_trainer.PPOTrainer.training_step

    def training_step(self, *args):
        sys.audit("test.step", folder)
        return original(self, *args)

    ppo_trainer.PPOTrainer.training_step = training_step


def send(step: int, *names: str) -> None:
    """Signals in the middle of a step."""
    at_step(step, lambda: [os.kill(os.getpid(), getattr(signal, name)) for name in names])


def send_in_evaluation(number: int, name: str) -> None:
    """A signal in the middle of an evaluation; 1: the one before training."""
    from training import training_run

    original, calls = training_run.HeldOutEvaluation.__call__, []

    def evaluate(self, engine):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), getattr(signal, name))
        return original(self, engine)

    training_run.HeldOutEvaluation.__call__ = evaluate


def limit_files(step: int, size: int) -> None:
    """From a step on no file may grow beyond so many bytes: what a full disk does to a write."""
    at_step(step, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))


def kill_wandb(step: int) -> None:
    """wandb's own process, which every figure goes through, is gone in the middle of a step."""
    import psutil

    def act():
        found = [child for child in psutil.Process().children(recursive=True) if "wandb" in child.name()]
        assert found, "no process of wandb to kill"
        for child in found:
            child.kill()
            child.wait()

    at_step(step, act)


def failing_reward(step: int) -> None:
    """The reward function raises."""
    import rewards

    original = rewards.reward_function

    def reward_function(*args, **kwargs):
        inner, calls = original(*args, **kwargs), []

        def broken(completions, **columns):
            calls.append(1)
            if len(calls) == step:
                raise KeyError("no such label")
            return inner(completions=completions, **columns)

        return broken

    rewards.reward_function = reward_function


FAULTS = {f.__name__: f for f in (kill, count, send, send_in_evaluation, limit_files, kill_wandb, failing_reward)}


# ----------------------------------------------------------------------------------------------- the interpreter's side


def _child(request: dict, scripts: dict) -> None:
    code = 1
    atexit._clear()  # what others registered before the fork is theirs: wandb would remove a folder that all use
    try:
        os.environ.update(request["env"])
        for number in (signal.SIGHUP, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)  # the tests themselves may run under nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if request["fault"]:
            name, *args = request["fault"]
            FAULTS[name](*args)
        scripts[request["script"]].main(request["argv"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _begin(request: dict, scripts: dict, terminals: dict[int, int]) -> int:
    if request["stdout"] == "terminal":
        pid, terminal = pty.fork()
        if pid:
            terminals[pid] = terminal
            return pid
    else:
        pid = os.fork()
        if pid:
            return pid
        if request["stdout"] == "closed":
            reader, file = os.pipe()
            os.close(reader)
        else:
            file = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(file, 1)
        os.dup2(file, 2)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    _child(request, scripts)


def _wait(pid: int, terminal: int | None) -> int:
    """The code, once the child has ended or stopped; meanwhile its terminal is read, or it would wait for that."""
    while True:
        found, status = os.waitpid(pid, os.WUNTRACED | (os.WNOHANG if terminal is not None else 0))
        if found:
            return -os.WSTOPSIG(status) if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status)
        if select.select([terminal], [], [], 0.05)[0]:
            try:
                os.read(terminal, 65536)
            except OSError:
                terminal = None  # the other end is closed; all that is left is to wait


def _serve() -> None:
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import conftest  # noqa: F401  # no network, one thread

    import ppo
    import sft
    from engine import models
    from training import ppo_trainer, sft_trainer, training_run  # noqa: F401  # once here, and not in every child

    models.load_tokenizer, models.load_model = map(functools.cache, (models.load_tokenizer, models.load_model))
    scripts, terminals = {"ppo": ppo, "sft": sft}, {}
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _wait(request["wait"], terminals.get(request["wait"]))
        elif "hang_up" in request:
            os.close(terminals.pop(request["hang_up"]))
            answer = None
        else:
            _load_once(request["argv"], models)
            gc.freeze()  # the children's collections need not look at what was there before them
            answer = _begin(request, scripts, terminals)
        builtins.print(json.dumps(answer), file=answers)


def _load_once(argv: list[str], models) -> None:
    """The model, before the fork: every child has its own copy then, and none has to load it."""
    if "--train_model_name" in argv:
        name = argv[argv.index("--train_model_name") + 1]
        models.load_tokenizer(name, True)
        models.load_model(name, True, False)


if __name__ == "__main__":
    _serve()
