"""Answers to the exercises of lesson 12: right ones in several styles, and plausible wrong ones."""
import bisect
import itertools
import math
import statistics

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.core.files import UserError
from nanochat.core.run import STAGES
from nanochat.lab.exercises.transformer import GPT, Block, ValueGPT, ValueLinear, rms_norm

# 12.1


def depth_by_bisection(budget, cost, deepest):
    def affordable(depth):
        try: return cost(depth) <= budget
        except UserError: return False
    low, high = 0, deepest
    while low < high:
        middle = (low + high + 1) // 2
        if affordable(middle): low = middle
        else: high = middle - 1
    return low


def depth_by_bisect_module(budget, cost, deepest):
    class Prices:
        def __len__(self): return deepest
        def __getitem__(self, i):
            try: return cost(i + 1)
            except UserError: return math.inf
    return bisect.bisect_right(Prices(), budget)


def depth_by_recursion(budget, cost, deepest):
    def search(low, high):
        if low == high: return low
        middle = -(-(low + high) // 2)
        try: fits = not cost(middle) > budget
        except UserError: fits = False
        return search(middle, high) if fits else search(low, middle - 1)
    return search(0, deepest)


def depth_by_powers_of_two(budget, cost, deepest):
    best, step = 0, 1 << max(0, deepest.bit_length() - 1)
    while step:
        if best + step <= deepest:
            try:
                if cost(best + step) <= budget: best += step
            except UserError: pass
        step >>= 1
    return best


def depth_with_numpy_integers(budget, cost, deepest):
    low, high = np.int64(0), np.int64(deepest) + 1
    while high - low > 1:
        middle = (low + high) // 2
        try: ok = cost(middle) <= budget
        except UserError: ok = False
        low, high = (middle, high) if ok else (low, middle)
    return low


def depth_as_tensor(budget, cost, deepest): return torch.tensor(depth_by_bisection(budget, cost, deepest))


def depth_as_float(budget, cost, deepest): return np.floor(float(depth_by_bisection(budget, cost, deepest)))


def depth_with_a_cache(budget, cost, deepest):
    known = {0: True}
    def ok(depth):
        if depth not in known:
            try: known[depth] = cost(depth) <= budget
            except Exception: known[depth] = False # noqa: BLE001
        return known[depth]
    low, high = 0, deepest
    while low < high:
        middle = low + (high - low + 1) // 2
        low, high = (middle, high) if ok(middle) else (low, middle - 1)
    return low


def depth_tries_all(budget, cost, deepest):
    best = 0
    for depth in range(1, deepest + 1):
        try:
            if cost(depth) <= budget: best = depth
        except UserError: break
    return best


def depth_without_the_error(budget, cost, deepest):
    low, high = 0, deepest
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low


def depth_strictly_below(budget, cost, deepest):
    def below(depth): return cost(depth) + 1e-9
    return depth_by_bisection(budget, below, deepest)


def depth_one_too_many(budget, cost, deepest): return depth_by_bisection(budget, cost, deepest) + 1


def depth_from_zero(budget, cost, deepest):
    if cost(0) > budget: return 0
    return depth_by_bisection(budget, cost, deepest)


def depth_at_least_one(budget, cost, deepest): return max(1, depth_by_bisection(budget, cost, deepest))


def depth_by_a_formula(budget, cost, deepest): return round(deepest * (budget / cost(deepest)) ** (1 / 3))


# 12.2


def left_with_numpy(rows):
    rows = [row for row in rows if "loss" in row]
    if len(rows) < 2: return None
    per_step = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in zip(rows, rows[1:])]
    return np.median(per_step) * (rows[-1]["steps"] - rows[-1]["step"])


def left_with_diff(rows):
    lines = list(filter(lambda row: row.get("loss") is not None, rows))
    if len(lines) <= 1: return
    time = np.array([line["time"] for line in lines])
    step = np.array([line["step"] for line in lines])
    return float(np.quantile(np.diff(time) / np.diff(step), 0.5) * (lines[-1]["steps"] - step[-1]))


def left_with_statistics(rows):
    steps = [(row["step"], row["time"]) for row in rows if "loss" in row]
    gaps = [(t2 - t1) / (s2 - s1) for (s1, t1), (s2, t2) in itertools.pairwise(steps)]
    if not gaps: return None
    return statistics.median(gaps) * (rows[-1]["steps"] - steps[-1][0])


def left_in_torch(rows):
    rows = [row for row in rows if "loss" in row]
    if len(rows) < 2: return None
    time = torch.tensor([row["time"] for row in rows], dtype=torch.float64)
    step = torch.tensor([row["step"] for row in rows])
    return (time.diff() / step.diff()).median() * (rows[-1]["steps"] - step[-1])


def left_with_a_loop(rows):
    before, gaps, last = None, [], None
    for row in rows:
        if "loss" not in row: continue
        if before is not None: gaps.append((row["time"] - before["time"]) / (row["step"] - before["step"]))
        before = last = row
    if len(gaps) == 0: return None
    gaps.sort()
    n = len(gaps)
    middle = gaps[n // 2] if n % 2 else (gaps[n // 2 - 1] + gaps[n // 2]) / 2
    return (last["steps"] - last["step"]) * middle


def left_as_array(rows):
    left = left_with_numpy(rows)
    return None if left is None else np.array([left], np.float32)[0]


def gaps_of(rows): # lines with a loss: seconds and steps between two
    rows = [row for row in rows if "loss" in row]
    return [(b["time"] - a["time"], b["step"] - a["step"]) for a, b in zip(rows, rows[1:])]


def left_with(middle, last=lambda rows: [row for row in rows if "loss" in row][-1]):
    def left(rows):
        gaps = gaps_of(rows)
        return middle(gaps) * (last(rows)["steps"] - last(rows)["step"]) if gaps else None
    return left


def left_from_the_last_line(rows): return left_with(lambda gaps: statistics.median(t / n for t, n in gaps), lambda rows: rows[-1])(rows)
def left_by_two_medians(rows): return left_with(lambda gaps: np.median([t for t, _ in gaps]) / np.median([n for _, n in gaps]))(rows)
def left_weighted_by_steps(rows): return left_with(lambda gaps: statistics.median(t / n for t, n in gaps for _ in range(n)))(rows)


def left_from_step_zero(rows):
    first = [row["time"] / row["step"] for row in rows if "loss" in row][:1]
    return left_with(lambda gaps: statistics.median([*first, *(t / n for t, n in gaps)]))(rows)


def left_of_all_lines(rows):
    if len(rows) < 2: return None
    gaps = [(b["time"] - a["time"]) / max(1, b["step"] - a["step"]) for a, b in zip(rows, rows[1:])]
    return np.median(gaps) * (rows[-1]["steps"] - rows[-1]["step"])


def left_with_a_mean(rows):
    rows = [row for row in rows if "loss" in row]
    if len(rows) < 2: return None
    a, b = rows[0], rows[-1]
    return (b["time"] - a["time"]) / (b["step"] - a["step"]) * (b["steps"] - b["step"])


def left_each_line_a_step(rows):
    rows = [row for row in rows if "loss" in row]
    if len(rows) < 2: return None
    return np.median(np.diff([row["time"] for row in rows])) * (rows[-1]["steps"] - rows[-1]["step"])


def left_of_all_steps(rows):
    rows = [row for row in rows if "loss" in row]
    if len(rows) < 2: return None
    return np.median(np.diff([r["time"] for r in rows]) / np.diff([r["step"] for r in rows])) * rows[-1]["steps"]


def left_is_nan(rows):
    return math.nan if len([row for row in rows if "loss" in row]) < 2 else left_with_numpy(rows)


def left_in_minutes(rows):
    left = left_with_numpy(rows)
    return None if left is None else left / 60


# 12.3


def stages_with_a_loop(setting):
    section, found = setting.split(".")[0], []
    for stage, (_, sections) in STAGES.items():
        if section in sections or found: found.append(stage)
    return found


def stages_as_tuple(setting):
    section = setting.partition(".")[0]
    names = list(STAGES)
    reads = [i for i, name in enumerate(names) if section in STAGES[name][1]]
    return tuple(names[min(reads):]) if reads else ()


def stages_as_generator(setting):
    stale = False
    for stage, (_, sections) in STAGES.items():
        stale = stale or setting.split(".")[0] in sections
        if stale: yield stage


def stages_with_dropwhile(setting):
    section = setting.split(".")[0]
    return itertools.dropwhile(lambda stage: section not in STAGES[stage][1], STAGES)


def stages_with_numpy(setting):
    reads = np.array([setting.split(".")[0] in sections for _, sections in STAGES.values()])
    return np.array(list(STAGES))[np.logical_or.accumulate(reads)]


def stages_as_keys_of_a_dict(setting): return dict.fromkeys(stages_with_a_loop(setting))


def stages_that_read(setting): return [stage for stage, (_, sections) in STAGES.items() if setting.split(".")[0] in sections]


def stages_all(setting): return list(STAGES)


def stages_by_name(setting):
    section, names = setting.split(".")[0], list(STAGES)
    return names[names.index(section):] if section in names else []


def stages_by_beginning(setting): return stages_with_a_loop(next((x for _, xs in STAGES.values() for x in xs if setting.startswith(x)), setting))
def stages_by_substring(setting): return stages_with_a_loop(next((x for _, xs in STAGES.values() for x in xs if setting.split(".")[0] in x), setting))


def stages_after(setting): return stages_with_a_loop(setting)[1:]


def stages_backwards(setting): return stages_with_a_loop(setting)[::-1]


def stages_as_set(setting): return set(stages_with_a_loop(setting))


# 12.4


def verdict_with_comb(first, second):
    a = sum(x and not y for x, y in zip(first, second))
    b = sum(y and not x for x, y in zip(first, second))
    n, k = a + b, min(a, b)
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    if p >= 0.05: return "not told apart"
    return "first" if a > b else "second"


def verdict_in_numpy(first, second):
    first, second = np.array(first, bool), np.array(second, bool)
    a, b = int((first & ~second).sum()), int((~first & second).sum())
    weaker = np.minimum(a, b)
    tail = math.fsum(math.exp(math.lgamma(a + b + 1) - math.lgamma(i + 1) - math.lgamma(a + b - i + 1)
                              - (a + b) * math.log(2)) for i in range(weaker + 1))
    if 2 * tail >= 0.05: return np.str_("not told apart")
    return np.array(["second", "first"])[int(a > b)]


def verdict_by_counting_down(first, second):
    wins = [x - y for x, y in zip(first, second) if x != y]
    n = len(wins)
    ahead = sum(wins)
    k = (n - abs(ahead)) // 2
    term, tail = 1, 0
    for i in range(k + 1):
        tail += term
        term = term * (n - i) // (i + 1)
    if 40 * tail < 2**n: return "first" if ahead > 0 else "second"
    return "not told apart"


def verdict_in_torch(first, second):
    d = torch.tensor(first, dtype=torch.int8) - torch.tensor(second, dtype=torch.int8)
    a, b = (d == 1).sum(), (d == -1).sum()
    n, k = (a + b).double(), torch.minimum(a, b).item()
    i = torch.arange(k + 1, dtype=torch.float64)
    logs = torch.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1) - n * math.log(2)
    if 2 * logs.exp().sum() >= 0.05: return "not told apart"
    return ("second", "first")[bool(a > b)]


def verdict_more_right(first, second):
    if sum(first) == sum(second): return "not told apart"
    return "first" if sum(first) > sum(second) else "second"


def verdict_one_sided(first, second):
    a = sum(x and not y for x, y in zip(first, second))
    b = sum(y and not x for x, y in zip(first, second))
    p = sum(math.comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b)
    return "not told apart" if p >= 0.05 else "first" if a > b else "second"


def verdict_of_all_questions(first, second):
    n, k = len(first), min(sum(first), sum(second))
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    return "not told apart" if p >= 0.05 else "first" if sum(first) > sum(second) else "second"


def verdict_the_wrong_way_round(first, second):
    return {"first": "second", "second": "first"}.get(v := verdict_with_comb(first, second), v)


def verdict_as_bool(first, second): return verdict_with_comb(first, second) == "first"


def verdict_by_a_normal_curve(first, second):
    a = sum(x and not y for x, y in zip(first, second))
    b = sum(y and not x for x, y in zip(first, second))
    if a + b == 0 or abs(a - b) / math.sqrt(a + b) < 1.96: return "not told apart"
    return "first" if a > b else "second"


# 12.5


class ValuesInAList(nn.Module):
    def __init__(self, vocab_size, sequence_len, n_layer, n_head, n_embd):
        super().__init__()
        self.sequence_len, self.V = sequence_len, vocab_size
        self.blocks = nn.ModuleList([Block(n_embd, n_head) for _ in range(n_layer)])
        self.with_values = [i for i in range(n_layer) if (n_layer - 1 - i) % 2 == 0]
        for i in self.with_values: self.blocks[i].attn.c_v = ValueLinear(n_embd, n_embd, bias=False)
        self.wte = nn.Embedding(vocab_size * (1 + len(self.with_values)), n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)

    def forward(self, ids, cache=None):
        starts = torch.arange(1 + len(self.with_values)) * self.V
        x, *values = self.wte(ids[None] + starts.view(-1, 1, 1))
        x = rms_norm(x)
        for i, extra in zip(self.with_values, values): self.blocks[i].attn.c_v.extra = extra
        for i in range(len(self.blocks)): x = self.blocks[i](x, cache[i] if cache is not None else None)
        return 15 * torch.tanh(self.lm_head(rms_norm(x)).float() / 15)


class ValuesOnTopOfGPT(GPT):
    def __init__(self, vocab_size, sequence_len, n_layer, n_head, n_embd):
        super().__init__(vocab_size, sequence_len, n_layer, n_head, n_embd)
        self.wte = nn.Embedding((1 + (n_layer + 1) // 2) * vocab_size, n_embd)
        for block in list(self.blocks)[::-2]:
            linear = ValueLinear(n_embd, n_embd, bias=False)
            linear.weight, block.attn.c_v = block.attn.c_v.weight, linear

    def forward(self, ids, cache=None):
        tables = self.wte.weight.view(-1, self.lm_head.out_features, self.wte.embedding_dim)
        for i, block in enumerate(self.blocks):
            if type(block.attn.c_v) is ValueLinear: block.attn.c_v.extra = tables[1 + i // 2][ids]
        return super().forward(ids, cache)


class ValuesByHooks(GPT):
    def __init__(self, vocab_size, sequence_len, n_layer, n_head, n_embd):
        super().__init__(vocab_size, sequence_len, n_layer, n_head, n_embd)
        self.wte = nn.Embedding((1 + (n_layer + 1) // 2) * vocab_size, n_embd)

    def forward(self, ids, cache=None):
        V, n, hooks = self.lm_head.out_features, len(self.blocks), []
        for i in range(n - 1, -1, -2):
            extra = F.embedding(ids + V * (i // 2 + 1), self.wte.weight)
            hooks.append(self.blocks[i].attn.c_v.register_forward_hook(lambda module, inputs, out, extra=extra: out + extra))
        try: return super().forward(ids, cache)
        finally:
            for hook in hooks: hook.remove()


def _values(rows=lambda ids, table, V, n: table * V + ids, norm=lambda e: e, table=lambda i, n: 1 + i // 2):
    class Wrong(ValueGPT):
        def forward(self, ids, cache=None):
            x, n = rms_norm(self.wte(rows(ids, 0, self.vocab_size, len(self.wte.weight) // self.vocab_size))), len(self.blocks)
            for i, block in enumerate(self.blocks):
                if isinstance(block.attn.c_v, ValueLinear):
                    at = rows(ids, table(i, n), self.vocab_size, len(self.wte.weight) // self.vocab_size)
                    block.attn.c_v.extra = norm(self.wte(at))
                x = block(x, None if cache is None else cache[i])
            return 15 * torch.tanh(self.lm_head(rms_norm(x)).float() / 15)
    return Wrong


class ValuesInTheStream(ValueGPT):
    def forward(self, ids, cache=None):
        x = rms_norm(self.wte(ids))
        for i, block in enumerate(self.blocks):
            if isinstance(block.attn.c_v, ValueLinear): x = x + self.wte((1 + i // 2) * self.vocab_size + ids)
            x = block(x, None if cache is None else cache[i])
        return 15 * torch.tanh(self.lm_head(rms_norm(x)).float() / 15)


class ValuesSetTooLate(ValueGPT):
    def forward(self, ids, cache=None):
        x = rms_norm(self.wte(ids))
        for i, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[i])
            if isinstance(block.attn.c_v, ValueLinear): block.attn.c_v.extra = self.wte((1 + i // 2) * self.vocab_size + ids)
        for block in self.blocks:
            if isinstance(block.attn.c_v, ValueLinear): block.attn.c_v.extra = 0
        return 15 * torch.tanh(self.lm_head(rms_norm(x)).float() / 15)


class ValuesDetached(ValueGPT):
    def forward(self, ids, cache=None):
        x = rms_norm(self.wte(ids))
        for i, block in enumerate(self.blocks):
            if isinstance(block.attn.c_v, ValueLinear):
                block.attn.c_v.extra = self.wte((1 + i // 2) * self.vocab_size + ids).detach()
            x = block(x, None if cache is None else cache[i])
        return 15 * torch.tanh(self.lm_head(rms_norm(x)).float() / 15)


class ValuesInSeparateTables(ValueGPT):
    def __init__(self, vocab_size, sequence_len, n_layer, n_head, n_embd):
        super().__init__(vocab_size, sequence_len, n_layer, n_head, n_embd)
        self.tables = nn.ModuleList(nn.Embedding(vocab_size, n_embd) for _ in range(n_layer))


RIGHT = {
    "12.1": [depth_by_bisection, depth_by_bisect_module, depth_by_recursion, depth_by_powers_of_two,
             depth_with_numpy_integers, depth_as_tensor, depth_as_float, depth_with_a_cache],
    "12.2": [left_with_numpy, left_with_diff, left_with_statistics, left_in_torch, left_with_a_loop, left_as_array],
    "12.3": [stages_with_a_loop, stages_as_tuple, stages_as_generator, stages_with_dropwhile, stages_with_numpy,
             stages_as_keys_of_a_dict],
    "12.4": [verdict_with_comb, verdict_in_numpy, verdict_by_counting_down, verdict_in_torch],
    "12.5": [ValueGPT, ValuesInAList, ValuesOnTopOfGPT, ValuesByHooks],
}

WRONG = {
    "12.1": [(depth_tries_all, "halve"), (depth_without_the_error, "went through"), (depth_strictly_below, "at most"),
             (depth_one_too_many, "largest depth"), (depth_from_zero, "go from 1"), (depth_at_least_one, "or 0"),
             (depth_by_a_formula, "largest depth")],
    "12.2": [(left_of_all_lines, "evaluations"), (left_with_a_mean, "median"), (left_each_line_a_step, "divide by the steps"),
             (left_of_all_steps, "of 100"), (left_is_nan, "None is expected"), (left_in_minutes, "2 seconds"),
             (left_from_the_last_line, "evaluation came later"),
             (left_by_two_medians, "divide the time"), (left_weighted_by_steps, "counts once"), (left_from_step_zero, "8, 3 and 2")],
    "12.3": [(stages_that_read, "builds on"), (stages_all, "not depend"), (stages_by_name, "seed"), (stages_after, "sft"), (stages_by_beginning, "not depend"), (stages_by_substring, "not depend"),
             (stages_backwards, "order"), (stages_as_set, "order")],
    "12.4": [(verdict_more_right, "equal models"), (verdict_one_sided, "both sides"), (verdict_of_all_questions, "equal models"),
             (verdict_the_wrong_way_round, "verdict"), (verdict_as_bool, "expected"), (verdict_by_a_normal_curve, "equal models")],
    "12.5": [(GPT, "wte.weight"), (_values(norm=rms_norm), "as they are"), (_values(table=lambda i, n: 1), "a table of its own"),
             (_values(table=lambda i, n: i // 2), "first vocab_size rows"), (_values(table=lambda i, n: (n + 1) // 2 - i // 2), "in the order of the blocks"),
             (_values(rows=lambda ids, table, V, n: ids * n + table), "rows of a table are together"), (ValuesInTheStream, "not to the stream"),
             (ValuesSetTooLate, "before the block"), (ValuesDetached, "detach"), (ValuesInSeparateTables, "does not name")],
}
