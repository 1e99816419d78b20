"""Every attention kernel against the formula, those of FlashAttention by way of stand-ins, the choice among them by two ranks, and what `torch.compile` makes of it. On a GPU: the real ones, and their memory."""
import itertools
import os
import re
import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import on_ranks
from torch.nn.attention import SDPBackend, _registry, varlen

from nanochat.model import attention as A

CPU = torch.device("cpu")
CASES = [(T, n_kv_head, window) for T in (1, 127, 300) for n_kv_head in (4, 2, 1) for window in (None, 1, 100, 299)]


def inputs(T, n_kv_head, head_dim=16, device=CPU, dtype=torch.float32, rows=2):
    "Queries in 4 heads, keys and values in `n_kv_head`, and a gradient for the output."
    g = torch.Generator().manual_seed(T)
    return [torch.randn(rows, T, n, head_dim, generator=g).to(device, dtype) for n in (4, n_kv_head, n_kv_head, 4)]


def outcome(attend, q, k, v, grad=None, **kw):
    "The output, and with `grad` the gradients of queries, keys and values."
    q, k, v = (x.detach().clone().requires_grad_(grad is not None) for x in (q, k, v))
    out = attend(q, k, v, **kw)
    return [out] if grad is None else [out, *torch.autograd.grad((out * grad).sum(), (q, k, v))]


def assert_right(attend, T, n_kv_head, window, scale=0.4, tolerance=1e-5, backward=True, **where):
    "Fail unless a kernel gives what the formula gives."
    q, k, v, grad = inputs(T, n_kv_head, **where)
    got = outcome(attend, q, k, v, grad if backward else None, window=window, scale=scale)
    want = outcome(A.reference_attention, q.float(), k.float(), v.float(), grad.float() if backward else None, window=window, scale=scale)
    for a, b in zip(got, want):
        assert a.shape == b.shape and a.dtype == q.dtype
        error = ((a.float() - b).abs() / (1 + b.abs())).max().item()
        assert error < tolerance, (T, n_kv_head, window, error)


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    "No choice and no mask outlives its test."
    monkeypatch.setattr(A, "_chosen", {})
    monkeypatch.setattr(A, "_flex_masks", {})
    yield
    A._activate_flash(None)


# what runs on any machine

@pytest.mark.parametrize("name", ["sdpa_attention", "attention"])
def test_pytorchs_kernel(name):
    for case in CASES: assert_right(getattr(A, name), *case)


def test_flex_attention_forward():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore") # it is slow without compilation, and says so
        for case in ((127, 4, 1), (128, 2, 126), (300, 1, 100), (300, 2, 299)): assert_right(A._flex_attention, *case, backward=False)


def test_tiles_are_those_that_asking_about_every_pair_finds():
    from torch.nn.attention.flex_attention import create_block_mask
    for T, window in itertools.product((1, 100, 129, 256, 640, 1000), (1, 64, 126, 127, 128, 129, 254, 255, 256, 300, 511, 512, 999, 5000)):
        asked = create_block_mask(lambda b, h, i, j: (i - j >= 0) & (i - j <= window), None, None, T, T, device="cpu")
        counted = A._flex_mask(T, window, CPU)
        for got, want in zip(counted.as_tuple()[:-1], asked.as_tuple()[:-1], strict=True):
            if torch.is_tensor(want): assert got.dtype == want.dtype and torch.equal(got, want), (T, window)
            else: assert got == want, (T, window)
        i, j = torch.arange(T)[:, None], torch.arange(T)
        assert torch.equal(counted.mask_mod(0, 0, i, j), A._visible_keys(torch.arange(T), 0, T, window))


def test_a_long_row_needs_no_square():
    T = 1 << 17 # T×T booleans would be 17 GB
    mask = A._flex_mask(T, 512, CPU)
    assert sum(x.numel() for x in mask.as_tuple() if torch.is_tensor(x)) < T * T / 2000
    assert A._flex_mask(T, 512, CPU) is mask
    with torch.inference_mode(): kept = A._flex_mask(300, 20, CPU)
    assert not kept.kv_indices.is_inference() # training may come after an evaluation


# FlashAttention, by stand-ins with the arguments and the meaning that torch documents

def documented(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False,
               seqused_k=None, block_table=None, num_splits=None):
    "`torch.nn.attention.varlen.varlen_attn`, whose numbers of tokens to the left and right are -1 for all."
    left, right = window_size
    assert right == 0 and left >= 0 and cu_seq_q.dtype == torch.int32 and enable_gqa == (q.size(1) != k.size(1))
    starts = cu_seq_q.tolist()
    assert starts == cu_seq_k.tolist() and starts[0] == 0 and starts[-1] == len(q) == len(k) and max_q == max_k == starts[1]
    rows = [[x[a:b][None] for x in (q, k, v)] for a, b in itertools.pairwise(starts)]
    return torch.cat([A.reference_attention(*row, window=left, scale=scale) for row in rows], 1)[0]


def test_packed_rows_are_given_as_documented(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", documented)
    for T, n_kv_head, window in CASES:
        if window is not None: assert_right(A._varlen_attention, T, n_kv_head, window)
    assert_right(A._varlen_attention, 64, 2, 20, scale=None)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The candidates of CUDA, tried on the CPU, with a clock by which the first is the fastest. cuDNN and FlexAttention's gradients are missing there.

    The result says which implementations of FlashAttention are installed, and how many keys too many their windows have."""
    installed, candidates, clock = {None: 0}, A._candidates, itertools.count(1)
    def register(implementation):
        if implementation not in installed: raise ImportError(f"No module named {implementation!r}")
        return SimpleNamespace(remove=lambda: None)
    def varlen_attn(q, *a, window_size, **kw):
        if q.dtype not in (torch.float16, torch.bfloat16): raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        return documented(q, *a, window_size=(window_size[0] + installed[_registry.current_flash_attention_impl()], 0), **kw)
    for name in ("FA3", "FA4"): monkeypatch.setitem(_registry._FLASH_ATTENTION_IMPLS, name, lambda name=name: register(name))
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(A, "_candidates", lambda device_type: candidates("cuda"))
    monkeypatch.setattr(A, "_milliseconds", lambda *a: float(next(clock)))
    return installed


def test_flash_attention_comes_first_where_it_is_installed(on_a_gpu, capsys):
    on_a_gpu |= {"FA3": 0, "FA4": 0}
    assert A.choose_backends(CPU, torch.bfloat16, 32) == {"full": "FlashAttention-4", "window": "FlashAttention-4"}
    said = capsys.readouterr().out
    assert re.search(r"attention on cpu in bfloat16: FlashAttention-4 1\.00 ms \(FlashAttention-3 2\.00 ms, FlashAttention-2 3\.00 ms, SDPA 4\.00 ms\), "
                     r"windows by FlashAttention-4 5\.00 ms \(FlashAttention-3 6\.00 ms, FlashAttention-2 7\.00 ms, SDPA in chunks 8\.00 ms\)", said)
    assert said.count("\n") == 1 and "not usable: cuDNN (" in said and "FlexAttention (" in said
    assert _registry.current_flash_attention_impl() == "FA4"
    assert_right(A.attention, 200, 2, 30, dtype=torch.bfloat16, head_dim=32, tolerance=0.1)


@pytest.mark.parametrize("wrong", [1, -1])
def test_one_key_too_many_or_too_few_is_refused(on_a_gpu, capsys, wrong):
    "FlashAttention-4 is right and the fastest without a window; but only one version can be active, and that one has to serve both."
    on_a_gpu |= {"FA3": 0, "FA4": wrong}
    assert A.choose_backends(CPU, torch.bfloat16, 64) == {"full": "FlashAttention-3", "window": "FlashAttention-3"}
    assert re.search(r"FlashAttention-4 \(is off by \d", capsys.readouterr().out)
    assert _registry.current_flash_attention_impl() == "FA3"


def test_what_is_not_installed_or_wants_16_bits_is_passed_over(on_a_gpu, capsys):
    assert A.choose_backends(CPU, torch.bfloat16, 24) == {"full": "FlashAttention-2", "window": "FlashAttention-2"}
    assert re.search(r"FlashAttention-3 \([^)]*No module named 'FA3'", capsys.readouterr().out)
    assert A.choose_backends(CPU, torch.float32, 24) == {"full": "FlashAttention-2", "window": "SDPA in chunks"}
    assert "FlashAttention-2 (FlashAttention only support fp16" in capsys.readouterr().out


def test_a_later_choice_leaves_the_earlier_one_its_flash_attention(on_a_gpu, monkeypatch):
    on_a_gpu["FA3"] = 0
    assert A.choose_backends(CPU, torch.bfloat16, 32)["window"] == "FlashAttention-3"
    monkeypatch.setattr(A, "_candidates", lambda device_type: {"full": {"SDPA": A.sdpa_attention}, "window": {"FlashAttention-4": None, "SDPA in chunks": A.sdpa_attention}})
    assert A.choose_backends(CPU, torch.float32, 32) == {"full": "SDPA", "window": "SDPA in chunks"}
    assert _registry.current_flash_attention_impl() == "FA3"


def choose_as(folder):
    "In a group of two, with three kernels: rank 1 has other times, and one of the kernels does not work there."
    rank = int(os.environ["RANK"])
    times = ({"A": 1.0, "B": 2.0, "C": 3.0}, {"B": 9.0, "C": 1.0})[rank]
    def kernel(name):
        def attend(*inputs, **kw):
            if name not in times: raise ValueError("no memory is left")
            return A.sdpa_attention(*inputs, **kw)
        attend.name = name
        return attend
    A._candidates = lambda device_type: {"full": {name: kernel(name) for name in "ABC"}, "window": {"SDPA in chunks": A.sdpa_attention}}
    A._milliseconds = lambda attend, *a: times[attend.name]
    torch.distributed.init_process_group("gloo")
    if rank == 0: A.choose_backends(CPU, torch.float32, 16, alone=True) # does not wait for the other
    A.choose_backends(CPU, torch.float32, 8)
    (folder/f"chosen-{rank}").write_text(A._chosen["cpu", torch.float32, 8]["full"].name)
    torch.distributed.destroy_process_group()


def test_all_ranks_take_what_is_right_on_all_and_fastest_on_the_first(tmp_path):
    assert on_ranks(2, choose_as, tmp_path) == [0, 0]
    assert [(tmp_path/f"chosen-{rank}").read_text() for rank in range(2)] == ["B", "B"] # alone, they would take A and C


def test_the_fastest_is_taken_wherever_it_stands(monkeypatch, capsys):
    ms = {"A": 3.0, "B": 1.0, "C": 2.0}
    def kernel(name):
        def attend(q, k, v, *, window=None, scale=None): return A.sdpa_attention(q, k, v, window=window, scale=scale)
        attend.name = name
        return attend
    kernels = {name: kernel(name) for name in ms}
    monkeypatch.setattr(A, "_candidates", lambda device_type: {"full": kernels, "window": {"SDPA in chunks": A.sdpa_attention}})
    monkeypatch.setattr(A, "_milliseconds", lambda attend, *a: ms[attend.name])
    assert A.choose_backends(CPU, torch.float32, 8)["full"] == "B"
    assert capsys.readouterr().out == "attention on cpu in float32: B 1.00 ms (C 2.00 ms, A 3.00 ms), windows by SDPA in chunks\n"
    assert A._chosen[CPU.type, torch.float32, 8]["full"] is kernels["B"]


def test_nothing_that_works_is_an_error(monkeypatch):
    def broken(q, k, v, *, window=None, scale=None): raise ValueError
    monkeypatch.setattr(A, "_candidates", lambda device_type: {"full": {"Broken": broken}, "window": {}})
    with pytest.raises(RuntimeError, match=r"no full attention works on cpu in torch.float32 with heads of 8: Broken \(ValueError\)"): A.choose_backends(CPU, torch.float32, 8)


def test_choosing_touches_neither_random_state_nor_modes():
    before = torch.get_rng_state()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16): A.choose_backends(CPU, torch.float32, 8)
    assert torch.equal(before, torch.get_rng_state())
    assert 0 < A._milliseconds(A.sdpa_attention, torch.empty(1, 32, 1, 8), 4) < 1000


# inside of a compiled model

@pytest.fixture
def traced():
    "Compiles a function for a backend that only keeps the graphs."
    torch._dynamo.reset()
    graphs = []
    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward
    def make(f, **kw): return torch.compile(f, backend=keep, **kw), graphs
    yield make
    torch._dynamo.reset()


def test_chosen_before_it_is_one_graph(traced):
    def layers(q, k, v): return A.attention(A.attention(q.sin(), k, v), k, v, window=20, scale=0.5).cos()
    A.choose_backends(CPU, torch.float32, 16)
    compiled, graphs = traced(layers, fullgraph=True)
    q, k, v, grad = inputs(50, 2)
    for got, want in zip(outcome(compiled, q, k, v, grad), outcome(layers, q, k, v, grad)): torch.testing.assert_close(got, want)
    A.choose_backends(CPU, torch.float32, 8) # another choice, elsewhere
    outcome(compiled, q, k, v, grad)
    assert len(graphs) == 1


def test_chosen_too_late_it_still_works(traced, capsys):
    def layer(q, k, v): return A.attention(q.sin(), k, v, window=20).cos()
    compiled, graphs = traced(layer)
    q, k, v, grad = inputs(50, 2)
    for _ in range(2):
        for got, want in zip(outcome(compiled, q, k, v, grad), outcome(layer, q, k, v, grad)): torch.testing.assert_close(got, want)
    assert len(graphs) > 1 and capsys.readouterr().out.count("attention on cpu") <= 1


@pytest.mark.parametrize("kernel", ["FLASH_ATTENTION", "MATH"])
def test_the_kernel_asked_for_is_asked_for_in_the_graph(traced, kernel):
    before = torch.nn.attention._cur_sdpa_kernel_backends()
    attend = A._only(getattr(SDPBackend, kernel))
    compiled, graphs = traced(attend, fullgraph=True)
    q, k, v, _ = inputs(50, 2)
    torch.testing.assert_close(compiled(q, k, v), A.sdpa_attention(q, k, v))
    assert torch.nn.attention._cur_sdpa_kernel_backends() == before
    assert kernel in {node.args[0] for node in graphs[0].graph.nodes if node.target is torch.nn.attention._backend_from_string}


def test_flex_attention_takes_its_tiles_from_outside(traced):
    def layers(q, k, v): return A._flex_attention(A._flex_attention(q, k, v, window=20), k, v, window=20)
    q, k, v, _ = inputs(300, 2)
    A._flex_mask(300, 20, CPU)
    compiled, graphs = traced(layers, fullgraph=True)
    want = A.reference_attention(A.reference_attention(q, k, v, window=20), k, v, window=20)
    torch.testing.assert_close(compiled(q, k, v), want)
    A._flex_mask(300, 30, CPU) # another mask, elsewhere
    compiled(q, k, v)
    assert len(graphs) == 1
    assert not any("sort" in str(node.target) or "arange" in str(node.target) for node in graphs[0].graph.nodes)


def test_flex_attention_makes_its_tiles_if_it_must(traced):
    def layer(q, k, v): return A._flex_attention(q, k, v, window=20)
    q, k, v, _ = inputs(300, 2)
    compiled, _ = traced(layer)
    for _ in range(2): torch.testing.assert_close(compiled(q, k, v), A.reference_attention(q, k, v, window=20))


@torch._dynamo.config.patch(recompile_limit=4) # monkeypatch would leave the setting deleted
def test_many_shapes_do_not_end_compilation(monkeypatch):
    "Outside of a compiled model FlexAttention is compiled by itself, for more than torch's eight combinations of heads, batch and so on."
    import torch._dynamo
    compiled = torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled(f, backend="eager", **kw))
    A._compiled_flex.cache_clear()
    kernel = A._compiled_flex()
    for heads in range(1, 8):
        q = torch.randn(1, heads, 40, 8)
        out = kernel(q, q, q, block_mask=A._flex_mask(40, 5, CPU)).transpose(1, 2)
        torch.testing.assert_close(out, A.reference_attention(*[q.transpose(1, 2)] * 3, window=5))
    A._compiled_flex.cache_clear()
    torch._dynamo.reset()


# what only a GPU shows

def test_a_kernel_that_refuses_does_not_warn(recwarn):
    "torch warns of each reason for which a CUDA kernel cannot be used; one line of ours says it."
    def refuses(q, k, v, *, window=None, scale=None):
        warnings.warn("Flash attention has been runtime disabled.")
        raise RuntimeError("No available kernel.")
    right, failed = A._judge({"no": refuses, "SDPA": A.sdpa_attention}, torch.empty(1, 64, 1, 32), None)
    assert list(right) == ["SDPA"] and failed == {"no": "no (No available kernel.)"} and not recwarn.list


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
NAMES = {"full": ["FlashAttention-4", "FlashAttention-3", "FlashAttention-2", "cuDNN", "SDPA"],
         "window": ["FlashAttention-4", "FlashAttention-3", "FlashAttention-2", "FlexAttention", "SDPA in chunks"]}
ON_CUDA = [(kind, name) for kind in NAMES for name in NAMES[kind]]


def test_no_candidate_goes_untested():
    assert {kind: list(candidates) for kind, candidates in A._candidates("cuda").items()} == NAMES


def candidate(kind, name, head_dim=64):
    "A kernel of this GPU; where it does not work at all the test is skipped, with the reason."
    attend = A._candidates("cuda")[kind][name]
    try:
        if name in A._FLASH: A._activate_flash(A._FLASH[name])
        A._probe(attend, torch.empty(1, 1, 1, head_dim, device="cuda", dtype=torch.bfloat16), None if kind == "full" else 100)
    except ArithmeticError: raise
    except Exception as e: pytest.skip(f"{name} does not work here: {(str(e).strip().splitlines() or [type(e).__name__])[0]}")
    return attend


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kind, name", ON_CUDA)
def test_every_kernel_of_this_gpu(kind, name, head_dim):
    attend = candidate(kind, name, head_dim)
    for T, n_kv_head, window in itertools.product((128, 300, 1024), (4, 2), (None,) if kind == "full" else (1, 100, 513)):
        if window is None or window < T: assert_right(attend, T, n_kv_head, window, scale=1.5 / head_dim**0.5, tolerance=0.1, device="cuda", dtype=torch.bfloat16, head_dim=head_dim)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("name", NAMES["window"])
def test_a_window_takes_no_square_of_memory(name):
    attend, T = candidate("window", name), 8192
    q, k, v, grad = inputs(T, 2, head_dim=64, device="cuda", dtype=torch.bfloat16, rows=1)
    def peak():
        A._flex_masks.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outcome(attend, q, k, v, grad, window=512)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    peak() # compiles
    assert peak() < T * T # bytes: a mask of booleans, once. The scores of four heads would be eight times that.


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_choice_on_this_gpu_alone_and_in_a_compiled_model(dtype, capsys):
    device = torch.device("cuda")
    names = A.choose_backends(device, dtype, 64, T=512, window=128)
    said = capsys.readouterr().out
    assert re.search(rf"attention on cuda in \w+: {re.escape(names['full'])} \d+\.\d\d ms.*windows by {re.escape(names['window'])} \d+\.\d\d ms", said)
    def layers(q, k, v, window, scale): return A.attention(A.attention(q, k, v, scale=scale), k, v, window=window, scale=scale)
    def by_formula(q, k, v, window, scale): return A.reference_attention(A.reference_attention(q, k, v, scale=scale), k, v, window=window, scale=scale)
    q, k, v, grad = inputs(512, 2, head_dim=64, device="cuda", dtype=dtype)
    want = outcome(by_formula, q.float(), k.float(), v.float(), grad.float(), window=128, scale=0.2)
    for attend in (layers, torch.compile(layers)):
        for got, right in zip(outcome(attend, q, k, v, grad, window=128, scale=0.2), want):
            assert ((got.float() - right).abs() / (1 + right.abs())).max().item() < (0.1 if dtype == torch.bfloat16 else 1e-2)
