"""One, two and four ranks have the same losses for a hundred steps, and a checkpoint of two goes on on one and on four."""
from pathlib import Path

import pytest
import torch
from conftest import on_ranks

from nanochat.core.files import rank_and_world
from nanochat.core.machine import distributed
from nanochat.core.world import World
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optim import (
    lr_multiplier, make_optimizer, muon_momentum, weight_decay_multiplier)
from nanochat.train.checkpoint import load_checkpoint, save_checkpoint
from nanochat.train.loop import accumulate_gradients

STEPS, HALF = 100, 50
ROWS, MICRO_BATCHES, T = 16, 2, 64 # in a step, over all ranks; on each rank; tokens in a row
TOLERANCE = 1e-5 # of a loss, relative: what is left is the order of fp32 sums, in a micro-batch and over ranks


def train(folder: Path, first: int, checkpoint: bool = False) -> torch.Tensor: # the losses of the steps from `first` on
    """Train from step 0, or from the checkpoint of step `first`, to the end; leave a checkpoint halfway if asked."""
    rank, world_size = rank_and_world()
    text = torch.tensor(list("\n".join(World(1).documents(0, 100)).encode()))
    model = GPT(GPTConfig(sequence_len=T, vocab_size=256, n_layer=3, n_head=2, n_kv_head=1, n_embd=32)) # all switches are on
    model.init_weights(1)
    # the rates of the laptop preset
    optimizer = make_optimizer(model, matrix_lr=0.01, embedding_lr=0.15, head_lr=0.004, scalar_lr=0.1, weight_decay=0.1)
    if first:
        weights, state, meta = load_checkpoint(folder/f"step_{first:06d}")
        model.load_state_dict(weights)
        optimizer.load_full_state(state)
        assert meta["step"] == first
    losses = []
    for step in range(first, STEPS):
        at = torch.randint(len(text) - T, (ROWS, 1), generator=torch.Generator().manual_seed(step))
        rows = text[at + torch.arange(T + 1)].view(world_size, MICRO_BATCHES, -1, T + 1)[rank]
        optimizer.zero_grad()
        loss, _ = accumulate_gradients(model, [(r[:, :-1], r[:, 1:]) for r in rows], optimizer=optimizer)
        optimizer.step(lr_multiplier(step, STEPS, 10, 0.5, 0.05), muon_momentum(step, STEPS, 0.5), weight_decay_multiplier(step, STEPS))
        losses.append(loss)
        if checkpoint and step + 1 == HALF:
            state = optimizer.full_state()
            if rank == 0: save_checkpoint(folder, HALF, model.state_dict(), state, {})
    return torch.stack(losses)


def one_rank(folder: Path, jobs):
    """What each process does: its jobs, and rank 0 keeps their losses."""
    with distributed(torch.device("cpu")): done = [train(folder, *job) for job in jobs]
    rank, world_size = rank_and_world()
    if rank == 0: torch.save(done, folder/f"losses-{world_size}")


def start(world_size: int, folder: Path, *jobs: tuple) -> list[torch.Tensor]: # the losses of each job
    """Do jobs, each the arguments of `train` after the folder, one after the other on some ranks."""
    assert on_ranks(world_size, one_rank, folder, jobs) == [0] * world_size
    return torch.load(folder/f"losses-{world_size}")


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict: # (ranks, first step): losses
    folder, threads = tmp_path_factory.mktemp("exact"), torch.get_num_threads()
    torch.set_num_threads(1)
    found = {(1, 0): train(folder, 0)}
    found[2, 0], = start(2, folder, (0, True))
    found[1, HALF] = train(folder, HALF)
    found[4, 0], found[4, HALF] = start(4, folder, (0,), (HALF,))
    torch.set_num_threads(threads)
    return found


def apart(a: torch.Tensor, b: torch.Tensor) -> float: # the largest relative difference
    return ((a.double() - b.double()).abs() / b.double()).max().item()


def test_the_model_learns(losses):
    assert losses[1, 0][:5].mean() > 5 and losses[1, 0][-5:].mean() < 2.7


@pytest.mark.parametrize("world_size", [2, 4])
def test_losses_do_not_depend_on_the_number_of_ranks(losses, world_size):
    assert len(losses[world_size, 0]) == STEPS
    assert apart(losses[world_size, 0], losses[1, 0]) < TOLERANCE


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_checkpoint_of_two_ranks_goes_on_on_others(losses, world_size):
    assert len(losses[world_size, HALF]) == STEPS - HALF
    assert apart(losses[world_size, HALF], losses[2, 0][HALF:]) < TOLERANCE
