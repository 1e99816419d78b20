"Answers to the exercises of lesson 3, right and wrong, in the styles of different people."
import math
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import einsum

from nanochat.lab.exercises.transformer import MLP, rms_norm, rotate


# 3.1: a head with a window

def head_additive_mask(q, k, v, window):
    T = q.size(0)
    mask = torch.zeros(T, T)
    for i in range(T):
        for j in range(T):
            if j > i or i - j > window: mask[i, j] = float("-inf")
    return F.softmax(q @ k.transpose(0, 1) * q.size(-1) ** -0.5 + mask, dim=-1) @ v


def head_numpy(q, k, v, window):
    q, k, v = (np.asarray(a, dtype=np.float64) for a in (q, k, v))
    scores = q @ k.T / np.sqrt(q.shape[1])
    rows, columns = np.indices(scores.shape)
    scores[(columns > rows) | (rows - columns > window)] = -np.inf
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores @ v


def head_slices_and_a_list_of_tensors(q, k, v, window):
    out = []
    for t in range(len(q)):
        first = max(0, t - window)
        w = (k[first:t + 1] @ q[t] / math.sqrt(q.shape[-1])).softmax(0)
        out.append(w @ v[first:t + 1])
    return out


def head_plain_lists(q, k, v, window):
    q, k, v = q.tolist(), k.tolist(), v.tolist()
    d, out = len(q[0]), []
    for t in range(len(q)):
        seen = range(max(0, t - window), t + 1)
        e = {j: math.exp(sum(a * b for a, b in zip(q[t], k[j])) / d**0.5) for j in seen}
        total = sum(e.values())
        out.append(tuple(sum(e[j] * v[j][c] for j in seen) / total for c in range(d)))
    return tuple(out)


def head_sdpa_with_a_mask(q, k, v, window):
    ones = torch.ones(len(q), len(q), dtype=torch.bool)
    band = ones.tril() & ones.triu(-int(window))
    return F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=band).squeeze(0)


def head_softmax_of_everything_then_renormalized(q, k, v, window): # shifts by the future's largest, too
    s = einsum("id,jd->ij", q.double(), k.double()) / math.sqrt(q.shape[1])
    w = torch.exp(s - s.max())
    w = w * torch.tril(torch.ones_like(w)) * torch.triu(torch.ones_like(w), -window)
    return (w / w.sum(1, keepdim=True)) @ v.double()


def head_large_negative_in_place(q, k, v, window):
    s = torch.matmul(q, k.t())
    s /= q.shape[1] ** 0.5
    i = torch.arange(len(q))
    s[i[None, :] > i[:, None]] = -1e30
    s[i[:, None] - i[None, :] > window] = -1e30
    return torch.softmax(s, 1).mm(v)


def head_without_the_root(q, k, v, window): return head_large_negative_in_place(q * q.shape[1]**0.5, k, v, window)
def head_window_too_short(q, k, v, window): return head_additive_mask(q, k, v, window - 1) if window else v
def head_without_causal_mask(q, k, v, window):
    i = torch.arange(len(q))
    return (q @ k.T / q.shape[1]**0.5).masked_fill((i[:, None] - i).abs() > window, -torch.inf).softmax(-1) @ v
def head_without_window(q, k, v, window): return head_additive_mask(q, k, v, len(q))
def head_mask_after_softmax(q, k, v, window):
    w = (q @ k.T / q.shape[1]**0.5).softmax(-1)
    return torch.tril(w).triu(-window) @ v
def head_softmax_over_queries(q, k, v, window):
    i = torch.arange(len(q))
    back = i[:, None] - i
    return (q @ k.T / q.shape[1]**0.5).masked_fill((back < 0) | (back > window), -1e9).softmax(0) @ v
def head_weights_only(q, k, v, window): return (q @ k.T).softmax(-1)


# 3.2: rotate the pairs

def rope_repeated_tables(x, base):
    T, d = x.shape
    inv = 1.0 / base ** (torch.arange(0, d, 2).float() / d)
    angle = torch.outer(torch.arange(T).float(), inv).repeat(1, 2)
    half = torch.cat((x[:, d // 2:], -x[:, :d // 2]), dim=-1)
    return x * angle.cos() + half * angle.sin()


def rope_complex(x, base):
    T, d = x.shape
    z = torch.complex(x[:, :d // 2].double(), x[:, d // 2:].double())
    angle = torch.arange(T, dtype=torch.float64)[:, None] * base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    z = z * torch.polar(torch.ones_like(angle), -angle)
    return torch.cat([z.real, z.imag], 1)


def rope_numpy(x, base):
    x = x.numpy()
    T, d = x.shape
    half = d // 2
    angle = np.arange(T)[:, np.newaxis] * np.power(float(base), -2.0 * np.arange(half) / d)
    out = np.empty_like(x)
    out[:, :half] = x[:, :half] * np.cos(angle) + x[:, half:] * np.sin(angle)
    out[:, half:] = x[:, half:] * np.cos(angle) - x[:, :half] * np.sin(angle)
    return out


def rope_loops_on_a_copy(x, base):
    y, (T, d) = x.clone(), x.shape
    for t in range(T):
        for i in range(d // 2):
            a, j = t / base ** (2 * i / d), i + d // 2
            y[t, i] = x[t, i] * math.cos(a) + x[t, j] * math.sin(a)
            y[t, j] = x[t, j] * math.cos(a) - x[t, i] * math.sin(a)
    return y


def rope_matrices_and_a_list_of_rows(x, base):
    rows = []
    for t, row in enumerate(x):
        d = len(row)
        R = torch.zeros(d, d)
        for i in range(d // 2):
            a, j = t * base ** (-2 * i / d), i + d // 2
            R[i, i] = R[j, j] = math.cos(a)
            R[i, j], R[j, i] = math.sin(a), -math.sin(a)
        rows.append(R @ row)
    return rows


def rope_in_place_on_clones(x, base):
    a, b = (part.clone() for part in x.chunk(2, dim=1))
    T, half = a.shape
    angle = torch.arange(T).unsqueeze(1) * torch.exp(-math.log(base) * torch.arange(half) / half)
    old = a.clone()
    a.mul_(angle.cos()).add_(b * angle.sin())
    b.mul_(angle.cos()).sub_(old * angle.sin())
    return torch.hstack((a, b))


def rope_overwrites_x1(x, base):
    x1, x2 = x.clone().chunk(2, 1)
    angle = torch.arange(len(x))[:, None] * base ** (-torch.arange(x1.shape[1]) / x1.shape[1])
    x1 = x1 * angle.cos() + x2 * angle.sin()
    return torch.cat([x1, x2 * angle.cos() - x1 * angle.sin()], 1)
def rope_the_other_way(x, base): return rope_complex(x.flip(1), base).flip(1)
def rope_neighbours(x, base):
    T, d = x.shape
    order = torch.cat([torch.arange(0, d, 2), torch.arange(1, d, 2)])
    out = torch.empty_like(x)
    out[:, order] = rope_repeated_tables(x[:, order], base)
    return out
def rope_from_one(x, base): return rope_repeated_tables(torch.cat([x[:1], x]), base)[1:]
def rope_one_rate(x, base): return rope_repeated_tables(x, 1.0)
def rope_wrong_exponent(x, base): return rope_repeated_tables(x, base**0.5)
def rope_does_nothing(x, base): return x


# 3.3: RMSNorm

def norm_by_length(x): return x * math.sqrt(x.shape[-1]) / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6 * x.shape[-1])
def norm_of_torch(x): return F.rms_norm(x, x.shape[-1:], eps=1e-6)
def norm_numpy(x):
    x = np.asarray(x, dtype=np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6)
def norm_in_place_on_a_copy(x):
    y = x.clone()
    y /= torch.pow(y, 2).mean(dim=-1, keepdim=True).add_(1e-6).sqrt_()
    return y
def norm_recursive_lists(x):
    if x.ndim > 1: return [norm_recursive_lists(row) for row in x]
    r = (sum(a * a for a in x.tolist()) / len(x) + 1e-6) ** 0.5
    return [a / r for a in x.tolist()]
def norm_einsum(x): return einsum("...c,...->...c", x, (einsum("...c,...c->...", x, x) / x.shape[-1] + 1e-6) ** -0.5)
def norm_unsqueezed_half(x): return (x / torch.sqrt(x.pow(2).mean(-1) + 1e-6)[..., None]).double()

def norm_layer_norm(x): return F.layer_norm(x, x.shape[-1:], eps=1e-6)
def norm_unit_length(x): return F.normalize(x, dim=-1)
def norm_over_everything(x): return x / (x.square().mean() + 1e-6).sqrt()
def norm_eps_outside(x): return x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)
def norm_without_eps(x): return x / x.square().mean(-1, keepdim=True).sqrt()
def norm_without_root(x): return x / (x.square().mean(-1, keepdim=True) + 1e-6)
def norm_over_the_first(x): return x / (x.square().mean(0, keepdim=True) + 1e-6).sqrt()
def norm_writes_into_its_input(x):
    x /= (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x


# 3.4: several heads

class _Layers(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.H, self.d = n_head, n_embd // n_head
        for name in ("c_q", "c_k", "c_v", "c_proj"): self.add_module(name, nn.Linear(n_embd, n_embd, bias=False))


class HeadsByMask(_Layers):
    def forward(self, x, cache=None):
        B, T, C = x.size()
        q = rms_norm(rotate(self.c_q(x).view(B, T, self.H, self.d))).transpose(1, 2)
        k = rms_norm(rotate(self.c_k(x).view(B, T, self.H, self.d))).transpose(1, 2)
        v = self.c_v(x).view(B, T, self.H, self.d).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * self.d ** -0.5
        att = att.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        return self.c_proj((F.softmax(att, -1) @ v).transpose(1, 2).contiguous().view(B, T, C))


class HeadsByEinsum(_Layers):
    def forward(self, x, cache=None):
        q, k, v = (layer(x).unflatten(-1, (self.H, self.d)) for layer in (self.c_q, self.c_k, self.c_v))
        q, k = F.rms_norm(rotate(q), (self.d,), eps=1e-6), F.rms_norm(rotate(k), (self.d,), eps=1e-6)
        s = einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.d)
        s = s + torch.full(s.shape[-2:], -torch.inf).triu(1)
        return self.c_proj(einsum("bhqk,bkhd->bqhd", s.softmax(-1), v).flatten(2))


class HeadsInALoop(_Layers):
    def forward(self, x, cache=None):
        parts = [layer(x).split(self.d, dim=-1) for layer in (self.c_q, self.c_k, self.c_v)]
        out = []
        for q, k, v in zip(*parts): # (B, T, d) each
            q, k = (rms_norm(rotate(y[:, :, None]))[:, :, 0] for y in (q, k))
            s = torch.bmm(q, k.mT).div_(self.d**0.5)
            T = s.size(1)
            out.append(s.masked_fill(torch.ones(T, T).triu(diagonal=1).bool(), -1e9).softmax(2).bmm(v))
        return self.c_proj(torch.cat(out, 2))


class HeadsTokenByToken(_Layers): # norm before rotation is the same
    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (layer(x).reshape(B, T, self.H, self.d) for layer in (self.c_q, self.c_k, self.c_v))
        q, k = rotate(rms_norm(q)), rotate(rms_norm(k))
        rows = []
        for t in range(T):
            s = (k[:, :t + 1] * q[:, t:t + 1]).sum(-1) / self.d**0.5 # (B, t + 1, H)
            rows.append((s.softmax(1)[..., None] * v[:, :t + 1]).sum(1))
        return self.c_proj(torch.stack(rows, 1).reshape(B, T, C))


class HeadsWithABuffer(_Layers):
    def __init__(self, n_embd, n_head):
        super().__init__(n_embd, n_head)
        self.register_buffer("mask", torch.tril(torch.ones(2048, 2048, dtype=torch.bool)))

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = torch.stack([self.c_q(x), self.c_k(x), self.c_v(x)]).view(3, B, T, self.H, self.d)
        q, k, v = qkv.unbind(0)
        q, k, v = (y.permute(0, 2, 1, 3) for y in (rms_norm(rotate(q)), rms_norm(rotate(k)), v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:T, :T])
        return F.linear(y.permute(0, 2, 1, 3).reshape(B, T, C), self.c_proj.weight)


class HeadsNotCausal(HeadsByEinsum):
    def forward(self, x, cache=None):
        q, k, v = (layer(x).unflatten(-1, (self.H, self.d)) for layer in (self.c_q, self.c_k, self.c_v))
        q, k = rms_norm(rotate(q)), rms_norm(rotate(k))
        s = einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.d)
        return self.c_proj(einsum("bhqk,bkhd->bqhd", s.softmax(-1), v).flatten(2))


class HeadsByViewOnly(_Layers): # (B, H, T, d) without a transposition
    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = (layer(x).view(B, self.H, T, self.d).transpose(1, 2) for layer in (self.c_q, self.c_k, self.c_v))
        q, k, v = (y.transpose(1, 2) for y in (rms_norm(rotate(q)), rms_norm(rotate(k)), v))
        return self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C))


def _heads(turn=True, norm=True, join=True, scale=None, project=True):
    class Heads(_Layers):
        def forward(self, x, cache=None):
            B, T, C = x.shape
            q, k, v = (layer(x).view(B, T, self.H, self.d) for layer in (self.c_q, self.c_k, self.c_v))
            if turn: q, k = rotate(q), rotate(k)
            if norm: q, k = rms_norm(q), rms_norm(k)
            y = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True, scale=scale)
            y = (y.transpose(1, 2) if join else y).reshape(B, T, C)
            return self.c_proj(y) if project else y
    return Heads


class HeadsWithBias(HeadsByMask):
    def __init__(self, n_embd, n_head):
        super().__init__(n_embd, n_head)
        self.c_proj = nn.Linear(n_embd, n_embd)


class HeadsInOneMatrix(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=False)


class HeadsInNumpy(HeadsByMask):
    def forward(self, x, cache=None):
        return torch.from_numpy(super().forward(x).detach().numpy())


class HeadsWithoutSuper(nn.Module):
    def __init__(self, n_embd, n_head): self.c_q = nn.Linear(n_embd, n_embd, bias=False)


# 3.5: the block

class BlockInOneLine(nn.Module):
    def __init__(self, C, n):
        super().__init__()
        self.attn, self.mlp = HeadsByMask(C, n), MLP(C)

    def forward(self, x, cache=None): return (lambda x: x + self.mlp(rms_norm(x)))(x + self.attn(rms_norm(x), cache))


class BlockByKeyword(nn.Module):
    def __init__(self, width, heads):
        nn.Module.__init__(self)
        self.mlp = MLP(width)
        self.attn = HeadsByEinsum(width, heads)

    def forward(self, x, cache=None):
        found = self.attn(F.rms_norm(x, (x.size(-1),), eps=1e-6), cache=cache)
        middle = torch.add(x, found)
        return torch.add(middle, self.mlp(F.rms_norm(middle, (x.size(-1),), eps=1e-6)))


class BlockInPlaceOnACopy(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.attn = HeadsTokenByToken(n_embd, n_head)
        self.mlp = MLP(n_embd)

    def forward(self, x, cache=None):
        x = x.clone()
        for part in (lambda y: self.attn(y, cache), self.mlp): x = x + part(rms_norm(x))
        return x


class BlockWithItsOwnMLP(nn.Module):
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.attn = HeadsInALoop(n_embd, n_head)
        self.mlp = self.Two(n_embd)

    class Two(nn.Module):
        def __init__(self, C):
            super().__init__()
            self.c_fc, self.c_proj = nn.Linear(C, 4 * C, False), nn.Linear(4 * C, C, False)
        def forward(self, x): return self.c_proj(torch.square(F.relu(self.c_fc(x))))

    def forward(self, x, cache=None):
        residual = x
        x = residual + self.attn(rms_norm(x), cache)
        residual = x
        return self.mlp(rms_norm(x)) + residual


def _block(forward, mlp=MLP):
    class Block(nn.Module):
        def __init__(self, n_embd, n_head):
            super().__init__()
            self.attn, self.mlp = HeadsByMask(n_embd, n_head), mlp(n_embd)
    Block.forward = forward
    return Block


def _post_norm(self, x, cache=None):
    x = rms_norm(x + self.attn(x, cache))
    return rms_norm(x + self.mlp(x))
def _no_residual(self, x, cache=None): return self.mlp(rms_norm(self.attn(rms_norm(x), cache)))
def _no_norm(self, x, cache=None):
    x = x + self.attn(x, cache)
    return x + self.mlp(x)
def _parallel(self, x, cache=None): return x + self.attn(rms_norm(x), cache) + self.mlp(rms_norm(x))
def _no_cache(self, x, cache=None):
    x = x + self.attn(rms_norm(x))
    return x + self.mlp(rms_norm(x))
def _into_its_input(self, x, cache=None):
    x += self.attn(rms_norm(x), cache)
    return x + self.mlp(rms_norm(x))


class GeluMLP(MLP):
    def forward(self, x): return self.c_proj(F.gelu(self.c_fc(x)))


# 3.6: the GPT

class GPTZipped(nn.Module):
    def __init__(self, vocab_size, sequence_len, n_layer, n_head, n_embd):
        super().__init__()
        self.sequence_len = sequence_len
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.blocks = nn.ModuleList([BlockInOneLine(n_embd, n_head) for _ in range(n_layer)])
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, ids, cache=None):
        x = rms_norm(self.wte(ids))
        for block, kept in zip(self.blocks, cache or [None] * len(self.blocks)): x = block(x, kept)
        return torch.tanh(self.lm_head(rms_norm(x)) / 15) * 15


class GPTByFunctions(nn.Module):
    def __init__(self, vocab_size, sequence_len, n_layer, n_head, n_embd):
        super().__init__()
        self.config, self.sequence_len = SimpleNamespace(softcap=15.0), sequence_len
        self.blocks = nn.ModuleList()
        for _ in range(n_layer): self.blocks.append(BlockByKeyword(n_embd, n_head))
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.wte = nn.Embedding(vocab_size, n_embd)
        nn.init.normal_(self.wte.weight, std=0.8)

    def trunk(self, ids, cache):
        x = F.rms_norm(self.wte.weight[ids], (self.wte.weight.size(1),), eps=1e-6)
        i = 0
        while i < len(self.blocks):
            x = self.blocks[i](x, cache=cache[i] if cache is not None else None)
            i += 1
        return rms_norm(x)

    def forward(self, ids, cache=None):
        logits = F.linear(self.trunk(ids, cache), self.lm_head.weight).to(torch.float32)
        logits = logits / self.config.softcap
        return logits.tanh_() * self.config.softcap


class GPTWithoutLoops(GPTZipped):
    def forward(self, ids, cache=None):
        from functools import reduce
        caches = cache if cache is not None else [None for _ in self.blocks]
        x = reduce(lambda x, pair: pair[0](x, pair[1]), zip(self.blocks, caches), rms_norm(self.wte(ids)))
        return 15.0 * (self.lm_head(rms_norm(x)).float() / 15.0).tanh()


class GPTFromOtherBlocks(nn.Module):
    def __init__(self, vocab_size, sequence_len, n_layer, n_head, n_embd):
        super().__init__()
        self.sequence_len, self.n_layer = sequence_len, n_layer
        self.wte = nn.Embedding(num_embeddings=vocab_size, embedding_dim=n_embd)
        self.blocks = nn.ModuleList(BlockWithItsOwnMLP(n_embd, n_head) for layer in range(n_layer))
        self.lm_head = nn.Linear(in_features=n_embd, out_features=vocab_size, bias=False)

    def forward(self, ids, cache=None):
        stream = rms_norm(self.wte(ids))
        for layer in range(self.n_layer): stream = self.blocks[layer](stream, cache and cache[layer])
        scores = self.lm_head(rms_norm(stream))
        return 15 * (1 - 2 / (torch.exp(2 * scores / 15) + 1)) # tanh


def _gpt(first=True, last=True, cap=lambda z: 15 * torch.tanh(z / 15), blocks=lambda b: b):
    class Wrong(GPTZipped):
        def forward(self, ids, cache=None):
            x = self.wte(ids)
            if first: x = rms_norm(x)
            for i, block in enumerate(blocks(list(self.blocks))): x = block(x, cache and cache[i])
            return cap(self.lm_head(rms_norm(x) if last else x))
    return Wrong


class GPTInAList(GPTZipped):
    def __init__(self, vocab_size, sequence_len, n_layer, n_head, n_embd):
        super().__init__(vocab_size, sequence_len, 0, n_head, n_embd)
        del self.blocks
        self.blocks = [BlockInOneLine(n_embd, n_head) for _ in range(n_layer)]


class GPTWithWrongAttention(GPTZipped):
    def __init__(self, vocab_size, sequence_len, n_layer, n_head, n_embd):
        super().__init__(vocab_size, sequence_len, n_layer, n_head, n_embd)
        for block in self.blocks: block.attn = _heads(norm=False)(n_embd, n_head)


class GPTOneCache(GPTZipped):
    def forward(self, ids, cache=None):
        x = rms_norm(self.wte(ids))
        for block in self.blocks: x = block(x, cache)
        return 15 * torch.tanh(self.lm_head(rms_norm(x)) / 15)


class GPTReturnsTheLast(GPTZipped):
    def forward(self, ids, cache=None): return super().forward(ids, cache)[:, -1]


# 3.7: cross-entropy

def loss_of_torch(logits, targets):
    if not (targets >= 0).any(): return 0 * logits.sum()
    return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def loss_selected(logits, targets):
    keep = targets >= 0
    n = max(1, int(keep.sum()))
    logits, targets = logits[keep], targets[keep]
    return (logits.logsumexp(-1) - logits[torch.arange(len(targets)), targets]).sum() / n


def loss_one_hot(logits, targets):
    V = logits.shape[-1]
    hot = (targets.unsqueeze(-1) == torch.arange(V)).to(logits.dtype) # all zeros for −1
    return -(hot * logits.softmax(dim=-1).log()).sum() / hot.sum().clamp_min(1)


def loss_in_loops(logits, targets):
    total, n = 0 * logits.sum(), 0
    for b in range(targets.shape[0]):
        for t in range(targets.shape[1]):
            if targets[b, t].item() < 0: continue
            p = logits[b, t].exp() / logits[b, t].exp().sum()
            total, n = total - torch.log(p[targets[b, t]]), n + 1
    return total / n if n else total


def loss_nll_in_double(logits, targets):
    log_p = F.log_softmax(logits.double(), -1).transpose(1, 2)
    total = F.nll_loss(log_p, targets, ignore_index=-1, reduction="sum")
    return total / (targets != -1).sum().clamp(min=1)


def loss_of_shape_one(logits, targets):
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")
    return (losses.sum() / max((targets >= 0).sum().item(), 1)).reshape(1)


def loss_nan_without_targets(logits, targets): return F.cross_entropy(logits.mT, targets, ignore_index=-1)
def loss_zero_without_gradient(logits, targets):
    return torch.tensor(0.0) if (targets < 0).all() else loss_of_torch(logits, targets)
def loss_over_all(logits, targets): return F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="none").mean()
def loss_sum(logits, targets): return F.cross_entropy(logits.mT, targets, ignore_index=-1, reduction="sum")
def loss_last_token(logits, targets):
    log_p = logits.log_softmax(-1)
    return -log_p.flatten(0, 1)[torch.arange(targets.numel()), targets.flatten()].mean()
def loss_in_bits(logits, targets): return loss_selected(logits, targets) / math.log(2)
def loss_a_float(logits, targets): return loss_selected(logits, targets).item()
def loss_not_negated(logits, targets): return -loss_selected(logits, targets)
def loss_numpy(logits, targets): return torch.tensor(loss_selected(logits, targets).detach().numpy())
def loss_softmax_over_rows(logits, targets):
    log_p = logits.log_softmax(1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(log_p * (targets >= 0)).sum() / (targets >= 0).sum().clamp(min=1)


# 3.8: count

def count_meta(config):
    from nanochat.model.gpt import GPT
    with torch.device("meta"): return sum(p.numel() for p in GPT(config).parameters())
def count_numpy(config):
    C, d = np.int64(config.n_embd), config.n_embd // config.n_head
    shapes = np.array([[C, C], [config.n_kv_head * d, C], [config.n_kv_head * d, C], [C, C], [4 * C, C], [C, 4 * C]])
    return shapes.prod(axis=1).sum() * config.n_layer + 2 * config.padded_vocab_size * C
def count_float(c): return 2.0 * c.padded_vocab_size * c.n_embd + c.n_layer * (10.0 + 2 * c.n_kv_head / c.n_head) * c.n_embd**2
def count_tensor(c):
    kv = c.n_embd * c.n_kv_head * c.head_dim
    return torch.tensor([2 * c.padded_vocab_size * c.n_embd] + [10 * c.n_embd**2 + 2 * kv] * c.n_layer).sum()
def count_loop(config):
    total, rows = 0, -(-config.vocab_size // 64) * 64
    for _ in range(2): total += rows * config.n_embd
    for _ in range(config.n_layer):
        for width in (config.n_embd, config.kv_channels, config.kv_channels, config.n_embd, 8 * config.n_embd): total += width * config.n_embd
    return total

def count_one_table(c): return count_loop(c) - c.padded_vocab_size * c.n_embd
def count_unpadded(c): return 2 * c.vocab_size * c.n_embd + c.n_layer * (2 * c.n_embd * (c.n_embd + c.kv_channels) + 8 * c.n_embd**2)
def count_full_kv(c): return 2 * c.padded_vocab_size * c.n_embd + c.n_layer * 12 * c.n_embd**2
def count_narrow_mlp(c): return count_loop(c) - 6 * c.n_layer * c.n_embd**2
def count_biases(c): return count_loop(c) + c.n_layer * 9 * c.n_embd
def count_nothing(c): count_loop(c)


# 3.9: the key offset

def _offset(shift, after=True):
    class Offset(_Layers):
        def forward(self, x, cache=None):
            B, T, C = x.shape
            q, k, v = (layer(x).view(B, T, self.H, self.d) for layer in (self.c_q, self.c_k, self.c_v))
            if not after: k = shift(k)
            q, k = rms_norm(rotate(q)), rms_norm(rotate(k))
            if after: k = shift(k)
            y = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
            return self.c_proj(y.transpose(1, 2).reshape(B, T, C))
    return Offset


def _delayed(k): return torch.cat([torch.zeros_like(k[:, :1]), k[:, :-1]], 1)
def _in_quarters(k):
    a, b, c, d = _delayed(k).chunk(4, -1)
    one, _, three, _ = k.chunk(4, -1)
    return torch.cat([one, b, three, d], -1)
def _by_assignment(k):
    new, d = k.clone(), k.size(-1)
    for low, high in ((d // 4, d // 2), (3 * d // 4, d)):
        new[:, 0, :, low:high] = 0
        new[:, 1:, :, low:high] = k[:, :-1, :, low:high]
    return new
def _by_where(k): return torch.where((torch.arange(k.size(-1)) % (k.size(-1) // 2) >= k.size(-1) // 4), _delayed(k), k)
def _by_padding(k):
    pairs = k.unflatten(-1, (2, -1))
    before = F.pad(pairs, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
    fast = pairs.size(-1) // 2
    return torch.cat((pairs[..., :fast], before[..., fast:]), -1).flatten(-2)
def _by_a_mask(k):
    slow = torch.tensor([c % (k.size(-1) // 2) >= k.size(-1) // 4 for c in range(k.size(-1))]).float()
    return slow * _delayed(k) + (1 - slow) * k

def _fast_half(k):
    a, b, c, d = _delayed(k).chunk(4, -1)
    return torch.cat([a, k.chunk(4, -1)[1], c, k.chunk(4, -1)[3]], -1)
def _upper_half(k): return torch.cat([k[..., :k.size(-1) // 2], _delayed(k)[..., k.size(-1) // 2:]], -1)
def _roll(k): return torch.where((torch.arange(k.size(-1)) % (k.size(-1) // 2) >= k.size(-1) // 4), k.roll(1, 1), k)
def _first_keeps(k): return torch.cat([k[:, :1], _by_where(k)[:, 1:]], 1)
def _added(k): return k + _delayed(k)


RIGHT = {
    "3.1": [head_additive_mask, head_numpy, head_slices_and_a_list_of_tensors, head_plain_lists, head_sdpa_with_a_mask,
            head_softmax_of_everything_then_renormalized, head_large_negative_in_place],
    "3.2": [rope_repeated_tables, rope_complex, rope_numpy, rope_loops_on_a_copy, rope_matrices_and_a_list_of_rows,
            rope_in_place_on_clones],
    "3.3": [norm_by_length, norm_of_torch, norm_numpy, norm_in_place_on_a_copy, norm_recursive_lists, norm_einsum,
            norm_unsqueezed_half],
    "3.4": [HeadsByMask, HeadsByEinsum, HeadsInALoop, HeadsTokenByToken, HeadsWithABuffer],
    "3.5": [BlockInOneLine, BlockByKeyword, BlockInPlaceOnACopy, BlockWithItsOwnMLP],
    "3.6": [GPTZipped, GPTByFunctions, GPTWithoutLoops, GPTFromOtherBlocks],
    "3.7": [loss_zero_without_gradient, loss_of_torch, loss_selected, loss_one_hot, loss_in_loops, loss_nll_in_double, loss_of_shape_one],
    "3.8": [count_meta, count_numpy, count_float, count_tensor, count_loop],
    "3.9": [_offset(_in_quarters), _offset(_by_assignment), _offset(_by_where), _offset(_by_padding), _offset(_by_a_mask)],
}

WRONG = {
    "3.1": [(head_without_the_root, "√d"), (head_window_too_short, "`window` tokens back"),
            (head_without_causal_mask, "hide the future"), (head_without_window, "`window` tokens back"),
            (head_mask_after_softmax, "hide the future"), (head_softmax_over_queries, "sum to 1"),
            (head_weights_only, "shape")],
    "3.2": [(rope_overwrites_x1, "old x1"), (rope_the_other_way, "other way"), (rope_neighbours, "i + d/2"),
            (rope_from_one, "position 0"), (rope_one_rate, "turns by"), (rope_wrong_exponent, "turns by"),
            (rope_does_nothing, "turns by")],
    "3.3": [(norm_layer_norm, "its own squares"), (norm_unit_length, "its own squares"), (norm_over_everything, "last dimension"),
            (norm_eps_outside, "under the root"), (norm_without_eps, "divided by zero"), (norm_without_root, "root of the mean"),
            (norm_over_the_first, "last dimension"), (norm_writes_into_its_input, "writes into")],
    "3.4": [(HeadsNotCausal, "hide the future"), (HeadsByViewOnly, "cut into heads, not the tokens"),
            (_heads(turn=False), "must be rotated"), (_heads(norm=False), "must be normalized"), (_heads(join=False), "swap it back"),
            (_heads(scale=1.0), "divided by √d"), (_heads(project=False), "`c_proj` mixes"), (HeadsWithBias, "c_proj.bias"),
            (HeadsInOneMatrix, "lacks c_q.weight"), (HeadsInNumpy, "no gradient"), (HeadsWithoutSuper, "Module.__init__")],
    "3.5": [(_block(_post_norm), "before each part"), (_block(_no_residual), "does not replace it"),
            (_block(_no_norm), "through `rms_norm`"), (_block(_parallel), "after attention has added"),
            (_block(_no_cache), "hands its `cache` on"), (_block(_into_its_input), "writes into"),
            (_block(BlockInOneLine.forward, GeluMLP), "the lesson's `MLP`")],
    "3.6": [(_gpt(first=False), "before the first block"), (_gpt(last=False), "before the output head"),
            (_gpt(cap=lambda z: z), "softcap is missing"), (_gpt(cap=lambda z: z.clamp(-15, 15)), "does not cut"),
            (_gpt(blocks=lambda b: b[::-1]), "in their order"), (_gpt(blocks=lambda b: b[:1]), "inside the loop"),
            (GPTInAList, "a module of its own"), (GPTWithWrongAttention, "pass their checks"), (GPTOneCache, "`cache[i]`"),
            (GPTReturnsTheLast, "shape")],
    "3.7": [(loss_nan_without_targets, "without a target"),
            (loss_over_all, "all targets"), (loss_sum, "not a sum"),
            (loss_last_token, "does not count"), (loss_in_bits, "nats"), (loss_a_float, "no gradient"),
            (loss_not_negated, "positive"), (loss_numpy, "no gradient"), (loss_softmax_over_rows, "mean of −ln p")],
    "3.8": [(count_one_table, "and a head"), (count_unpadded, "padded"), (count_full_kv, "kv heads"),
            (count_narrow_mlp, "too few"), (count_biases, "too many"), (count_nothing, "return")],
    "3.9": [(_heads(), "tokens themselves"), (_offset(_fast_half), "fast pairs"), (_offset(_upper_half), "upper half of"),
            (_offset(_roll), "not what is at the end"), (_offset(_first_keeps), "it gets zeros"),
            (_offset(_delayed), "only half"), (_offset(_by_where, after=False), "first rotate and norm"),
            (_offset(_added), "Compare the shape")],
}
