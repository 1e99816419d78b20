"""Answers to the exercises of lesson 11: right ones in several styles, and plausible wrong ones."""
import math
import struct

import numpy as np
import torch

# 11.1


def ring_with_copy_and_loop(data, step):
    after, ranks = data.copy(), len(data)
    for rank in range(ranks):
        chunk = (rank - step) % ranks
        after[(rank + 1) % ranks, chunk] += data[rank, chunk]
    return after


def ring_from_the_receiver(data, step):
    ranks = len(data)
    result = np.array(data)
    for me in range(ranks):
        left = (me - 1) % ranks
        c = (left - step) % ranks
        result[me, c] = result[me, c] + data[left, c]
    return result


def ring_vectorised_with_out(data, step):
    n = len(data)
    senders = np.arange(n)
    chunks = (senders - step) % n
    after = np.empty_like(data)
    np.copyto(after, data)
    receivers = (senders + 1) % n
    after[receivers, chunks] = np.add(after[receivers, chunks], data[senders, chunks])
    return after


def ring_in_torch(data, step):
    state = torch.as_tensor(data)
    after, n = state.clone(), state.shape[0]
    for rank in range(n):
        after[(rank + 1) % n, (rank - step) % n].add_(state[rank, (rank - step) % n])
    return after


def ring_as_nested_lists(data, step):
    rows = [[list(map(float, chunk)) for chunk in rank] for rank in data]
    n = len(rows)
    sent = [rows[r][(r - step) % n] for r in range(n)]
    sent = [chunk[:] for chunk in sent]
    for r in range(n):
        target = rows[(r + 1) % n][(r - step) % n]
        for i, x in enumerate(sent[r]): target[i] += x
    return rows


def ring_list_of_arrays(data, step):
    n = len(data)
    return [np.stack([data[r, c] + (data[r - 1, c] if c == (r - 1 - step) % n else 0) for c in range(n)])
            for r in range(n)]


def ring_list_of_tensors(data, step):
    return [torch.tensor(of_rank) for of_rank in ring_with_copy_and_loop(data, step)]


def ring_in_float32(data, step): return ring_with_copy_and_loop(data.astype(np.float32), step)


def ring_writes_into_data(data, step):
    n = len(data)
    for rank in range(n): data[(rank + 1) % n, (rank - step) % n] += data[rank, (rank - step) % n]
    return data


def ring_replaces(data, step):
    after, n = data.copy(), len(data)
    for rank in range(n): after[(rank + 1) % n, (rank - step) % n] = data[rank, (rank - step) % n]
    return after


def ring_backwards(data, step):
    after, n = data.copy(), len(data)
    for rank in range(n): after[(rank - 1) % n, (rank - step) % n] += data[rank, (rank - step) % n]
    return after


def ring_wrong_chunk(data, step):
    after, n = data.copy(), len(data)
    for rank in range(n): after[(rank + 1) % n, (rank + step) % n] += data[rank, (rank + step) % n]
    return after


def ring_without_the_last(data, step):
    after, n = data.copy(), len(data)
    for rank in range(n - 1): after[rank + 1, (rank - step) % n] += data[rank, (rank - step) % n]
    return after


def ring_of_whole_numbers(data, step): return ring_with_copy_and_loop(data.astype(int), step)


def ring_forgets_return(data, step):
    ring_with_copy_and_loop(data, step)


# 11.2


def zero_with_ceil(params, ranks, stage):
    share = math.ceil(params / ranks)
    weights = share if stage >= 3 else params
    gradients = share if stage >= 2 else params
    state = share if stage >= 1 else params
    return 2 * weights + 2 * gradients + 12 * state


def zero_with_a_table(params, ranks, stage):
    share = (params + ranks - 1) // ranks
    whole, cut = {0: (16, 0), 1: (4, 12), 2: (2, 14), 3: (0, 16)}[stage]
    return whole * params + cut * share


def zero_in_numpy(params, ranks, stage):
    share = np.ceil(params / ranks)
    bytes_each = np.array([2, 2, 12])
    return np.sum(bytes_each * np.where(np.array([3, 2, 1]) <= stage, share, params))


def zero_as_float(params, ranks, stage): return float(zero_with_ceil(params, ranks, stage))


def zero_as_tensor(params, ranks, stage): return torch.tensor([zero_with_ceil(params, ranks, stage)], dtype=torch.float32)


def zero_by_cases(params, ranks, stage):
    share = params // ranks + (params % ranks > 0)
    if stage == 0: return params * 16
    if stage == 1: return params * 4 + share * 12
    if stage == 2: return params * 2 + share * 14
    return share * 16


def zero_rounds_down(params, ranks, stage): return zero_with_ceil(params // ranks * ranks, ranks, stage)


def zero_all_at_once(params, ranks, stage): return 16 * params if stage == 0 else 16 * math.ceil(params / ranks)


def zero_gradients_first(params, ranks, stage):
    share = math.ceil(params / ranks)
    gradients, state = (share if stage >= first else params for first in (1, 2))
    return 2 * (share if stage >= 3 else params) + 2 * gradients + 12 * state


def zero_forgets_weights(params, ranks, stage): return zero_with_ceil(params, ranks, min(stage, 2))


def zero_state_of_eight(params, ranks, stage):
    share = math.ceil(params / ranks)
    weights, gradients, state = (share if stage >= first else params for first in (3, 2, 1))
    return 2 * weights + 2 * gradients + 8 * state


# 11.3


def bf16_with_frexp(x):
    m, e = math.frexp(x)
    return math.ldexp(round(m * 256), e - 8)


def bf16_by_bits(x):
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    bits += 0x7FFF + ((bits >> 16) & 1)
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def bf16_with_numpy(x):
    m, e = np.frexp(x)
    return np.ldexp(np.rint(m * 2.0**8), e - 8)


def bf16_as_float32(x): return np.float32(bf16_with_frexp(x))


def bf16_by_torch(x): return torch.tensor(x, dtype=torch.float64).to(torch.bfloat16)


def bf16_with_log2(x):
    if x == 0: return 0.0
    step = 2.0 ** (math.floor(math.log2(abs(x))) - 7)
    return round(x / step) * step


def bf16_with_a_loop(x):
    if x == 0: return x
    sign, size, scale = math.copysign(1, x), abs(x), 0
    while size >= 256: size, scale = size / 2, scale + 1
    while size < 128: size, scale = size * 2, scale - 1
    whole, rest = divmod(size, 1)
    if rest > 0.5 or rest == 0.5 and whole % 2: whole += 1
    return sign * whole * 2.0**scale


def bf16_seven_bits(x):
    m, e = math.frexp(x)
    return math.ldexp(round(m * 2**7), e - 7)


def bf16_truncated(x):
    m, e = math.frexp(x)
    return math.ldexp(int(m * 2**8), e - 8)


def bf16_truncated_bits(x):
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    return struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]


def bf16_half_up(x):
    m, e = math.frexp(x)
    return math.ldexp(math.floor(m * 2**8 + 0.5), e - 8)


def bf16_is_fp16(x): return float(np.float16(x))


def bf16_fixed_point(x): return round(x * 128) / 128


def bf16_three_digits(x): return float(f"{x:.3g}")


# 11.4


def online_in_numpy(scores, values, block):
    largest, total, output = -np.inf, 0.0, np.zeros(values.shape[1])
    for start in range(0, len(scores), block):
        s, v = scores[start:start + block], values[start:start + block]
        new = max(largest, s.max())
        p, rescale = np.exp(s - new), np.exp(largest - new)
        total, output, largest = total * rescale + p.sum(), output * rescale + p @ v, new
    return output / total


def online_exp_with_out(scores, values, block):
    m, z, o = -np.inf, 0.0, np.zeros(values.shape[1])
    for i in range(0, scores.shape[0], block):
        b = scores[i:i + block]
        n = np.maximum(m, b.max())
        p = np.empty_like(b)
        np.exp(b - n, out=p)
        c = np.exp(m - n)
        z = z * c + p.sum()
        o *= c
        np.add(o, p @ values[i:i + block], out=o)
        m = n
    return o / z


def online_in_place(scores, values, block):
    m, z, o = -np.inf, 0.0, np.zeros_like(values[0])
    for i in range(0, len(scores), block):
        p = scores[i:i + block].copy()
        n = max(m, float(np.max(p)))
        np.subtract(p, n, out=p)
        np.exp(p, out=p)
        c = math.exp(m - n)
        z *= c
        z += p.sum()
        np.multiply(o, c, out=o)
        o += values[i:i + block].T @ p
        m = n
    o /= z
    return o


def online_score_by_score(scores, values, block):
    m, z, o = -math.inf, 0.0, [0.0] * len(values[0])
    for s, v in zip(scores.tolist(), values.tolist()):
        n = max(m, s)
        c, p = math.exp(m - n), math.exp(s - n)
        z = z * c + p
        o = [a * c + p * b for a, b in zip(o, v)]
        m = n
    return [a / z for a in o]


def online_in_torch(scores, values, block):
    m, z, o = torch.tensor(-torch.inf), torch.tensor(0.0), torch.zeros(values.shape[1], dtype=torch.float64)
    for s, v in zip(torch.from_numpy(scores).split(block), torch.from_numpy(values).split(block)):
        n = torch.maximum(m, s.max())
        p, c = torch.exp(s - n), torch.exp(m - n)
        z, o, m = z * c + p.sum(), o.mul(c).add_(p @ v), n
    return o.div_(z)


def online_of_copied_arrays(scores, values, block):
    scores, values = np.array(scores, dtype=np.float64), np.array(values, dtype=np.float64)
    return online_in_numpy(scores, values, block)


def online_in_float32(scores, values, block): return online_in_numpy(scores.astype(np.float32), values.astype(np.float32), block)


def online_with_logsumexp(scores, values, block):
    lse, out = -np.inf, np.zeros(values.shape[1])
    for start in range(0, len(scores), block):
        s = scores[start:start + block]
        top = s.max()
        new = np.logaddexp(lse, top + np.log(np.exp(s - top).sum()))
        out = out * np.exp(lse - new) + np.exp(s - new) @ values[start:start + block]
        lse = new
    return out


def online_already_divided(scores, values, block):
    m, z, mean = scores[0], 0.0, 0.0
    while len(scores):
        s, v, scores, values = scores[:block], values[:block], scores[block:], values[block:]
        n = max(m, max(s))
        old, p = z * np.exp(m - n), np.exp(s - n)
        z, m = old + p.sum(), n
        mean = (mean * old + (p[:, None] * v).sum(axis=0)) / z
    return mean


def online_merged_at_the_end(scores, values, block):
    parts = []
    for start in range(0, len(scores), block):
        s = scores[start:start + block]
        p = np.exp(s - s.max())
        parts.append((s.max(), p.sum(), p @ values[start:start + block]))
    top = max(m for m, _, _ in parts)
    return sum(np.exp(m - top) * o for m, _, o in parts) / sum(np.exp(m - top) * z for m, z, _ in parts)


def whole_row(scores, values, block):
    p = np.exp(scores - scores.max())
    return p @ values / p.sum()


def whole_row_as_plain_array(scores, values, block):
    return whole_row(np.asarray(scores), np.asarray(values), block)


def whole_row_by_torch(scores, values, block):
    p = torch.softmax(torch.tensor(np.asarray(scores)), dim=0)
    return (p @ torch.tensor(np.asarray(values))).numpy()


def whole_row_in_python(scores, values, block):
    m = max(scores)
    p = [math.exp(s - m) for s in scores]
    return [sum(w * v[i] for w, v in zip(p, values)) / sum(p) for i in range(len(values[0]))]


def two_passes(scores, values, block):
    m, z, o = scores.max(), 0.0, 0.0
    for start in range(0, len(scores), block):
        p = np.exp(scores[start:start + block] - m)
        z, o = z + p.sum(), o + p @ values[start:start + block]
    return o / z


def never_rescaled(scores, values, block):
    m, z, o = -np.inf, 0.0, np.zeros(values.shape[1])
    for start in range(0, len(scores), block):
        s = scores[start:start + block]
        m = max(m, s.max())
        p = np.exp(s - m)
        z, o = z + p.sum(), o + p @ values[start:start + block]
    return o / z


def output_not_rescaled(scores, values, block):
    m, z, o = -np.inf, 0.0, np.zeros(values.shape[1])
    for start in range(0, len(scores), block):
        s = scores[start:start + block]
        n = max(m, s.max())
        p = np.exp(s - n)
        z, o, m = z * np.exp(m - n) + p.sum(), o + p @ values[start:start + block], n
    return o / z


def plain_exponentials(scores, values, block):
    z, o = 0.0, np.zeros(values.shape[1])
    for start in range(0, len(scores), block):
        p = np.exp(scores[start:start + block])
        z, o = z + p.sum(), o + p @ values[start:start + block]
    return o / z


def largest_of_the_block(scores, values, block):
    m, z, o = -np.inf, 0.0, np.zeros(values.shape[1])
    for start in range(0, len(scores), block):
        s = scores[start:start + block]
        p, c, m = np.exp(s - s.max()), np.exp(m - s.max()), s.max()
        z, o = z * c + p.sum(), o * c + p @ values[start:start + block]
    return o / z


def last_block_dropped(scores, values, block):
    whole = len(scores) // block * block or len(scores)
    return online_in_numpy(scores[:whole], values[:whole], block)


RIGHT = {
    "11.1": [ring_with_copy_and_loop, ring_from_the_receiver, ring_vectorised_with_out, ring_in_torch,
             ring_as_nested_lists, ring_list_of_arrays, ring_list_of_tensors, ring_in_float32],
    "11.2": [zero_with_ceil, zero_with_a_table, zero_in_numpy, zero_as_float, zero_as_tensor, zero_by_cases],
    "11.3": [bf16_with_frexp, bf16_by_bits, bf16_with_numpy, bf16_as_float32, bf16_by_torch, bf16_with_log2,
             bf16_with_a_loop],
    "11.4": [online_in_numpy, online_exp_with_out, online_in_place, online_score_by_score, online_in_torch,
             online_of_copied_arrays, online_in_float32, online_with_logsumexp, online_already_divided,
             online_merged_at_the_end],
}

WRONG = {
    "11.1": [(ring_writes_into_data, "copy"), (ring_replaces, "adds"), (ring_backwards, "other chunks"),
             (ring_wrong_chunk, "other chunks"), (ring_without_the_last, "exactly one"),
             (ring_of_whole_numbers, "chunks changed"), (ring_forgets_return, "return")],
    "11.2": [(zero_rounds_down, "rounded up"), (zero_all_at_once, "stage 1"), (zero_gradients_first, "optimizer's state"),
             (zero_forgets_weights, "everything"), (zero_state_of_eight, "2 + 2 + 12")],
    "11.3": [(bf16_seven_bits, "eight significant bits or fewer"), (bf16_truncated, "nearest"),
             (bf16_truncated_bits, "nearest"), (bf16_half_up, "tie"), (bf16_is_fp16, "Eight significant bits"),
             (bf16_fixed_point, "size"), (bf16_three_digits, "fewer")],
    "11.4": [(whole_row, "whole row"), (whole_row_as_plain_array, "whole row"), (whole_row_by_torch, "whole row"),
             (whole_row_in_python, "whole row"), (two_passes, "so far"), (never_rescaled, "corrected"),
             (output_not_rescaled, "corrected"), (plain_exponentials, "not finite"), (largest_of_the_block, "largest score so far"), (last_block_dropped, "shorter")],
}
