"""The preset `record` is the recipe of karpathy/nanochat's record: figures, schedules, and the losses of a hundred steps beside a second implementation."""
import math
import os
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat.model import optim
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optim import MuonVariant, make_optimizer
from nanochat.train.hardware import named_hardware
from nanochat.train.pretrain import _pretrain_schedule, optimizer_for
from nanochat.train.plan import make_plan

AT = [*range(40), *range(40, 5560, 92)] # a hundred of the record's 5,568 steps: the whole warm-up, and some of plateau and warm-down
RATES = {"matrix_lr": 0.02, "embedding_lr": 0.05, "head_lr": 0.004, "scalar_lr": 0.05, "weight_decay": 0.06} # for a small model
SHAPE = {"sequence_len": 160, "vocab_size": 192, "n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": 64} # a window is 128 of 160 tokens


def record(preset="record"): return make_plan(preset, hardware=named_hardware("8xH100")).config


# --- figures


def test_the_figures_of_the_record():
    config = record()
    base, hardware = config["base"], config["hardware"]
    P, P12 = 24 * 12 * 1536**2 + 1536 * 32768, 12 * 12 * 768**2 + 768 * 32768 # the gates of the value embeddings are left out
    assert base["batch_tokens"] == 2**20 == 2**round(19 + 0.383 * math.log2(P / P12))
    assert base["steps"] == 8 * P // 2**20 == 5568
    for name, rate in (("matrix", 0.02), ("embedding", 0.3), ("head", 0.008), ("scalar", 0.5)):
        assert base[f"{name}_lr"] == pytest.approx(rate * math.sqrt(2), rel=1e-3)
    assert base["weight_decay"] == pytest.approx(0.28 * math.sqrt(2) * P12 / P, rel=1e-3)
    assert (base["warmup_steps"], base["warmdown_ratio"], base["final_lr_frac"]) == (40, 0.65, 0.05)
    assert hardware["fp8"] and base["crop"] and config["data"]["characters"] > 7.3 * base["tokens"] # a token is 4.8 characters, a third is cropped
    assert config["mid"]["mixture"] == {"smoltalk": "1x", "mmlu": "3x", "gsm8k": "4x"} and config["mid"]["lr_scale"] == 0.8
    assert config["dial"]["until"] == "mid" and "muon_eq" not in base # added after the record


def test_the_figures_of_the_claim():
    config = record("pr830")
    base, model = config["base"], config["model"]
    assert (model["n_layer"], model["n_embd"], model["vocab_size"], base["warmdown_ratio"]) == (22, 1408, 49152, 0.85)
    assert base["steps"] == int(9.4 * (22 * 12 * 1408**2 + 11 * 11 * 12 + 1408 * 49152)) // 2**20
    assert base["muon_eq"] and base["muon_plus"] and base["optimizer"] == "nanochat"


def reference_schedule(step, steps=5568):
    """Factor of the learning rates, Muon's momentum, factor of its weight decay."""
    down = round(0.65 * steps)
    left = (steps - step) / down
    lr = (step + 1) / 40 if step < 40 else 1.0 if step <= steps - down else left + (1 - left) * 0.05
    momentum = 0.85 + 0.12 * step / 400 if step < 400 else 0.97 if left >= 1 else 0.90 + 0.07 * left
    return lr, momentum, 0.5 * (1 + math.cos(math.pi * step / steps))


def test_the_schedules_of_the_record():
    ours = _pretrain_schedule(record()["base"])
    for step in range(5568): assert tuple(ours(step).values()) == pytest.approx(reference_schedule(step), rel=1e-9), step


# --- a second implementation: one process, float32, a matrix at a time


def rms(x): return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotated(x): # (B, T, heads, d)
    """RoPE with base 100,000; the second half of the channels partners the first."""
    half = x.size(-1) // 2
    angle = torch.arange(x.size(1))[:, None] * 100_000.0 ** -(torch.arange(half) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None] # (T, 1, d / 2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def reference_loss(w, x, y, n_layer, n_head):
    """The mean cross-entropy; `w` holds the weights by name."""
    B, T = x.shape
    stream = rms(w["transformer.wte.weight"][x])
    gate = w["smear_lambda"] * torch.sigmoid(stream[:, 1:, :24] @ w["smear_gate.weight"].T)
    stream = first = torch.cat([stream[:, :1], stream[:, 1:] + gate * stream[:, :-1]], 1)
    back = torch.arange(T)[:, None] - torch.arange(T)
    for i in range(n_layer):
        def part(name, h): return h @ w[f"transformer.h.{i}.{name}.weight"].T
        stream = w["resid_lambdas"][i] * stream + w["x0_lambdas"][i] * first
        h = rms(stream)
        q, k, v = (part(f"attn.c_{name}", h).view(B, T, n_head, -1) for name in "qkv")
        if (n_layer - 1 - i) % 2 == 0: # value embeddings in every other layer, the last included
            share = 3 * torch.sigmoid(part("attn.ve_gate", h[..., :12]))
            v = v + share[..., None] * w[f"value_embeds.{i}.weight"][x].view_as(v)
        q, k = (1.2 * rms(rotated(z)) for z in (q, k))
        window = 128 if "SSSL"[i % 4] == "S" and i < n_layer - 1 else T
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.size(-1))
        weights = scores.masked_fill((back < 0) | (back > window), -math.inf).softmax(-1)
        stream = stream + part("attn.c_proj", torch.einsum("bhij,bjhd->bihd", weights, v).reshape(B, T, -1))
        stream = stream + part("mlp.c_proj", part("mlp.c_fc", rms(stream)).relu().square())
        if i == n_layer // 2: middle = stream
    logits = rms(stream - w["backout_lambda"] * middle) @ w["lm_head.weight"].T
    return F.cross_entropy((15 * torch.tanh(logits / 15)).flatten(0, 1), y.flatten())


POLAR = [(8.156554524902461, -22.48329292557795, 15.878769915207462), (4.042929935166739, -2.808917465908714, 0.5000178451051316),
         (3.8916678022926607, -2.772484153217685, 0.5060648178503393), (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
         (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)]


def muon_step(p, g, state, lr, momentum, decay, eq, plus):
    """Nesterov momentum, MuonEq, Polar Express, Muon+, NorMuon and cautious decay, for one matrix."""
    rows, cols = p.shape
    mean = state["mean"] = momentum * state.get("mean", 0) + (1 - momentum) * g
    X = (1 - momentum) * g + momentum * mean
    if eq: X = X * (X.norm() / rows**0.5) / X.norm(dim=1, keepdim=True).clamp_min(1e-6)
    X = X / (1.01 * X.norm() + 1e-6)
    if rows > cols: X = X.T
    for a, b, c in POLAR:
        A = X @ X.T
        X = a * X + (b * A + c * (A @ A)) @ X
    if rows > cols: X = X.T
    if plus: X = X * min(rows, cols)**0.5 / X.norm().clamp_min(1e-6)
    short = 1 if rows >= cols else 0
    second = state["second"] = 0.9 * state.get("second", 0) + 0.1 * X.square().mean(short, keepdim=True)
    even = X / second.clamp_min(1e-10).sqrt()
    X = even * (X.norm() / even.norm().clamp_min(1e-10))
    p -= lr * max(1, rows / cols)**0.5 * (X + decay * p * (X * p >= 0))


def adamw_step(p, g, state, step, lr, beta1, beta2, decay):
    """AdamW with ε = 1e-10."""
    first = state["first"] = beta1 * state.get("first", 0) + (1 - beta1) * g
    second = state["second"] = beta2 * state.get("second", 0) + (1 - beta2) * g.square()
    p *= 1 - lr * decay
    p -= lr * (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + 1e-10)


def adamw_rule(name, width): # learning rate, betas, weight decay
    """The record's rule for a parameter that is no matrix of a layer."""
    wide = (width / 768) ** -0.5
    if name.startswith("transformer.wte"): return RATES["embedding_lr"] * wide, 0.8, 0.995, 0.001
    if name.startswith("value_embeds"): return RATES["embedding_lr"] * wide / 2, 0.8, 0.995, 0.01
    if name.startswith("lm_head"): return RATES["head_lr"] * wide, 0.8, 0.96, 0.01
    if name == "resid_lambdas": return RATES["scalar_lr"] / 100, 0.8, 0.95, 0.05
    if name == "x0_lambdas": return RATES["scalar_lr"], 0.96, 0.95, 0.0
    return 0.2, 0.8, 0.95, 0.0 # smear and backout


def reference_losses(start, batches, eq, plus):
    w = {name: t.clone().requires_grad_() for name, t in start.items()}
    states, losses = {name: {} for name in w}, []
    for i, (at, (x, y)) in enumerate(zip(AT, batches)):
        loss = reference_loss(w, x, y, SHAPE["n_layer"], SHAPE["n_head"])
        grads = dict(zip(w, torch.autograd.grad(loss, list(w.values()))))
        losses.append(loss.item())
        lr, momentum, decay = reference_schedule(at)
        with torch.no_grad():
            for name, p in w.items():
                if name.startswith("transformer.h."):
                    muon_step(p, grads[name], states[name], RATES["matrix_lr"] * lr, momentum, RATES["weight_decay"] * decay, eq, plus)
                else:
                    rate, *rule = adamw_rule(name, SHAPE["n_embd"])
                    adamw_step(p, grads[name], states[name], i + 1, rate * lr, *rule)
    return losses


# --- the same losses


@pytest.fixture(scope="module")
def start():
    """Weights that no gradient leaves at 0: fresh projections are 0, and then the first gradients of most scalars are rounding errors."""
    model = GPT(GPTConfig(**SHAPE))
    model.init_weights(1)
    g = torch.Generator().manual_seed(2)
    return {name: t + 0.02 * torch.randn(t.shape, generator=g) for name, t in model.state_dict().items()}


@pytest.fixture(scope="module")
def batches():
    """Rows of a random walk over the vocabulary, which can be learned in part."""
    g = torch.Generator().manual_seed(3)
    jumps = torch.randint(1, 8, (len(AT), 2, SHAPE["sequence_len"] + 1), generator=g)
    tokens = jumps.cumsum(-1) % SHAPE["vocab_size"]
    return [(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in tokens]


def our_losses(start, batches, **changes):
    config = record()
    config["base"] |= RATES | changes
    config["hardware"] |= {"dtype": "float32", "compile": False}
    model = GPT(GPTConfig(**SHAPE))
    model.load_state_dict(start)
    optimizer, schedule, losses = optimizer_for(model, config), _pretrain_schedule(config["base"]), []
    for at, (x, y) in zip(AT, batches): # `batches` may be the first few
        loss = model(x, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(**schedule(at))
        losses.append(loss.item())
    return losses


def gap(a, b): return max(abs(x - y) for x, y in zip(a, b, strict=True))


def test_a_hundred_steps_beside_a_second_implementation(start, batches):
    ours = our_losses(start, batches)
    assert ours[-1] < ours[0] - 1 # it learns, so that the comparison means something
    assert gap(ours, reference_losses(start, batches, False, False)) < 1e-4 # 2e-5 was measured
    latest = our_losses(start, batches[:50], muon_eq=True, muon_plus=True)
    assert gap(latest, reference_losses(start, batches[:50], True, True)) < 1e-4
    # what differs would be seen
    assert gap(ours[:50], latest) > 1e-3
    assert gap(ours[:15], our_losses(start, batches[:15], optimizer="own")) > 1e-3


def test_a_hundred_steps_beside_the_published_code(start, batches, tmp_path):
    """With karpathy/nanochat of July 2026, which has MuonEq and Muon+: `NANOCHAT_REFERENCE` is the folder of a clone."""
    clone = os.environ.get("NANOCHAT_REFERENCE")
    if not clone: pytest.skip("NANOCHAT_REFERENCE names no clone of karpathy/nanochat")
    rates = {"unembedding_lr" if name == "head_lr" else name: rate for name, rate in RATES.items()}
    schedule = [dict(zip(("lr_mult", "momentum", "wd_mult"), reference_schedule(at))) for at in AT]
    torch.save(dict(shape=SHAPE, weights=start, rates=rates, batches=batches, schedule=schedule), tmp_path/"start.pt")
    # their `torch.compile` would only cost time here
    env = os.environ | {"PYTHONPATH": clone, "NANOCHAT_DTYPE": "float32", "TORCHDYNAMO_DISABLE": "1"}
    subprocess.run([sys.executable, Path(__file__).with_name("published.py"), tmp_path], env=env, check=True, timeout=300)
    difference = gap(our_losses(start, batches, muon_eq=True, muon_plus=True), torch.load(tmp_path/"losses.pt"))
    print(f"largest difference of the losses: {difference:.1e}")
    assert difference < 1e-4


# --- the compiled update


def test_the_compiled_update_is_the_eager_one(monkeypatch):
    from torch._dynamo.testing import CompileCounterWithBackend
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(optim, "_COMPILED_SIZE", 1000) # neither gates nor scalars
    monkeypatch.setattr(optim, "_compile", cache(partial(torch.compile, dynamic=False, fullgraph=True, backend=counter)))
    models = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = GPT(GPTConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
        optimizer, compilations = make_optimizer(model, variant=MuonVariant(optim.NANOCHAT_STEPS, True, True)), []
        optimizer.compiled = compiled
        for step in range(4):
            for p in model.parameters(): p.grad = torch.randn(p.shape) * 1e-3
            optimizer.step(lr_mult=1 - 0.1 * step, momentum=0.9 + 0.01 * step, wd_mult=1 - 0.2 * step)
            compilations.append(counter.frame_count)
        models.append(model)
    assert compilations == [5] * 4 # three shapes of matrices, two rules of AdamW; the rates change, and nothing is compiled again
    for a, b in zip(models[0].parameters(), models[1].parameters()): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_only_cuda_compiles_the_update():
    config = record()
    config["hardware"]["dtype"] = "float32"
    assert config["hardware"]["compile"] and not optimizer_for(GPT(GPTConfig(**SHAPE)), config).compiled
    model = GPT(GPTConfig(**SHAPE))
    model.lm_head.weight = OnCuda(model.lm_head.weight)
    assert optimizer_for(model, config).compiled
    config["hardware"]["compile"] = False
    assert not optimizer_for(model, config).compiled


class OnCuda(torch.nn.Parameter):
    """A parameter that says that it is on a GPU."""
    is_cuda = True
