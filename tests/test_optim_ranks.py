"""Two and three ranks end with the weights of one, hold a share of the state each, and take over each other's state."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanochat.common import distributed, rank_and_world
from nanochat.model import GPT, GPTConfig
from nanochat.optim import make_optimizer

STEPS, ROWS = 4, 6 # 6 rows divide among 1, 2 and 3 ranks


def train(folder: Path, start: int, stop: int, source: str | None) -> dict:
    """Train a tiny model from step `start` to `stop`; leave weights and state in `folder`; go on from `source` if given."""
    rank, world_size = rank_and_world()
    model = GPT(GPTConfig(sequence_len=32, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(0)
    with torch.no_grad(): # projections start at 0, which makes the scalars' first gradients rounding errors: AdamW would follow their signs
        for p in model.parameters(): p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    opt = make_optimizer(model)
    if source:
        model.load_state_dict(load_file(folder/f"{source}.model"))
        opt.load_full_state(load_file(folder/f"{source}.optim"))
    held = sum(t.numel() for g in opt.param_groups for t in g["shard"].values())
    norms = []
    for step in range(start, stop):
        tokens = torch.randint(64, (ROWS, 33), generator=torch.Generator().manual_seed(step))
        mine = tokens[rank * ROWS // world_size:(rank + 1) * ROWS // world_size]
        opt.zero_grad()
        model(mine[:, :-1], mine[:, 1:]).backward()
        norms.append(float(opt.step(momentum=0.9)))
    state = opt.full_state()
    assert bool(state) == (rank == 0)
    if rank == 0:
        name = f"{world_size}-{start}-{stop}-{source}"
        save_file(model.state_dict(), folder/f"{name}.model")
        save_file(state, folder/f"{name}.optim")
        torch.save({"held": held, "norms": norms}, folder/f"{name}.info")


def launch(world_size: int, folder: Path, start: int, stop: int, source: str | None = None) -> str:
    """Run `train` on some ranks; returns the name that it left its files under."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), __file__,
                    str(folder), str(start), str(stop), source or ""], check=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return f"{world_size}-{start}-{stop}-{source}"


def same(folder: Path, a: str, b: str):
    """Weights and state of two runs agree up to rounding."""
    for kind in ("model", "optim"):
        x, y = load_file(folder/f"{a}.{kind}"), load_file(folder/f"{b}.{kind}")
        assert set(x) == set(y)
        for name in x: torch.testing.assert_close(x[name], y[name], rtol=2e-3, atol=2e-5, msg=lambda m: f"{kind} {name}: {m}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder with the runs of a single process: steps 0 to 4, and 0 to 2."""
    folder = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(folder, 0, STEPS, None)
    train(folder, 0, 2, None)
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one(alone, world_size):
    name = launch(world_size, alone, 0, STEPS)
    same(alone, name, "1-0-4-None")
    one, many = torch.load(alone/"1-0-4-None.info"), torch.load(alone/f"{name}.info")
    torch.testing.assert_close(torch.tensor(one["norms"]), torch.tensor(many["norms"]), rtol=1e-4, atol=0)
    assert many["held"] < 1.2 * one["held"] / world_size # a share, and some padding


def test_state_moves_between_numbers_of_ranks(alone):
    two = launch(2, alone, 0, 2)
    train(alone, 2, STEPS, two)                         # from two ranks to one
    same(alone, f"1-2-4-{two}", "1-0-4-None")
    same(alone, launch(2, alone, 2, STEPS, "1-0-2-None"), "1-0-4-None") # and from one to two


if __name__ == "__main__":
    folder, start, stop, source = sys.argv[1:]
    with distributed(torch.device("cpu")): train(Path(folder), int(start), int(stop), source or None)
