"""`kill -9` in the middle of every stage, then the same command: it ends with the weights of the undisturbed run, bit for bit."""
import multiprocessing
import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import between_checkpoints, edit_config, kill_tree, nanochat, start, wait_for
from safetensors.torch import load_file
from tqdm import tqdm

from nanochat.core.run import Run, read_metrics
from nanochat.train.checkpoint import latest_checkpoint
from nanochat.lab.stages import compute_stage

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGKILL")

BEFORE = {"mid": "base", "sft": "mid", "rl": "sft"} # pretraining has a test of its own
EVAL_EVERY = {"mid": 8, "sft": 5, "rl": 4} # and so checkpoints; what lies between them is lost


def weights(run, stage):
    "A stage's final weights."
    return load_file(latest_checkpoint(run/stage/"checkpoints")/"model.safetensors")


def snapshots(run, stage):
    "A stage's snapshots: what their files hold, by name."
    return {path.name: path.read_bytes() for path in (run/stage/"snapshots").iterdir()}


def history(run, stage):
    "A stage's metrics, without what depends on the clock."
    return {(row["step"], key): value for row in read_metrics(run/"metrics.jsonl", stage) for key, value in row.items()
            if key in ("loss", "reward", "bits_per_byte", "heldout_accuracy", "world_score")}


def saved_step(run, stage):
    "The step of a stage's latest checkpoint; 0 if there is none."
    path = latest_checkpoint(run/stage/"checkpoints")
    return int(path.name.split("_")[1]) if path else 0


def same_history(ours, theirs):
    "Whether each step's loss is the same in two histories, and everything else that both have."
    losses = lambda history: {key: value for key, value in history.items() if key[1] in ("loss", "reward")}
    shared = ours.keys() & theirs.keys()
    return losses(ours) == losses(theirs) and all(ours[key] == theirs[key] for key in shared)


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

    process = start(mine.base, "-m", "nanochat", "stage", stage, "--run", "smoke")
    wait_for(lambda: between_checkpoints(mine.run, stage), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (mine.run/stage/"manifest.json").exists()
    saved = saved_step(mine.run, stage)
    assert saved % EVAL_EVERY[stage] == 0

    done = nanochat(mine.base, "stage", stage, "--run", "smoke")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from step {saved} of" in done.stdout
    assert differing(weights(mine.run, stage), weights(theirs.run, stage)) == []
    assert snapshots(mine.run, stage) == snapshots(theirs.run, stage)
    assert same_history(history(mine.run, stage), history(theirs.run, stage))


def pretrain(base):
    "Pretraining in a process that is forked where torch has been imported already; what it prints is added to `base/output.txt`."
    tqdm.set_lock(threading.RLock()) # the usual lock is shared with other processes, which would learn that it is never given back
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    with open(base/"output.txt", "ab") as output:
        for stream in (1, 2): os.dup2(output.fileno(), stream)
    compute_stage(Run.open("smoke"), "base")


class Attempt:
    "One process that pretrains, and what can be seen of it from outside."
    def __init__(self, mine, processes):
        self.mine, self.saved_before, self.began = mine, saved_step(mine.run, "base"), time.time()
        self.output = mine.base/"output.txt"
        self.offset = self.output.stat().st_size if self.output.exists() else 0
        self.process = processes.Process(target=pretrain, args=(mine.base,), daemon=True)
        self.process.start()

    def poll(self): return self.process.exitcode

    def wait_for(self, condition): wait_for(condition, self, seconds=120)

    def rows(self): return [row for row in read_metrics(self.mine.run/"metrics.jsonl", "base") if row["time"] >= self.began]

    def reached(self, step): return any(row["step"] >= step for row in self.rows())

    def left(self, ending): return any((self.mine.run/"base"/"checkpoints").glob(f".step_*.{ending}"))

    def went_on_from(self): # None: from nowhere, or it did not come so far
        said = re.search(r"resuming from step (\d+) of 60", self.output.read_bytes()[self.offset:].decode())
        return said and int(said[1])

    def kill(self):
        "SIGKILL. Returns what the process was doing, as far as its traces tell."
        self.process.kill()
        self.process.join()
        if not self.rows(): return "starting"
        if self.left("part"): return "saving"
        if self.left("old"): return "removing an old checkpoint"
        last = self.rows()[-1]
        due = last["step"] % 4 == 0 and last["step"] == saved_step(self.mine.run, "base") and "bits_per_byte" not in last
        return "evaluating" if due else "training"


def test_killed_twenty_times(smoke, copy, monkeypatch):
    mine, dice = copy("tokenizer"), random.Random(20)
    edit_config(mine.run, base={"eval_every": 4, "save_minutes": 60}) # a checkpoint every 4 steps
    # a new process would import torch for two seconds; these are copies of one that has
    processes = multiprocessing.get_context("forkserver")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    processes.set_forkserver_preload(["nanochat.train.loop", __name__])

    aims = ["start"] * 3 + ["save"] * 7 + ["anywhere"] * 10
    dice.shuffle(aims)
    doing, saved = [], []
    for aim, step in zip(aims, sorted(dice.randrange(45) for _ in aims)):
        attempt = Attempt(mine, processes)
        if aim != "start": attempt.wait_for(lambda: attempt.reached(step))
        if aim == "save": attempt.wait_for(lambda: attempt.left("part"))
        time.sleep({"start": 0.3, "save": 0.03, "anywhere": 0.2}[aim] * dice.random() ** (3 if aim == "save" else 1))
        doing.append(attempt.kill())
        assert attempt.poll() == -signal.SIGKILL # it did not end by itself
        assert attempt.went_on_from() == (attempt.saved_before or None) or (doing[-1] == "starting" and attempt.went_on_from() is None)
        saved.append(saved_step(mine.run, "base"))
    # they did not all die at the same place, or nothing would be shown
    assert doing.count("saving") >= 2 and {"starting", "training"} <= set(doing), doing
    assert sorted(saved) == saved and len(set(saved)) >= 5, saved

    attempt = Attempt(mine, processes)
    attempt.process.join(120)
    assert attempt.poll() == 0 and attempt.went_on_from() == saved[-1]
    assert (mine.run/"base"/"manifest.json").exists() and not attempt.left("part") and not attempt.left("old")
    assert differing(weights(mine.run, "base"), weights(smoke.run, "base")) == []
    assert snapshots(mine.run, "base") == snapshots(smoke.run, "base") # what killed writers left is gone
    assert same_history(history(mine.run, "base"), history(smoke.run, "base"))


def test_killed_speedrun(smoke, copy):
    mine, command = copy("sft"), ("speedrun", "--preset", "smoke")
    process = start(mine.base, "-m", "nanochat", *command)
    wait_for(lambda: between_checkpoints(mine.run, "rl"), process)
    kill_tree(process)
    assert not (mine.run/"rl"/"manifest.json").exists()
    done = nanochat(mine.base, *command)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "5_sft: done" in done.stdout and "6_rl: finished" in done.stdout
    assert "resuming from step" in (mine.run/"notebooks"/"6_rl.ipynb").read_text()
    assert differing(weights(mine.run, "rl"), weights(smoke.run, "rl")) == []
    assert (mine.run/"report"/"manifest.json").exists()


def test_two_at_a_time_are_refused(copy):
    "A second command on a run that is being worked on says so, and the first one is not disturbed."
    mine = copy("tokenizer")
    process = start(mine.base, "-m", "nanochat", "speedrun", "--preset", "smoke")
    try:
        wait_for(lambda: read_metrics(mine.run/"metrics.jsonl", "base"), process)
        done = nanochat(mine.base, "speedrun", "--preset", "smoke")
        assert done.returncode == 2 and "another process is working on run 'smoke'" in done.stderr
        assert process.poll() is None
    finally: kill_tree(process)
