"""`kill -9` in the middle of every stage, then the same command: it ends with the weights of the undisturbed run, bit for bit."""
import os
import signal

import pytest
import torch
from conftest import between_checkpoints, edit_config, kill_tree, nanochat, start, wait_for
from safetensors.torch import load_file

from nanochat.checkpoint import latest_checkpoint
from nanochat.common import read_metrics

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL")

BEFORE = {"base": "tokenizer", "mid": "base", "sft": "mid", "rl": "sft"}
EVAL_EVERY = {"base": 20, "mid": 8, "sft": 5, "rl": 4} # and so checkpoints; what lies between them is lost


def weights(run, stage):
    "A stage's final weights."
    return load_file(latest_checkpoint(run/stage/"checkpoints")/"model.safetensors")


def history(run, stage):
    "A stage's metrics, without what depends on the clock."
    return {(row["step"], key): value for row in read_metrics(run/"metrics.jsonl", stage) for key, value in row.items()
            if key in ("loss", "reward", "bits_per_byte", "heldout_accuracy", "world_score")}


def differing(ours, theirs):
    "Names of the tensors that are not the same, bit for bit."
    assert ours.keys() == theirs.keys()
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("stage", BEFORE)
def test_killed_stage(smoke, copy, stage):
    settings = {stage: {"eval_every": EVAL_EVERY[stage], "save_minutes": 60}}
    # the smoke run's model is so weak that RL moves no weight: at a lower temperature and with more tries, some answers are right
    if stage == "rl": settings["rl"] |= {"temperature": 0.5, "samples_per_prompt": 8, "steps": 10}
    mine = copy(BEFORE[stage])
    edit_config(mine.run, **settings)
    theirs = smoke
    if stage == "rl":
        theirs = copy("sft", "undisturbed")
        edit_config(theirs.run, **settings)
        assert nanochat(theirs.base, "stage", "rl", "--run", "smoke").returncode == 0
        assert differing(weights(theirs.run, "rl"), weights(theirs.run, "sft")), "RL has learned nothing, so this test would show nothing"

    process = start(mine.base, "-m", "nanochat.speedrun", "stage", stage, "--run", "smoke")
    wait_for(lambda: between_checkpoints(mine.run, stage), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (mine.run/stage/"manifest.json").exists()
    saved = int(latest_checkpoint(mine.run/stage/"checkpoints").name.split("_")[1])
    assert saved % EVAL_EVERY[stage] == 0

    done = nanochat(mine.base, "stage", stage, "--run", "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"going on from step {saved} of" in done.stdout
    assert differing(weights(mine.run, stage), weights(theirs.run, stage)) == []
    ours, other = history(mine.run, stage), history(theirs.run, stage)
    shared = ours.keys() & other.keys()
    assert {key for key in shared if key[1] in ("loss", "reward")} == {key for key in other if key[1] in ("loss", "reward")}
    assert {key: ours[key] for key in shared} == {key: other[key] for key in shared}


def test_killed_speedrun(smoke, copy):
    mine, command = copy("sft"), ("speedrun", "--preset", "smoke")
    process = start(mine.base, "-m", "nanochat.speedrun", *command)
    wait_for(lambda: between_checkpoints(mine.run, "rl"), process)
    kill_tree(process)
    assert not (mine.run/"rl"/"manifest.json").exists()
    done = nanochat(mine.base, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5_sft: done" in done.stdout and "6_rl: finished" in done.stdout
    assert "going on from step" in (mine.run/"notebooks"/"6_rl.ipynb").read_text()
    assert differing(weights(mine.run, "rl"), weights(smoke.run, "rl")) == []
    assert (mine.run/"report"/"manifest.json").exists()


def test_two_at_a_time_are_refused(copy):
    "A second command on a run that is being worked on says so, and the first one is not disturbed."
    mine = copy("tokenizer")
    process = start(mine.base, "-m", "nanochat.speedrun", "speedrun", "--preset", "smoke")
    try:
        wait_for(lambda: read_metrics(mine.run/"metrics.jsonl", "base"), process)
        done = nanochat(mine.base, "speedrun", "--preset", "smoke")
        assert done.returncode == 2 and "another process is working on run 'smoke'" in done.stderr
        assert process.poll() is None
    finally: kill_tree(process)
