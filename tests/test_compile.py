"""What `torch.compile` makes of a model in training: one compilation for each kind of layer, the losses of the uncompiled model, what is kept for the backward pass, and gradients that ranks sum while backward runs."""
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import on_ranks
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from nanochat.core.files import rank_and_world
from nanochat.core.machine import distributed
from nanochat.model import attention
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optim import make_optimizer
from nanochat.model.precision import quantize_weights, use_fp8
from nanochat.model.shape import model_shape
from nanochat.train.loop import accumulate_gradients

LAYER_KINDS = 3 # SSSL with value embeddings in every second layer: short, short with them, full with them
TOKENS = torch.randint(64, (2, 49), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh():
    """Each test compiles anew."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_model(n_layer=12, n_embd=128):
    """A small model with every switch on, in which no gradient is small."""
    model = GPT(GPTConfig(sequence_len=256, vocab_size=64, n_layer=n_layer, n_head=2, n_kv_head=2, n_embd=n_embd)).train()
    with torch.no_grad(): # projections start at 0, which keeps the first gradients of most other parameters there
        for p in model.parameters(): p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    for dtype in (torch.float32, torch.bfloat16): # as `prepare_model` does: choosing inside a compiled model would cut its graph
        attention.choose_backends(torch.device("cpu"), dtype, n_embd // 2, T=256, window=128)
    return model


def compiler(backend="aot_eager"): return partial(torch.compile, dynamic=False, backend=backend)


def two_steps(model, dtype):
    """Losses and norms of two training steps of two micro-batches."""
    optimizer, seen = make_optimizer(model), []
    for _ in range(2):
        optimizer.zero_grad()
        batches = [(TOKENS[i:i + 1, :-1], TOKENS[i:i + 1, 1:]) for i in range(2)]
        with quantize_weights(model): loss, _ = accumulate_gradients(model, batches, dtype, optimizer)
        seen.append((loss.item(), optimizer.step().item()))
    return seen


@pytest.mark.parametrize("dtype, recompute", [(torch.float32, False), (torch.bfloat16, True)])
def test_layers_of_a_kind_share_one_compilation(dtype, recompute):
    counter = CompileCounterWithBackend("aot_eager")
    model = make_model()
    model.for_training(compiler(counter), recompute)
    found = two_steps(model, dtype)
    assert counter.frame_count == LAYER_KINDS + 2 # and the pieces before and after the layers
    assert not counters["graph_break"]
    torch.testing.assert_close(found, two_steps(make_model(), dtype), rtol=1e-6, atol=1e-6)


def gradients(model):
    model(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    return [p.grad for p in model.parameters()]


def test_recomputed_activations_give_the_same_gradients():
    model = make_model(n_layer=3)
    model.for_training(recompute=True)
    for a, b in zip(gradients(model), gradients(make_model(n_layer=3)), strict=True): assert torch.equal(a, b)


def test_evaluation_and_generation_are_not_compiled():
    model = make_model(n_layer=2)
    def refuse(*_): raise AssertionError("a piece for training was used")
    model.for_training(lambda piece: refuse)
    with torch.no_grad():
        assert model.eval()(TOKENS[:, :-1]).isfinite().all()
        assert model.train()(TOKENS[:, :9], kv_cache=model.new_cache(2, 9)).isfinite().all()
    with pytest.raises(AssertionError, match="for training"): model(TOKENS[:, :-1])


def fake_model(n_layer, fp8):
    """A model of depth 24's width with a few layers, of fake tensors, and tokens for it."""
    config = GPTConfig(**model_shape(24, 64, 128) | {"n_layer": n_layer})
    with torch.device("meta"): model = GPT(config)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None: module._parameters[name] = torch.nn.Parameter(torch.empty(p.shape))
        for name, b in module._buffers.items(): module._buffers[name] = torch.empty(b.shape, dtype=b.dtype)
    if fp8: use_fp8(model)
    return model.train(), torch.zeros((16, 2048), dtype=torch.int64)


def by_kernel(q, k, v, *, window=None, scale=None): # as a GPU attends: one operation, and no T×T scores
    return attention._sdpa(q, k, v, scale, is_causal=True)


@pytest.mark.parametrize("fp8, n_layer, kinds", [(False, 4, LAYER_KINDS), (True, 2, 2)], ids=["bf16", "fp8"])
def test_wide_layers_are_traced_once(monkeypatch, fp8, n_layer, kinds):
    monkeypatch.setitem(attention._chosen, ("cpu", torch.bfloat16, 128), {"full": by_kernel, "window": by_kernel})
    counter = CompileCounterWithBackend("aot_eager")
    with FakeTensorMode():
        model, tokens = fake_model(n_layer, fp8)
        model.for_training(compiler(counter))
        for _ in range(2):
            with quantize_weights(model), torch.autocast("cpu", dtype=torch.bfloat16): out = model.trunk(tokens)
            out.backward(torch.ones_like(out))
            for p in model.transformer.parameters(): assert p.grad.shape == p.shape
    assert counter.frame_count == kinds + 2 and not counters["graph_break"]


def kept_per_token(compiled, recompute=False):
    """What a layer keeps for each token until the backward pass, in bfloat16 vectors of its width."""
    def partitioned(graph, inputs): # the partitioner that `torch.compile` uses, without writing code
        from functorch.compile import make_boxed_func
        from torch._inductor.compile_fx import compile_fx
        return compile_fx(graph, inputs, inner_compile=lambda graph, inputs, **how: make_boxed_func(graph.forward))
    def kept(n_layer):
        storages = {}
        def keep(t):
            storages[t.untyped_storage()._cdata] = t
            return t
        model = make_model(n_layer)
        model.for_training(compiler(partitioned) if compiled else None, recompute)
        with saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", dtype=torch.bfloat16): model.trunk(TOKENS.repeat(8, 1))
        tokens = 8 * TOKENS.numel()
        sizes = [t.untyped_storage().nbytes() for t in storages.values() if tokens in (t.shape[:1].numel(), t.shape[:2].numel())]
        return sum(sizes) / tokens / (2 * 128)
    return (kept(9) - kept(5)) / 4 # both have the same kinds of layer in the same shares


def test_a_compiled_layer_keeps_no_more_than_an_uncompiled_one():
    uncompiled, compiled = kept_per_token(False), kept_per_token(True)
    assert 10 < uncompiled < 11.5, uncompiled
    assert compiled < uncompiled + 0.5, compiled # several more with both sides of ReLU² and of the norms
    assert 1 <= kept_per_token(True, recompute=True) < 1.1


def overlap(folder: Path):
    """On each rank: losses with and without a compiler, and the order of sums that begin and of gradients that arrive."""
    events = []
    def losses(compiled):
        model, seen = make_model(n_layer=6, n_embd=64), []
        if compiled: model.for_training(compiler())
        optimizer = make_optimizer(model)
        start = optimizer._start_reduce
        def record(group):
            events.append(("sum", group["names"]))
            return start(group)
        optimizer._start_reduce = record
        model.transformer.h[0].attn.c_q.weight.register_post_accumulate_grad_hook(lambda p: events.append(("first layer", None)))
        for _ in range(2):
            events.clear()
            optimizer.zero_grad()
            batch = [(TOKENS[rank_and_world()[0]][None, :-1], TOKENS[rank_and_world()[0]][None, 1:])]
            seen.append(accumulate_gradients(model, batch, torch.float32, optimizer)[0].item())
            optimizer.step()
        return seen
    found = {"plain": losses(False), "compiled": losses(True), "events": events}
    torch.save(found, folder/f"seen-{rank_and_world()[0]}")


def one_rank(folder: Path):
    """What each rank does."""
    with distributed(torch.device("cpu")): overlap(folder)


def test_ranks_sum_gradients_while_a_compiled_backward_runs(tmp_path):
    assert on_ranks(2, one_rank, tmp_path) == [0, 0]
    for rank in range(2):
        seen = torch.load(tmp_path/f"seen-{rank}")
        torch.testing.assert_close(seen["compiled"], seen["plain"], rtol=1e-6, atol=1e-6)
        kinds = [kind for kind, _ in seen["events"]]
        early = [name for _, names in seen["events"][:kinds.index("first layer")] for name in names]
        assert any("transformer.h.5." in name for name in early), early # a whole stack of the last layers' matrices
