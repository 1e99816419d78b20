"""One command from nothing to a model that talks, and each of its notebooks alone."""
import json
import re
import subprocess
import sys
import time

import nbformat
import torch
from conftest import REPO, contents, environment, nanochat, without_zmq
from safetensors.torch import load_file

from nanochat.core.run import STAGES, read_metrics
from nanochat.train.checkpoint import latest_checkpoint


def test_every_stage_is_done(smoke):
    for stage in STAGES: assert json.loads((smoke.run/stage/"manifest.json").read_text())["stage"] == stage
    for notebook in [notebook for notebook, _ in STAGES.values()] + ["8_chat"]:
        cells = nbformat.read(smoke.run/"notebooks"/f"{notebook}.ipynb", 4).cells
        assert any(cell.get("outputs") for cell in cells), f"{notebook} has no outputs"
        assert not [out for cell in cells for out in cell.get("outputs", []) if out.output_type == "error"], f"{notebook} holds an error"


def test_what_the_command_says(smoke):
    for words in ("parameters", "steps", "memory", "time", "3_pretrain: finished", f"report: {smoke.run/'report.html'}", "nanochat chat --run smoke"):
        assert words in smoke.done.stdout, words
    assert "\r" not in smoke.done.stdout and "\x1b" not in smoke.done.stdout # no bar and no colours where nobody sees them
    assert without_zmq(smoke.done.stderr) == ""


def test_answers_for_programs(copy):
    "JSON alone on stdout, whatever a command has to tell."
    base = copy("sft").base
    done = nanochat(base, "eval", "smoke", "--tasks", "sums", "--max-per-task", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["chat"]["tasks"]["sums"]["n"] == 2 and found["core"] is None and "stage sft" in done.stderr
    [run] = json.loads(nanochat(base, "runs", "--json").stdout)["runs"]
    assert (run["run"], run["preset"], run["next"], run["score"]["stage"]) == ("smoke", "smoke", "rl", "sft") and run["bytes"] > 1e6
    assert re.search(r"^smoke +rl +\w.* \(sft\) +\d+ MB", nanochat(base, "runs").stdout, re.M)


def test_it_learned(smoke):
    for stage in ("base", "mid", "sft"):
        curve = [row["bits_per_byte"] for row in read_metrics(smoke.run/"metrics.jsonl", stage) if "bits_per_byte" in row]
        assert curve[-1] < curve[0], (stage, curve)
    base = [row["bits_per_byte"] for row in read_metrics(smoke.run/"metrics.jsonl", "base") if "bits_per_byte" in row]
    assert base[0] > 3.5 and base[-1] < 2.3, base # an untrained model, and one that knows the commonest words
    for stage in ("mid", "sft", "rl"):
        tasks = json.loads((smoke.run/stage/"eval.json").read_text())["tasks"]
        assert {"identity", "facts", "sums"} <= set(tasks) and all(0 <= task["accuracy"] <= 1 and task["n"] > 0 for task in tasks.values())


def test_report(smoke):
    markdown, page = ((smoke.run/f"report.{kind}").read_text() for kind in ("md", "html"))
    for stage in ("data", "tokenizer", "base", "mid", "sft", "rl"): assert f"| {stage} | done |" in markdown
    final = [row["bits_per_byte"] for row in read_metrics(smoke.run/"metrics.jsonl", "base") if "bits_per_byte" in row][-1]
    for text in (markdown, page): assert f"bits per byte {final:.2f}" in text
    assert (smoke.run/"report_files"/"base.png").stat().st_size > 1000 and "report_files/base.png" in markdown
    assert page.count("<svg") >= 5 and "src=\"http" not in page and "<link" not in page # one file that needs nothing else


def test_chat_answers(smoke):
    done = nanochat(smoke.base, "chat", "-p", "Who are you?")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-2000:]
    assert nanochat(smoke.base, "chat", "-p", "Who are you?").stdout == done.stdout # the seed decides


def test_the_same_command_again_runs_nothing(smoke):
    before, started = contents(smoke.base), time.perf_counter()
    done = nanochat(smoke.base, "speedrun", "--preset", "smoke")
    assert time.perf_counter() - started < 15
    assert done.returncode == 0 and "3_pretrain: done" in done.stdout and "report.html" in done.stdout
    assert contents(smoke.base) == before


def papermill(base, notebook, out):
    "Execute a stage notebook with nothing but papermill."
    return subprocess.run([sys.executable, "-m", "papermill", str(REPO/"nbs"/"speedrun"/f"{notebook}.ipynb"), str(out), "-p", "preset", "smoke"],
                          env=environment(base), cwd=out.parent, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)


def test_a_notebook_by_papermill_alone(smoke, copy, tmp_path):
    mine, out = copy("tokenizer"), tmp_path/"out.ipynb"
    done = papermill(mine.base, "3_pretrain", out)
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = (load_file(latest_checkpoint(run/"base"/"checkpoints")/"model.safetensors") for run in (mine.run, smoke.run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_notebook_too_early_says_what_is_missing(copy, tmp_path):
    mine, out = copy("data"), tmp_path/"out.ipynb"
    before = contents(mine.base)
    done = papermill(mine.base, "3_pretrain", out)
    assert done.returncode != 0
    errors = [o for cell in nbformat.read(out, 4).cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert len(errors) == 1 and errors[0].ename == "UserError" and len(errors[0].traceback) == 1
    assert "run 2_tokenizer.ipynb first" in errors[0].evalue
    assert "run 2_tokenizer.ipynb first" in done.stderr + done.stdout
    assert contents(mine.base) == before
