"""One of two ranks fails at each exchange of a training run: both are gone soon, one sentence says why, and nothing is tried again."""
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_loop import Rows

from nanochat.core.machine import distributed, on_every_rank
from nanochat.core.run import Run, read_metrics
from nanochat.lab import stages
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optim import make_optimizer
from nanochat.train.checkpoint import latest_checkpoint
from nanochat.train.loop import LoopSettings, all_reduce_sum, train

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals")

STEPS, SECONDS = 4, 60 # steps of a run; what two ranks may take to end
EXCHANGES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_gather_object", "broadcast")
ERRORS = {"OSError": OSError(5, "Input/output error"), "OutOfMemoryError": torch.OutOfMemoryError("CUDA out of memory."),
          "KeyboardInterrupt": KeyboardInterrupt(), "RuntimeError": RuntimeError("a bug"), "SIGKILL": None}
SENTENCES = {"OSError": "failed with OSError ([Errno 5] Input/output error)", "OutOfMemoryError": "ran out of GPU memory: lower base.device_batch",
             "KeyboardInterrupt": "was interrupted by Ctrl-C", "RuntimeError": "failed with RuntimeError (a bug)"}


def kind(function):
    "Name an exchange: the function, and who calls it."
    frame, names = sys._getframe(2), [function]
    while frame and len(names) < 4:
        if "/nanochat/" in frame.f_code.co_filename: names.append(frame.f_code.co_name)
        frame = frame.f_back
    return " < ".join(names)


def watch_exchanges(at):
    "Call `at` with the kind of each exchange, before it begins."
    for name in EXCHANGES:
        def exchange(*args, name=name, real=getattr(dist, name), **kw):
            at(kind(name))
            return real(*args, **kw)
        setattr(dist, name, exchange)


class Halves(Rows):
    "Each rank's rows in two micro-batches."
    def __init__(self):
        super().__init__()
        self.left = []
    def next_batch(self):
        if not self.left: self.left = list(zip(*(t.split(1) for t in super().next_batch())))
        return self.left.pop(0)


def tiny(folder, loader=Rows, hook=None, **how):
    "Train a tiny model as a rank of stage `base`."
    run = Run(folder, {})
    with stages.as_rank(run, "base"), distributed(torch.device("cpu")):
        model = GPT(GPTConfig(sequence_len=16, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
        model.init_weights(0)
        if hook: model.register_forward_pre_hook(hook)
        def evaluate():
            on_every_rank(lambda: None) # as `evaluate_task` does
            return {"bits_per_byte": float(all_reduce_sum(torch.ones(())))}
        settings = LoopSettings(STEPS, eval_every=2, checkpoints=run.stage_dir("base")/"checkpoints")
        train(model, make_optimizer(model), loader(), settings, schedule=lambda step: {}, evaluate=evaluate, metrics=lambda step: run.metrics("base", step), **how)


def fail(folder, rank, what, error):
    "A rank, of which number 1 fails at an exchange of the kind `what`."
    def at(found):
        if rank != 1 or found != what: return
        if error == "SIGKILL": os.kill(os.getpid(), signal.SIGKILL)
        if not (folder/"failed").exists():
            (folder/"failed").touch()
            raise ERRORS[error]
    watch_exchanges(at)
    tiny(folder)


def record(folder, rank):
    "An undisturbed rank, which writes down the kinds of exchanges."
    kinds = {}
    watch_exchanges(lambda found: kinds.setdefault(found))
    tiny(folder)
    (folder/f"kinds-{rank}.json").write_text(json.dumps(list(kinds)))


def stuck(folder, rank):
    "In step 3 rank 0 waits in C++ for what never comes, as in NCCL, and still writes the checkpoint of step 2; rank 1 fails."
    flush = os.fsync
    os.fsync = lambda fd: (time.sleep(1.5), flush(fd))
    def hook(*_, calls=[]):
        calls.append(1)
        if len(calls) < 3: return
        if rank == 1: raise ERRORS["OSError"]
        dist.distributed_c10d._get_default_store().wait(["what never comes"])
    tiny(folder, hook=hook)


def scarce(folder, rank, lasting):
    "The memory of rank 1 does not suffice in the first forward pass, or in any."
    def hook(*_, calls=[]):
        calls.append(1)
        if rank == 1 and (lasting or len(calls) == 1): raise ERRORS["OutOfMemoryError"]
    tiny(folder, hook=hook)


def halves(folder, rank): tiny(folder, Halves, grad_accum=2)


def play_launcher(folder, job, *args):
    "What `torch.distributed.run` does with two ranks, until it would restart them. Returns what has happened."
    folder.mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    signals, codes, ranks = [], {}, {}
    signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
    for rank in (0, 1):
        if not (pid := os.fork()): one_rank(folder, rank, port, job, *args)
        ranks[pid] = rank
    began = told = None
    while len(codes) < 2:
        for pid in ranks.keys() - codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended: codes[pid] = os.waitstatus_to_exitcode(status)
        if (signals or any(codes.values())) and not began:
            began, told = time.monotonic(), bool(signals)
            for pid in ranks.keys() - codes.keys(): os.kill(pid, signal.SIGTERM)
        if began and time.monotonic() - began > SECONDS:
            for pid in ranks.keys() - codes.keys(): os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return {"codes": [codes[pid] for pid in sorted(ranks, key=ranks.get)], "told": told, "seconds": time.monotonic() - began if began else 0}


def one_rank(folder, rank, port, job, *args):
    "The life of a forked rank."
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "TORCHELASTIC_RUN_ID": "x", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "3"}
    with open(folder/f"log-{rank}.txt", "w") as log:
        for stream in (1, 2): os.dup2(log.fileno(), stream)
    code = 1
    try:
        job(folder, rank, *args)
        code = 0
    except BaseException: traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr): stream.flush()
        os._exit(code)


def main(folder):
    "All that befalls two ranks; the results go into `results.json`."
    stages._GRACE = 4
    results = {"record": play_launcher(folder/"record", record)}
    kinds = json.loads((folder/"record"/"kinds-1.json").read_text())
    for i, what in enumerate(kinds):
        for error in ERRORS: results[f"{error} {i}"] = {"what": what, "error": error} | play_launcher(folder/f"{error} {i}", fail, what, error)
    results["stuck"] = play_launcher(folder/"stuck", stuck)
    results["scarce"] = play_launcher(folder/"scarce", scarce, False)
    results["too scarce"] = play_launcher(folder/"too scarce", scarce, True)
    results["halves"] = play_launcher(folder/"halves", halves)
    (folder/"results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    "What happened to two ranks in all cases: one process imports torch for all of them."
    folder = tmp_path_factory.mktemp("chaos")
    done = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads((folder/"results.json").read_text())


def sentences(folder):
    "What the ranks of a stage have left for the person."
    return [path.read_text() for name in ("error.txt", "stopped.txt") if (path := folder/"base"/name).exists()]


def test_undisturbed(ended):
    folder, results = ended
    assert results["record"]["codes"] == [0, 0] and sentences(folder/"record") == []
    ours, theirs = (json.loads((folder/"record"/f"kinds-{rank}.json").read_text()) for rank in (0, 1))
    assert ours == theirs and len(ours) >= 12 and {name.split(" < ")[0] for name in ours} == set(EXCHANGES)


def test_an_error_at_any_exchange_ends_both_ranks(ended):
    folder, results = ended
    seen = 0
    for case, found in results.items():
        if found.get("error") in (None, "SIGKILL") or found["codes"] == [0, 0]: continue
        seen += 1
        assert found["told"] and found["seconds"] < 30 and found["codes"][1] == 1 and found["codes"][0] in (1, -signal.SIGTERM), (case, found)
        said, = sentences(folder/case)
        assert said.startswith(f"rank 1 of stage base {SENTENCES[found['error']]}") and f"nanochat speedrun --run {case}" in said, (case, said)
    # a gradient's exchange is the only one that can be repeated, and only if memory was short
    assert [found["error"] for found in results.values() if "error" in found and found["codes"] == [0, 0]] == ["OutOfMemoryError"]
    assert seen >= 4 * 12 - 1


def test_a_rank_that_is_killed_leaves_no_sentence(ended):
    "So the launcher restarts both."
    folder, results = ended
    killed = {case: found for case, found in results.items() if found.get("error") == "SIGKILL"}
    assert len(killed) >= 12
    for case, found in killed.items():
        assert not found["told"] and found["codes"][1] == -signal.SIGKILL and found["seconds"] < 30 and sentences(folder/case) == [], (case, found)


def test_a_rank_that_waits_in_nccl_is_ended_when_it_has_saved(ended):
    folder, results = ended
    assert results["stuck"]["codes"] == [1, 1] and results["stuck"]["told"] and results["stuck"]["seconds"] < 30, results["stuck"]
    assert len(sentences(folder/"stuck")) == 1
    assert latest_checkpoint(folder/"stuck"/"base"/"checkpoints").name == "step_000002"


def test_too_little_memory_on_one_rank_halves_the_rows_of_all(ended):
    folder, results = ended
    assert results["scarce"]["codes"] == results["halves"]["codes"] == [0, 0]
    logs = [(folder/"scarce"/f"log-{rank}.txt").read_text() for rank in (0, 1)]
    assert logs[0].count("The memory does not suffice for 2 rows at a time. The step is repeated with 1, ") == 1 and "--set base.device_batch=1." in logs[0]
    assert "memory" not in logs[1]
    ours, theirs = ([row["loss"] for row in read_metrics(folder/case/"metrics.jsonl") if "loss" in row] for case in ("scarce", "halves"))
    assert len(ours) == STEPS and ours == theirs
    ours, theirs = (load_file(latest_checkpoint(folder/case/"base"/"checkpoints")/"model.safetensors") for case in ("scarce", "halves"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_no_memory_for_one_row(ended):
    folder, results = ended
    assert results["too scarce"]["told"] and results["too scarce"]["seconds"] < 30
    said, = sentences(folder/"too scarce")
    assert said.startswith("the memory does not suffice for training on one row of 16 tokens at a time: ")


def test_the_real_launcher_does_not_try_again(tmp_path):
    env = os.environ | stages.LAUNCHER_ENV
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3", __file__, tmp_path/"run", "real"],
                          capture_output=True, text=True, timeout=120, env=env)
    assert done.returncode and done.stderr.count("OSError: [Errno 5]") == 1, done.stderr[-3000:]
    said, = sentences(tmp_path/"run")
    assert said.startswith("rank 1 of stage base failed with OSError") and not (tmp_path/"run"/"base"/"restarts.txt").exists()


def test_a_gpu_gets_segments_that_can_grow():
    env = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}
    code = "import os, sys, nanochat; assert 'torch' not in sys.modules; print(os.environ['PYTORCH_ALLOC_CONF'])"
    def value(**more): return subprocess.run([sys.executable, "-c", code], env=env | more, check=True, capture_output=True, text=True).stdout.strip()
    assert (value(), value(PYTORCH_ALLOC_CONF="backend:native")) == ("expandable_segments:True", "backend:native")


if __name__ == "__main__":
    if sys.argv[2:] == ["real"]:
        rank = int(os.environ["RANK"])
        def hook(*_):
            if rank == 1: raise ERRORS["OSError"]
        tiny(Path(sys.argv[1]), hook=hook)
    else: main(Path(sys.argv[1]))
