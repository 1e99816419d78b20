"""Two ranks on one processor, over gloo: the same losses as one rank, and nothing left running when they are stopped."""
import signal

import psutil
import pytest
from conftest import edit_config, family, nanochat, start, wait_for

from nanochat.core.run import STAGES, read_metrics
from nanochat.train.checkpoint import latest_checkpoint, load_checkpoint

TRAINED = ("base", "mid", "sft", "rl")
LONG = {"steps": 999, "tokens": 999 * 2048, "eval_every": 999, "device_batch": 8} # will not end by itself before it is stopped


def rows(run, stage):
    "A stage's metrics, one dictionary for each step."
    steps = {}
    for row in read_metrics(run/"metrics.jsonl", stage): steps.setdefault(row["step"], {}).update(row)
    return steps


def test_two_ranks_agree_with_one(smoke, copy):
    two = copy("tokenizer")
    done = nanochat(two.base, "speedrun", "--preset", "smoke", "--nproc", 2, "--until", "rl")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for stage in TRAINED: assert (two.run/stage/"manifest.json").exists()
    for stage in TRAINED: assert "starting 2 processes" in (two.run/"notebooks"/f"{STAGES[stage][0]}.ipynb").read_text()

    one, two = ({stage: rows(run, stage) for stage in TRAINED} for run in (smoke.run, two.run))
    for stage in ("base", "mid", "sft"):
        assert two[stage].keys() == one[stage].keys() # the same number of steps
        # sums are taken in another order, which is the only difference; it grows as training goes on
        # (fine-tuning begins with it, because its models were trained apart)
        for step, tolerance in ((1, 1e-3 if stage == "base" else 1e-2), (3, 5e-3 if stage == "base" else 2e-2), (max(one[stage]), 0.1)):
            assert two[stage][step]["loss"] == pytest.approx(one[stage][step]["loss"], rel=tolerance)
            assert two[stage][step]["targets"] == one[stage][step]["targets"] # the global batch
        last = max(one[stage])
        assert two[stage][last]["bits_per_byte"] == pytest.approx(one[stage][last]["bits_per_byte"], rel=0.05)
    assert two["rl"].keys() == one["rl"].keys()
    # a mean over 16 answers of 1 to 32 tokens, sampled from models that were trained apart
    assert two["rl"][1]["length"] == pytest.approx(one["rl"][1]["length"], abs=10)


def gone(processes, seconds=60):
    "Whether processes end within some time."
    return not psutil.wait_procs(processes, seconds)[1]


def training(run):
    "Whether pretraining has taken some steps."
    return len(read_metrics(run/"metrics.jsonl", "base")) > 5


CELL = "from nanochat.core.run import Run; from nanochat.lab.stages import run_stage; run_stage(Run.open('smoke'), 'base')"


def start_cell(run):
    "What a cell of the stage notebook does, in a process that can be signalled as a kernel is; returns it with all its ranks."
    edit_config(run.run, hardware={"nproc": 2}, base=LONG)
    process = start(run.base, "-c", CELL)
    wait_for(lambda: training(run.run), process)
    members = family(process)
    ranks = [p for p in members if "stage" in p.cmdline() and "torch.distributed.run" not in p.cmdline()]
    assert len(ranks) == 2
    return process, members


def saved_step(run):
    "The step of the latest checkpoint, after a look at the whole of it; it must be the last step that was taken."
    step = load_checkpoint(latest_checkpoint(run/"base"/"checkpoints"))[2]["step"]
    assert step == max(rows(run, "base"))
    return step


def test_interrupting_the_cell_stops_every_rank_and_saves(copy):
    mine = copy("tokenizer")
    process, members = start_cell(mine)
    process.send_signal(signal.SIGINT) # what Jupyter's stop button sends to the kernel
    process.wait(90)
    assert gone(members)
    assert "KeyboardInterrupt" in (mine.base/"output.txt").read_text()
    saved = saved_step(mine.run)
    assert not (mine.run/"base"/"manifest.json").exists()

    # the same cell goes on from there, on one process instead of two
    edit_config(mine.run, hardware={"nproc": 1}, base={"steps": saved + 3, "tokens": (saved + 3) * 2048, "eval_tokens": 2048})
    done = nanochat(mine.base, "stage", "base", "--run", "smoke")
    assert done.returncode == 0 and f"resuming from step {saved} of {saved + 3}" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("who", ["kernel", "launcher"])
def test_who_dies_takes_the_ranks_along(copy, who):
    mine = copy("tokenizer")
    process, members = start_cell(mine)
    launcher = next(p for p in members if "torch.distributed.run" in p.cmdline())
    (process if who == "kernel" else launcher).kill() # nothing is passed on: the ranks notice by themselves
    process.wait(90)
    assert gone(members)
    saved_step(mine.run)
    assert not (mine.run/"base"/"restarts.txt").exists()


def test_a_user_error_is_not_tried_again(copy):
    mine = copy("tokenizer")
    edit_config(mine.run, hardware={"nproc": 2}, base={"device_batch": 16}) # for two ranks twice as much as the batch has
    process = start(mine.base, "-c", CELL)
    process.wait(180)
    said, log = (mine.base/"output.txt").read_text(), (mine.run/"base"/"ranks.log").read_text()
    assert process.returncode == 1 and "UserError: batch_tokens=2048 is not a multiple of" in said.splitlines()[-1], said[-3000:]
    assert "nanochat: batch_tokens=2048 is not a multiple of" in log
    assert not (mine.run/"base"/"restarts.txt").exists() and "restarted" not in said + log


def test_sigterm_to_the_launcher_saves(copy):
    mine = copy("tokenizer")
    process, members = start_cell(mine)
    launcher = next(p for p in members if "torch.distributed.run" in p.cmdline())
    launcher.send_signal(signal.SIGTERM) # what a cluster sends before it takes the machine back
    process.wait(90)
    assert gone(members)
    saved_step(mine.run)
    said = (mine.base/"output.txt").read_text()
    assert "Stopped: stopped by SIGTERM after step" in said.splitlines()[-1], said[-3000:]
    assert not (mine.run/"base"/"error.txt").exists() # nothing has failed


def test_a_stage_that_the_driver_sees_stop_has_not_failed(copy):
    mine = copy("tokenizer")
    process = start(mine.base, "-m", "nanochat", "speedrun", "--preset", "smoke")
    wait_for(lambda: training(mine.run), process)
    kernel = next(p for p in family(process) if any("ipykernel" in word for word in p.cmdline()))
    kernel.send_signal(signal.SIGINT) # the stop button of a notebook
    assert process.wait(90) == 2
    said = (mine.base/"output.txt").read_text()
    assert "nanochat: stopped by Ctrl-C after step" in said and "Traceback" not in said, said[-3000:]
    assert not (mine.run/"base"/"error.txt").exists()
    saved_step(mine.run)


def test_ctrl_c_in_the_terminal_stops_every_rank(copy):
    mine = copy("tokenizer")
    process = start(mine.base, "-m", "nanochat", "speedrun", "--preset", "smoke", "--nproc", 2)
    wait_for(lambda: training(mine.run), process)
    members = family(process)
    assert len(members) >= 5 # driver, kernel, launcher, two ranks
    process.send_signal(signal.SIGINT)
    process.wait(90)
    assert process.returncode != 0 and gone(members)
    # whatever was saved is whole
    path = latest_checkpoint(mine.run/"base"/"checkpoints")
    if path: load_checkpoint(path)
