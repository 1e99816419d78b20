"""The moments of a run: every stage keeps its snapshots, the slider asks all of them, and the report says what was learned when."""
import html
import json

import pytest
import torch
from conftest import nanochat

from nanochat.core.run import TRAINED, Run
from nanochat.lab.report import Report
from nanochat.talk.moments import TimeSlider, ask_moments, moments, thinned
from nanochat.train.checkpoint import latest_checkpoint, load_checkpoint, load_snapshot, snapshot_steps


@pytest.fixture
def run(smoke, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(smoke.base))
    return Run.open("smoke")


def test_every_stage_keeps_its_snapshots(run):
    expected = [(stage, step) for stage in TRAINED for step in snapshot_steps(run.manifest(stage)["step"], 2, stage == "base")]
    assert [moment[:2] for moment in moments(run)] == expected and len(expected) == 9
    for stage in TRAINED: # the last one is the model that the stage ended with, rounded
        last = [moment for moment in moments(run) if moment.stage == stage][-1]
        weights, meta = load_snapshot(last.path)
        trained, _, about = load_checkpoint(latest_checkpoint(run.stage_dir(stage)/"checkpoints"))
        assert meta["step"] == about["step"] and meta["tokenizer"] == about["tokenizer"]
        assert trained.keys() == weights.keys() and all(torch.equal(weights[name], trained[name].bfloat16()) for name in trained)


def test_the_slider_shows_all_answers(run):
    question = "What is <b>your</b> name?"
    slider = TimeSlider(run, question)
    page = slider._repr_mimebundle_()["text/html"]
    asked = ask_moments(run, question)
    assert [row[:2] for row in asked] == [moment[:2] for moment in moments(run)] and slider.answers == [row[2] for row in asked]
    assert len(set(slider.answers)) > 2 and "<b>" not in page and "What is &lt;b&gt;your" in page
    for answer in slider.answers: assert html.escape(answer or "(nothing)") in page


def test_the_report_says_what_was_learned_when(run):
    learned = json.loads((run.dir/"report"/"learned.json").read_text())
    assert learned["moments"] == [[moment.stage, moment.step] for moment in thinned(moments(run))]
    assert {"facts", "sums"} <= learned["kinds"].keys()
    for kind in learned["kinds"].values(): assert len(kind["accuracy"]) == 9 and kind["n"] >= 3
    assert "## What was learned when" in (run.dir/"report.md").read_text()


def test_a_run_without_snapshots(copy, monkeypatch):
    mine = copy("tokenizer")
    done = nanochat(mine.base, "speedrun", "--preset", "smoke", "--set", "snapshots=0", "--until", "base")
    assert done.returncode == 0, done.stderr[-3000:] # another number of snapshots is not another run
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(mine.base))
    assert moments("smoke") == [] and "kept no snapshots" in repr(TimeSlider("smoke", "Who?"))
    assert "What was learned when" not in repr([getattr(block, "text", "") for block in Report("smoke").blocks])
