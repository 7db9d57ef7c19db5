"""benchmarks/run.sh gpu: what it measures without a card, and what its table says of what went wrong."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import gpu, gpu_exactness, gpu_models
from engine.models import EMBEDDED, load_tokenizer

WRONG = dict(part="b", shape="tiny", format="float32", layout="packed", quantity="states", error=1.0, tolerance=1e-6)


@pytest.mark.slow
def test_it_runs_whole_on_a_cpu(tmp_path):
    command = [sys.executable, str(gpu.ROOT / "benchmarks" / "gpu.py"), "--shape", "tiny", "--output", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert "no CUDA device" in record["machine"]
    rows = {name: [row for row in record["rows"] if row["part"] == name] for name in gpu.TITLES}
    assert [row["failed"] for row in rows["a"] + rows["f"]] == [gpu.NO_CARD] * 2
    checked = {(row["format"], row["layout"], row["quantity"]): row["ok"] for row in rows["b"]}
    assert all(checked.values()) and len(checked) == 2 * (1 + 4 + 4 + 3)
    speed = {row["mode"]: row for row in rows["c"] if "mode" in row}
    assert list(speed) == ["expected", "sampled", "free", "CoT"]
    assert all(row["seconds_per_sample"] > 0 and row["operations_per_step"] > 0 for row in speed.values())
    assert {row["rows"] for row in speed.values()} == {"packed"}
    trl = [row for row in rows["d"] if row["program"].startswith("TRL")]
    assert len(trl) == 2 and all(row["response_tokens"] <= 16 for row in trl)
    assert [row["waits"] for row in rows["e"]] == [None] * 4
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert text in done.stdout and all(f"## {name}: {title}" in text for name, title in gpu.TITLES.items())


def test_without_a_card_only_the_tiny_shape_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "card", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2 and "there is no CUDA device here; --shape tiny" in capsys.readouterr().err


def test_a_part_that_is_ended_keeps_what_it_has_measured(tmp_path):
    row = json.dumps(dict(part="c", program="ours", shape="7B", mode="free", failed="OutOfMemoryError: CUDA"))
    program = tmp_path / "benchmarks" / "gpu_stuck.py"
    program.parent.mkdir()
    program.write_text(f"import signal\nprint('{row}', flush=True)\nsignal.pause()\n", encoding="utf-8")
    output, failed = gpu.run((str(program),), sys.executable, 2, tmp_path / "log")
    assert failed == "not done after 2 s"
    part = gpu.Part("c", "ppo.py, 7B", ("-m", "benchmarks.gpu_speed"), 2)
    assert gpu.rows_of(part, output) == [json.loads(row)]


def test_what_cannot_be_measured_says_why(tmp_path):
    part = gpu.Part("d", "scoring", ("-c", "raise SystemExit(3)"), 60, card=True)
    assert gpu.measure(part, 60, False, tmp_path / "log") == [
        {"part": "d", "program": "scoring", "failed": gpu.NO_CARD}
    ]
    (row,) = gpu.measure(part, 60, True, tmp_path / "log")
    assert row["failed"].startswith("exit code 3, see")
    (row,) = gpu.measure(part, 2, True, tmp_path / "log")
    assert row["failed"] == "skipped: the time was up"
    (row,) = gpu.measure(replace(part, environment=tmp_path / "no-env"), 60, True, tmp_path / "log")
    assert row["failed"].startswith("skipped: no-env is not there")


def test_the_table_shows_failures_and_the_exit_names_them():
    waits = dict(part="e", program="ours", shape="7B", mode="free", waits={"step": 20, "updates": 3})
    full = dict(part="c", program="ours", shape="7B", mode="CoT", failed="OutOfMemoryError: CUDA")
    fast = dict(part="c", program="ours", shape="7B", mode="free", seconds_per_sample=0.5, peak_memory_bytes=2 * 10**9)
    slow = dict(part="d", program="TRL 1.14.0 GRPO", shape="7B", mode="free", seconds_per_sample=4.0)
    without = dict(part="a", program="tests", failed=gpu.NO_CARD)
    rows = [without, {**WRONG, "ok": False}, full, fast, slow, waits]
    assert gpu.problems(rows) == [
        "c: OutOfMemoryError: CUDA",
        "b: float32, packed: states",
        "e: 7B, free: 3 waits within an update",
    ]
    text = gpu.document(dict(machine="a card", date="2000-01-01", seconds=1.0, rows=rows))
    assert "- ours, 7B, CoT: OutOfMemoryError: CUDA" in text and f"- tests: {gpu.NO_CARD}" in text
    assert "| tiny | float32 | packed | states | 1 | 1e-06 | NO |" in text
    assert "| TRL 1.14.0 GRPO | 7B | 4 | 8 | - | - | - |" in text
    assert "| 7B | free | 20 | 3 |" in text


def test_a_wrong_number_is_beyond_what_is_allowed():
    """A weight that is off by a thousandth is seen in float32, one that is off by a tenth in bfloat16."""
    tokenizer = load_tokenizer(EMBEDDED)
    for dtype in gpu_exactness.WIDER:
        model = gpu_exactness.adapted("tiny", dtype)
        exact = gpu_exactness.plain(copy.deepcopy(model).to(gpu_exactness.WIDER[dtype]))
        usual = gpu_exactness.plain(model)
        with torch.no_grad():
            model.get_base_model().model.layers[0].self_attn.v_proj.base_layer.weight.mul_(
                1.001 if dtype == torch.float32 else 1.1
            )
        found = gpu_exactness.by_engine(model, tokenizer, (True, None))
        for quantity in ("states", "log-probabilities", "gradients"):
            apart = gpu_exactness.distance(found, exact, quantity)
            assert apart > gpu_exactness.tolerance(usual, exact, quantity)


def test_the_shapes_have_the_sizes_of_their_names(monkeypatch):
    monkeypatch.setattr(gpu_models.models, "device", lambda: torch.device("meta"))
    sizes = {
        shape: round(sum(p.numel() for p in gpu_models.random_model(shape).parameters()) / 1e6)
        for shape in ("135M", "1.5B", "7B")
    }
    # The published models have 134,515,008, 1,543,714,304 and 7,615,616,512.
    assert sizes == {"135M": 135, "1.5B": 1544, "7B": 7616}
