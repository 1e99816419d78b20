"""torch's launcher, once on this machine and once as if on two: ranks that die are started again, and the weights are those of an undisturbed run."""
import json
import re
import shlex
import socket
import subprocess

import pytest
import torch
from conftest import REPO, between_checkpoints, edit_config, family, kill_tree, start, wait_for
from safetensors.torch import load_file

from nanochat.train.checkpoint import latest_checkpoint
from nanochat.lab.stages import LAUNCHER_ENV

CELL = "from nanochat.core.run import Run; from nanochat.lab.stages import run_stage; run_stage(Run.open('smoke'), 'base')"
SHORT = {"steps": 40, "tokens": 40 * 2048, "eval_every": 10, "eval_tokens": 2048, "device_batch": 8}


def weights(run):
    "The final weights of pretraining."
    assert (run/"base"/"manifest.json").exists()
    return load_file(latest_checkpoint(run/"base"/"checkpoints")/"model.safetensors")


def same(ours, theirs):
    "Whether all tensors are the same, bit for bit."
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def ranks(process):
    "The ranks that a launcher has started, by their number."
    return {p.environ()["RANK"]: p for p in family(process) if "stage" in p.cmdline() and "torch.distributed.run" not in p.cmdline()}


def end(process, seconds):
    "Wait for a process, and leave nothing of it behind if it does not end. Returns its exit code."
    try: return process.wait(seconds)
    except subprocess.TimeoutExpired: kill_tree(process)


@pytest.fixture
def two(copy):
    "Makes copies of the smoke run that are ready to be pretrained on two ranks."
    def make(name):
        mine = copy("tokenizer", name)
        edit_config(mine.run, hardware={"nproc": 2}, base=SHORT)
        return mine
    return make


@pytest.fixture
def undisturbed(two, cache={}):
    "What pretraining on two ranks of `launch` gives; computed once."
    if not cache:
        mine = two("undisturbed")
        assert end(start(mine.base, "-c", CELL), 300) == 0, (mine.base/"output.txt").read_text()[-3000:]
        assert "died" not in (mine.base/"output.txt").read_text()
        cache.update(weights(mine.run))
    return cache


def test_a_rank_that_dies(two, undisturbed):
    mine = two("killed")
    process = start(mine.base, "-c", CELL)
    wait_for(lambda: between_checkpoints(mine.run, "base"), process)
    saved = int(latest_checkpoint(mine.run/"base"/"checkpoints").name.removeprefix("step_"))
    ranks(process)["0"].kill() # the one that writes
    assert end(process, 300) == 0, (mine.base/"output.txt").read_text()[-3000:]
    news = "a rank died: restarted from the last checkpoint, 1 of 3."
    assert f"base: {news}" in (mine.base/"output.txt").read_text()
    log = (mine.run/"base"/"ranks.log").read_text()
    assert log.count(news) == 1 and int(re.search(r"resuming from step (\d+) of 40", log)[1]) >= saved > 0
    assert same(weights(mine.run), undisturbed)


def documented_command(port):
    "The command for two machines of eight GPUs, as the notebook of the stages has it, for two launchers of one rank on this machine: (environment, arguments)."
    cells = json.loads((REPO/"nbs"/"lab"/"55_stages.ipynb").read_text())["cells"]
    export, command = re.search(r"```bash\n(export .*)\n(torchrun .*)\n```", "".join("".join(cell["source"]) for cell in cells)).groups()
    for theirs, ours in (("--nproc-per-node=8", "--nproc-per-node=1"), ("HOST:29500", f"127.0.0.1:{port}"), ("NAME", "smoke"),
                         ("torchrun", "-m torch.distributed.run")):
        assert command.count(theirs) == 1
        command = command.replace(theirs, ours)
    return dict(word.split("=") for word in shlex.split(export)[1:]), shlex.split(command)


def test_two_machines(two, undisturbed, monkeypatch):
    mine = two("machines")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    settings, command = documented_command(port)
    assert settings.pop("NANOCHAT_BASE_DIR") and settings == LAUNCHER_ENV
    for name, value in settings.items(): monkeypatch.setenv(name, value)
    launchers = [start(mine.base, *command) for _ in range(2)]
    said = lambda: (mine.base/"output.txt").read_text()
    try:
        wait_for(lambda: between_checkpoints(mine.run, "base"), launchers[0])
        numbers = [list(ranks(launcher)) for launcher in launchers]
        assert sorted(numbers) == [["0"], ["1"]]
        ranks(launchers[1])[numbers[1][0]].kill()
        assert [end(launcher, 300) for launcher in launchers] == [0, 0], said()[-3000:]
    finally:
        for launcher in launchers:
            if launcher.poll() is None: kill_tree(launcher)
    assert "resuming from step" in said()
    assert same(weights(mine.run), undisturbed)
