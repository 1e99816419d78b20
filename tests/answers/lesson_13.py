"Answers to the exercises of lesson 13: right ones in many styles, and plausible wrong ones."
import copy
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F


def norm(x): return F.rms_norm(x, (x.shape[-1],), eps=1e-6)
def read(model, x): return 15 * torch.tanh(model.lm_head(norm(x)) / 15)


@contextmanager
def hooked(register, function):
    hook = register(function)
    try: yield
    finally: hook.remove()


# 13.1 · The logit lens

def lens_with_pre_hooks(model, ids):
    streams = []
    hooks = [block.register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0])) for block in model.blocks]
    last = model(ids)
    for hook in hooks: hook.remove()
    return torch.stack([read(model, x) for x in streams] + [last])


def lens_with_hooks_on_the_outputs(model, ids):
    streams = [norm(model.wte(ids))]
    hooks = [block.register_forward_hook(lambda block, inputs, output: streams.append(output)) for block in model.blocks]
    model(ids)
    [hook.remove() for hook in hooks]
    return [read(model, x) for x in streams]


def lens_by_hand_without_hooks(model, ids):
    x = norm(model.wte(ids))
    result = read(model, x)[None]
    for block in model.blocks:
        x = block(x)
        result = torch.cat([result, read(model, x)[None]])
    return result.double()


def lens_in_numpy(model, ids):
    x, rows = model.wte.weight[ids], []
    x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    for block in [*model.blocks, None]:
        h = x.detach().numpy()
        h = h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6)
        rows.append(15 * np.tanh(h @ model.lm_head.weight.detach().numpy().T / 15))
        if block is not None: x = block(x)
    return np.stack(rows)


def lens_with_fewer_and_fewer_blocks(model, ids): # a model cut off after k blocks
    short, rows = copy.deepcopy(model), ()
    for n in range(len(model.blocks) + 1):
        short.blocks = model.blocks[:n]
        rows += (short(ids),)
    return rows


def lens_without_the_norm(model, ids):
    return torch.stack([15 * torch.tanh(model.lm_head(x) / 15) for x in _streams(model, ids)])


def _streams(model, ids):
    streams = [norm(model.wte(ids))]
    for block in model.blocks: streams.append(block(streams[-1]))
    return streams


def lens_without_the_softcap(model, ids): return torch.stack([model.lm_head(norm(x)) for x in _streams(model, ids)])
def lens_without_the_first(model, ids): return torch.stack([read(model, x) for x in _streams(model, ids)[1:]])
def lens_of_probabilities(model, ids): return torch.stack([read(model, x).softmax(-1) for x in _streams(model, ids)])
def lens_backwards(model, ids): return torch.stack([read(model, x) for x in _streams(model, ids)[::-1]])


def lens_of_each_block_alone(model, ids): # what a block adds, not the stream
    streams = _streams(model, ids)
    return torch.stack([read(model, streams[0])] + [read(model, b - a) for a, b in zip(streams, streams[1:])])


def lens_with_hooks_left_behind(model, ids):
    streams = []
    for block in model.blocks: block.register_forward_pre_hook(lambda block, inputs: streams.append(inputs[0]))
    last = model(ids)
    return torch.stack([read(model, x) for x in streams] + [last])


# 13.2 · Patch the stream

def patch_with_two_hooks(model, clean, corrupted, layer, position):
    kept = {}
    def keep(block, inputs): kept["x"] = inputs[0]
    def swap(block, inputs):
        x = inputs[0].clone()
        x[:, position] = kept["x"][:, position]
        return (x, *inputs[1:])
    with hooked(model.blocks[layer].register_forward_pre_hook, keep): model(clean)
    with hooked(model.blocks[layer].register_forward_pre_hook, swap): return model(corrupted)


def patch_in_place_inside_the_hook(model, clean, corrupted, layer, position):
    block, kept = model.blocks[layer], []
    hook = block.register_forward_pre_hook(lambda block, inputs: kept.append(inputs[0].clone()))
    model(clean)
    hook.remove()
    def swap(block, inputs): inputs[0][:, position] = kept[0][:, position]
    hook = block.register_forward_pre_hook(swap)
    logits = model(corrupted)
    hook.remove()
    return logits.numpy()


def patch_by_hand(model, clean, corrupted, layer, position):
    x, c = norm(model.wte(corrupted)), norm(model.wte(clean))
    for i, block in enumerate(model.blocks):
        if i == layer:
            mask = (torch.arange(x.shape[1]) == position)[:, None]
            x = torch.where(mask, c, x)
        x, c = block(x), block(c)
    return read(model, x)


def patch_both_in_one_batch(model, clean, corrupted, layer, position): # the clean rows come first
    n = len(clean)
    def swap(block, inputs):
        x = inputs[0].clone()
        x[n:, position] = x[:n, position]
        return x
    hook = model.blocks[layer].register_forward_pre_hook(swap)
    try: return model(torch.cat([clean, corrupted]))[n:].tolist()
    finally: hook.remove()


def patch_the_block_before(model, clean, corrupted, layer, position): # its output is the same stream
    module = model.blocks[layer - 1] if layer else model.wte
    kept = []
    with hooked(module.register_forward_hook, lambda m, inputs, output: kept.append(output)): model(clean)
    def swap(m, inputs, output):
        output = output.clone()
        output[:, position, :] = kept[0][:, position, :]
        return output
    with hooked(module.register_forward_hook, swap): return model(corrupted).double()


def patch_that_returns_nothing_in_the_hook(model, clean, corrupted, layer, position):
    kept = []
    with hooked(model.blocks[layer].register_forward_pre_hook, lambda b, inputs: kept.append(inputs[0])): model(clean)
    def swap(block, inputs):
        x = inputs[0].clone()
        x[:, position] = kept[0][:, position]
    with hooked(model.blocks[layer].register_forward_pre_hook, swap): return model(corrupted)


def patch_the_wrong_way(model, clean, corrupted, layer, position):
    return patch_with_two_hooks(model, corrupted, clean, layer, position)


def patch_everything(model, clean, corrupted, layer, position):
    return patch_with_two_hooks(model, clean, corrupted, layer, slice(None))


def patch_after_the_block(model, clean, corrupted, layer, position):
    if layer + 1 == len(model.blocks): return patch_with_two_hooks(model, clean, corrupted, layer, position)
    return patch_with_two_hooks(model, clean, corrupted, layer + 1, position)


def patch_with_hooks_left_behind(model, clean, corrupted, layer, position):
    kept = []
    model.blocks[layer].register_forward_pre_hook(lambda b, inputs: kept.append(inputs[0]))
    model(clean)
    return patch_with_two_hooks(model, clean, corrupted, layer, position)


def patch_the_tokens(model, clean, corrupted, layer, position):
    corrupted[:, position] = clean[:, position]
    return model(corrupted)


def patch_from_this_position_on(model, clean, corrupted, layer, position):
    return patch_with_two_hooks(model, clean, corrupted, layer, slice(position, None))


# 13.3 · Score the heads

def scores_by_index(maps, period):
    t = torch.arange(period, maps.shape[-1])
    return maps[..., t, t - period + 1].mean(-1)


def scores_by_diagonal(maps, period): return torch.diagonal(maps, -(period - 1), dim1=-2, dim2=-1)[..., 1:].mean(dim=-1)


def scores_in_numpy(maps, period):
    maps = np.asarray(maps, dtype=np.float64)
    return np.mean([maps[..., t, t - period + 1] for t in range(period, maps.shape[-1])], axis=0)


def scores_with_a_mask(maps, period):
    T = maps.size(-1)
    t = torch.arange(T)
    mask = ((t[:, None] - t == period - 1) & (t[:, None] >= period)).double()
    return torch.einsum("...qk,qk->...", maps.double(), mask) / mask.sum()


def scores_in_nested_lists(maps, period):
    def of(block):
        if block.dim() > 2: return [of(part) for part in block]
        values = [block[t, t - period + 1].item() for t in range(period, len(block))]
        return sum(values) / len(values)
    return of(maps)


def scores_of_the_token_itself(maps, period):
    t = torch.arange(period, maps.shape[-1])
    return maps[..., t, t - period].mean(-1)


def scores_one_too_far(maps, period):
    t = torch.arange(period + 1, maps.shape[-1])
    return maps[..., t, t - period - 1].mean(-1)


def scores_of_all_queries(maps, period): return maps.diagonal(1 - period, -2, -1).mean(-1)


def scores_with_keys_and_queries_exchanged(maps, period):
    t = torch.arange(period, maps.shape[-1])
    return maps[..., t - period + 1, t].mean(-1)


def scores_summed(maps, period): return scores_by_index(maps, period) * (maps.shape[-1] - period)
def scores_over_all_tokens(maps, period): return scores_by_index(maps, period) * (maps.shape[-1] - period) / maps.shape[-1]
def scores_over_all_heads(maps, period): return scores_by_index(maps, period).mean()
def scores_at_their_best(maps, period): return maps.diagonal(1 - period, -2, -1)[..., 1:].amax(-1)


# 13.4 · Switch off a head

def silent_by_a_pre_hook(model, ids, layer, head, n_head):
    def silence(c_proj, inputs):
        y, = inputs
        y = y.clone()
        d = y.shape[-1] // n_head
        y[..., head * d:(head + 1) * d] = 0
        return y
    with hooked(model.blocks[layer].attn.c_proj.register_forward_pre_hook, silence): return model(ids)


def silent_by_its_columns(model, ids, layer, head, n_head):
    weight = model.blocks[layer].attn.c_proj.weight
    kept, d = weight.data.clone(), weight.shape[1] // n_head
    weight.data[:, head * d:head * d + d] = 0
    logits = model(ids)
    weight.data = kept
    return logits.numpy()


def silent_in_a_copy(model, ids, layer, head, n_head):
    model = copy.deepcopy(model)
    weight = model.blocks[layer].attn.c_proj.weight
    weight.data.view(len(weight), n_head, -1)[:, head] = 0
    return model(ids).tolist()


def silent_by_a_mask(model, ids, layer, head, n_head):
    mask = torch.ones(n_head)
    mask[head] = 0
    def silence(c_proj, inputs): return ((inputs[0].unflatten(-1, (n_head, -1)) * mask[:, None]).flatten(-2),)
    hook = model.blocks[layer].attn.c_proj.register_forward_pre_hook(silence)
    logits = model(ids)
    hook.remove()
    return logits


def silent_by_its_values(model, ids, layer, head, n_head): # a head of zero values has nothing to say
    def silence(c_v, inputs, output):
        return torch.cat([p * (i != head) for i, p in enumerate(output.chunk(n_head, -1))], -1)
    with hooked(model.blocks[layer].attn.c_v.register_forward_hook, silence): return model(ids).double()


def silent_whole_layer(model, ids, layer, head, n_head):
    with hooked(model.blocks[layer].attn.c_proj.register_forward_hook, lambda m, i, output: output * 0): return model(ids)


def silent_others(model, ids, layer, head, n_head):
    mask = torch.zeros(n_head)
    mask[head] = 1
    def silence(c_proj, inputs): return ((inputs[0].unflatten(-1, (n_head, -1)) * mask[:, None]).flatten(-2),)
    with hooked(model.blocks[layer].attn.c_proj.register_forward_pre_hook, silence): return model(ids)


def silent_one_channel(model, ids, layer, head, n_head):
    def silence(c_proj, inputs):
        y = inputs[0].clone()
        y[..., head] = 0
        return y
    with hooked(model.blocks[layer].attn.c_proj.register_forward_pre_hook, silence): return model(ids)


def silent_every_nth_channel(model, ids, layer, head, n_head):
    def silence(c_proj, inputs):
        y = inputs[0].clone()
        y[..., head::n_head] = 0
        return y
    with hooked(model.blocks[layer].attn.c_proj.register_forward_pre_hook, silence): return model(ids)


def silent_without_a_return(model, ids, layer, head, n_head):
    def silence(c_proj, inputs):
        y = inputs[0].clone()
        d = y.shape[-1] // n_head
        y[..., head * d:(head + 1) * d] = 0
    with hooked(model.blocks[layer].attn.c_proj.register_forward_pre_hook, silence): return model(ids)


def silent_for_ever(model, ids, layer, head, n_head):
    weight = model.blocks[layer].attn.c_proj.weight
    d = weight.shape[1] // n_head
    weight.data[:, head * d:(head + 1) * d] = 0
    return model(ids)


def silent_rows_of_the_matrix(model, ids, layer, head, n_head):
    def silence(c_proj, inputs, output):
        output = output.clone()
        d = output.shape[-1] // n_head
        output[..., head * d:(head + 1) * d] = 0
        return output
    with hooked(model.blocks[layer].attn.c_proj.register_forward_hook, silence): return model(ids)


RIGHT = {
    "13.1": [lens_with_pre_hooks, lens_with_hooks_on_the_outputs, lens_by_hand_without_hooks,
             lens_in_numpy, lens_with_fewer_and_fewer_blocks],
    "13.2": [patch_with_two_hooks, patch_in_place_inside_the_hook, patch_by_hand,
             patch_both_in_one_batch, patch_the_block_before],
    "13.3": [scores_by_index, scores_by_diagonal, scores_in_numpy, scores_with_a_mask,
             scores_in_nested_lists],
    "13.4": [silent_by_a_pre_hook, silent_by_its_columns, silent_in_a_copy, silent_by_a_mask,
             silent_by_its_values],
}

WRONG = {
    "13.1": [(lens_without_the_norm, "norm is missing"), (lens_without_the_softcap, "softcap is missing"),
             (lens_without_the_first, "before the first block"), (lens_of_probabilities, "probabilities"),
             (lens_backwards, "the model itself"), (lens_of_each_block_alone, "model itself"),
             (lens_with_hooks_left_behind, "remove()")],
    "13.2": [(patch_that_returns_nothing_in_the_hook, "*return*"), (patch_the_wrong_way, "exchanged"),
             (patch_everything, "only `[:, position]`"), (patch_after_the_block, "too late"),
             (patch_with_hooks_left_behind, "hook"), (patch_the_tokens, "changed"),
             (patch_from_this_position_on, "Only the vector")],
    "13.3": [(scores_of_the_token_itself, "after* it"), (scores_one_too_far, "before the last"),
             (scores_of_all_queries, "repetition only"), (scores_with_keys_and_queries_exchanged, "exchanged"),
             (scores_summed, "sums"), (scores_over_all_tokens, "mean of"), (scores_over_all_heads, "shape"),
             (scores_at_their_best, "mean of")],
    "13.4": [(silent_whole_layer, "whole layer"), (silent_others, "*other*"), (silent_one_channel, "this is one"),
             (silent_every_nth_channel, "side by side"), (silent_without_a_return, "*return*"),
             (silent_for_ever, "put them back"), (silent_rows_of_the_matrix, "input of `c_proj`")],
}
