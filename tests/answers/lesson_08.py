"""Answers to the exercises of lesson 8: right ones in many styles, and plausible wrong ones with part of the sentence that refuses them."""
import math
from functools import reduce
from itertools import accumulate

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.lab.exercises.inference import prefill, tool_result
from nanochat.lab.exercises.transformer import rms_norm, rotate


# 8.1 Append to a cache

def append_by_loop(cache, lengths, new):
    for b in range(cache.shape[0]):
        cache[b, :, lengths[b]] = new[b, :, 0]
    return lengths + 1

def append_returns_a_list(cache, lengths, new):
    after = []
    for row, n, one in zip(cache, lengths.tolist(), new):
        row[:, n:n + 1] = one
        after.append(n + 1)
    return after

def append_through_numpy(cache, lengths, new):
    at = lengths.numpy()
    cache.numpy()[np.arange(len(at)), :, at] = new.numpy()[:, :, 0]
    return at + 1

def append_by_scatter(cache, lengths, new):
    B, H, _, D = cache.shape
    cache.scatter_(2, lengths.view(B, 1, 1, 1).expand(B, H, 1, D), new)
    return torch.add(lengths, 1)

def append_by_mask(cache, lengths, new):
    here = torch.arange(cache.shape[2])[None] == lengths[:, None]
    cache.copy_(torch.where(here[:, None, :, None], new, cache))
    return (lengths + 1).to(torch.int32)

def append_changes_the_lengths(cache, lengths, new):
    append_by_loop(cache, lengths, new)
    lengths += 1
    return lengths

def append_to_a_copy(cache, lengths, new):
    return append_by_loop(cache.clone(), lengths, new)

def append_at_the_mean(cache, lengths, new):
    cache[:, :, lengths.float().mean().long()] = new[:, :, 0]
    return lengths + 1

def append_one_early(cache, lengths, new):
    append_by_loop(cache, (lengths - 1).clamp(min=0), new)
    return lengths + 1

def append_first_head_everywhere(cache, lengths, new):
    return append_by_loop(cache, lengths, new[:, :1].expand(-1, cache.shape[1], -1, -1))

def append_forgets_the_return(cache, lengths, new): append_by_loop(cache, lengths, new)


# 8.2 Attention with a cache

class _Heads(nn.Module):
    "What the answers below share: four matrices."
    def __init__(self, n_embd, n_head):
        super().__init__()
        self.n_head, self.head_dim = n_head, n_embd // n_head
        self.c_q, self.c_k, self.c_v, self.c_proj = (
            nn.Linear(n_embd, n_embd, bias=False) for _ in range(4))

    def split(self, x, start):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, self.n_head, self.head_dim) for f in (self.c_q, self.c_k, self.c_v))
        return rms_norm(rotate(q, start)), rms_norm(rotate(k, start)), v

    def merge(self, y): return self.c_proj(y.flatten(2)) # (B, T, H, d)


class TupleInCache(_Heads):
    "Keeps a pair, by hand-written softmax."
    def forward(self, x, cache=None):
        past = cache.get("kv") if cache is not None else None
        q, k, v = self.split(x, past[0].size(1) if past is not None else 0)
        if past is not None: k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        if cache is not None: cache["kv"] = (k, v)
        T, S = q.size(1), k.size(1)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(self.head_dim)
        future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.merge(torch.einsum("bhts,bshd->bthd", weights, v))


class ListsAndPosition(_Heads):
    "Keeps lists of pieces and counts positions itself."
    def forward(self, x, cache=None):
        if cache is None: cache = {}
        at = cache.get("at", 0)
        q, k, v = self.split(x, at)
        cache["at"] = at + x.shape[1]
        cache.setdefault("keys", []).append(k)
        cache.setdefault("values", []).append(v)
        k, v = torch.cat(cache["keys"], 1), torch.cat(cache["values"], 1)
        places = torch.arange(k.shape[1])
        mask = places[None] <= places[at:, None]
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), attn_mask=mask)
        return self.merge(y.transpose(1, 2))


class BufferWrittenInPlace(_Heads):
    "Allocates a long buffer once, and writes into it."
    def forward(self, x, cache=None):
        T = x.shape[1]
        if cache is None:
            q, k, v = (t.transpose(1, 2) for t in self.split(x, 0))
            return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2))
        if not cache:
            room = (len(x), 64, self.n_head, self.head_dim)
            cache.update(k=torch.empty(room), v=torch.empty(room), n=0)
        n = cache["n"]
        q, k, v = self.split(x, n)
        cache["k"][:, n:n + T], cache["v"][:, n:n + T] = k, v
        cache["n"] = n + T
        k, v = cache["k"][:, :n + T], cache["v"][:, :n + T]
        rows = []
        for t in range(T): # token by token
            seen = slice(0, n + t + 1)
            w = (k[:, seen] * q[:, t:t + 1]).sum(-1).div(self.head_dim**0.5).softmax(1)
            rows.append((w[..., None] * v[:, seen]).sum(1))
        return self.merge(torch.stack(rows, 1))


class OffsetByRoll(_Heads):
    "With the key offset, written with a mask of channels."
    def slow(self):
        half = self.head_dim // 2
        return torch.arange(self.head_dim) % half >= half // 2

    def forward(self, x, cache=None):
        state = {} if cache is None else cache
        start = state["k"].shape[1] if "k" in state else 0
        q, k, v = self.split(x, start)
        before = torch.roll(k, 1, dims=1)
        before[:, 0] = state["raw"] if "raw" in state else 0
        state["raw"] = k[:, -1]
        k = torch.where(self.slow(), before, k)
        if start: k, v = torch.cat([state["k"], k], 1), torch.cat([state["v"], v], 1)
        state["k"], state["v"] = k, v
        mask = torch.full((q.shape[1], k.shape[1]), -torch.inf).triu(start + 1)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return self.merge(y.transpose(1, 2))


class KeepsTheOffsetKey(OffsetByRoll):
    "The last key is kept after its offset."
    def forward(self, x, cache=None):
        got = super().forward(x, cache)
        if cache is not None: cache["raw"] = cache["k"][:, -1]
        return got


class CountsFromZero(TupleInCache):
    def split(self, x, start): return super().split(x, 0)


class NoCacheAtAll(TupleInCache):
    def forward(self, x, cache=None): return super().forward(x, None)


class StateInTheLayer(TupleInCache):
    def forward(self, x, cache=None):
        if cache is None: return super().forward(x)
        if not cache: self.state = {}
        cache["used"] = True
        return super().forward(x, self.state)


class RereadsTheRow(TupleInCache):
    def forward(self, x, cache=None):
        if cache is None: return super().forward(x)
        cache["x"] = torch.cat([cache["x"], x], 1) if cache else x
        return super().forward(cache["x"])[:, -x.shape[1]:]


class ReturnsTheCache(TupleInCache):
    def forward(self, x, cache=None): return super().forward(x, cache), cache


class SeesTheFirstKeys(_Heads):
    def forward(self, x, cache=None):
        q, k, v = self.split(x, cache["k"].shape[1] if cache else 0)
        if cache: k, v = torch.cat([cache["k"], k], 1), torch.cat([cache["v"], v], 1)
        if cache is not None: cache.update(k=k, v=v)
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        return self.merge(y.transpose(1, 2))

class NewTokensSeeEachOther(TupleInCache):
    def forward(self, x, cache=None):
        if not cache: return super().forward(x, cache)
        q, k, v = self.split(x, cache["kv"][0].size(1))
        k, v = torch.cat((cache["kv"][0], k), 1), torch.cat((cache["kv"][1], v), 1)
        cache["kv"] = (k, v)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.merge(y.transpose(1, 2))


class WithoutGradient(TupleInCache):
    @torch.no_grad()
    def forward(self, x, cache=None): return super().forward(x, cache)


# 8.3 How large is a cache?

def bytes_in_numpy(*shape): return np.prod([2, *shape])

def bytes_by_reduce(n_layer, n_kv_head, head_dim, tokens, rows, bytes_per_number):
    return reduce(lambda a, b: a * b, (n_layer, n_kv_head, head_dim, tokens, rows, bytes_per_number), 2)

def bytes_of_a_tensor(n_layer, n_kv_head, head_dim, tokens, rows, bytes_per_number):
    one = torch.empty(n_layer, rows, n_kv_head, tokens, head_dim, device="meta")
    return torch.tensor(2 * one.numel() * bytes_per_number)

def bytes_as_float(*shape): return 2.0 * math.prod(map(float, shape))

def bytes_of_keys_only(*shape): return math.prod(shape)

def numbers_instead_of_bytes(n_layer, n_kv_head, head_dim, tokens, rows, bytes_per_number):
    return 2 * n_layer * n_kv_head * head_dim * tokens * rows

def bytes_of_one_head(n_layer, n_kv_head, head_dim, tokens, rows, bytes_per_number):
    return 2 * n_layer * head_dim * tokens * rows * bytes_per_number

def bytes_as_text(*shape): return f"{2 * math.prod(shape)} bytes"


# 8.4 Temperature and top-k

def top_k_by_scatter(logits, temperature, k):
    values, index = (logits / temperature).topk(min(k, logits.shape[1]))
    return torch.zeros_like(logits).scatter(1, index, values.softmax(1))

def top_k_in_numpy(logits, temperature, k):
    scaled = np.array(logits, dtype=np.float64) / temperature
    k = min(k, scaled.shape[1])
    least = np.sort(scaled, axis=1)[:, -k][:, None]
    e = np.where(scaled >= least, np.exp(scaled - scaled.max(1, keepdims=True)), 0)
    return e / e.sum(1, keepdims=True)

def top_k_by_loop(logits, temperature, k):
    rows = []
    for row in logits.tolist():
        best = sorted(range(len(row)), key=lambda i: -row[i])[:k]
        weights = [math.exp((row[i] - max(row)) / temperature) if i in best else 0.0 for i in range(len(row))]
        rows.append([w / sum(weights) for w in weights])
    return rows

def top_k_in_place_on_a_copy(logits, temperature, k):
    out = logits.clone().double().div_(temperature)
    for row in out:
        worst = row.argsort()[:max(0, len(row) - k)]
        row[worst] = float("-inf")
    return torch.softmax(out, dim=-1)

def top_k_renormalised(logits, temperature, k):
    probs = F.softmax(logits / temperature, dim=-1)
    kept = probs * (probs >= probs.topk(min(k, probs.size(-1))).values.amin(-1, keepdim=True))
    return kept / kept.sum(-1, keepdim=True)

def top_k_multiplies(logits, temperature, k): return top_k_by_scatter(logits * temperature**2, temperature, k)

def top_k_unscaled(logits, temperature, k):
    probs = (logits / temperature).softmax(-1)
    return probs * (top_k_by_scatter(logits, 1, k) > 0)

def top_k_of_the_batch(logits, temperature, k):
    least = logits.flatten().topk(min(k, logits.numel())).values[-1]
    return (logits / temperature).masked_fill(logits < least, -torch.inf).softmax(-1)

def top_k_fills_with_zero(logits, temperature, k):
    least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return (logits / temperature).masked_fill(logits < least, 0).softmax(-1)

def top_k_overflows(logits, temperature, k):
    e = (logits / temperature).exp() * (logits >= logits.topk(min(k, logits.shape[1])).values[:, -1:])
    return e / e.sum(1, keepdim=True)

def top_k_in_place(logits, temperature, k):
    logits /= temperature
    return top_k_by_scatter(logits, 1, k)

def temperature_on_probabilities(logits, temperature, k): return top_k_by_scatter(logits, 1, k) / temperature


# 8.5 The top-p set

def top_p_by_loop(probs, p):
    order = sorted(range(len(probs)), key=lambda i: -float(probs[i]))
    kept, total = [False] * len(probs), 0.0
    for i in order:
        kept[i] = True
        total += float(probs[i])
        if total >= p - 1e-9: break
    return kept

def top_p_in_numpy(probs, p):
    probs = np.asarray(probs)
    order = np.argsort(-probs, kind="stable")
    n = np.searchsorted(np.cumsum(probs[order]), p - 1e-7) + 1
    kept = np.zeros(len(probs), dtype=np.int64)
    kept[order[:n]] = 1
    return kept

def top_p_by_scatter(probs, p):
    values, index = probs.sort(descending=True)
    return torch.zeros_like(probs).scatter(0, index, (values.cumsum(0) - values < p).float())

def top_p_of_numpy_bools(probs, p): return [np.bool_(x) for x in top_p_by_loop(probs, p)]

def top_p_by_accumulate(probs, p):
    order = sorted(range(len(probs)), key=probs.tolist().__getitem__, reverse=True)
    before = [0.0, *accumulate(probs.tolist()[i] for i in order)]
    kept = {i for i, b in zip(order, before) if b < p}
    return (i in kept for i in range(len(probs)))

def top_p_without_the_crossing(probs, p):
    values, index = probs.sort(descending=True)
    return torch.zeros_like(probs, dtype=torch.bool).scatter(0, index, values.cumsum(0) <= p)

def top_p_unsorted(probs, p): return probs.cumsum(0) - probs < p

def top_p_in_sorted_order(probs, p):
    values = probs.sort(descending=True).values
    return values.cumsum(0) - values < p

def top_p_above_p(probs, p): return probs >= p

def top_p_keeps_all(probs, p): return [True] * len(probs)

def top_p_as_indices(probs, p): return [i for i, kept in enumerate(top_p_by_loop(probs, p)) if kept]


# 8.6 Generate

def _ends(tokenizer): return {tokenizer.special["<|assistant_end|>"], tokenizer.special["<|bos|>"]}

def _draw(logits, temperature, k, generator):
    if temperature == 0: return logits.argmax(-1)
    logits = logits / temperature
    if k is not None:
        least = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)

@torch.inference_mode()
def generate_with_prefill(model, tokenizer, prompt, n=1, max_new_tokens=64, temperature=1.0, k=None, seed=0):
    logits, cache = prefill(model, prompt, n)
    generator = torch.Generator().manual_seed(seed)
    rows, waiting, done = [([], []) for _ in range(n)], [[] for _ in range(n)], set()
    for _ in range(max_new_tokens):
        tokens = _draw(logits, temperature, k, generator)
        for i in range(n):
            if i in done: continue
            ids, mask = rows[i]
            if waiting[i]:
                tokens[i] = waiting[i].pop(0)
                mask.append(0)
            elif int(tokens[i]) in _ends(tokenizer):
                done.add(i)
                continue
            else: mask.append(1)
            ids.append(int(tokens[i]))
            if mask[-1]: waiting[i] = tool_result(tokenizer, ids)
        if len(done) == n: break
        logits = model(tokens[:, None], cache=cache)[:, -1]
    return rows

class _Row:
    def __init__(self): self.ids, self.mask, self.queue, self.open = [], [], [], True

    def accept(self, token, tokenizer, room):
        forced = bool(self.queue)
        if forced: token = self.queue.pop(0)
        elif token in _ends(tokenizer): self.open = False
        if self.open:
            self.ids.append(token)
            self.mask.append(not forced)
            if not forced: self.queue = list(tool_result(tokenizer, self.ids))
            self.open = len(self.ids) < room
        return token

def generate_with_row_objects(model, tokenizer, prompt, n=1, max_new_tokens=64, temperature=1.0, k=None, seed=0):
    "Reads the prompt as n rows, in numpy, and returns tensors."
    rows, rng = [_Row() for _ in range(n)], np.random.default_rng(seed)
    cache = [dict() for _ in range(len(model.blocks))]
    ids = torch.tensor(prompt).repeat(n, 1)
    while any(row.open for row in rows):
        with torch.no_grad(): logits = model(ids, cache)[:, -1, :].double().numpy()
        if temperature == 0: tokens = logits.argmax(1)
        else:
            if k: logits = np.where(logits >= np.sort(logits, 1)[:, -k][:, None], logits, -np.inf)
            noise = rng.gumbel(size=logits.shape)
            tokens = (logits / temperature + noise).argmax(1) # the Gumbel trick
        tokens = [row.accept(int(t), tokenizer, max_new_tokens) for row, t in zip(rows, tokens)]
        ids = torch.tensor(tokens)[:, None]
    return [[torch.tensor(row.ids, dtype=torch.int32), np.array(row.mask)] for row in rows]

def generate_drops_rows(model, tokenizer, prompt, n=1, max_new_tokens=64, temperature=1.0, k=None, seed=0):
    "Rows that have ended leave the batch and its cache; a generator of tuples."
    torch.manual_seed(seed)
    cache = [{} for _ in model.blocks]
    with torch.no_grad(): logits = model(torch.tensor([prompt]), cache)[:, -1]
    logits = logits.expand(n, -1)
    for layer in cache:
        for name in layer: layer[name] = layer[name].expand(n, *layer[name].shape[1:])
    rows = [_Row() for _ in range(n)]
    alive = list(range(n))
    while alive:
        tokens = _draw(logits, temperature, k, None).tolist()
        tokens = [rows[i].accept(t, tokenizer, max_new_tokens) for i, t in zip(alive, tokens)]
        stay = [j for j, i in enumerate(alive) if rows[i].open]
        alive = [alive[j] for j in stay]
        if not alive: break
        for layer in cache:
            for name in layer: layer[name] = layer[name][stay]
        with torch.no_grad(): logits = model(torch.tensor([[tokens[j]] for j in stay]), cache)[:, 0]
    return ((row.ids, [int(m) for m in row.mask]) for row in rows)

def generate_without_cache(model, tokenizer, prompt, n=1, max_new_tokens=64, temperature=1.0, k=None, seed=0):
    generator, rows = torch.Generator().manual_seed(seed), [_Row() for _ in range(n)]
    ids = torch.tensor(prompt).repeat(n, 1)
    for _ in range(max_new_tokens):
        tokens = _draw(model(ids)[:, -1], temperature, k, generator).tolist()
        tokens = [row.accept(t, tokenizer, max_new_tokens) for row, t in zip(rows, tokens)]
        ids = torch.cat([ids, torch.tensor(tokens)[:, None]], 1)
    return [(row.ids, row.mask) for row in rows]

def generate_row_by_row(model, tokenizer, prompt, n=1, seed=0, **how):
    return [generate_with_prefill(model, tokenizer, prompt, 1, seed=seed * 10000 + i, **how)[0] for i in range(n)]

def generate_ignores_tools(model, tokenizer, prompt, n=1, max_new_tokens=64, temperature=1.0, k=None, seed=0):
    logits, cache = prefill(model, prompt, n)
    generator, rows, done = torch.Generator().manual_seed(seed), [[] for _ in range(n)], set()
    for _ in range(max_new_tokens):
        tokens = _draw(logits, temperature, k, generator)
        done |= {i for i in range(n) if int(tokens[i]) in _ends(tokenizer)}
        for i in set(range(n)) - done: rows[i].append(int(tokens[i]))
        logits = model(tokens[:, None], cache)[:, -1]
    return [(ids, [1] * len(ids)) for ids in rows]

def generate_same_seed_each_step(model, tokenizer, prompt, n=1, max_new_tokens=64, temperature=1.0, k=None, seed=0):
    logits, cache = prefill(model, prompt, n)
    rows = [_Row() for _ in range(n)]
    for _ in range(max_new_tokens):
        tokens = _draw(logits, temperature, k, torch.Generator().manual_seed(seed)).tolist()
        tokens = [row.accept(t, tokenizer, max_new_tokens) for row, t in zip(rows, tokens)]
        logits = model(torch.tensor(tokens)[:, None], cache)[:, -1]
    return [(row.ids, row.mask) for row in rows]

def generate_one_dictionary(model, tokenizer, prompt, n=1, max_new_tokens=64, temperature=1.0, k=None, seed=0):
    cache = [{}] * len(model.blocks)
    model(torch.tensor([prompt] * n), cache)
    model(torch.tensor([[0]] * n), cache)
    return [([], [])] * n

def generate_with_the_prompt(model, tokenizer, prompt, n=1, **how):
    rows = generate_with_prefill(model, tokenizer, prompt, n, **how)
    return [(prompt + ids, [0] * len(prompt) + mask) for ids, mask in rows]

def generate_with_the_stop(model, tokenizer, prompt, n=1, **how):
    end = tokenizer.special["<|assistant_end|>"]
    return [(ids + [end], mask + [1]) for ids, mask in generate_with_prefill(model, tokenizer, prompt, n, **how)]

def generate_masks_nothing(model, tokenizer, prompt, n=1, **how):
    return [(ids, [1] * len(ids)) for ids, _ in generate_with_prefill(model, tokenizer, prompt, n, **how)]

def generate_copies_one_row(model, tokenizer, prompt, n=1, **how):
    return generate_with_prefill(model, tokenizer, prompt, 1, **how) * n

def generate_always_greedy(model, tokenizer, prompt, n=1, max_new_tokens=64, temperature=1.0, k=None, seed=0):
    return generate_with_prefill(model, tokenizer, prompt, n, max_new_tokens, 0)


# 8.7 Stop strings

def stream_by_search(pieces, stops):
    text, shown = "", 0
    for piece in pieces:
        text += piece
        ends = [text.index(stop) for stop in stops if stop in text]
        if ends:
            yield text[shown:min(ends)]
            return
        safe = len(text)
        for stop in stops:
            for n in range(len(stop) - 1, 0, -1):
                if text.endswith(stop[:n]):
                    safe = min(safe, len(text) - n)
                    break
        if safe > shown:
            yield text[shown:safe]
            shown = safe
    if text[shown:]: yield text[shown:]

def stream_by_character(pieces, stops):
    held = ""
    for character in (c for piece in pieces for c in piece):
        held += character
        complete = [stop for stop in stops if held.endswith(stop)]
        if complete:
            longest = max(map(len, complete))
            yield held[:len(held) - longest]
            return
        while held and not any(stop.startswith(held[i:]) for stop in stops for i in range(len(held))):
            yield held[0]
            held = held[1:]
        while held and not any(stop.startswith(held) for stop in stops):
            yield held[0]
            held = held[1:]
    yield held

class StreamObject:
    "An iterator with a state."
    def __init__(self, pieces, stops):
        self.pieces, self.stops, self.held, self.over = iter(pieces), stops, "", False

    def __iter__(self): return self

    def __next__(self):
        if self.over: raise StopIteration
        try: self.held += next(self.pieces)
        except StopIteration:
            self.over = True
            return self.held
        found = [self.held.find(stop) for stop in self.stops if stop in self.held]
        if found:
            self.over = True
            return self.held[:min(found)]
        keep = 0
        for stop in self.stops:
            for n in range(1, len(stop)):
                if self.held.endswith(stop[:n]): keep = max(keep, n)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return out

def stream_piece_by_piece(pieces, stops):
    for piece in pieces:
        found = [piece.find(stop) for stop in stops if stop in piece]
        if found:
            yield piece[:min(found)]
            return
        yield piece

def stream_holds_everything(pieces, stops):
    text = "".join(pieces)
    yield text[:min([text.find(stop) for stop in stops if stop in text], default=len(text))]

def stream_loses_the_end(pieces, stops): yield from list(stream_by_search([*pieces, "#"], [*stops, "#"]))[:-2]

def stream_first_stop_of_the_list(pieces, stops):
    text = "".join(pieces)
    for stop in stops:
        if stop in text: text = text[:text.find(stop)]; break
    yield text

def stream_holds_a_fixed_tail(pieces, stops):
    held, longest = "", max(map(len, stops))
    for piece in pieces:
        held += piece
        found = [held.find(stop) for stop in stops if stop in held]
        if found:
            yield held[:min(found)]
            return
        cut = max(0, len(held) - longest)
        yield held[:cut]
        held = held[cut:]
    yield held

def stream_returns_text(pieces, stops): return "".join(stream_by_search(pieces, stops))


# 8.8 Accept or correct

def accept_in_numpy(p, q, drafted, uniform):
    p, q, uniform = np.asarray(p), np.asarray(q), np.asarray(uniform)
    i = np.arange(len(drafted))
    fails = np.flatnonzero(uniform >= p[i, drafted] / q[i, drafted])
    if not len(fails): return len(drafted), p[-1]
    n = fails[0]
    left = np.maximum(p[n] - q[n], 0)
    return n, left / left.sum()

def accept_vectorised(p, q, drafted, uniform):
    ratio = (p[:-1].gather(1, drafted[:, None]) / q.gather(1, drafted[:, None])).squeeze(1)
    n = (uniform < ratio).long().cumprod(0).sum()
    left = p[n] - F.pad(q, (0, 0, 0, 1))[n]
    left = left.relu()
    return [n, left / left.sum()]

def accept_without_division(p, q, drafted, uniform):
    n = 0
    while n < len(drafted) and uniform[n] * q[n][drafted[n]] < p[n][drafted[n]]: n += 1
    if n == len(drafted): return torch.tensor(n), p[n].tolist()
    more = [max(a - b, 0.0) for a, b in zip(p[n].tolist(), q[n].tolist())]
    return torch.tensor(n), [m / sum(more) for m in more]

def accept_counts_all(p, q, drafted, uniform):
    i = torch.arange(len(drafted))
    return int((uniform < p[i, drafted] / q[i, drafted]).sum()), accept_in_numpy(p, q, drafted, uniform)[1]

def accept_draws_from_p(p, q, drafted, uniform):
    n = accept_in_numpy(p, q, drafted, uniform)[0]
    return n, p[n]

def accept_unscaled(p, q, drafted, uniform):
    n = int(accept_in_numpy(p, q, drafted, uniform)[0])
    return n, p[n] if n == len(drafted) else (p[n] - q[n]).clamp(min=0)

def accept_likelier_only(p, q, drafted, uniform):
    n = 0
    while n < len(drafted) and p[n, drafted[n]] >= q[n, drafted[n]]: n += 1
    return n, accept_in_numpy(p, q, drafted, uniform)[1]

def accept_the_other_way(p, q, drafted, uniform):
    n = 0
    while n < len(drafted) and uniform[n] < q[n, drafted[n]] / p[n, drafted[n]]: n += 1
    return n, p[n]

def accept_only_the_number(p, q, drafted, uniform): return accept_in_numpy(p, q, drafted, uniform)[0]


RIGHT = {
    "8.1": [append_by_loop, append_returns_a_list, append_through_numpy, append_by_scatter, append_by_mask],
    "8.2": [TupleInCache, ListsAndPosition, BufferWrittenInPlace, OffsetByRoll],
    "8.3": [bytes_in_numpy, bytes_by_reduce, bytes_of_a_tensor, bytes_as_float],
    "8.4": [top_k_by_scatter, top_k_in_numpy, top_k_by_loop, top_k_in_place_on_a_copy, top_k_renormalised],
    "8.5": [top_p_by_loop, top_p_in_numpy, top_p_by_scatter, top_p_of_numpy_bools, top_p_by_accumulate],
    "8.6": [generate_with_prefill, generate_with_row_objects, generate_drops_rows],
    "8.7": [stream_by_search, stream_by_character, StreamObject],
    "8.8": [accept_in_numpy, accept_vectorised, accept_without_division],
}

WRONG = {
    "8.1": [(append_changes_the_lengths, "only the cache is written to"), (append_to_a_copy, "in place"),
            (append_at_the_mean, "differ in length"), (append_one_early, "were written at the positions"),
            (append_first_head_everywhere, "its own numbers"), (append_forgets_the_return, "return")],
    "8.2": [(KeepsTheOffsetKey, "before its own offset"), (CountsFromZero, "position 0 again"),
            (NoCacheAtAll, "still empty"), (StateInTheLayer, "disturb each other"),
            (RereadsTheRow, "computed once"), (ReturnsTheCache, "return the output alone"),
            (NewTokensSeeEachOther, "a mask of"), (SeesTheFirstKeys, "`is_causal=True`"),
            (WithoutGradient, "no gradient")],
    "8.3": [(bytes_of_keys_only, "besides its key"), (numbers_instead_of_bytes, "not bytes"),
            (bytes_of_one_head, "multiply everything"), (bytes_as_text, "a number is expected")],
    "8.4": [(top_k_multiplies, "wrong way round"), (top_k_unscaled, "scaled up"),
            (top_k_of_the_batch, "its own k best"), (top_k_fills_with_zero, "its own k best"),
            (top_k_in_place, "logits were changed"), (top_k_overflows, "`exp` overflows"),
            (temperature_on_probabilities, "not the probabilities")],
    "8.5": [(top_p_without_the_crossing, "crosses p"), (top_p_unsorted, "would be enough"),
            (top_p_in_sorted_order, "together"), (top_p_above_p, "no token is left"),
            (top_p_keeps_all, "would be enough"), (top_p_as_indices, "answers for 4 tokens")],
    "8.6": [(generate_without_cache, "had no cache"), (generate_row_by_row, "one new token of every row"),
            (generate_ignores_tools, "the calculator writes"), (generate_same_seed_each_step, "new random numbers"),
            (generate_one_dictionary, "the same dictionary"), (generate_with_the_prompt, "begin with the prompt"),
            (generate_with_the_stop, "not part of the ids"), (generate_masks_nothing, "both marks included"),
            (generate_copies_one_row, "from the probabilities"), (generate_always_greedy, "from the probabilities")],
    "8.7": [(stream_piece_by_piece, "begin in one piece"), (stream_holds_everything, "hold back no more"),
            (stream_loses_the_end, "is expected"), (stream_first_stop_of_the_list, "hold back no more"),
            (stream_holds_a_fixed_tail, "hold back no more"), (stream_returns_text, "a generator")],
    "8.8": [(accept_counts_all, "is lost with it"), (accept_draws_from_p, "more than q"),
            (accept_unscaled, "more than q"), (accept_likelier_only, "are accepted"),
            (accept_the_other_way, "are accepted"), (accept_only_the_number, "two things")],
}
