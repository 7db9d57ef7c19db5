"""scripts/results.sh: every run once, whatever happens in between."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def call(out: Path, *methods: str, **settings: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "RESULTS": str(out), "TASKS": "MR", "EVAL_SIZE": "4", **settings}
    return subprocess.run(
        ["bash", "scripts/results.sh", *methods], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580
    )


def test_what_is_done_is_skipped(tmp_path):
    first = call(tmp_path, "zero-shot")
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    summary = tmp_path / "MR" / "zero-shot-0" / "summary.json"
    written = summary.stat().st_mtime_ns
    second = call(tmp_path, "zero-shot")
    assert second.returncode == 0 and f"done: {summary.parent}" in second.stdout
    assert summary.stat().st_mtime_ns == written


def test_a_run_that_fails_is_counted_and_the_others_go_on(tmp_path):
    done = call(tmp_path, "zero-shot", TASKS="NoSuchTask MR")
    assert done.returncode == 1 and "1 runs failed" in done.stderr
    assert (tmp_path / "MR" / "zero-shot-0" / "summary.json").exists()


def test_an_unknown_method_is_refused(tmp_path):
    done = call(tmp_path, "PPPO")
    assert done.returncode == 2 and "no method PPPO" in done.stderr


def test_rows_are_part_of_a_methods_name(tmp_path):
    done = call(tmp_path, "SFT-8", "PPO-16")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name, rows in (("SFT-8", 8), ("PPO-16", 16)):
        summary = json.loads((tmp_path / "MR" / f"{name}-0" / "summary.json").read_text(encoding="utf-8"))
        assert summary["samples"] == rows


def test_calibrated_prompting_is_a_method_of_its_own(tmp_path):
    done = call(tmp_path, "zero-shot-batch", "8-shot-contextual")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name, kind in (("zero-shot-batch", "batch"), ("8-shot-contextual", "contextual")):
        summary = json.loads((tmp_path / "MR" / f"{name}-0" / "summary.json").read_text(encoding="utf-8"))
        assert summary["arguments"]["calibration"] == kind
