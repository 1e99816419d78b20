"Answers to the exercises of lesson 9, right and wrong, in the styles of different people."
import math
import re
import statistics

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.lab.exercises.chat import render
from nanochat.lab.exercises.inference import generate, reply_parts


# 9.1: advantages of groups

def advantages_in_numpy_float64(rewards, sigma_norm=False):
    r = np.asarray(rewards, dtype=np.float64)
    r = r - r.mean(axis=1, keepdims=True)
    if sigma_norm:
        sd = np.sqrt((r ** 2).mean(axis=1, keepdims=True))
        r = np.divide(r, sd, out=np.zeros_like(r), where=sd > 1e-6)
    return r


def advantages_in_plain_lists(rewards, sigma_norm=False):
    out = []
    for row in rewards.tolist():
        mean = sum(row) / len(row)
        sd = statistics.pstdev(row) if sigma_norm else 1.0
        out.append([0.0 if max(row) == min(row) else (r - mean) / sd for r in row])
    return out


def advantages_as_a_list_of_rows(rewards, sigma_norm=False):
    rows = []
    for group in rewards:
        if (group == group[0]).all(): rows.append(torch.zeros_like(group))
        else:
            centred = group - group.mean()
            rows.append(centred / group.std(unbiased=False) if sigma_norm else centred)
    return rows


def advantages_of_the_papers(rewards, sigma_norm=False):
    std, mean = torch.std_mean(rewards, dim=-1, unbiased=False, keepdim=True)
    return (rewards - mean) / (std + 1e-6) if sigma_norm else rewards - mean


def advantages_in_place_on_a_copy(rewards, sigma_norm=False):
    a = rewards.clone().double()
    a -= a.mean(1, keepdim=True)
    if sigma_norm: a /= a.std(1, correction=0, keepdim=True).clamp_(min=1e-4)
    return a.float()


def advantages_nan_to_num(rewards, sigma_norm=False):
    centred = rewards - rewards.mean(1)[:, None]
    centred[rewards.var(1) < 1e-9] = 0
    return torch.nan_to_num(centred / rewards.std(1, correction=0)[:, None]) if sigma_norm else centred


def baseline_of_the_whole_step(rewards, sigma_norm=False): return rewards - rewards.mean()


def sigma_of_a_sample(rewards, sigma_norm=False):
    a = rewards - rewards.mean(1, keepdim=True)
    return a / (rewards.std(1, keepdim=True) + 1e-6) if sigma_norm else a


def always_divided(rewards, sigma_norm=False):
    a = rewards - rewards.mean(1, keepdim=True)
    return a / (rewards.std(1, correction=0, keepdim=True) + 1e-6)


def zero_by_zero(rewards, sigma_norm=False):
    a = rewards - rewards.mean(1, keepdim=True)
    return a / rewards.std(1, correction=0, keepdim=True) if sigma_norm else a


def changes_its_input(rewards, sigma_norm=False):
    rewards -= rewards.mean(1, keepdim=True)
    return rewards


def along_the_prompts(rewards, sigma_norm=False): return rewards - rewards.mean(0, keepdim=True)


# 9.2: the policy-gradient loss

def loss_by_masked_fill(logprobs, mask, advantage):
    kept = logprobs.masked_fill(~mask.bool(), 0)
    return -torch.einsum("b,bt->", advantage, kept) / mask.sum()


def loss_by_loops(logprobs, mask, advantage):
    total, count = 0, 0
    for b in range(len(logprobs)):
        for t in range(logprobs.shape[1]):
            if mask[b, t]:
                total = total - advantage[b] * logprobs[b, t]
                count += 1
    return total / count


def loss_by_selection(logprobs, mask, advantage):
    chosen = mask > 0
    weights = advantage.unsqueeze(1).expand_as(logprobs)[chosen]
    return (-weights * logprobs[chosen]).mean()


def loss_by_nan_to_num(logprobs, mask, advantage):
    finite = torch.nan_to_num(logprobs, neginf=0.0)
    return -(finite * mask.float() * advantage.view(-1, 1)).sum() / mask.float().sum()


def loss_in_place_on_a_clone(logprobs, mask, advantage):
    each = logprobs.clone()
    each[mask == 0] = 0
    each *= -advantage[:, None]
    return each.sum().div(mask.count_nonzero()).reshape(1)


def loss_in_double(logprobs, mask, advantage):
    m = mask.double()
    logp = torch.where(m == 1, logprobs.double(), 0.0)
    return (logp @ torch.ones(logp.shape[1]).double() @ -advantage.double()) / m.sum()


def loss_of_everything(logprobs, mask, advantage): return -(advantage[:, None] * logprobs).mean()


def loss_times_the_mask(logprobs, mask, advantage): return -(advantage[:, None] * logprobs * mask).sum() / mask.sum()


def loss_with_the_wrong_sign(logprobs, mask, advantage): return -loss_by_masked_fill(logprobs, mask, advantage)


def loss_answer_by_answer(logprobs, mask, advantage):
    kept = logprobs.masked_fill(~mask.bool(), 0)
    return -(advantage * kept.sum(1) / mask.sum(1)).mean()


def loss_over_all_places(logprobs, mask, advantage):
    return -(advantage[:, None] * logprobs.masked_fill(~mask.bool(), 0)).mean()


def loss_as_a_number(logprobs, mask, advantage): return loss_by_masked_fill(logprobs, mask, advantage).item()


def loss_over_useful_tokens(logprobs, mask, advantage):
    useful = mask.bool() & (advantage != 0)[:, None]
    return -(advantage[:, None] * logprobs.masked_fill(~useful, 0)).sum() / useful.sum()


def loss_that_fills_its_input(logprobs, mask, advantage):
    logprobs.data[mask == 0] = 0
    return -(advantage[:, None] * logprobs).sum() / mask.sum()


def loss_not_summed(logprobs, mask, advantage): return -(advantage[:, None] * logprobs.masked_fill(~mask.bool(), 0))


# 9.3: a verifier

def verify_by_characters(text, right):
    text = text.strip()
    if text.endswith("."): text = text[:-1]
    digits = text[1:] if text[:1] == "-" else text
    if not digits or any(c not in "0123456789" for c in digits) or len(digits) > 50: return 0
    return 1 if int(text) == right else 0


def verify_returns_a_bool(text, right):
    found = re.match(r"^\s*(-?\d{1,18})\.?\s*$", text, re.ASCII)
    return bool(found) and int(found.group(1)) == right


def verify_with_numpy(text, right):
    text = text.strip()
    return np.float32(text == str(right) or text == f"{right}.")


def verify_returns_a_tensor(text, right):
    try: same = text.strip().removesuffix(".") in (str(right),)
    except Exception: same = False
    return torch.tensor(float(same))


def verify_np_bool(text, right): return np.bool_(re.fullmatch(rf"\s*{right}\.?\s*", text) is not None)


def number_occurs(text, right): return float(str(right) in text)


def exactly_equal(text, right): return float(text == str(right))


def by_int(text, right):
    try: return float(int(text.strip().rstrip(".")) == right)
    except ValueError: return 0.0


def without_commas(text, right): return verify_by_characters(text.replace(",", ""), right)


def by_float_at_last(text, right):
    found = re.fullmatch(r"(-?[0-9]{1,18})\.?", text.strip())
    return float(found is not None and float(found[1]) == float(right))


def first_number(text, right):
    found = re.search(r"-?\d+", text)
    return float(found is not None and int(found[0][:20]) == right)


def by_float(text, right):
    try: return float(float(text) == right)
    except ValueError: return 0.0


def raises_an_error(text, right): return 1.0 if int(text.strip().removesuffix(".")) == right else 0.0


# 9.4: k3

def k3_in_numpy(logprobs, reference):
    x = np.asarray(reference, dtype=np.float64) - np.asarray(logprobs, dtype=np.float64)
    return np.expm1(x) - x


def k3_in_double(logprobs, reference):
    log_rho = reference.double() - logprobs.double()
    return (log_rho.exp() - 1 - log_rho).float()


def k3_in_place(logprobs, reference):
    log_rho = reference - logprobs
    out = log_rho.clone()
    torch.expm1(log_rho, out=out)
    out -= log_rho
    return out


def k3_number_by_number(logprobs, reference):
    if logprobs.dim(): return [k3_number_by_number(a, b) for a, b in zip(logprobs, reference)]
    x = float(reference) - float(logprobs)
    return math.expm1(x) - x


def k3_by_a_series(logprobs, reference):
    x = reference - logprobs
    return torch.where(x.abs() < 1e-2, x * x / 2 + x ** 3 / 6 + x ** 4 / 24, x.exp() - 1 - x)


def k1(logprobs, reference): return logprobs - reference


def k3_the_other_way(logprobs, reference): return torch.expm1(logprobs - reference) - (logprobs - reference)


def k3_rounded(logprobs, reference): return (reference - logprobs).exp() - 1 - (reference - logprobs)


def k3_as_a_mean(logprobs, reference): return (torch.expm1(reference - logprobs) - (reference - logprobs)).mean()


def k2(logprobs, reference): return (reference - logprobs) ** 2 / 2


# 9.5: one step

def prompt_of(tokenizer, conversation):
    ids, _ = render(conversation, tokenizer.encode, lambda name: tokenizer.special[name])
    return list(ids) + [tokenizer.special["<|assistant_start|>"]]


def step_answer_by_answer(model, tokenizer, optimizer, conversations, reward, n=8, max_new_tokens=64, multiplier=1.0, seed=0):
    drawn, values = [], np.zeros((len(conversations), n))
    for i, conversation in enumerate(conversations):
        prompt = prompt_of(tokenizer, conversation)
        for j, (ids, mask) in enumerate(generate(model, tokenizer, prompt, n, max_new_tokens, seed=1000 * seed + i)):
            values[i, j] = reward(conversation, reply_parts(tokenizer, ids))
            drawn.append((prompt, ids, mask, i, j))
    above = values - values.mean(1, keepdims=True)
    count = sum(sum(mask) for _, _, mask, _, _ in drawn)
    model.zero_grad()
    for prompt, ids, mask, i, j in drawn:
        if not ids or abs(above[i, j]) < 1e-12: continue
        row = torch.tensor([prompt + ids])
        nll = F.cross_entropy(model(row[:, :-1])[0, len(prompt) - 1:], row[0, len(prompt):], reduction="none")
        (above[i, j] * (nll * torch.tensor(mask)).sum() / count).backward()
    optimizer.step(multiplier)
    return values.mean()


def step_in_one_batch_with_the_end(model, tokenizer, optimizer, conversations, reward, n=8, max_new_tokens=64, multiplier=1.0, seed=0):
    end, rows, masks, rewards = tokenizer.special["<|assistant_end|>"], [], [], []
    generator = torch.Generator().manual_seed(seed)
    for conversation in conversations:
        prompt = prompt_of(tokenizer, conversation)
        one = int(torch.randint(2**31, (), generator=generator))
        for ids, mask in generate(model, tokenizer, prompt, n=n, max_new_tokens=max_new_tokens, seed=one):
            rewards.append(reward(conversation, reply_parts(tokenizer, ids)))
            stopped = len(ids) < max_new_tokens
            rows.append(torch.tensor(prompt + ids + [end] * stopped))
            masks.append(torch.tensor([0] * len(prompt) + mask + [1] * stopped))
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    m = torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)[:, 1:]
    r = torch.tensor(rewards, dtype=torch.float32).reshape(len(conversations), n)
    a = (r - r.mean(1, keepdim=True)).reshape(-1, 1)
    logp = F.log_softmax(model(x)[:, :-1], dim=-1)
    each = torch.take_along_dim(logp, x[:, 1:, None], 2).squeeze(-1)
    loss = -(a * each * m).sum() / m.sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step(multiplier=multiplier)
    return r.mean()


def step_conversation_by_conversation(model, tokenizer, optimizer, conversations, reward, n=8, max_new_tokens=64, multiplier=1.0, seed=0):
    groups = []
    for i, c in enumerate(conversations):
        p = prompt_of(tokenizer, c)
        answers = generate(model, tokenizer, p, n=n, max_new_tokens=max_new_tokens, seed=hash((seed, i)) % 2**31)
        groups.append((p, answers, torch.tensor([float(reward(c, reply_parts(tokenizer, ids))) for ids, _ in answers])))
    tokens = sum(sum(m) for _, answers, _ in groups for _, m in answers)
    optimizer.zero_grad()
    for p, answers, r in groups:
        if r.max() == r.min(): continue
        longest = max(len(ids) for ids, _ in answers)
        x = torch.tensor([p + ids + [0] * (longest - len(ids)) for ids, _ in answers])
        m = torch.tensor([m + [0] * (longest - len(m)) for _, m in answers])
        log_p = model(x).log_softmax(-1)[:, len(p) - 1:-1].gather(2, x[:, len(p):, None]).squeeze(2)
        loss = -((r - r.mean())[:, None] * torch.where(m == 1, log_p, 0.0)).sum() / tokens
        loss.backward()
    optimizer.step(multiplier)
    return float(torch.cat([r for *_, r in groups]).mean())


def step_that_always_ends(model, tokenizer, optimizer, conversations, reward, n=8, max_new_tokens=64, multiplier=1.0, seed=0):
    end, rows, masks, r = tokenizer.special["<|assistant_end|>"], [], [], []
    for i, c in enumerate(conversations):
        p = prompt_of(tokenizer, c)
        for ids, mask in generate(model, tokenizer, p, n=n, max_new_tokens=max_new_tokens, seed=seed * 99 + i):
            r.append(reward(c, reply_parts(tokenizer, ids)))
            rows.append(torch.tensor([*p, *ids, end]))
            masks.append(torch.tensor([0] * len(p) + mask + [1]))
    x, m = (torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (rows, masks))
    r = torch.tensor(r).view(-1, n)
    each = model(x).log_softmax(-1)[:, :-1].gather(2, x[:, 1:, None])[..., 0] * m[:, 1:]
    optimizer.zero_grad()
    (-((r - r.mean(1, keepdim=True)).view(-1, 1) * each).sum() / m.sum()).backward()
    optimizer.step(multiplier)
    return r.mean()


def wrong_step(sign=1.0, baseline="group", use_mask=True, zero=True, use_multiplier=True, use_seed=True, divide=True, own_seeds=True, longest=None):
    def step(model, tokenizer, optimizer, conversations, reward, n=8, max_new_tokens=64, multiplier=1.0, seed=0):
        drawn, r = [], []
        for i, c in enumerate(conversations):
            p = prompt_of(tokenizer, c)
            answers = generate(model, tokenizer, p, n=n, max_new_tokens=longest or max_new_tokens, seed=(seed if use_seed else 0) * 99 + i * own_seeds)
            r.append([reward(c, reply_parts(tokenizer, ids)) for ids, _ in answers])
            drawn += [(p, ids, mask if use_mask else [1] * len(ids)) for ids, mask in answers]
        r = torch.tensor(r)
        a = {"group": r - r.mean(1, keepdim=True), "step": r - r.mean(), "none": r}[baseline].flatten()
        loss = 0
        for (p, ids, mask), advantage in zip(drawn, a):
            row = torch.tensor([p + ids])
            each = model(row[:, :-1]).log_softmax(-1)[0, len(p) - 1:].gather(1, row[0, len(p):, None])[:, 0]
            loss = loss - sign * advantage * (each * torch.tensor(mask)).sum()
        if divide: loss = loss / sum(sum(mask) for *_, mask in drawn)
        if zero: optimizer.zero_grad()
        loss.backward()
        optimizer.step(*[multiplier] * use_multiplier)
        return r.mean().item()
    return step


RIGHT = {
    "9.1": [advantages_in_numpy_float64, advantages_in_plain_lists, advantages_as_a_list_of_rows, advantages_of_the_papers,
            advantages_in_place_on_a_copy, advantages_nan_to_num],
    "9.2": [loss_by_masked_fill, loss_by_loops, loss_by_selection, loss_by_nan_to_num, loss_in_place_on_a_clone, loss_in_double],
    "9.3": [verify_by_characters, verify_returns_a_bool, verify_with_numpy, verify_returns_a_tensor, verify_np_bool],
    "9.4": [k3_in_numpy, k3_in_double, k3_in_place, k3_number_by_number, k3_by_a_series],
    "9.5": [step_answer_by_answer, step_in_one_batch_with_the_end, step_conversation_by_conversation, wrong_step()],
}
WRONG = {
    "9.1": [(baseline_of_the_whole_step, "own row"), (sigma_of_a_sample, "one less"), (always_divided, "nothing is divided"),
            (zero_by_zero, "0/0"), (changes_its_input, "changed"), (along_the_prompts, "own row")],
    "9.2": [(loss_of_everything, "prompt"), (loss_times_the_mask, "torch.where"), (loss_with_the_wrong_sign, "sign"),
            (loss_answer_by_answer, "count alike"), (loss_over_all_places, "not of all positions"), (loss_as_a_number, "float"),
            (loss_over_useful_tokens, "*all* sampled tokens"), (loss_that_fills_its_input, "was changed"), (loss_not_summed, "shape")],
    "9.3": [(number_occurs, "longer number"), (exactly_equal, "is right where"), (by_int, "two full stops"), (first_number, "fooled by words"),
            (by_float, "decimal"), (without_commas, "a comma"), (by_float_at_last, "another last digit"), (raises_an_error, "raised ValueError")],
    "9.4": [(k1, "above in ρ"), (k3_the_other_way, "above in ρ"), (k3_rounded, "expm1"), (k3_as_a_mean, "shape"), (k2, "above in ρ")],
    "9.5": [(wrong_step(sign=-1.0), "wrong way"), (wrong_step(baseline="none"), "as they are"), (wrong_step(baseline="step"), "whole step"),
            (wrong_step(use_mask=False), "calculator"), (wrong_step(zero=False), "earlier step"), (wrong_step(use_multiplier=False), "multiplier 1"),
            (wrong_step(use_seed=False), "another seed"), (wrong_step(own_seeds=False), "for each of them"), (wrong_step(longest=64), "letters"), (step_that_always_ends, "only to shorter ones"),
            (wrong_step(divide=False), "Divide by")],
}
