"""The training loop among ranks, signals and trackers: a rank that dies, Ctrl-C in a terminal and in a kernel, a loss that is no number."""
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import on_ranks, start, wait_for
from safetensors.torch import load_file

from nanochat.core.files import UserError, rank_and_world, run_command
from nanochat.core.machine import distributed
from nanochat.core.run import TRACKERS, Run, read_metrics
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optim import make_optimizer
from nanochat.train.checkpoint import latest_checkpoint, load_checkpoint
from nanochat.train.loop import LoopSettings, train
from nanochat.lab.stages import LAUNCHER_ENV

STEPS, ROWS = 20, 4 # rows of a step, over all ranks

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")


class Rows:
    "Random rows: the n-th is the same on any number of ranks."
    def __init__(self): self.row = 0
    def state(self): return {"row": self.row}
    def load_state(self, state): self.row = state["row"]
    def next_batch(self):
        rank, world_size = rank_and_world()
        mine = range(self.row + rank * ROWS // world_size, self.row + (rank + 1) * ROWS // world_size)
        self.row += ROWS
        tokens = torch.stack([torch.randint(64, (17,), generator=torch.Generator().manual_seed(n)) for n in mine])
        return tokens[:, :-1], tokens[:, 1:]


def loop(run: Path, steps=STEPS, at=lambda step: None, harm=None, checkpoints="checkpoints"):
    "Train a tiny model, with a checkpoint every five steps; `at` happens in every step, `harm` to the loss of one."
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(0)
    calls = []
    model.register_forward_hook(lambda module, inputs, loss: (calls.append(1), loss * float("nan") if len(calls) == harm else loss)[1])
    def schedule(step):
        at(step + 1)
        return {}
    settings = LoopSettings(steps, eval_every=5, keep=9, checkpoints=run/"base"/checkpoints)
    return train(model, make_optimizer(model), Rows(), settings, schedule=schedule, metrics=lambda step: Run(run, {}).metrics("base", step))


def main(run: Path, what: str):
    "One rank, and what befalls it."
    rank, _ = rank_and_world()
    def die(step): # in its first life
        if step == 13 and f"rank {rank} dies" == what and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0": os.kill(os.getpid(), signal.SIGKILL)
    def doze(step): time.sleep(60 if what == "stuck" and step == 13 else 0.05)
    with distributed(torch.device("cpu")):
        if what == "slow": loop(run, 999, doze)
        elif what == "stuck": loop(run, at=doze)
        elif what == "nan": loop(run, harm=7 if rank == 1 else None)
        elif what == "another folder": loop(run, checkpoints="another" if rank == 1 else "checkpoints")
        else: loop(run, at=die)


def launch(run: Path, what="", *options):
    "Two ranks under `torch.distributed.run`, to their end."
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options, __file__, str(run), what],
                          capture_output=True, text=True, timeout=300, env=os.environ | LAUNCHER_ENV)


def one_rank(run: Path, what: str):
    "A rank that no launcher has started; what it says is added to files."
    for stream in (1, 2): os.dup2(os.open(f"{run}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    run_command(lambda: main(run, what))


def ranks(run: Path, what=""):
    "Two ranks without a launcher, to their end: an exit code that is not 0 if there is one, and what they said."
    code = max(map(abs, on_ranks(2, one_rank, run, what)))
    return subprocess.CompletedProcess([], code, Path(f"{run}.1").read_text(), Path(f"{run}.2").read_text())


def saved(run): return sorted(int(path.name[-6:]) for path in (run/"base"/"checkpoints").glob("step_*"))
def steps(run): return [row["step"] for row in read_metrics(run/"metrics.jsonl", "base")]


def same_end(run, other):
    "Whether two runs have ended with the same weights, bit for bit."
    a, b = (load_file(folder/"base"/"checkpoints"/f"step_{STEPS:06d}"/"model.safetensors") for folder in (run, other))
    return all(torch.equal(a[name], b[name]) for name in b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A run of two ranks that nothing has disturbed."
    run = tmp_path_factory.mktemp("loop")/"whole"
    done = ranks(run)
    assert done.returncode == 0, done.stderr[-3000:]
    assert saved(run) == [5, 10, 15, 20] and steps(run) == list(range(1, STEPS + 1))
    return run


def test_torchrun_restarts_from_the_last_checkpoint(whole, tmp_path):
    leftover = tmp_path/"run"/"base"/"checkpoints"/".step_000011.part"
    leftover.mkdir(parents=True) # of an even earlier end
    (leftover/"model.safetensors").write_bytes(b"half")
    done = launch(tmp_path/"run", "rank 1 dies", "--max-restarts=1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"resuming from step 10 of {STEPS}") == 1
    assert same_end(tmp_path/"run", whole) and steps(tmp_path/"run") == list(range(1, STEPS + 1))
    assert not leftover.exists()


@pytest.mark.parametrize("dead", [0, 1])
def test_nobody_waits_for_the_dead(tmp_path, dead):
    "Without a launcher that would end it, the other rank notices by itself."
    codes = on_ranks(2, one_rank, tmp_path/"run", f"rank {dead} dies")
    assert codes[dead] == -signal.SIGKILL and codes[1 - dead] not in (0, None)
    assert load_checkpoint(latest_checkpoint(tmp_path/"run"/"base"/"checkpoints"))[2]["step"] == 10


def test_rank_0_chooses_the_checkpoint(whole, tmp_path):
    "Another rank sees a newer one, which rank 0 does not know of yet."
    for name, there in (("checkpoints", (5, 10)), ("another", (5, 10, 15))):
        for step in there: shutil.copytree(whole/"base"/"checkpoints"/f"step_{step:06d}", tmp_path/"run"/"base"/name/f"step_{step:06d}")
    done = ranks(tmp_path/"run", "another folder")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"resuming from step 10 of {STEPS}" in done.stdout and same_end(tmp_path/"run", whole)


def test_a_rank_that_does_not_see_it_says_so(whole, tmp_path):
    shutil.copytree(whole/"base"/"checkpoints", tmp_path/"run"/"base"/"checkpoints")
    done = ranks(tmp_path/"run", "another folder")
    assert done.returncode and done.stderr.count("nanochat: not every rank sees") == 2 and "NANOCHAT_BASE_DIR" in done.stderr, done.stderr[-3000:]
    assert not steps(tmp_path/"run")


def test_no_number_on_one_rank_stops_both(tmp_path):
    done = ranks(tmp_path/"run", "nan")
    sentences = [line for line in done.stderr.splitlines() if line.startswith("nanochat: ")]
    assert done.returncode and len(sentences) == 2 and len(set(sentences)) == 1, done.stderr[-3000:]
    assert "the loss became nan at step 7, which read rows 24 to 27" in sentences[0] and f"last good checkpoint is {tmp_path/'run'/'base'/'checkpoints'/'step_000005'}" in sentences[0]
    assert saved(tmp_path/"run") == [5]


@pytest.mark.parametrize("ranks", [1, 2])
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, ranks):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if ranks == 2 else []
    process = start(tmp_path, *launcher, __file__, tmp_path/"run", "slow")
    wait_for(lambda: len(steps(tmp_path/"run")) > 6, process)
    process.send_signal(signal.SIGINT)
    code, output = process.wait(60), (tmp_path/"output.txt").read_text()
    last = max(steps(tmp_path/"run"))
    assert f"nanochat: stopped by Ctrl-C after step {last} of 999, which is saved: the same command or cell resumes there" in output, output[-3000:]
    assert saved(tmp_path/"run")[-1] == last and code == (2 if ranks == 1 else code != 0)


def test_a_second_ctrl_c_waits_for_nothing(tmp_path):
    process = start(tmp_path, __file__, tmp_path/"run", "stuck")
    wait_for(lambda: len(steps(tmp_path/"run")) == 12, process)
    time.sleep(0.5) # well inside step 13, which takes a minute
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "Ctrl-C again stops at once" in (tmp_path/"output.txt").read_text(), process, 10)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) and "KeyboardInterrupt" in (tmp_path/"output.txt").read_text()
    assert saved(tmp_path/"run") == [5, 10]


def test_the_stop_button_of_a_notebook(tmp_path):
    from jupyter_client import KernelManager
    run, cell = tmp_path/"run", "import test_loop; from pathlib import Path; result = test_loop.loop(Path({run!r}), {steps}, lambda step: test_loop.time.sleep(0.05))"
    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel(cwd=str(Path(__file__).parent))
    client = kernel.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        def reply(to): # what else arrives belongs to earlier requests
            while (message := client.get_shell_msg(timeout=60))["parent_header"]["msg_id"] != to: pass
            return message["content"]
        first = client.execute(cell.format(run=str(run), steps=999))
        until = time.monotonic() + 60
        while len(steps(run)) < 7 and time.monotonic() < until: time.sleep(0.01)
        kernel.interrupt_kernel() # what the button does
        stopped = reply(first)
        last = max(steps(run))
        assert (stopped["status"], stopped["ename"]) == ("error", "Stopped"), stopped
        assert stopped["evalue"].startswith(f"stopped by Ctrl-C after step {last} of 999, which is saved") and saved(run)[-1] == last
        again = reply(client.execute(cell.format(run=str(run), steps=last + 3))) # only its end is nearer
        assert again["status"] == "ok" and steps(run) == list(range(1, last + 4))
        assert reply(client.execute("1 / 0"))["ename"] == "ZeroDivisionError" # and the kernel is as before
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


TRACKED = """
import sys
from nanochat.core.run import Run
run = Run(sys.argv[1], {"seed": 1, "hardware": {"tracker": sys.argv[2]}})
log = run.metrics("base")
for step in range(1, 6): log.log(step, loss=6.0 - step)
run.metrics("base", 3).log(4, loss=0.5) # the stage was killed, and goes on from step 3
run.metrics("base", sys.maxsize).log(4, score=0.25) # what an evaluation adds when all is done
run.metrics("mid").log(1, loss=7.0)
"""


@pytest.mark.parametrize("tracker", TRACKERS)
def test_the_real_tracker(tmp_path, tracker):
    pytest.importorskip(tracker)
    env = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(tmp_path/"trackio"), "HF_HUB_OFFLINE": "1"}
    def python(*command): return subprocess.run([sys.executable, "-c", *command], env=env, check=True, capture_output=True, text=True, timeout=120).stdout
    python(TRACKED, str(tmp_path/"demo"), tracker)
    assert [(row["step"], row.get("loss")) for row in read_metrics(tmp_path/"demo"/"metrics.jsonl", "base")] == [(1, 5), (2, 4), (3, 3), (4, 0.5), (4, None)]
    if tracker == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        stages = {stage: EventAccumulator(str(tmp_path/"demo"/"tensorboard"/stage)).Reload() for stage in ("base", "mid")}
        assert [(event.step, event.value) for event in stages["base"].Scalars("base/loss")] == [(1, 5), (2, 4), (3, 3), (4, 0.5)]
        assert stages["base"].Scalars("base/score")[0].value == 0.25 and stages["mid"].Scalars("mid/loss")[0].value == 7
    if tracker == "wandb": # one run, begun once and taken up three times
        run_id = (tmp_path/"demo"/"wandb_id.txt").read_text()
        folders = list((tmp_path/"demo"/"wandb").glob("offline-run-*"))
        assert len(folders) == 4 and all(run_id in folder.name.split("-") for folder in folders)
    if tracker == "trackio":
        told = python("import trackio; print([(run.name, run.config['seed']) for run in trackio.Api().runs('nanochat')])")
        assert told.strip().endswith("[('demo', 1)]"), told


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_a_gpu_is_asked_for(tmp_path):
    "Losses wait on the device between looks, and memory is the device's."
    model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)).cuda()
    model.init_weights(0)
    class OnDevice(Rows):
        def next_batch(self): return tuple(t.cuda() for t in super().next_batch())
    calls = []
    model.register_forward_hook(lambda module, inputs, loss: (calls.append(1), loss * float("inf") if len(calls) == 12 else loss)[1])
    with pytest.raises(UserError, match="the loss became inf at step 12, which read rows 44 to 47"):
        train(model, make_optimizer(model), OnDevice(), LoopSettings(5000), schedule=lambda step: {}, metrics=Run(tmp_path/"run", {}).metrics("base"), peak_flops=1e12)
    row = read_metrics(tmp_path/"run"/"metrics.jsonl")[-1]
    assert row["step"] == 10 and row["mfu"] > 0 and 0 < row["memory_mb"] <= torch.cuda.max_memory_allocated() / 1e6


if __name__ == "__main__": run_command(lambda: main(Path(sys.argv[1]), sys.argv[2]))
