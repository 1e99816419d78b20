"Answers to the exercises of lesson 5, as other people may write them."
import math

import numpy as np
import torch
import torch.nn.functional as F


# 5.1

def mean_loss(model, x, y): return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1)


def loop_over_a_zip(model, optimizer, batches, steps, multiplier, log=None):
    losses = []
    for step, (x, y) in zip(range(steps), batches):
        optimizer.zero_grad()
        loss = mean_loss(model, x, y)
        loss.backward()
        optimizer.step(multiplier=multiplier(step))
        losses += [loss.item()]
        if log is not None: log(step, loss.item())
    return losses


def loop_into_an_array(model, optimizer, batches, steps, multiplier, log=None):
    losses = np.zeros(steps)
    for i in range(steps):
        x, y = next(batches)
        logits = model(x)
        logits.retain_grad()
        loss = torch.nn.CrossEntropyLoss(ignore_index=-1)(logits.transpose(1, 2), y)
        model.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step(multiplier(i))
        losses[i] = float(loss.detach())
        (log or (lambda *_: None))(i, losses[i])
    return losses


def loop_while(model, optimizer, batches, steps, multiplier, log=None):
    step, losses = 0, []
    while step < steps:
        batch = next(batches)
        for p in model.parameters(): p.grad = None
        loss = mean_loss(model, *batch)
        torch.autograd.backward(loss)
        optimizer.step(torch.tensor(multiplier(step)))
        losses.append(loss.detach())
        if log: log(torch.tensor(step), loss.detach())
        step += 1
    return tuple(losses)


def loop_over_everything(model, optimizer, batches, steps, multiplier, log=None):
    losses = []
    for step, (x, y) in enumerate(batches):
        if step == steps: break
        loss = mean_loss(model, x, y)
        loss.backward()
        optimizer.step(multiplier(step))
        optimizer.zero_grad()
        losses.append(loss.item())
        if log: log(step=step, loss=losses[-1])
    return torch.tensor(losses)


def loop_by_a_generator(model, optimizer, batches, steps, multiplier, log=None):
    def one(step):
        optimizer.zero_grad()
        loss = mean_loss(model, *next(batches))
        loss.backward()
        optimizer.step(multiplier(step))
        if log: log(step, loss.item())
        return loss.item()
    return list(map(one, range(steps)))


def loop_without_emptying(model, optimizer, batches, steps, multiplier, log=None):
    losses = []
    for step in range(steps):
        loss = mean_loss(model, *next(batches))
        loss.backward()
        optimizer.step(multiplier(step))
        losses.append(loss.item())
    return losses


def loop_from_one(model, optimizer, batches, steps, multiplier, log=None):
    return loop_over_a_zip(model, optimizer, batches, steps, lambda step: multiplier(step + 1), log)


def loop_without_multiplier(model, optimizer, batches, steps, multiplier, log=None):
    return loop_over_a_zip(model, optimizer, batches, steps, lambda step: 1.0, log)


def loop_with_one_batch(model, optimizer, batches, steps, multiplier, log=None):
    one = next(batches)
    return loop_over_a_zip(model, optimizer, iter([one] * steps), steps, multiplier, log)


def loop_that_logs_before_the_step(model, optimizer, batches, steps, multiplier, log=None):
    losses = []
    for step in range(steps):
        loss = mean_loss(model, *next(batches))
        losses.append(loss.item())
        if log: log(step, losses[-1])
        loss.backward()
        optimizer.step(multiplier(step))
        optimizer.zero_grad()
    return losses


def loop_that_empties_too_late(model, optimizer, batches, steps, multiplier, log=None):
    losses = []
    for step in range(steps):
        loss = mean_loss(model, *next(batches))
        loss.backward()
        optimizer.zero_grad()
        optimizer.step(multiplier(step))
        losses.append(loss.item())
    return losses


def loop_that_keeps_graphs(model, optimizer, batches, steps, multiplier, log=None):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append(mean_loss(model, *next(batches)))
        losses[-1].backward()
        optimizer.step(multiplier(step))
    return losses


def loop_without_log(model, optimizer, batches, steps, multiplier, log=None):
    return loop_over_a_zip(model, optimizer, batches, steps, multiplier)


def loop_of_sums(model, optimizer, batches, steps, multiplier, log=None):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        x, y = next(batches)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum")
        loss.backward()
        optimizer.step(multiplier(step))
        losses.append(loss.item())
    return losses


def loop_one_short(model, optimizer, batches, steps, multiplier, log=None):
    return loop_over_a_zip(model, optimizer, batches, steps - 1, multiplier, log)


# 5.2

def accumulate_sums_of_the_library(model, parts):
    n = sum((y >= 0).sum() for _, y in parts)
    total = 0
    for x, y in parts:
        loss = model(x, y, loss_reduction="sum") / n
        loss.backward()
        total = total + loss.detach()
    return total


def accumulate_by_torch(model, parts):
    n, losses = sum(y.ge(0).sum().item() for _, y in parts), []
    for x, y in parts:
        total = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum")
        (total / n).backward()
        losses.append(total.item() / n)
    return np.sum(losses)


def accumulate_and_skip_the_empty(model, parts):
    full = [(x, y) for x, y in parts if (y != -1).any()]
    n = torch.cat([y.flatten() for _, y in full]).ne(-1).sum()
    loss = sum(mean_loss(model, x, y) * (y != -1).sum() for x, y in full) / n
    loss.backward()
    return loss


def accumulate_by_scaling_gradients(model, parts):
    "Adds sums, and divides what it added at the end."
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    for p in model.parameters(): p.grad = None
    n, total = 0, 0.0
    for x, y in parts:
        loss = model(x, y, loss_reduction="sum")
        loss.backward()
        total += loss.item()
        n += int((y >= 0).sum())
    for p, old in zip(model.parameters(), before):
        if p.grad is not None: p.grad /= n
        if old is not None: p.grad = old if p.grad is None else p.grad + old
    return np.float32(total / n)


def accumulate_token_by_token(model, parts):
    picked = []
    for x, y in parts:
        log_p = model(x).log_softmax(-1)
        picked += [log_p[b, t, y[b, t]] for b in range(len(y)) for t in range(y.shape[1]) if y[b, t] >= 0]
    loss = -torch.stack(picked).mean()
    loss.backward()
    return [loss.item()][0]


def accumulate_means(model, parts):
    total = 0.0
    for x, y in parts:
        loss = model(x, y) / len(parts)
        loss.backward()
        total += loss.item()
    return total


def accumulate_without_token_zero(model, parts):
    n, total = sum(int((y > 0).sum()) for _, y in parts), 0.0
    for x, y in parts:
        loss = model(x, torch.where(y > 0, y, -1), loss_reduction="sum") / n
        loss.backward()
        total += loss.item()
    return total


def accumulate_over_all_places(model, parts):
    n, total = sum(y.numel() for _, y in parts), 0.0
    for x, y in parts:
        loss = model(x, y, loss_reduction="sum") / n
        loss.backward()
        total += loss.item()
    return total


def accumulate_after_emptying(model, parts):
    model.zero_grad()
    return accumulate_by_torch(model, parts)


def accumulate_without_backward(model, parts):
    n = sum(int((y >= 0).sum()) for _, y in parts)
    with torch.no_grad(): return sum(model(x, y, loss_reduction="sum").item() for x, y in parts) / n


def accumulate_sums(model, parts):
    total = 0.0
    for x, y in parts:
        loss = model(x, y, loss_reduction="sum")
        loss.backward()
        total += loss.item()
    return total


def accumulate_nothing_by_nothing(model, parts):
    n, total = sum(int((y >= 0).sum()) for _, y in parts), 0.0
    for x, y in parts:
        loss = mean_loss(model, x, y) * int((y >= 0).sum()) / n # NaN · 0
        loss.backward()
        total += loss.item()
    return total


# 5.3

def bpb_in_numpy(nats, targets, token_bytes):
    nats, targets, token_bytes = nats.numpy(), targets.numpy(), token_bytes.numpy()
    asked = targets >= 0
    sizes = token_bytes[targets[asked]]
    return nats[asked][sizes > 0].sum() / np.log(2) / sizes.sum()


def bpb_by_a_loop(nats, targets, token_bytes):
    bits = size = 0
    for row, wanted in zip(nats.tolist(), targets.tolist()):
        for nat, target in zip(row, wanted):
            if target == -1 or token_bytes[target] == 0: continue
            bits += nat / math.log(2)
            size += int(token_bytes[target])
    return bits / size


def bpb_with_one_more_entry(nats, targets, token_bytes):
    n = torch.cat([token_bytes, torch.zeros(1, dtype=torch.int64)])[targets] # -1 is the entry of zero bytes
    return (nats * (n > 0)).sum() / (n.sum() * math.log(2))


def bpb_in_place_on_copies(nats, targets, token_bytes):
    nats, targets = nats.clone(), targets.clone()
    hidden = targets < 0
    targets[hidden] = 0
    sizes = token_bytes[targets]
    sizes[hidden] = 0
    nats[sizes == 0] = 0
    return torch.tensor([nats.sum() / sizes.sum() / np.log(2)])


def bpb_in_nats(*case): return bpb_by_a_loop(*case) * math.log(2)
def bpb_with_minus_one_as_an_index(nats, targets, token_bytes): return (nats[token_bytes[targets] > 0].sum() / token_bytes[targets].sum() / math.log(2)).item()
def bpb_as_a_mean_of_quotients(nats, targets, token_bytes):
    sizes = torch.where(targets >= 0, token_bytes[targets.clamp(min=0)], 0)
    return (nats[sizes > 0] / sizes[sizes > 0]).mean().item() / math.log(2)
def bpb_with_special_tokens(nats, targets, token_bytes):
    asked = targets >= 0
    return nats[asked].sum() / token_bytes[targets[asked]].sum() / math.log(2)
def bpb_for_each_token(nats, targets, token_bytes): return nats[targets >= 0].mean() / math.log(2)


# 5.4

def flops_by_a_loop(n_embd, vocab_size, windows, T):
    total = 6 * vocab_size * n_embd
    for window in windows:
        total += 72 * n_embd**2
        total += 12 * n_embd * (window if window < T else T)
    return total


def flops_in_numpy(n_embd, vocab_size, windows, T):
    return np.sum(72 * n_embd**2 + 12 * n_embd * np.minimum(windows, T)) + np.int64(6 * vocab_size * n_embd)


def flops_in_torch(n_embd, vocab_size, windows, T):
    w = torch.tensor(windows).clamp(max=T)
    return 6 * (len(w) * 12 * n_embd**2 + vocab_size * n_embd) + (12 * n_embd * w).sum()


def flops_in_place_on_a_copy(n_embd, vocab_size, windows, T):
    windows = [*windows]
    for i in range(len(windows)): windows[i] = min(windows[i], T)
    return float(3 * (2 * (vocab_size * n_embd + 12 * len(windows) * n_embd * n_embd) + 4 * n_embd * sum(windows)))


def flops_forward(*case): return flops_by_a_loop(*case) / 3
def flops_with_the_embedding(C, V, windows, T): return flops_by_a_loop(C, 2 * V, windows, T)
def flops_of_long_windows(C, V, windows, T): return flops_by_a_loop(C, V, windows, 10**9)
def flops_of_full_rows(C, V, windows, T): return flops_by_a_loop(C, V, [T] * len(windows), T)
def flops_without_attention(C, V, windows, T): return 6 * (12 * len(windows) * C * C + V * C)
def flops_of_half_the_attention(C, V, windows, T): return flops_without_attention(C, V, windows, T) + sum(6 * C * min(w, T) for w in windows)


# 5.5

def bought_as_an_array(dollars, machine, mfu, flops_per_token):
    hours = dollars / machine.count / machine.dollars_per_hour
    return np.array([hours, np.floor(hours * 3600 * machine.count * machine.peak_flops * mfu / flops_per_token)])


def bought_with_whole_division(dollars, machine, mfu, flops_per_token):
    gpu_hours = dollars / machine.dollars_per_hour
    return [gpu_hours / machine.count, gpu_hours * 3600 * machine.peak_flops * mfu // flops_per_token]


def bought_in_torch(dollars, machine, mfu, flops_per_token):
    hours = torch.tensor(dollars / (machine.count * machine.dollars_per_hour), dtype=torch.float64)
    return hours, (hours * 3600 * machine.count * machine.peak_flops * mfu / flops_per_token).long()


def bought_by_a_generator(dollars, machine, mfu, flops_per_token):
    hours = dollars / (machine.dollars_per_hour * machine.count)
    yield np.float64(hours)
    yield math.floor(hours * 3600 * mfu * machine.peak_flops * machine.count / flops_per_token)


def bought_on_one_gpu(dollars, machine, mfu, flops_per_token):
    hours = dollars / machine.dollars_per_hour
    return hours, int(hours * 3600 * machine.peak_flops * mfu / flops_per_token)


def bought_twice(dollars, machine, mfu, flops_per_token):
    hours, tokens = bought_as_an_array(dollars, machine, mfu, flops_per_token)
    return hours, tokens * machine.count


def bought_at_the_peak(dollars, machine, mfu, flops_per_token): return bought_as_an_array(dollars, machine, 1, flops_per_token)
def bought_in_minutes(*case): return bought_as_an_array(*case) * [1, 1 / 60]
def bought_and_rounded_up(*case):
    hours, tokens = bought_as_an_array(*case)
    return hours, tokens + 1
def bought_tokens_alone(*case): return bought_as_an_array(*case)[1]


RIGHT = {
    "5.1": [loop_that_logs_before_the_step, loop_over_a_zip, loop_into_an_array, loop_while, loop_over_everything, loop_by_a_generator],
    "5.2": [accumulate_sums_of_the_library, accumulate_by_torch, accumulate_and_skip_the_empty, accumulate_by_scaling_gradients, accumulate_token_by_token],
    "5.3": [bpb_in_numpy, bpb_by_a_loop, bpb_with_one_more_entry, bpb_in_place_on_copies],
    "5.4": [flops_by_a_loop, flops_in_numpy, flops_in_torch, flops_in_place_on_a_copy],
    "5.5": [bought_as_an_array, bought_with_whole_division, bought_in_torch, bought_by_a_generator],
}
WRONG = {
    "5.1": [(loop_without_emptying, "emptied"), (loop_from_one, "count from 0"), (loop_without_multiplier, "`multiplier(step)`"), (loop_with_one_batch, "a new batch"),
            (loop_that_empties_too_late, "no gradient"), (loop_that_keeps_graphs, "holds its graph"), (loop_without_log, "`log` was called 0 times"), (loop_of_sums, "mean cross-entropy"),
            (loop_one_short, "took 4 steps")],
    "5.2": [(accumulate_means, "in all parts together"), (accumulate_over_all_places, "in all parts together"), (accumulate_after_emptying, "was there before"),
            (accumulate_without_backward, "`backward`"), (accumulate_sums, "in all parts together"), (accumulate_nothing_by_nothing, "has no mean"),
            (accumulate_without_token_zero, "do not count")],
    "5.3": [(bpb_in_nats, "nats into bits"), (bpb_with_minus_one_as_an_index, "also an index"), (bpb_as_a_mean_of_quotients, "mean of quotients"), (bpb_with_special_tokens, "above the line"),
            (bpb_for_each_token, "sum of all bytes")],
    "5.4": [(flops_forward, "twice backward"), (flops_with_the_embedding, "looked up"), (flops_of_long_windows, "than the row has"), (flops_of_full_rows, "a window of 0"),
            (flops_without_attention, "layer by layer"), (flops_of_half_the_attention, "layer by layer")],
    "5.5": [(bought_on_one_gpu, "all of them run"), (bought_twice, "seconds × GPUs"), (bought_at_the_peak, "the share that is reached"), (bought_in_minutes, "seconds × GPUs"),
            (bought_and_rounded_up, "rounded down"), (bought_tokens_alone, "two numbers")],
}
