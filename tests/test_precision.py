"""fp8's kernel agrees with its emulation, fp16 trains with a scaled loss, and the head's kernel compiles: most of it needs a GPU."""
import copy
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nanochat.model import gpt, loss, precision
from nanochat.model.precision import (
    LossScaler, apply_linears, fp8_linear, fp8_matmul, fp8_supported, quantize, quantize_weight,
    quantize_weights, use_fp8)
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.post.chat_eval import ROUNDING
from nanochat.lab.bench.engine import bench_engine

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture
def gpu():
    "A CUDA device."
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def fp8_gpu(gpu):
    "A CUDA device that multiplies in fp8."
    supported, why = fp8_supported(gpu)
    if not supported: pytest.skip(f"needs fp8: {why}")
    return gpu


def distance(a, b):
    "Relative error in the Frobenius norm, wherever the two are."
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return ((a - b).norm() / b.norm()).item()


def random(*shape, seed=0):
    "Numbers that are the same on all devices."
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(layer, x, weight, grad):
    "Output and both gradients of a linear layer."
    x, weight = x.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    y = layer(x, weight)
    y.backward(grad.to(y.dtype))
    return y, x.grad, weight.grad


class Linear(nn.Linear):
    "A layer that lets fp8 in, as the model's do."
    fp8 = None
    def forward(self, x): return self.fp8(x, self.weight) if self.fp8 is not None and self.training else F.linear(x, self.weight)


class Net(nn.Module):
    "Two large matrices where a `GPT` has its blocks, and a head."
    def __init__(self):
        super().__init__()
        self.transformer = nn.ModuleDict({"h": nn.ModuleList([Linear(128, 256, bias=False), Linear(256, 128, bias=False)])})
        self.lm_head = Linear(128, 16, bias=False)
        for i, p in enumerate(self.parameters()): p.data = random(*p.shape, seed=i) / p.size(1)**0.5

    def forward(self, x):
        up, down = self.transformer.h
        return self.lm_head(x + down(F.relu(up(x))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_engine_computes_in_its_dtype(dtype):
    "On a GPU without bfloat16 that is fp16, for which evaluation has a margin too."
    engine = bench_engine(GPT(GPTConfig(sequence_len=32, vocab_size=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)), dtype=dtype, exact=False)
    assert engine.weights().lm_head.weight.dtype == dtype and dtype in ROUNDING
    assert engine.prefill([[1, 2, 3]])[0].isfinite().all()


@pytest.mark.parametrize("a_dtype", [E4M3, E5M2])
def test_the_emulation_is_torchs_product(a_dtype):
    "torch has a slow fp8 product for CPUs too, where its library for matrices is built in."
    (a, scale_a), (b, scale_b) = quantize(random(32, 64), a_dtype), quantize(random(48, 64, seed=1), E4M3)
    try: want = torch._scaled_mm(a, b.t(), scale_a, scale_b, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError) as e: pytest.skip(f"this torch has none: {str(e)[:80]}")
    torch.testing.assert_close(fp8_matmul(a, b, scale_a, scale_b, torch.float32), want, rtol=1e-5, atol=1e-5)


def separately(x, layers):
    "What `apply_linears` computes, with an input that each layer quantises for itself."
    return [layer(x) for layer in layers]


def fp8_model(n_kv_head):
    "A model of two layers that trains in fp8, none of whose matrices is zero, and tokens for it."
    model = GPT(GPTConfig(sequence_len=64, vocab_size=64, n_layer=2, n_head=2, n_kv_head=n_kv_head, n_embd=128))
    for i, p in enumerate(model.parameters()):
        if p.ndim == 2: p.data += 0.02 * random(*p.shape, seed=i)
    return model, use_fp8(model), torch.randint(0, 64, (2, 64), generator=torch.Generator().manual_seed(0))


def counted_step(model, tokens, monkeypatch):
    "Quantised tensors forward and backward, by dtype; bytes of fp8 kept for the backward pass; loss and gradients."
    counts, kept = Counter(), {}
    def counting(x, dtype):
        counts[dtype] += 1
        return quantize(x, dtype)
    def keep(t):
        if t.dtype == E4M3: kept[t.data_ptr()] = t
        return t
    model.zero_grad()
    with quantize_weights(model), monkeypatch.context() as patched:
        patched.setattr(precision, "quantize", counting)
        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): value = model(tokens, tokens)
        forward = dict(counts)
        kept = sum(t.nbytes for t in kept.values())
        value.backward()
    backward = {dtype: n - forward.get(dtype, 0) for dtype, n in counts.items()}
    return forward, backward, kept, [value.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("n_kv_head, of_a_layer", [(2, 6), (1, 4)]) # one head of keys has 64 channels: too few for fp8
def test_a_layer_quantises_each_input_once(n_kv_head, of_a_layer, monkeypatch):
    "Queries, keys and values share one fp8 copy of their input; nothing is rounded differently for that."
    model, names, tokens = fp8_model(n_kv_head)
    assert len(names) == 2 * of_a_layer
    forward, backward, kept, found = counted_step(model, tokens, monkeypatch)
    assert forward == {E4M3: 2 * 4} and backward == {E4M3: 0, E5M2: 2 * of_a_layer} # inputs of attention, its projection and the two matrices of the MLP

    rows, width = tokens.numel(), 128
    weights = sum(p.numel() for name, p in model.transformer.h.named_parameters() if name.removesuffix(".weight") in names)
    assert kept == 2 * rows * (3 * width + 4 * width) + weights # one copy of each input, and the transposed weights

    monkeypatch.setattr(gpt, "apply_linears", separately)
    forward, backward, more, want = counted_step(model, tokens, monkeypatch)
    assert forward == {E4M3: 2 * of_a_layer} and more == kept + 2 * rows * width * (of_a_layer - 4)
    for a, b in zip(found, want): assert a.equal(b)


@pytest.mark.cuda
def test_a_shared_input_changes_no_number_on_a_gpu(fp8_gpu):
    layers = [Linear(256, n, bias=False).to(fp8_gpu) for n in (256, 128, 128)]
    x = random(4, 64, 256).to(fp8_gpu).requires_grad_()
    for layer in layers: layer.fp8 = precision._FP8Weight()
    found = []
    for apply in (apply_linears, separately):
        with torch.autocast("cuda", torch.bfloat16): outputs = apply(x, layers)
        grads = [random(*y.shape, seed=i).to(y) for i, y in enumerate(outputs)]
        found.append(outputs + list(torch.autograd.grad(outputs, [x, *(layer.weight for layer in layers)], grads)))
    for a, b in zip(*found): assert a.equal(b)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_quantising_is_the_same_everywhere(fp8_gpu, dtype):
    for x in (random(256, 512), random(256, 512).bfloat16(), 1e-9 * random(3, 7), torch.zeros(4, 4)):
        (here, scale_here), (there, scale_there) = quantize(x, dtype), quantize(x.to(fp8_gpu), dtype)
        torch.testing.assert_close(scale_there.cpu(), scale_here, rtol=1e-6, atol=0)
        assert (there.float().cpu() != here.float()).float().mean() < 1e-3 # a scale that differs in its last bit may tip what lies between two numbers


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(256, 512), (2, 100, 512), (3, 512), (1, 512)], ids=str) # also rows that are no multiple of 16
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_agrees_with_the_emulation(fp8_gpu, shape, dtype):
    x, weight, grad = random(*shape).to(dtype), 0.05 * random(128, 512, seed=1), (0.1 * random(*shape[:-1], 128, seed=2)).to(dtype)
    emulated = run(fp8_linear, x, weight, grad)
    computed = run(fp8_linear, x.to(fp8_gpu), weight.to(fp8_gpu), grad.to(fp8_gpu))
    for a, b in zip(computed, emulated):
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_cuda
        assert distance(a, b) < 1e-2 # bfloat16 rounds by up to 2^-9, fast accumulation by less than that
    exact = run(F.linear, x.float(), weight, grad.float())
    assert max(distance(a, b) for a, b in zip(computed, exact)) < 0.1


@pytest.mark.cuda
def test_autocast_and_layouts(fp8_gpu):
    x, weight, grad = (t.to(fp8_gpu) for t in (random(2, 64, 256), random(128, 256, seed=1), random(64, 2, 128, seed=2)))
    with torch.autocast(x.device.type, torch.bfloat16): y, grad_x, grad_weight = run(fp8_linear, x.transpose(0, 1), weight.t().contiguous().t(), grad[..., :1].expand(64, 2, 128))
    assert (y.dtype, grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    emulated = run(fp8_linear, x.transpose(0, 1).cpu(), weight.cpu(), grad[..., :1].expand(64, 2, 128).bfloat16().cpu())
    for a, b in zip((y, grad_x, grad_weight), emulated): assert distance(a, b) < 1e-2


@pytest.mark.cuda
def test_what_is_not_finite_stays_so(fp8_gpu):
    x, weight, grad = (t.to(fp8_gpu) for t in (random(32, 128), random(128, 128, seed=1), random(32, 128, seed=2)))
    for bad in (float("inf"), float("nan")):
        for i in range(3):
            tensors = [t.clone() for t in (x, weight, grad)]
            tensors[i][3, 5] = bad
            found = [t.isfinite().any().item() for t in run(fp8_linear, *tensors)]
            assert found == [i == 2, i == 0, i == 1] # each of the three products lacks one of the three tensors
    assert not any(t.any() for t in run(fp8_linear, torch.zeros_like(x), weight, torch.zeros_like(grad)))


@pytest.mark.cuda
def test_compiled(fp8_gpu):
    "One graph without a break, compiled once for all steps, and the numbers of the ordinary run."
    x, weight, grad = (t.to(fp8_gpu) for t in (random(64, 256).bfloat16(), random(128, 256, seed=1), random(64, 128, seed=2).bfloat16()))
    torch._dynamo.reset()
    compiled = torch.compile(fp8_linear, fullgraph=True)
    for a, b in zip(run(compiled, x, weight, grad), run(fp8_linear, x, weight, grad)): assert distance(a, b) < 2e-2

    net = Net().to(fp8_gpu)
    use_fp8(net)
    twin, losses = copy.deepcopy(net), []
    runner = torch.compile(twin, fullgraph=True)
    x = random(64, 128).to(fp8_gpu)
    for step in range(3):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            for model, forward in ((net, net), (twin, runner)):
                with quantize_weights(forward), torch.autocast(x.device.type, torch.bfloat16): loss = forward(x).float().square().mean()
                loss.backward()
                with torch.no_grad():
                    for p in model.parameters(): p.sub_(0.1 * p.grad)
                model.zero_grad()
                losses.append(loss.item())
    assert losses[::2] == pytest.approx(losses[1::2], rel=2e-2) and losses[-1] < losses[0]


@pytest.mark.cuda
def test_fp8_trains(fp8_gpu):
    nets, losses = [Net().to(fp8_gpu) for _ in range(2)], []
    assert use_fp8(nets[0]) == ["0", "1"]
    for net in nets:
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        for step in range(50):
            with quantize_weights(net):
                for micro in range(2):
                    x = random(64, 128, seed=2 * step + micro).to(fp8_gpu)
                    with torch.autocast(x.device.type, torch.bfloat16): loss = (net(x).float() - x[:, :16].sin()).square().mean()
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.cuda
def test_kept_weights_are_the_layers_own(fp8_gpu):
    "A quantised weight from outside gives exactly what the layer finds by itself."
    x, weight, grad = (t.to(fp8_gpu) for t in (random(32, 128), random(256, 128, seed=1), random(32, 256, seed=2)))
    kept = quantize_weight(weight)
    for a, b in zip(run(lambda x, w: fp8_linear(x, w, kept), x, weight, grad), run(fp8_linear, x, weight, grad)): assert a.equal(b)


def unscale(scaler, params):
    "Divide the gradients by the scale, and adapt the scale; may the step be taken?"
    grads = [p.grad for p in params if p.grad is not None]
    for grad in grads: grad /= scaler.scale
    return scaler.update(all(grad.isfinite().all().item() for grad in grads))


def fp16_steps(device, scaler, steps=30):
    "Train in fp16 on a loss that is far too small for it; returns the first and last loss, and whether a skipped step left all weights alone."
    net, untouched = Net().to(device), True
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, eps=1e-20)
    x = random(128, 128).to(device)
    losses, skipped = [], 0
    while len(losses) < steps + 1:
        with torch.autocast(device.type, torch.float16): y = net(x)
        loss = 1e-8 * (y.float() - x[:, :16].sin()).square().mean()
        optimizer.zero_grad()
        (loss * scaler.scale).backward()
        before = [p.detach().clone() for p in net.parameters()]
        if unscale(scaler, net.parameters()):
            optimizer.step()
            losses.append(loss.item())
        else:
            skipped += 1
            untouched &= all(a.equal(b) for a, b in zip(before, net.parameters()))
    return losses[0], losses[-1], skipped, untouched


@pytest.mark.cuda
def test_fp16_trains_with_a_scaled_loss(gpu):
    first, last, skipped, untouched = fp16_steps(gpu, LossScaler(start=2.0**60))
    assert 0 < skipped < 40 and untouched and last < 0.5 * first
    first, last, skipped, _ = fp16_steps(gpu, LossScaler(enabled=False))
    assert skipped == 0 and last > 0.9 * first # without scaling, hardly any gradient is left


ROWS, WIDTH, VOCAB = 4096, 1536, 32768 # of one chunk at depth 24


class Traffic(TorchDispatchMode):
    "Bytes that operations read and write, and the largest float32 tensor that any of them makes."
    def __init__(self):
        super().__init__()
        self.bytes, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        if function.is_view or name == "device" or name.startswith(("empty", "new_empty")): return out
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        results = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        read = {t.untyped_storage()._cdata: t for t in tensors} # a tensor that is also the result counts once here
        if name == "mm": read = {key: t for key, t in read.items() if all(t is not r for r in results)}
        self.bytes += sum(t.nbytes for t in [*read.values(), *results])
        self.largest = max([self.largest, *(t.numel() for t in results if t.dtype == torch.float32)])
        return out


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch knows no CUDA")
def test_the_head_moves_few_bytes(monkeypatch):
    "On tensors that only claim to be on a GPU: no float32 copy of the logits, and half of the traffic of the way with copies (4.9 GB)."
    traffic, launched = Traffic(), []
    class Kernel:
        def __getitem__(self, grid): return self.launch
        def launch(self, logits, *arguments, **options):
            launched.append((logits.dtype, tuple(logits.shape), options["HAS_GRAD"]))
            traffic.bytes += 3 * logits.nbytes # read twice, written once
    monkeypatch.setattr(loss, "_triton_kernel", Kernel)
    monkeypatch.setattr(loss, "_sums_in_float32", lambda device, dtype: True)
    with FakeTensorMode():
        def empty(*shape, dtype=torch.bfloat16): return torch.empty(shape, device="cuda", dtype=dtype)
        arguments = empty(ROWS, WIDTH), empty(VOCAB, WIDTH), empty(ROWS, dtype=torch.int64), 15.0, empty(ROWS, dtype=torch.float32)
        with traffic: _, grad_x, grad_weight = loss._walk(*arguments)
    assert launched == [(torch.bfloat16, (ROWS, VOCAB), True)]
    assert traffic.largest == VOCAB * WIDTH # the gradient of the weight
    assert (grad_x.dtype, grad_weight.dtype) == (torch.bfloat16, torch.float32)
    assert 2.2e9 < traffic.bytes < 2.5e9


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_heads_kernel_compiles(capability):
    "Down to machine code, without a GPU: it reads and writes 16 bytes at a time, and no register spills into memory."
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    signature = dict(logits="*bf16", targets="*i64", weights="*fp32", losses="*fp32", V="i32", softcap="fp32", HAS_GRAD="constexpr", BLOCK="constexpr")
    options = dict(loss._TRITON_OPTIONS)
    constants = {(6,): True, (7,): options.pop("BLOCK")}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}
    source = ASTSource(fn=loss._triton_kernel(), signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = compiled.asm["ptx"]
    assert "ld.global.v4" in code and "st.global.v4" in code
    assert compiled.metadata.shared < 1024 # bytes, for the sums across warps

    # the assembler's own account of the machine code
    tool = Path(triton.__file__).parent/"backends"/"nvidia"/"bin"/"cuobjdump"
    if not tool.is_file(): return # some builds of Triton come without it
    cubin = Path(compiled.metadata_group[f"{compiled.name}.cubin"])
    account = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    usage = dict(word.split(":", 1) for word in account.split() if word.startswith(("REG:", "STACK:")))
    assert int(usage["REG"]) <= 64 and int(usage["STACK"]) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_head_agrees_with_the_formula(gpu, dtype, reduction, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_LOGITS", 8 * 5000) # 64 rows at a time
    x, weight = random(300, 64).to(dtype), 0.3 * random(5000, 64, seed=1)
    targets = torch.randint(-1, 5000, (300,), generator=torch.Generator().manual_seed(0))
    def results(losses, device):
        leaves = [t.to(device).requires_grad_() for t in (x, weight)]
        total = losses(*leaves, targets.to(device), 15.0).sum()
        return [total, *torch.autograd.grad(total, leaves)]
    found = results(lambda *a: loss.head_loss(*a, reduction), gpu)
    for a, b in zip(found, results(loss.reference_head_loss, "cpu")): assert distance(a, b) < (1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.cuda
def test_the_weights_gradient_is_summed_in_float32(gpu):
    "bf16 would round this product to 1."
    if not loss._sums_in_float32(gpu, torch.bfloat16): pytest.skip("this torch has no such product")
    total = torch.full((16, 16), 2.0, device=gpu)
    a = torch.full((16, 32), 2.0**-14, device=gpu, dtype=torch.bfloat16)
    a[:, 0] = 1
    loss._add_product(total, a, torch.ones(32, 16, device=gpu, dtype=torch.bfloat16))
    assert (total == 3 + 31 * 2.0**-14).all()
