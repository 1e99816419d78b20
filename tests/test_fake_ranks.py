"""All ranks call the same collectives in the same order, in every stage.

A rank that calls one collective more than the others leaves them waiting. Here eight ranks are
imitated in one process, one after the other: each collective call is recorded, and returns at once.
"""
import copy
import shutil

import pytest
import torch.distributed as dist

from nanochat.core.run import Run
from nanochat.lab.stages import compute_stage
from nanochat.train.plan import make_plan

WORLD_SIZE = 8
FEW = { # settings that make each stage short, on more ranks than it has prompts or questions
    "base.steps": 4, "base.eval_every": 2, "base.batch_tokens": 2048, "base.eval_tokens": 2048,
    "data.characters": 200_000, "tokenizer.max_characters": 100_000, "hardware.nproc": WORLD_SIZE,
    "rl.steps": 2, "rl.eval_every": 1, "rl.eval_problems": 4, "eval.questions": 3,
    "eval.max_new_tokens": 8, "rl.max_new_tokens": 8, "eval.tasks": "sums,choice,identity"}
SMALL_MIXTURE = {"identity": 20, "sums": 40, "choice": 20}


class Done:
    "The handle of an operation that has finished."
    def wait(self): return True


class ImitatedRank:
    "Replaces the functions of `torch.distributed` by ones that record their calls."
    def __init__(self, rank: int, monkeypatch, others: list | None = None):
        self.rank, self.calls = rank, []
        self.sent = [] # what this rank has given to the others
        self.others = iter(others or []) # what another rank gave
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(WORLD_SIZE))
        replaced = {
            "is_initialized": lambda: True, "get_rank": lambda group=None: rank,
            "get_world_size": lambda group=None: WORLD_SIZE}
        for name in ("all_reduce", "broadcast", "barrier", "all_gather_object",
                     "broadcast_object_list", "reduce_scatter_tensor", "all_gather_into_tensor"):
            replaced[name] = self.recorded(name)
        for name, function in replaced.items(): monkeypatch.setattr(dist, name, function)

    def recorded(self, name: str):
        def call(*args, async_op=False, **kw):
            shapes = [(tuple(x.shape), str(x.dtype)) for x in args if hasattr(x, "shape")]
            self.calls.append((name, *shapes))
            getattr(self, name, lambda *args: None)(*args)
            return Done() if async_op else None
        return call

    # what a rank receives: its own part, and that of another rank, if there is one
    def exchanged(self, mine): # -> what the other rank gave in the same call
        self.sent.append(copy.deepcopy(mine))
        return next(self.others, None)

    def all_reduce(self, x, *args):
        theirs = self.exchanged(x)
        if theirs is not None: x.add_(theirs)

    def broadcast(self, x, *args):
        theirs = self.exchanged(x)
        if theirs is not None: x.copy_(theirs)

    def all_gather_object(self, parts, mine):
        parts[:] = [[] for _ in range(WORLD_SIZE)]
        parts[self.rank] = mine
        if theirs := self.exchanged(mine): parts[0] = theirs

    def reduce_scatter_tensor(self, out, given, *args):
        out.copy_(given.view(WORLD_SIZE, *out.shape)[self.rank])

    def all_gather_into_tensor(self, out, mine, *args):
        out.view(WORLD_SIZE, *mine.shape).copy_(mine)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A run with data and tokenizer."
    base = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        settings = FEW | {f"{stage}.mixture.{task}": SMALL_MIXTURE.get(task, 0)
                          for stage in ("mid", "sft")
                          for task in make_plan("smoke").config["mid"]["mixture"]}
        run = Run.create("ranks", make_plan("smoke", settings).config)
        for stage in ("data", "tokenizer"): compute_stage(run, stage)
    return base


def test_ranks_call_the_same_collectives(prepared, tmp_path, monkeypatch):
    before = prepared
    for stage in ("base", "mid", "sft", "rl"):
        ranks = {}
        for rank in (0, 7):
            folder = tmp_path/f"{stage}-{rank}"
            shutil.copytree(before, folder)
            with monkeypatch.context() as patch:
                patch.setenv("NANOCHAT_BASE_DIR", str(folder))
                ranks[rank] = ImitatedRank(rank, patch, ranks[0].sent if rank else None)
                compute_stage(Run.open("ranks"), stage)
        before = tmp_path/f"{stage}-0" # rank 0 has written what the next stage needs
        assert len(ranks[0].calls) > 10
        assert ranks[7].calls == ranks[0].calls, stage
