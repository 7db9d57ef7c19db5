"""inference.py and fewshot.py with `--endpoint`: what is asked, kept, resumed, paid and written. The servers are fakes
on loopback, but for the last one: `transformers serve` with the embedded model."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from fake_server import chat, completion, error, serving, with_logprobs

import fewshot
import inference
import prompts
import rewards
import tasks
from engine import models
from evaluation import endpoint, responses
from evaluation.endpoint import Reply
from evaluation.responses import Reader, label_probabilities
from tasks import loaders
from tasks.table import Task

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
KEY = "sk-secret-of-this-test"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody waits, and the key is no key."""
    monkeypatch.setattr(endpoint, "PAUSE", 0.0)
    monkeypatch.setattr(responses, "GRACE", 5.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def run(server, output: Path, *options: str, script=inference, data: Path = FIXTURES, model: str = "gpt-4o") -> Path:
    script.main(
        ["--task", "SST", "--endpoint", server.url, "--train_model_name", model, "--data_path", str(data)]
        + ["--report_to", "none", "--output_dir", str(output), *options]
    )
    return output


def refused(capsys, *arguments, **how) -> str:
    """The one line that is left on standard error."""
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, **how)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1, said
    return said


def lines(folder: Path, name: str = "predictions.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def by_number(path: str, request: dict) -> dict:
    """An answer that depends on the row alone: the number at its end decides."""
    number = int(re.findall(r"[dt](\d+)", request["messages"][-1]["content"])[-1])
    return chat(f"<Judgement>{('negative', 'positive')[number % 2]}</Judgement>")


# ------------------------------------------------------------------------------------------------- what is written


def test_a_run_leaves_predictions_responses_and_a_summary_with_tokens_and_cost(data_root, tmp_path, capsys):
    with serving(by_number) as server:
        folder = run(server, tmp_path / "run", "--price_in", "2.5", "--price_out", "10", data=data_root)
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "arguments.json", "predictions.jsonl", "responses.jsonl", "run.json", "summary.json"
    }  # fmt: skip
    task = tasks.get("SST")
    rows = loaders.load(task, "validation", data_root=data_root)
    asked = {json.dumps(request["messages"]) for request in server.requests}
    assert asked == {json.dumps(prompts.chat(task, row)) for row in rows} and len(server.requests) == len(rows) == 12
    found = lines(folder)
    assert [line["id"] for line in found] == [row["id"] for row in rows]
    assert all(line["answer"] in ("positive</Judgement>", "negative</Judgement>") for line in found)
    assert all(line["correct"] == (line["label"] == line["gold"]) for line in found)
    assert found[0]["prompt"].startswith("user: Classify the sentiment")
    written = summary(folder)
    assert (written["method"], written["model"], written["answer_space"]) == ("zero-shot", "gpt-4o", "free")
    assert written["tokens"] == {"input": 1200, "output": 60} and written["answered_by"] == ["fake-2026"]
    assert written["cost"] == pytest.approx(1200 * 2.5e-6 + 60 * 10e-6)
    assert "1200 tokens in prompts and 60 in answers, cost 0.0036" in capsys.readouterr().out
    accuracy = sum(line["correct"] for line in found) / len(found)
    assert written["metrics"]["after"] == {"accuracy": accuracy, "score": accuracy, "invalid_rate": 0.0}


def test_the_key_is_written_nowhere(data_root, tmp_path, capsys):
    def echo(path, request):
        return chat("positive") if len(server.requests) < 6 else error(401, f"Wrong key: {KEY}")

    with serving(echo) as server:
        said = refused(capsys, server, tmp_path / "run", "--concurrency", "1", data=data_root)
    assert server.keys[0] == f"Bearer {KEY}"
    assert KEY not in said and all(KEY.encode() not in p.read_bytes() for p in (tmp_path / "run").iterdir())


@pytest.mark.parametrize("name", ["openai/gpt-4o", "meta-llama/Llama-3:free", "ft:gpt-4o:org::abc", "a b/c?d*"])
def test_any_model_name_makes_a_folder(name, data_root, tmp_path, monkeypatch):
    monkeypatch.setattr("run.folder.ROOT", tmp_path)
    with serving(by_number) as server:
        inference.main(
            ["--task", "SST", "--endpoint", server.url, "--train_model_name", name, "--data_path", str(data_root)]
            + ["--report_to", "none"]
        )
    (folder,) = (tmp_path / "model" / "SST").iterdir()
    assert re.fullmatch(r"[\w.+-]+", folder.name) and summary(folder)["model"] == name
    assert server.requests[0]["model"] == name


def test_every_task_of_a_suite_is_asked(tmp_path):
    with serving(lambda path, request: chat("yes")) as server:
        folder = run(server, tmp_path / "run", "--task", "GLUE", "--concurrency", "3")
    counted = [task for task in tasks.suite("GLUE") if task.in_suite_score]
    assert all((folder / task.name / "responses.jsonl").exists() for task in tasks.suite("GLUE"))
    assert 0 <= json.loads((folder / "GLUE.json").read_text())["score"] <= 1 and len(counted) > 5


def test_what_a_server_does_not_count_is_said(data_root, tmp_path, capsys):
    with serving(lambda path, request: chat("positive", tokens=None)) as server:
        folder = run(server, tmp_path / "run", data=data_root)
    assert summary(folder)["tokens"] == {"input": 0, "output": 0} and summary(folder)["cost"] is None
    assert "the server did not count those of 12 rows" in capsys.readouterr().out


def test_answers_that_are_cut_off_are_said_to_be(data_root, tmp_path, capsys):
    with serving(lambda path, request: chat(None, "length")) as server:
        folder = run(server, tmp_path / "run", "--max_response_length", "5", data=data_root)
    assert server.requests[0]["max_tokens"] == 5 + 16  # and the tags
    assert summary(folder)["metrics"]["after"]["invalid_rate"] == 1.0
    assert (
        "12 of 12 answers were cut off before they were valid; raise --max_response_length" in capsys.readouterr().out
    )


def test_sampling_has_a_temperature_and_a_seed(data_root, tmp_path):
    with serving(by_number) as server:
        options = ("--do_sample", "True", "--model_temperature", "0.7", "--seed", "3")
        run(server, tmp_path / "run", *options, data=data_root)
    assert all((r["temperature"], r["seed"]) == (0.7, 3) for r in server.requests)


def test_nothing_that_computes_is_imported(data_root, tmp_path):
    with serving(by_number) as server:
        program = (
            "import sys; sys.path.insert(0, sys.argv.pop(1)); import inference; inference.main()\n"
            "print('computes:', *[name for name in ('torch', 'transformers') if name in sys.modules])"
        )
        command = [
            sys.executable,
            "-c",
            program,
            ROOT,
            "--task",
            "SST",
            "--endpoint",
            server.url,
            "--report_to",
            "none",
        ]
        command += ["--data_path", data_root, "--output_dir", tmp_path / "run"]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.endswith("computes:\n")


# ---------------------------------------------------------------------------------------------------- what is asked


def test_demonstrations_are_turns_of_the_assistant(data_root, tmp_path):
    with serving(by_number) as server:
        folder = run(server, tmp_path / "run", "--num_shots", "4", script=fewshot, data=data_root)
    for request in server.requests:
        turns = request["messages"]
        assert [turn["role"] for turn in turns] == ["user", "assistant"] * 4 + ["user"]
        answers = [turn["content"] for turn in turns[1::2]]
        assert sorted(answers) == ["<Judgement>negative</Judgement>"] * 2 + ["<Judgement>positive</Judgement>"] * 2
    assert summary(folder)["method"] == "few-shot" and summary(folder)["shots"] == 4


@pytest.mark.parametrize("name", ["SST", "MNLI-m", "STS-B", "COPA"])
@pytest.mark.parametrize("use_CoT", [False, True])
def test_a_chat_is_the_prompt_that_a_model_here_is_given(name, use_CoT):
    task, tokenizer = tasks.get(name), models.load_tokenizer(models.EMBEDDED)
    row, *shots = loaders.load(task, "train", data_root=FIXTURES)[:3]
    turns = prompts.chat(task, row, use_CoT, shots)
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids, _ = prompts.build(task, row, tokenizer, use_CoT, 4096, shots)
    assert tokenizer.decode(ids) == rendered + (rewards.ANALYSIS if use_CoT else rewards.JUDGEMENT)


def test_half_of_a_character_is_refused_before_anything_is_asked(tmp_path, capsys):
    path = tmp_path / "SST" / "dev.tsv"
    path.parent.mkdir()
    path.write_bytes(b"sentence\tlabel\n\xed\xa0\xbd film\t1\nfine\t0\n")
    with serving([]) as server:
        refused(capsys, server, tmp_path / "run", data=path)
    assert server.requests == [] and not (tmp_path / "run").exists()


def test_so_many_are_asked_at_a_time_and_no_more(data_root, tmp_path):
    together, lock, now, most = threading.Barrier(3), threading.Lock(), [0], [0]

    def answer(path, request):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
            alone = len(server.requests) == 1  # it finds out what the server takes
        if not alone:
            together.wait(timeout=60)  # passes only when three wait here
        with lock:
            now[0] -= 1
        return by_number(path, request)

    path = tmp_path / "dev.tsv"  # 13 rows: one, and four times three
    train = (data_root / "GLUE" / "SST" / "train.tsv").read_text().splitlines(keepends=True)
    path.write_text("".join(train[:14]))
    with serving(answer) as server:
        folder = run(server, tmp_path / "run", "--concurrency", "3", "--eval_size", "0", data=path)
    assert len(lines(folder)) == 13 and most[0] == 3


# ------------------------------------------------------------------------------------------ interrupted and resumed


@pytest.mark.parametrize("cut", ["", '{"row": 11, "id"'])
@pytest.mark.parametrize("concurrency", ["1", "4"])
def test_a_run_that_failed_goes_on_and_pays_nothing_twice(data_root, tmp_path, capsys, concurrency, cut):
    with serving(by_number) as server:
        whole = run(server, tmp_path / "whole", data=data_root)
    good: list[str] = []  # the questions that were answered, and paid
    lock = threading.Lock()

    def answer(path, request):
        with lock:
            if broken and len(good) >= 5:
                return b"<html>Payment required</html>"
            good.append(request["messages"][-1]["content"])
        return by_number(path, request)

    broken = True
    with serving(answer) as server:
        said = refused(capsys, server, tmp_path / "run", "--concurrency", concurrency, data=data_root)
        assert "answers nonsense 8 times: no JSON but '<html>Payment required</html>'" in said
        assert f"5 of 12 answers are kept: go on with --resume {tmp_path / 'run'}" in said
        assert len(lines(tmp_path / "run", "responses.jsonl")) == 5
        assert not (tmp_path / "run" / "predictions.jsonl").exists()
        with open(tmp_path / "run" / "responses.jsonl", "a") as file:
            file.write(cut)
        broken = False
        inference.main(
            ["--resume", str(tmp_path / "run"), "--concurrency", "2", "--price_in", "1", "--report_to", "none"]
        )
    assert len(good) == len(set(good)) == 12
    assert (tmp_path / "run" / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert summary(tmp_path / "run")["metrics"] == summary(whole)["metrics"]
    assert summary(tmp_path / "run")["tokens"] == {"input": 1200, "output": 60}
    assert summary(tmp_path / "run")["cost"] == pytest.approx(0.0012)


def test_a_signal_waits_for_the_answers_that_are_on_their_way(data_root, tmp_path, monkeypatch, capsys):
    arrived, stopping = threading.Barrier(3), threading.Event()

    def answer(path, request):
        if len(server.requests) > 1 and not stopping.is_set():  # the first is asked alone
            if arrived.wait(timeout=60) == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            stopping.wait(timeout=60)
        return by_number(path, request)

    give_up = endpoint.Endpoint.give_up
    monkeypatch.setattr(endpoint.Endpoint, "give_up", lambda self: (give_up(self), stopping.set()))
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_DFL)  # pytest may run under nohup
    with serving(answer) as server:
        with pytest.raises(SystemExit) as stopped:
            run(server, tmp_path / "run", "--concurrency", "3", data=data_root)
        assert stopped.value.code == 143
        assert "stopped at once by SIGTERM; the answers so far are kept" in capsys.readouterr().err
        kept = len(lines(tmp_path / "run", "responses.jsonl"))
        assert kept == len(server.requests) == 4
        inference.main(["--resume", str(tmp_path / "run"), "--report_to", "none"])
    assert len(server.requests) == len(lines(tmp_path / "run")) == 12


def test_finished_tasks_are_not_asked_again(tmp_path, capsys):
    with serving(lambda path, request: chat("positive")) as server:
        folder = run(server, tmp_path / "run", "--task", "SST,CoLA")
        asked = len(server.requests)
        (folder / "CoLA" / "summary.json").unlink()
        inference.main(["--resume", str(folder), "--report_to", "none"])
        assert len(server.requests) == asked
    assert "SST is already done" in capsys.readouterr().out and (folder / "CoLA" / "summary.json").exists()


def test_other_prompts_or_a_broken_line_are_no_resume(data_root, tmp_path, monkeypatch, capsys):
    with serving(by_number) as server:
        folder = run(server, tmp_path / "run", data=data_root)
        (folder / "summary.json").unlink()
        path = folder / "responses.jsonl"
        text = path.read_text()
        path.write_text(text.replace('"finish"', '"end"', 1))
        with pytest.raises(SystemExit):
            inference.main(["--resume", str(folder), "--report_to", "none"])
        assert "responses.jsonl, line 1 cannot be read" in capsys.readouterr().err
        path.write_text(text)
        monkeypatch.setitem(prompts.WORDINGS, "SST", prompts.WORDINGS["CoLA"])
        with pytest.raises(SystemExit):
            inference.main(["--resume", str(folder), "--report_to", "none"])
        assert "the prompts of SST are not those that the run began with" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("nonsense", [b"<html></html>", b"", {"choices": []}, error(404, "no such model")])
def test_a_server_that_answers_nonsense_leaves_nothing(nonsense, data_root, tmp_path, capsys):
    with serving(lambda path, request: nonsense) as server:
        said = refused(capsys, server, tmp_path / "run", data=data_root)
    assert said.startswith(f"inference.py: error: --endpoint {server.url} answers") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--endpoint", "localhost:8000"],
            "--endpoint localhost:8000 is no URL; give one such as http://localhost:8000/v1",
        ),
        (["--endpoint", "http://"], "is no URL"),
        (["--endpoint", "http://host:port/v1"], "is no URL"),
        (["--endpoint", "ftp://host/v1"], "is no URL"),
        (["--endpoint", "http://me:sk-1@host/v1"], "--endpoint has a user, a password or a query"),
        (["--endpoint", "http://host/v1?key=sk-1"], "--endpoint has a user, a password or a query"),
        (["--answer_space", "labels"], "--answer_space labels needs the model itself"),
        (["--answer_space", "score"], "--answer_space score needs the model itself"),
        (["--text", "a film"], "--text asks a model here"),
        (["--concurrency", "0"], "--concurrency 0 must be greater than 0"),
        (["--price_in", "-1"], "--price_in -1.0 must not be negative"),
        (["--from_local", "True"], "--train_model_name gpt-4o is no folder"),
    ],
)
def test_bad_arguments_end_with_one_sentence(options, said, tmp_path, capsys):
    with serving([]) as server:
        found = refused(capsys, server, tmp_path / "run", *options)
    assert said in found and "sk-1" not in found and server.requests == [] and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------- from a reply to a label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("<Judgement>positive</Judgement>", 1),
        ("positive", 1),
        ("  Positive.", 1),
        ("Here is my answer:\n<Judgement> negative </Judgement>", 0),
        ("<think>It is not <Judgement>negative</Judgement>.</think>\n<Judgement>positive</Judgement>", 1),
        ("<think>warm</think>\n\npositive", 1),
        ("The review is positive", None),
        ("I'm sorry, but I can't help with that.", None),
        ("", None),
        ("positively", None),
    ],
)
def test_a_chat_s_answer_is_read_behind_its_tag(text, label):
    reader = Reader(tasks.get("SST"), True, False, False)
    assert reader.prediction(reader.response(0, {"id": 0}, Reply(text, "stop"))).label == label


def test_an_analysis_comes_before_the_judgement():
    reader = Reader(tasks.get("SST"), True, True, False)
    text = "<Analysis>negative?</Analysis>\n<Judgement>positive</Judgement>"
    assert reader.prediction(reader.response(0, {"id": 0}, Reply(text, "stop"))).label == 1
    assert not reader.wants_probabilities


def test_a_text_that_goes_on_is_read_at_its_beginning():
    reader = Reader(tasks.get("SST"), False, False, False)
    reply = Reply("positive</Judgement>\n<Judgement>negative", "length")
    assert reader.prediction(reader.response(0, {"id": 0}, reply)).label == 1


def logs(**chances: float) -> dict[str, float]:
    return {token: math.log(chance) for token, chance in chances.items()}


TAG = (("<", {}), ("Judgement", {}), (">", {}))


def words(*labels: str) -> Task:
    task = tasks.get("SST")
    return Task(**{**vars(task), "labels": labels, "words": labels})


@pytest.mark.parametrize(
    ("task", "tokens", "expected"),
    [
        (words("no", "yes"), (("yes", logs(yes=0.6, no=0.2, The=0.2)),), [0.25, 0.75]),
        (words("no", "yes"), (("yes", {**logs(yes=0.4, No=0.1), " Yes": math.log(0.4), "": -1.0}),), [1 / 9, 8 / 9]),
        (words("negative", "positive"), (*TAG, ("pos", logs(pos=0.75, neg=0.25)), ("itive", {})), [0.25, 0.75]),
        (words("negative", "positive"), (("<Judgement> pos", {"<Judgement> pos": -0.1}), ("itive", {})), [0.0, 1.0]),
        (words("no", "yes"), (("yesterday", logs(yesterday=0.9, yes=0.1)),), [0.0, 1.0]),
        (words("not", "not_at_all"), (("not", logs(**{"not": 0.9})),), None),  # either may follow
        (words("negative", "neutral"), (("neu", logs(neu=0.6, neg=0.4, n=0.001)),), [0.4, 0.6]),
        (words("negative", "neutral"), (("neu", logs(neu=0.6, neg=0.3, ne=0.1)),), None),
        (words("no", "yes"), (("maybe", logs(maybe=1.0)),), None),
        (words("no", "yes"), (("yes", {}),), None),
        (words("no", "yes"), (), None),
    ],
)
def test_label_probabilities_are_those_of_the_answer_s_first_token(task, tokens, expected):
    reply = Reply("".join(token for token, _ in tokens), "stop", candidates=tokens)
    found = label_probabilities(task, reply, Reader(task, True, False, False).answer_start(reply.text))
    if expected is None:
        assert found is None
    else:
        assert found == pytest.approx(expected, rel=0.01)


def test_tokens_that_are_not_the_text_say_nothing():
    reply = Reply("yes", "stop", candidates=(("no", logs(no=1.0)),))
    assert label_probabilities(words("no", "yes"), reply, 0) is None


def test_probabilities_are_in_the_predictions_where_the_server_gives_them(data_root, tmp_path):
    def answer(path, request):
        return with_logprobs(chat("positive"), ("positive", logs(positive=0.8, negative=0.2)))

    with serving(answer) as server:
        folder = run(server, tmp_path / "run", data=data_root)
    assert [line["probability_of_last_label"] for line in lines(folder)] == pytest.approx([0.8] * 12)
    assert lines(folder, "responses.jsonl")[0]["probabilities"] == pytest.approx([0.2, 0.8])


def test_a_table_without_labels_is_answered_into_a_table(tmp_path):
    (tmp_path / "new.csv").write_text('text\n"a warm film, fine"\ncaf\u00e9\n', encoding="utf-8")

    def answer(path, request):
        return with_logprobs(chat("positive"), ("positive", logs(positive=0.8, negative=0.2)))

    with serving(answer) as server:
        folder = run(server, tmp_path / "run", "--task", "MR", data=tmp_path / "new.csv")
    table = (folder / "predictions.csv").read_text(encoding="utf-8").splitlines()
    assert len(table) == 3 and table[2].startswith("caf\u00e9,positive,") and table[2].endswith(",0.200000,0.800000")


def test_a_checkpoint_s_own_answer_space_is_no_reason_to_refuse(model_folder, data_root, tmp_path):
    (tmp_path / "model" / "best").mkdir(parents=True)
    for path in model_folder.iterdir():
        (tmp_path / "model" / "best" / path.name).symlink_to(path)
    (tmp_path / "model" / "arguments.json").write_text(json.dumps({"task": "SST", "answer_space": "labels"}))
    with serving(lambda path, request: completion("positive")) as server:
        options = ("--from_local", "True")
        folder = run(server, tmp_path / "run", *options, data=data_root, model=str(tmp_path / "model" / "best"))
    assert summary(folder)["answer_space"] == "free"


def test_a_number_has_no_probabilities_and_the_parser_s_range(tmp_path):
    with serving(lambda path, request: chat("<Judgement>7.25</Judgement>")) as server:
        folder = run(server, tmp_path / "run", "--task", "STS-B")
    assert "logprobs" not in server.requests[0] and {line["label"] for line in lines(folder)} == {5.0}


# ------------------------------------------------------------------------------ a model folder here, a server there


def test_with_the_folder_here_the_server_continues_the_very_prompts(model_folder, data_root, tmp_path):
    with serving(lambda path, request: completion("positive</Judgement> and", "length")) as server:
        folder = run(server, tmp_path / "run", "--from_local", "True", data=data_root, model=str(model_folder))
    tokenizer, task = models.load_tokenizer(str(model_folder), True), tasks.get("SST")
    rows = loaders.load(task, "validation", data_root=data_root)
    texts = {tokenizer.decode(prompts.build(task, row, tokenizer)[0]) for row in rows}
    assert {request["prompt"] for request in server.requests} == texts
    assert {request["max_tokens"] for request in server.requests} == {16}
    assert {line["label"] for line in lines(folder)} == {"positive"} and {
        line["prompt"] for line in lines(folder)
    } == texts


def test_a_begin_token_is_not_sent_twice(model_folder, data_root, tmp_path, monkeypatch):
    load = models.load_tokenizer

    def with_begin(*arguments):
        tokenizer = load(*arguments)
        tokenizer.bos_token = "<|im_start|>"
        encode = tokenizer.__class__.__call__

        class Begins(tokenizer.__class__):
            def __call__(self, text, add_special_tokens=True, **more):
                found = encode(self, text, add_special_tokens=False, **more)
                if add_special_tokens:
                    one = isinstance(text, str)
                    ids = [found.input_ids] if one else found.input_ids
                    ids = [[self.bos_token_id, *row] for row in ids]
                    found["input_ids"] = ids[0] if one else ids
                return found

        tokenizer.__class__ = Begins
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", with_begin)
    with serving(lambda path, request: completion("positive")) as server:
        run(server, tmp_path / "run", "--from_local", "True", data=data_root, model=str(model_folder))
    assert all(request["prompt"].startswith(("user\n", "system\n")) for request in server.requests)


# ------------------------------------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """`transformers serve` with the embedded model: its folder, and the URL."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    folder, log = models.embedded_folder(), tmp_path_factory.mktemp("serve") / "log"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", folder, "--host", "127.0.0.1"]
    command += ["--port", port, "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        end = time.monotonic() + 300
        while not ready(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.2)  # it loads its model before it listens
        yield folder, f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("task", ["MR", "MNLI-m"])
def test_transformers_serve_gives_the_answers_that_free_mode_gives_here(served, task, tmp_path):
    folder, url = served
    options = ["--task", task, "--from_local", "True", "--train_model_name", str(folder), "--report_to", "none"]
    options += ["--eval_size", "12", "--answer_space", "free"] + (
        ["--data_path", str(FIXTURES)] if task != "MR" else []
    )
    inference.main([*options, "--output_dir", str(tmp_path / "here")])
    inference.main([*options, "--endpoint", url, "--output_dir", str(tmp_path / "there")])
    here, there = lines(tmp_path / "here"), lines(tmp_path / "there")
    assert [line["prompt"] for line in there] == [line["prompt"] for line in here]
    assert [line["label"] for line in there] == [line["label"] for line in here]
    # Here an answer ends with the token that completes it.
    assert all(far["answer"].startswith(near["answer"]) for near, far in zip(here, there, strict=True))
    assert summary(tmp_path / "there")["metrics"] == summary(tmp_path / "here")["metrics"]
    assert len({line["label"] for line in here} - {None}) > 1 or task != "MR"


@pytest.mark.slow
def test_transformers_serve_answers_a_chat(served, tmp_path):
    folder, url = served
    options = ["--task", "MR", "--endpoint", url, "--train_model_name", str(folder), "--report_to", "none"]
    inference.main([*options, "--eval_size", "4", "--output_dir", str(tmp_path / "run")])
    assert all(line["answer"] for line in lines(tmp_path / "run"))
    assert summary(tmp_path / "run")["tokens"]["input"] > 4 * 50


@pytest.mark.slow
def test_transformers_serve_refuses_a_model_that_it_was_not_started_with(served, tmp_path, capsys):
    options = ["--task", "MR", "--endpoint", served[1], "--train_model_name", "gpt-4o", "--report_to", "none"]
    with pytest.raises(SystemExit):
        inference.main([*options, "--output_dir", str(tmp_path / "run")])
    assert "requested 'gpt-4o'" in capsys.readouterr().err and not (tmp_path / "run").exists()
