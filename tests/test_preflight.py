"""What a machine is asked before a run: the checks that the speedrun makes by itself, and preflight, which measures all else on the way to go or no-go."""
import json
import os
import resource
import subprocess
import sys

import pytest
import torch
from conftest import assert_user_error, environment, nanochat
from hub import Hub, hub_environment

from nanochat.core.run import Run
from nanochat.train.check import machine_checks
from nanochat.train.hardware import named_hardware
from nanochat.train.plan import make_plan

WEB = ("--preset", "smoke", "--data", "climbmix", "--set", "eval.core_questions=0", "--set", "eval.tasks=world")


@pytest.fixture(scope="module")
def plan():
    return make_plan("smoke", hardware=named_hardware("cpu"))


def levels(plan, run=None):
    "What the checks of a machine say: name → level."
    return {check.name: check.level for check in machine_checks(plan, run)}


def test_preflight_on_two_ranks(tmp_path):
    "All of it, with the accident: the second rank is killed, and both come back."
    done = nanochat(tmp_path, "preflight", "--preset", "smoke", "--nproc", 2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("go: ") and "exchange" in done.stdout

    result = json.loads((tmp_path/"runs"/"preflight.json").read_text())
    measured = result["measured"]
    assert result["go"] and result["reasons"] == [] and result["preset"] == "smoke"
    assert {check["name"]: check["level"] for check in result["checks"]} == dict.fromkeys(("disk", "memory", "open files"), "ok")
    assert measured["checkpoint_same"] and measured["decode_same"] and measured["restart_same"]
    assert len(measured["gemm_flops_of_each"]) == 2
    for name in ("gemm_flops", "memory_bandwidth", "exchange_seconds", "disk_rate", "step_seconds", "decode_step_seconds", "decode_graph_seconds", "start_seconds",
                 "sft_step_seconds", "rl_step_seconds", "eval_batch_seconds", "restart_seconds", "peak_memory"): assert measured[name] > 0, name
    rate = 2048 / measured["step_seconds"] # the plan is made again with it
    assert result["seconds"]["base"] == pytest.approx(60 * 2048 / rate, abs=25)
    assert "resuming from step 3 of 6" in (tmp_path/"runs"/"preflight.log").read_text()
    assert {path.name for path in (tmp_path/"runs").iterdir()} == {"preflight.json", "preflight.log", ".preflight.lock"} # its run is gone


def test_an_old_driver_is_named(tmp_path, monkeypatch):
    "On such a machine torch finds no GPU, and 'there is none here' would help nobody."
    program = tmp_path/"bin"/"nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\nfor i in 0 1 2 3 4 5 6 7; do echo $i, NVIDIA H100 80GB HBM3, 470.82.01, 81559 MiB, 4 MiB, 0; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "") # where there are GPUs: torch must not find them
    done = nanochat(tmp_path, "speedrun", "--preset", "speedrun")
    assert_user_error(done, "driver 470.82.01 is older" if torch.version.cuda else "built without CUDA")
    assert not (tmp_path/"runs").exists()


def test_a_hub_that_does_not_answer_ends_the_run_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert_user_error(nanochat(tmp_path, "speedrun", *WEB), "127.0.0.1:9", "HF_ENDPOINT")
    assert not (tmp_path/"runs").exists()


HUB = """
from nanochat.core import download as d
d.SOURCES["climbmix"] = d.Source("a test", "none", repo="someone/text", shards=5, shard_characters=400_000)
from nanochat.lab.preflight import _network_rate
from nanochat.train.check import hub_address, machine_checks
from nanochat.train.hardware import named_hardware
from nanochat.train.plan import make_plan
plan = make_plan("smoke", hardware=named_hardware("cpu"), data="climbmix")
print({check.name: check.level for check in machine_checks(plan)}["hub"], _network_rate(hub_address(plan.config)))
"""


def test_a_hub_that_answers(tmp_path):
    (tmp_path/"files").mkdir()
    (tmp_path/"files"/"shard_00000.parquet").write_bytes(bytes(20 << 20))
    hub = Hub(tmp_path/"files")
    try:
        env = environment(tmp_path) | hub_environment(hub.url, tmp_path)
        done = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True, timeout=120)
    finally: hub.close()
    level, rate = done.stdout.split()[-2:]
    assert level == "ok" and 1e6 < float(rate) < 1e11, done.stdout + done.stderr
    assert {method for method, *_ in hub.requests} == {"HEAD", "GET"}
    assert {first for method, *_, first in hub.requests if method == "GET"} >= {0, 8 << 20, 16 << 20} # in parts


def test_few_open_files(plan, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (300, 300))
    assert levels(plan) == {"disk": "ok", "memory": "ok", "open files": "failed"}


def test_a_finished_run_needs_nothing(plan, smoke, monkeypatch):
    "On a full disk and without a network, the same command says that all is done."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(smoke.base))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    assert levels(plan)["disk"] == "failed" and levels(plan, Run.open("smoke"))["disk"] == "ok"
