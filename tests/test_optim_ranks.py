"""Several ranks end with the weights of one, hold a share of the state each, take over each other's state, and send while backward runs."""
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import on_ranks
from safetensors.torch import load_file, save_file

from nanochat.core.files import rank_and_world
from nanochat.core.machine import distributed
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optim import make_optimizer
from nanochat.model import optim

STEPS, ROWS = 4, 6 # 6 rows divide among 1, 2 and 3 ranks


def make_model():
    """A tiny model with every switch on, in which no gradient is small."""
    model = GPT(GPTConfig(sequence_len=32, vocab_size=64, n_layer=3, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(0)
    with torch.no_grad(): # projections start at 0, which keeps the first gradients of most other parameters there
        for p in model.parameters(): p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


def loss_of(model, step):
    """The loss of this rank's rows."""
    rank, world_size = rank_and_world()
    tokens = torch.randint(64, (ROWS, 33), generator=torch.Generator().manual_seed(step))
    mine = tokens[rank * ROWS // world_size:(rank + 1) * ROWS // world_size]
    return model(mine[:, :-1], mine[:, 1:])


def train(folder: Path, start: str, stop: str, source: str):
    """Train a tiny model from step `start` to `stop`; leave weights and state in `folder`; go on from `source` if given."""
    rank, world_size = rank_and_world()
    model = make_model()
    opt = make_optimizer(model)
    if source:
        model.load_state_dict(load_file(folder/f"{source}.model"))
        opt.load_full_state(load_file(folder/f"{source}.optim"))
    held = sum(t.numel() for g in opt.param_groups for t in g["shard"].values())
    norms = []
    for step in range(int(start), int(stop)):
        opt.zero_grad()
        loss_of(model, step).backward()
        norms.append(float(opt.step(momentum=0.9)))
    state = opt.full_state()
    assert bool(state) == (rank == 0)
    if rank == 0:
        name = f"{world_size}-{start}-{stop}-{source}"
        save_file(model.state_dict(), folder/f"{name}.model")
        save_file(state, folder/f"{name}.optim")
        torch.save({"held": held, "norms": norms}, folder/f"{name}.info")


def everything(model, opt):
    """All weights and this rank's part of the state."""
    return [t.detach().clone() for t in (*model.parameters(), *(t for g in opt.param_groups for t in g["shard"].values()))]


def equal(a, b): return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


def two_steps(block, grad_scale=1.0, without=None, runner=lambda model: model, **settings):
    """What two steps of two micro-batches lead to; `block(opt)` goes around the last backward; one parameter may get no gradient on rank 1."""
    model = make_model()
    opt = make_optimizer(model)
    run, norms = runner(model), []
    unreached = [model.get_parameter(without)] if without and rank_and_world()[0] == 1 else []
    def forward(step):
        for p in unreached: p.requires_grad_(False)
        loss = grad_scale * loss_of(run, step)
        for p in unreached: p.requires_grad_(True)
        return loss
    for step in range(2):
        forward(2 * step).backward()
        loss = forward(2 * step + 1)
        with block(opt): loss.backward()
        dist.all_reduce(torch.ones(1)) # a loop averages its loss here: it must not meet a sum of gradients on another rank
        norms.append(opt.step(grad_scale=grad_scale, **settings))
        opt.zero_grad()
    return [torch.stack(norms), *everything(model, opt)]


class nothing:
    """A block that does nothing: the sums start in `step`."""
    def __init__(self, opt): pass
    def __enter__(self): pass
    def __exit__(self, *_): pass


def overlap(folder: Path):
    """On each rank, all that there is to see of sums that start during backward; the answers go to `folder`."""
    rank, seen = rank_and_world()[0], {}
    later = two_steps(nothing)
    seen["same bits"] = equal(two_steps(lambda opt: opt.overlap_backward()), later)

    compiled = two_steps(lambda opt: opt.overlap_backward(), runner=lambda model: torch.compile(model, backend="aot_eager"))
    seen["compiled"] = max(float((a - b).abs().max()) for a, b in zip(compiled, later))

    # how many groups are under way each time a gradient has come
    model = make_model()
    opt = make_optimizer(model)
    seen["groups"], seen["under way"] = len(opt.param_groups), []
    hooks = [p.register_post_accumulate_grad_hook(lambda _: seen["under way"].append(len(opt._started))) for p in model.parameters()]
    loss = loss_of(model, 0)
    with opt.overlap_backward():
        loss.backward()
        for hook in hooks: hook.remove()
        seen["at the end"] = len(opt._started)
        seen["gradients left"] = sum(p.grad is not None for p in model.parameters())

    # zero_grad forgets what is under way, and another backward after the block is noticed
    opt.zero_grad()
    seen["after zero_grad"] = len(opt._started)
    with opt.overlap_backward(): loss_of(model, 0).backward()
    loss_of(model, 1).backward()
    try: opt.step()
    except RuntimeError as e: seen["second backward"] = str(e)

    # a matrix of the last layer, whose group is among the first, gets no gradient on rank 1
    missing = dict(without="transformer.h.2.attn.c_q.weight")
    seen["no gradient"] = equal(two_steps(lambda opt: opt.overlap_backward(), **missing), two_steps(nothing, **missing))

    # gradients that are not finite on one rank
    seen["untouched"], seen["bad norms"], seen["goes on"] = [], [], []
    for block in (nothing, lambda opt: opt.overlap_backward()):
        model = make_model()
        opt = make_optimizer(model)
        before = everything(model, opt)
        for bad in (math.inf, math.nan):
            def spoil(p): p.grad[0] = bad if rank == 1 else 1.0
            hook = model.lm_head.weight.register_post_accumulate_grad_hook(spoil) # comes before the optimizer's
            with block(opt): loss_of(model, 0).backward()
            hook.remove()
            seen["bad norms"].append(float(opt.step(skip_nonfinite=True)))
            seen["untouched"].append(equal(before, everything(model, opt)) and opt.updates == 0)
            opt.zero_grad()
        with block(opt): loss_of(model, 0).backward()
        seen["goes on"].append(bool(opt.step(skip_nonfinite=True).isfinite()) and opt.updates == 1)
    seen["scaled"] = equal(two_steps(lambda opt: opt.overlap_backward(), grad_scale=1024.0, skip_nonfinite=True), later)
    torch.save(seen, folder/f"seen-{rank}")


def as_rank(function, *args):
    """What each rank does."""
    with distributed(torch.device("cpu")): function(*args)


def start(world_size: int, *job):
    """Run one of the functions above on some ranks."""
    assert on_ranks(world_size, as_rank, *job) == [0] * world_size


def launch(world_size: int, folder: Path, first: int, stop: int, source: str = "") -> str:
    """Run `train` on some ranks; returns the name that it left its files under."""
    start(world_size, train, folder, first, stop, source)
    return f"{world_size}-{first}-{stop}-{source}"


def same(folder: Path, a: str, b: str):
    """Weights and state of two runs agree up to rounding: all, but for a few weights whose decay hangs on a sign that hangs on rounding."""
    for kind in ("model", "optim"):
        x, y = load_file(folder/f"{a}.{kind}"), load_file(folder/f"{b}.{kind}")
        assert set(x) == set(y)
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=0, atol=0.01, msg=lambda m: f"{kind} {name}: {m}")
            far = ~x[name].isclose(y[name], rtol=2e-3, atol=2e-5)
            assert far.sum() <= far.numel() / 500, (kind, name, far.sum())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder with the runs of a single process: steps 0 to 4, and 0 to 2."""
    folder = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(folder, 0, STEPS, "")
    train(folder, 0, 2, "")
    yield folder
    torch.set_num_threads(threads)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_equal_one(alone, world_size):
    name = launch(world_size, alone, 0, STEPS)
    same(alone, name, "1-0-4-")
    one, many = torch.load(alone/"1-0-4-.info"), torch.load(alone/f"{name}.info")
    torch.testing.assert_close(torch.tensor(one["norms"]), torch.tensor(many["norms"]), rtol=1e-4, atol=0)
    assert many["held"] < 1.2 * one["held"] / world_size # a share, and some padding


def test_state_moves_between_numbers_of_ranks(alone):
    two = launch(2, alone, 0, 2)
    train(alone, 2, STEPS, two)                     # from two ranks to one
    same(alone, f"1-2-4-{two}", "1-0-4-")
    same(alone, launch(2, alone, 2, STEPS, "1-0-2-"), "1-0-4-") # and from one to two


def held(monkeypatch, model, world_size):
    """Bytes of optimizer state on one of some ranks."""
    monkeypatch.setattr(optim, "group_rank_and_world", lambda: (0, world_size))
    return sum(t.nbytes for g in make_optimizer(model).param_groups for t in g["shard"].values())


@pytest.mark.parametrize("depth", [12, 20, 32])
def test_state_is_divided(monkeypatch, depth):
    with torch.device("meta"): # shapes without memory
        model = GPT(GPTConfig(vocab_size=32768, n_layer=depth, n_embd=64 * depth, n_head=depth // 2, n_kv_head=depth // 2))
    one = held(monkeypatch, model, 1)
    assert 4 * sum(p.numel() for p in model.parameters()) < one < 8 * sum(p.numel() for p in model.parameters())
    for world_size in (2, 4, 8): assert 1 <= held(monkeypatch, model, world_size) * world_size / one < 1.1


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What both of two ranks saw."""
    folder = tmp_path_factory.mktemp("overlap")
    start(2, overlap, folder)
    return [torch.load(folder/f"seen-{rank}") for rank in range(2)]


def test_sums_start_while_backward_runs(seen):
    for mine in seen:
        under_way, groups = mine["under way"], mine["groups"]
        assert under_way == seen[0]["under way"]
        # (the test's hook comes before the optimizer's: with the last gradient, all groups but those that waited for it are on their way)
        assert under_way[1] >= 1 and under_way[len(under_way) // 2] >= groups // 4 and groups > under_way[-1] >= groups - 2
        assert mine["at the end"] == groups
        assert mine["gradients left"] == 0 # what is sent need not be kept


def test_it_makes_no_difference_when_sums_start(seen):
    for mine in seen:
        assert mine["same bits"] and mine["scaled"]
        assert mine["compiled"] < 1e-3, mine["compiled"]


def test_a_gradient_that_never_comes_blocks_nobody(seen):
    for mine in seen: assert mine["no gradient"]


def test_gradients_that_are_not_finite_change_nothing_on_any_rank(seen):
    for mine in seen:
        assert not any(math.isfinite(norm) for norm in mine["bad norms"])
        assert mine["untouched"] == [True] * 4 and mine["goes on"] == [True] * 2


def test_a_second_backward_is_noticed(seen):
    for mine in seen:
        assert mine["after zero_grad"] == 0
        assert "overlap_backward" in mine["second backward"]
