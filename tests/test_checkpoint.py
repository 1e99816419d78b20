"""A process that is killed while it saves leaves whole checkpoints or none, wherever the kill falls."""
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train.checkpoint import _build_model, latest_checkpoint, load_checkpoint, save_checkpoint

SAVER = """
import itertools, sys, torch
from nanochat.train.checkpoint import CheckpointWriter
writer, weights = CheckpointWriter(), torch.empty(300_000)
for step in itertools.count(1):
    weights.fill_(step)
    writer.save(sys.argv[1], step, {"w": weights}, {"w/exp_avg": weights.clone()}, {"step": step})
    if step == 2:
        writer.wait()
        print("saving", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("trial", range(3))
def test_kill_at_any_moment(tmp_path, trial):
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"saving\n"
    time.sleep(random.Random(trial).uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()

    found = sorted(p for p in tmp_path.iterdir() if not p.name.startswith("."))
    assert len(found) >= 2 # the newest and the one before it, at every moment
    for path in found:
        weights, state, meta = load_checkpoint(path)
        assert path.name == f"step_{meta['step']:06d}"
        assert torch.equal(weights["w"], torch.full((300_000,), float(meta["step"]))) and torch.equal(weights["w"], state["w/exp_avg"])

    step = load_checkpoint(latest_checkpoint(tmp_path))[2]["step"] + 1
    save_checkpoint(tmp_path, step, weights, None, {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step_{step - 1:06d}", f"step_{step:06d}"] # leftovers are gone


def test_weights_of_a_checkpoint_are_not_made_first(monkeypatch, tmp_path):
    model = GPT(GPTConfig(sequence_len=32, vocab_size=64, n_layer=2, n_head=2, n_kv_head=2, n_embd=32), seed=3)
    state = model.state_dict()
    state["lm_head.weight"] = state["lm_head.weight"].bfloat16() # an imported model may be stored so
    def refuse(*_): raise AssertionError("weights were made that the checkpoint replaces")
    monkeypatch.setattr(GPT, "init_weights", refuse)
    built = _build_model(tmp_path, state, vars(model.config), "cpu")
    for name, p in built.named_parameters():
        assert p.requires_grad and p.dtype == torch.float32 and torch.equal(p, state[name].float()), name
        assert p.data_ptr() != state[name].data_ptr(), name
    assert torch.equal(built.rope_cos, model.rope_cos)
