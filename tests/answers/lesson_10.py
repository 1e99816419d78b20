"Answers to the exercises of lesson 10, right and wrong, in the styles of different people."
import bisect
import itertools
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.lab.exercises.chat import render


# 10.1: pairs

def pairs_as_a_set(records):
    thumb, gone = {}, defaultdict(set)
    for r in records:
        if r["rating"]: thumb[r["prompt"], r["answer"]] = r["rating"]
        gone[r["prompt"]].update(r["instead_of"])
    result = set()
    for (q, a), rating in thumb.items():
        if rating != 1: continue
        down = {other for (p, other), rating in thumb.items() if p == q and rating == -1}
        down |= {other for other in gone[q] if (q, other) not in thumb}
        result |= {(q, a, other) for other in down}
    return result


def pairs_by_a_generator(records):
    prompts = list(dict.fromkeys(r["prompt"] for r in records))
    for q in prompts:
        rating = {}
        for r in (r for r in records if r["prompt"] == q):
            for other in r["instead_of"]: rating.setdefault(other, 0)
            if r["rating"] != 0: rating[r["answer"]] = r["rating"]
        up = [a for a in rating if rating[a] > 0]
        down = [a for a in rating if rating[a] <= 0]
        yield from ([q, u, d] for u, d in itertools.product(up, down))


def pairs_as_an_array(records):
    found = []
    last = {(r["prompt"], r["answer"]): r["rating"] for r in records if r["rating"]}
    for q, a in last:
        if last[q, a] == 1:
            lost = [b for p, b in last if p == q and last[p, b] == -1]
            lost += [b for r in records if r["prompt"] == q for b in r["instead_of"] if (q, b) not in last]
            found.extend((q, a, b) for b in dict.fromkeys(lost))
    return np.array(found, dtype=object).reshape(-1, 3)


def pairs_across_prompts(records):
    down = [r["answer"] for r in records if r["rating"] == -1]
    return [(r["prompt"], r["answer"], d) for r in records if r["rating"] == 1 for d in down]


def pairs_of_thumbs_only(records):
    last = {(r["prompt"], r["answer"]): r["rating"] for r in records if r["rating"]}
    return [(q, a, b) for (q, a), x in last.items() for (p, b), y in last.items() if p == q and x == 1 and y == -1]


def pairs_of_regenerated_only(records):
    return [(r["prompt"], r["answer"], other) for r in records if r["rating"] == 1 for other in r["instead_of"]]


def pairs_over_its_own_instead_of(records):
    last = {(r["prompt"], r["answer"]): r["rating"] for r in records if r["rating"]}
    own = [(r["prompt"], r["answer"], b) for r in records for b in r["instead_of"] if last.get((r["prompt"], r["answer"])) == 1 and (r["prompt"], b) not in last]
    return list(dict.fromkeys(own + pairs_of_thumbs_only(records)))


def pairs_forget_a_discarded_answer(records): # if it is seen again
    state = {}
    for r in records:
        for other in r["instead_of"]: state.setdefault((r["prompt"], other), -1)
        here = r["prompt"], r["answer"]
        if r["rating"]: state[here] = r["rating"]
        elif state.get(here) == -1: del state[here]
    return [(q, a, b) for (q, a), x in state.items() for (p, b), y in state.items() if p == q and x == 1 and y == -1]


def pairs_discarded_anywhere(records):
    last = {(r["prompt"], r["answer"]): r["rating"] for r in records if r["rating"]}
    gone = {b for r in records for b in r["instead_of"]}
    seen = {(r["prompt"], a) for r in records for a in [r["answer"], *r["instead_of"]]}
    return [(q, a, b) for (q, a), x in last.items() for p, b in seen if x == 1 and p == q and (last.get((q, b)) == -1 or (q, b) not in last and b in gone)]


def pairs_twice(records): return list(pairs_by_a_generator(records)) * 2


def pairs_of_two(records): return [(a, b) for _, a, b in pairs_by_a_generator(records)]


# 10.2: Bradley–Terry

def bt_softplus(strengths, winners, losers): return F.softplus(strengths[losers] - strengths[winners]).mean()


def bt_loop(strengths, winners, losers):
    total = 0
    for w, l in zip(winners.tolist(), losers.tolist()): total = total - F.logsigmoid(strengths[w] - strengths[l])
    return total / len(winners)


def bt_cross_entropy(strengths, winners, losers):
    both = torch.stack([strengths[winners], strengths[losers]], 1)
    return F.cross_entropy(both, torch.zeros(len(winners), dtype=torch.long))


def bt_logaddexp(strengths, winners, losers):
    s = strengths.double()
    return (torch.logaddexp(s[winners], s[losers]) - s[winners]).mean().reshape(1)


def bt_swapped(strengths, winners, losers): return bt_softplus(strengths, losers, winners)


def bt_sum(strengths, winners, losers): return bt_softplus(strengths, winners, losers) * len(winners)


def bt_log_of_sigmoid(strengths, winners, losers): return -torch.log(torch.sigmoid(strengths[winners] - strengths[losers])).mean()


def bt_detached(strengths, winners, losers): return bt_softplus(strengths, winners, losers).detach()


def bt_clamped(strengths, winners, losers): return -torch.sigmoid(strengths[winners] - strengths[losers]).clamp(min=1e-9).log().mean()


# 10.3: log-probability of an answer

def logprob_cross_entropy(logits, ids, mask):
    nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return -(nll * mask[:, 1:].float()).sum(dim=-1)


def logprob_numpy(logits, ids, mask):
    x = logits.double().numpy()
    x = x - np.logaddexp.reduce(x, axis=-1, keepdims=True)
    rows, cols = np.arange(len(ids))[:, None], np.arange(ids.shape[1] - 1)[None]
    return (x[rows, cols, ids.numpy()[:, 1:]] * mask.numpy()[:, 1:]).sum(1)


def logprob_loop(logits, ids, mask):
    sums = []
    for b in range(len(ids)):
        total = torch.zeros(())
        for t in range(1, ids.shape[1]):
            if mask[b, t] == 1: total = total + torch.log_softmax(logits[b, t - 1], -1)[ids[b, t]]
        sums.append(total)
    return sums


def logprob_plain_numbers(logits, ids, mask):
    log_p = logits.log_softmax(-1)
    return [sum(log_p[b, t - 1, ids[b, t]].item() for t in range(1, ids.size(1)) if mask[b, t]) for b in range(ids.size(0))]


def logprob_one_hot_in_place(logits, ids, mask):
    chosen = F.one_hot(ids[:, 1:], logits.shape[-1]).to(logits.dtype)
    chosen *= mask[:, 1:, None]
    return torch.einsum("btv,btv->b", logits[:, :-1].log_softmax(-1), chosen)


def logprob_same_place(logits, ids, mask): return (logits.log_softmax(-1).gather(2, ids[..., None])[..., 0] * mask).sum(1)


def logprob_mask_not_moved(logits, ids, mask):
    return (logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask[:, :-1]).sum(1)


def logprob_squeezed(logits, ids, mask):
    return (logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze() * mask[:, 1:]).sum(1)


def logprob_mean(logits, ids, mask): return logprob_cross_entropy(logits, ids, mask) / mask.sum(1).clamp(min=1)


def logprob_without_softmax(logits, ids, mask): return (logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]).sum(1)


def logprob_of_everything(logits, ids, mask): return logprob_cross_entropy(logits, ids, torch.ones_like(mask))


# 10.4: DPO

def dpo_softplus(chosen, rejected, reference_chosen, reference_rejected, beta):
    return F.softplus(-beta * (chosen - rejected - reference_chosen + reference_rejected)).mean()


def dpo_loop(chosen, rejected, reference_chosen, reference_rejected, beta):
    losses = []
    for c, r, a, b in zip(chosen, rejected, reference_chosen, reference_rejected):
        losses.append(-F.logsigmoid(beta * (c - a) - beta * (r - b)))
    return sum(losses) / len(losses)


def dpo_cross_entropy(chosen, rejected, reference_chosen, reference_rejected, beta):
    rewards = beta * torch.stack([chosen - reference_chosen, rejected - reference_rejected], dim=1)
    return F.cross_entropy(rewards, torch.zeros(len(chosen), dtype=torch.long))


def dpo_binary(chosen, rejected, reference_chosen, reference_rejected, beta):
    logits = beta * ((chosen - rejected) - (reference_chosen - reference_rejected))
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))


def dpo_without_reference(chosen, rejected, reference_chosen, reference_rejected, beta): return -F.logsigmoid(beta * (chosen - rejected)).mean()


def dpo_swapped(chosen, rejected, reference_chosen, reference_rejected, beta):
    return dpo_softplus(rejected, chosen, reference_rejected, reference_chosen, beta)


def dpo_without_beta(chosen, rejected, reference_chosen, reference_rejected, beta):
    return dpo_softplus(chosen, rejected, reference_chosen, reference_rejected, 1.0)


def dpo_log_of_sigmoid(chosen, rejected, reference_chosen, reference_rejected, beta):
    return -torch.sigmoid(beta * (chosen - rejected - reference_chosen + reference_rejected)).log().mean()


def dpo_of_chosen_alone(chosen, rejected, reference_chosen, reference_rejected, beta):
    return dpo_softplus(chosen, rejected.detach(), reference_chosen, reference_rejected, beta)


def dpo_sum(chosen, rejected, reference_chosen, reference_rejected, beta):
    return len(chosen) * dpo_softplus(chosen, rejected, reference_chosen, reference_rejected, beta)


# 10.5: one step

def rows_of(tokenizer, pair, answer):
    conversation = {"messages": pair[0]["messages"] + [{"role": "assistant", "content": pair[answer]}]}
    return render(conversation, tokenizer.encode, lambda name: tokenizer.special[name])


def logprob_of(model, ids, mask):
    x = torch.tensor([list(ids)])
    nll = F.cross_entropy(model(x)[0, :-1], x[0, 1:], reduction="none")
    return -(nll * torch.tensor(list(mask))[1:]).sum()


def step_pair_by_pair(model, reference, tokenizer, optimizer, pairs, beta=0.1, multiplier=1.0):
    optimizer.zero_grad()
    total = 0.0
    for pair in pairs:
        chosen, rejected = rows_of(tokenizer, pair, 1), rows_of(tokenizer, pair, 2)
        with torch.inference_mode(): old = (logprob_of(reference, *chosen) - logprob_of(reference, *rejected)).item()
        loss = F.softplus(-beta * (logprob_of(model, *chosen) - logprob_of(model, *rejected) - old)) / len(pairs)
        loss.backward()
        total += loss.item()
    optimizer.step(multiplier)
    return total


def step_chosen_then_rejected(model, reference, tokenizer, optimizer, pairs, beta=0.1, multiplier=1.0):
    def scores(net, side):
        rows = [rows_of(tokenizer, pair, side) for pair in pairs]
        x = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids, _ in rows], batch_first=True)
        m = torch.nn.utils.rnn.pad_sequence([torch.tensor(mask) for _, mask in rows], batch_first=True)
        log_p = net(x).log_softmax(-1)[:, :-1]
        return (torch.take_along_dim(log_p, x[:, 1:, None], dim=2)[..., 0] * m[:, 1:]).sum(1)
    moved = [scores(model, side) - scores(reference, side).detach() for side in (1, 2)]
    loss = -F.logsigmoid(beta * (moved[0] - moved[1])).mean()
    model.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step(multiplier=multiplier)
    return loss.detach()


def step_whole_rows(model, reference, tokenizer, optimizer, pairs, beta=0.1, multiplier=1.0):
    # the prompt is the same on both sides: its log-probability cancels
    margins = []
    for conversation, *texts in pairs:
        both = []
        for text in texts:
            ids, _ = render({"messages": [*conversation["messages"], {"role": "assistant", "content": text}]}, tokenizer.encode, tokenizer.special.get)
            ones = [1] * len(ids)
            with torch.no_grad(): old = logprob_of(reference, ids, ones)
            both.append(logprob_of(model, ids, ones) - old)
        margins.append(beta * (both[0] - both[1]))
    loss = F.softplus(-torch.stack(margins)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(multiplier)
    return np.float64(loss.item())


def step_with_another_result(result, no_gradient=torch.no_grad):
    def step(model, reference, tokenizer, optimizer, pairs, beta=0.1, multiplier=1.0):
        def loss_of_pairs():
            margins = []
            for pair in pairs:
                sides = [rows_of(tokenizer, pair, k) for k in (1, 2)]
                with no_gradient(): old = [logprob_of(reference, *side) for side in sides]
                new = [logprob_of(model, *side) for side in sides]
                margins.append(beta * (new[0] - old[0] - new[1] + old[1]))
            return -F.logsigmoid(torch.stack(margins)).mean()
        loss = loss_of_pairs()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step(multiplier)
        return result(loss, loss_of_pairs)
    return step


def wrong_step(swap=False, use_reference=True, use_beta=True, zero=True, use_multiplier=True, end=True, steps=1, mean=True):
    def step(model, reference, tokenizer, optimizer, pairs, beta=0.1, multiplier=1.0):
        losses = []
        for pair in pairs:
            sides = [rows_of(tokenizer, pair, k) for k in ((2, 1) if swap else (1, 2))]
            if not end: sides = [(ids[:-1], mask[:-1]) for ids, mask in sides]
            with torch.no_grad(): old = [logprob_of(reference, *side) * use_reference for side in sides]
            new = [logprob_of(model, *side) for side in sides]
            losses.append(-F.logsigmoid((beta if use_beta else 1) * (new[0] - old[0] - new[1] + old[1])))
        loss = sum(losses) / (len(losses) if mean else 1)
        if zero: optimizer.zero_grad()
        loss.backward()
        for _ in range(steps): optimizer.step(*[multiplier] * use_multiplier)
        return loss.item()
    return step


# 10.6: a threshold

def leaks_by_sorting(harmful, harmless, limit):
    harmful, harmless = sorted(harmful), sorted(harmless)
    best = len(harmful)
    for t in harmful:
        refused = len(harmless) - bisect.bisect_left(harmless, t)
        if refused <= limit * len(harmless) + 1e-12: best = min(best, bisect.bisect_left(harmful, t))
    return best / len(harmful)


def leaks_in_numpy(harmful, harmless, limit):
    a, b = np.asarray(harmful, float), np.asarray(harmless, float)
    t = np.r_[a, np.inf]
    allowed = (b[None] >= t[:, None]).mean(1) <= limit + 1e-12
    return (a[None] < t[:, None]).mean(1)[allowed].min()


def leaks_in_torch(harmful, harmless, limit):
    a, b = torch.tensor(harmful, dtype=torch.float64), torch.tensor(harmless, dtype=torch.float64)
    worst = b.sort(descending=True).values
    k = int(limit * len(b) + 1e-9)
    return (a <= worst[k]).float().mean() if k < len(b) else torch.tensor(0.0)


def leaks_in_place(harmful, harmless, limit):
    order, best = list(harmless), 1.0
    order += list(harmful)
    order.sort(reverse=True)
    for t in order:
        if sum(1 for s in harmless if s >= t) > limit * len(harmless) + 1e-12: break
        best = sum(1 for s in harmful if s < t) / len(harmful)
    return best


def refuses_above_only(harmful, harmless, limit):
    best = 1.0
    for t in [*harmful, *harmless, min([*harmful, *harmless]) - 1]:
        if sum(s > t for s in harmless) / len(harmless) <= limit: best = min(best, sum(s < t for s in harmful) / len(harmful))
    return best


def refuses_above_throughout(harmful, harmless, limit):
    found = [sum(s <= t for s in harmful) / len(harmful) for t in [*harmful, *harmless] if sum(s > t for s in harmless) / len(harmless) <= limit]
    return min(found, default=1.0)


def limit_of_a_count(harmful, harmless, limit):
    return min([1.0] + [sum(s < t for s in harmful) / len(harmful) for t in harmful if sum(s >= t for s in harmless) <= limit])


def share_that_is_caught(harmful, harmless, limit): return 1 - leaks_by_sorting(harmful, harmless, limit)


def must_refuse_something(harmful, harmless, limit):
    found = [sum(s < t for s in harmful) / len(harmful) for t in harmless if sum(s >= t for s in harmless) / len(harmless) <= limit]
    return min(found, default=1.0)


def a_count_instead_of_a_share(harmful, harmless, limit): return leaks_by_sorting(harmful, harmless, limit) * len(harmful)


RIGHT = {
    "10.1": [pairs_as_a_set, pairs_by_a_generator, pairs_as_an_array],
    "10.2": [bt_softplus, bt_loop, bt_cross_entropy, bt_logaddexp],
    "10.3": [logprob_cross_entropy, logprob_numpy, logprob_loop, logprob_plain_numbers, logprob_one_hot_in_place],
    "10.4": [dpo_softplus, dpo_loop, dpo_cross_entropy, dpo_binary],
    "10.5": [step_pair_by_pair, step_chosen_then_rejected, step_whole_rows, wrong_step()],
    "10.6": [leaks_by_sorting, leaks_in_numpy, leaks_in_torch, leaks_in_place],
}
WRONG = {
    "10.1": [(pairs_across_prompts, "regenerated"), (pairs_of_thumbs_only, "missing"), (pairs_of_regenerated_only, "thumb down"),
             (pairs_over_its_own_instead_of, "regenerated twice"), (pairs_forget_a_discarded_answer, "missing"), (pairs_discarded_anywhere, "another prompt"),
             (pairs_twice, "twice"), (pairs_of_two, "three texts")],
    "10.2": [(bt_swapped, "winner"), (bt_sum, "mean"), (bt_log_of_sigmoid, "logsigmoid"), (bt_detached, "no gradient"), (bt_clamped, "logsigmoid")],
    "10.3": [(logprob_same_place, "predicts token"), (logprob_mask_not_moved, "move along"), (logprob_mean, "no mean"), (logprob_squeezed, "T = 2"),
             (logprob_without_softmax, "softmax"), (logprob_of_everything, "mask")],
    "10.4": [(dpo_without_reference, "reference"), (dpo_swapped, "chosen one"), (dpo_without_beta, "β"), (dpo_log_of_sigmoid, "logsigmoid"),
             (dpo_of_chosen_alone, "both answers"), (dpo_sum, "off by")],
    "10.5": [(wrong_step(swap=True), "swapped"), (wrong_step(use_reference=False), "reference's"), (wrong_step(use_beta=False), "Where is β"),
             (wrong_step(zero=False), "earlier step"), (wrong_step(use_multiplier=False), "multiplier 1"), (wrong_step(end=False), "as `render` makes them"),
             (wrong_step(steps=2), "2 steps"), (wrong_step(mean=False), "not their sum"),
             (step_with_another_result(lambda loss, again: again().item()), "after the step"), (step_with_another_result(lambda loss, again: loss), "its graph"),
             (step_with_another_result(lambda loss, again: loss.item(), torch.enable_grad), "reference got gradients")],
    "10.6": [(refuses_above_only, "is expected"), (refuses_above_throughout, "lowest of all"), (limit_of_a_count, "is expected"), (share_that_is_caught, "is expected"),
             (must_refuse_something, "is expected"), (a_count_instead_of_a_share, "is expected")],
}
