"""Answers to the exercises of lesson 6: right ones in several styles, and wrong ones with a part of what the check says."""
import math
from decimal import Decimal
from fractions import Fraction
from math import comb

import numpy as np
import torch


# 6.1 · Choose an option

def choose_masked_tensor(nats, prefix, lengths):
    place = torch.arange(nats.shape[1])
    judged = (place >= prefix) & (place < lengths[:, None])
    return int((torch.where(judged, nats, 0.0).sum(1) / judged.sum(1)).argmin())


def choose_numpy_argmin(nats, prefix, lengths):
    nats, lengths = nats.numpy(), lengths.numpy()
    means = np.array([row[prefix:n].mean() for row, n in zip(nats, lengths)])
    return np.argmin(means)


def choose_loop_of_floats(nats, prefix, lengths):
    best, least = None, math.inf
    for i, row in enumerate(nats.tolist()):
        total, n = 0.0, 0
        for t in range(prefix, lengths[i]):
            total += row[t]
            n += 1
        if total / n < least: best, least = i, total / n
    return best


def choose_zero_dim_tensor(nats, prefix, lengths):
    return torch.stack([nats[i, prefix:lengths[i]].mean() for i in range(len(nats))]).argmin()


def choose_by_cumulative_sum(nats, prefix, lengths):
    sums = torch.cat([torch.zeros(len(nats), 1), nats.cumsum(1)], 1)
    total = sums.gather(1, lengths[:, None])[:, 0] - sums[:, prefix]
    return (total / (lengths - prefix)).min(0).indices.item()


def choose_in_place_on_a_copy(nats, prefix, lengths):
    own = nats.clone()
    own[:, :prefix] = 0
    for row, n in zip(own, lengths): row[n:] = 0
    own /= (lengths - prefix)[:, None]
    return own.sum(1).argmin().numpy()


choose_lambda_sorted = lambda nats, prefix, lengths: sorted( # noqa: E731
    range(len(nats)), key=lambda i: sum(nats[i, prefix:lengths[i]]) / (lengths[i] - prefix))[0]


def choose_masked_array(nats, prefix, lengths):
    place = np.arange(nats.shape[1])
    hidden = (place < prefix) | (place >= np.asarray(lengths)[:, None])
    return np.ma.array(nats.numpy(), mask=hidden).mean(axis=1).argmin()


def choose_by_a_product(nats, prefix, lengths):
    place = torch.arange(nats.shape[1])
    judged = (place >= prefix) & (place < lengths[:, None])
    return ((nats * judged).sum(1) / judged.sum(1)).argmin()


def choose_smallest_sum(nats, prefix, lengths):
    return min(range(len(nats)), key=lambda i: nats[i, prefix:lengths[i]].sum())


def choose_with_padding(nats, prefix, lengths):
    return int(nats[:, prefix:].mean(1).argmin())


def choose_with_question(nats, prefix, lengths):
    return min(range(len(nats)), key=lambda i: nats[i, :lengths[i]].mean())


def choose_most_surprising(nats, prefix, lengths):
    return max(range(len(nats)), key=lambda i: nats[i, prefix:lengths[i]].mean())


def choose_shifted_by_one(nats, prefix, lengths):
    return int(np.argmin([row[prefix - 1:n - 1].mean() for row, n in zip(nats, lengths)]))


def choose_the_loss_itself(nats, prefix, lengths):
    return min(nats[i, prefix:lengths[i]].mean() for i in range(len(nats)))


def choose_divides_by_length(nats, prefix, lengths):
    return int(np.argmin([nats[i, prefix:n].sum() / n for i, n in enumerate(lengths)]))


# 6.2 · Centre and average

def core_generator(accuracies, chances):
    return sum((a - c) / (1 - c) for a, c in zip(accuracies, chances)) / len(accuracies)


def core_numpy_scalar(accuracies, chances):
    a, c = np.array(accuracies), np.array(chances)
    return ((a - c) / (1 - c)).mean()


def core_tensor(accuracies, chances):
    a, c = torch.tensor(accuracies, dtype=torch.float64), torch.tensor(chances, dtype=torch.float64)
    return (a - c).div(1 - c).mean()


def core_loop_in_place(accuracies, chances):
    total = 0.0
    for i in range(len(accuracies)):
        total += accuracies[i] - chances[i] and (accuracies[i] - chances[i]) / (1 - chances[i])
    return total / len(chances)


def core_fractions(accuracies, chances):
    scores = [1 - (1 - Fraction(a)) / (1 - Fraction(c)) for a, c in zip(accuracies, chances)]
    return sum(scores) / len(scores)


def core_one_element_array(accuracies, chances):
    scores = np.subtract(accuracies, chances)
    np.divide(scores, 1 - np.array(chances), out=scores)
    return np.mean(scores, keepdims=True)


def core_not_divided(accuracies, chances):
    return np.mean(np.subtract(accuracies, chances))


def core_of_the_means(accuracies, chances):
    a, c = np.mean(accuracies), np.mean(chances)
    return (a - c) / (1 - c)


def core_clipped(accuracies, chances):
    return np.mean([max(0.0, (a - c) / (1 - c)) for a, c in zip(accuracies, chances)])


def core_divided_by_chance(accuracies, chances):
    return np.mean([(a - c) / c if c else a for a, c in zip(accuracies, chances)])


def core_list(accuracies, chances):
    return [(a - c) / (1 - c) for a, c in zip(accuracies, chances)]


# 6.3 · An interval that holds

def interval_clipped(right, n, z=1.96):
    p, shrink = right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    return max(0.0, centre - half), min(1.0, centre + half)


def interval_not_clipped(right, n, z=1.96):
    p = right / n
    root = z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    return [(p + z**2 / 2 / n - root) / (1 + z**2 / n), (p + z**2 / 2 / n + root) / (1 + z**2 / n)]


def interval_array_by_clip(right, n, z=1.96):
    p = right / n
    ends = p + z**2 / (2 * n) + np.array([-1, 1]) * z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return np.clip(ends / (1 + z**2 / n), 0, 1)


def interval_tensor(right, n, z=1.96):
    p = torch.tensor(right / n, dtype=torch.float64)
    half = z * torch.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (torch.stack([p + z * z / 2 / n - half, p + z * z / 2 / n + half]) / (1 + z * z / n)).clamp(0, 1)


def interval_by_counts(right, n, other_name=1.96):
    z2 = other_name ** 2
    root = other_name * math.sqrt(right * (n - right) / n + z2 / 4)
    yield max(0, right + z2 / 2 - root) / (n + z2)
    yield min(1, (right + z2 / 2 + root) / (n + z2))


def interval_quadratic_roots(right, n, z=1.96):
    # the p with (p - right/n)² = z² p (1 - p) / n
    a, b, c = 1 + z * z / n, -(2 * right / n + z * z / n), (right / n) ** 2
    return tuple(sorted(np.roots([a, b, c]).real.clip(0, 1)))


def interval_textbook(right, n, z=1.96):
    p = right / n
    half = z * math.sqrt(p * (1 - p) / n)
    return max(0, p - half), min(1, p + half)


def interval_without_shrinking(right, n, z=1.96):
    p = right / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return p + z * z / (2 * n) - half, p + z * z / (2 * n) + half


def interval_z_is_fixed(right, n, z=1.96):
    return interval_clipped(right, n)


def interval_only_low(right, n, z=1.96):
    return interval_clipped(right, n, z)[0]


def interval_root_too_short(right, n, z=1.96):
    p, shrink = right / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n) + z * z / (4 * n * n)
    return (p + z * z / (2 * n) - half) / shrink, (p + z * z / (2 * n) + half) / shrink


# 6.4 · A paired test

def paired_integers(first, second):
    b = sum(x and not y for x, y in zip(first, second))
    c = sum(y and not x for x, y in zip(first, second))
    return min(1.0, 2 * sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c))


def paired_numpy(first, second):
    difference = np.array(first, int) - np.array(second, int)
    n, k = np.count_nonzero(difference), min((difference > 0).sum(), (difference < 0).sum())
    ways = np.array([comb(int(n), i) / 2 ** int(n) for i in range(k + 1)])
    return np.minimum(1, 2 * ways.sum())


def paired_fraction(first, second):
    differ = [x for x, y in zip(first, second) if x != y]
    n, k = len(differ), min(sum(differ), len(differ) - sum(differ))
    return min(Fraction(1), Fraction(2 * sum(comb(n, i) for i in range(k + 1)), 2**n))


def paired_distribution_of_coins(first, second):
    n = k = 0
    for x, y in zip(first, second):
        if x != y:
            n += 1
            k += x
    p = np.zeros(n + 1)
    p[0] = 1
    for _ in range(n): p[1:], p[0] = (p[1:] + p[:-1]) / 2, p[0] / 2
    far = abs(np.arange(n + 1) - n / 2) >= abs(k - n / 2) - 1e-9
    return p[far].sum()


def paired_log_gamma(first, second):
    b = sum(1 for x, y in zip(first, second) if x > y)
    c = sum(1 for x, y in zip(first, second) if y > x)
    n = b + c
    logs = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(min(b, c) + 1)]
    return torch.tensor(min(1.0, 2 * sum(map(math.exp, logs))), dtype=torch.float64)


def paired_decimal(first, second):
    b, c = sum(np.array(first) & ~np.array(second)), sum(~np.array(first) & np.array(second))
    n, p = int(b + c), Decimal(0)
    for k in range(int(min(b, c)) + 1): p += Decimal(comb(n, k)) / Decimal(2) ** n
    return min(2 * p, Decimal(1))


def paired_one_sided(first, second):
    return paired_integers(first, second) / 2


def paired_all_questions(first, second):
    b = sum(x and not y for x, y in zip(first, second))
    c = sum(y and not x for x, y in zip(first, second))
    n = len(first)
    return min(1.0, 2 * sum(comb(n, k) for k in range(min(b, c) + 1)) / 2**n)


def paired_uncapped(first, second):
    b = sum(x and not y for x, y in zip(first, second))
    c = sum(y and not x for x, y in zip(first, second))
    return 2 * sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)


def paired_chi_squared(first, second):
    b = sum(x and not y for x, y in zip(first, second))
    c = sum(y and not x for x, y in zip(first, second))
    return math.erfc(math.sqrt((b - c) ** 2 / max(1, b + c) / 2))


def paired_exact_split_only(first, second):
    b = sum(x and not y for x, y in zip(first, second))
    c = sum(y and not x for x, y in zip(first, second))
    return min(1.0, 2 * comb(b + c, b) / 2 ** (b + c))


def paired_first_model_only(first, second):
    b = sum(x and not y for x, y in zip(first, second))
    c = sum(y and not x for x, y in zip(first, second))
    return min(1.0, 2 * sum(comb(b + c, k) for k in range(b + 1)) / 2 ** (b + c))


# 6.5 · pass@k

def pass_comb(n, c, k):
    return 1 - comb(n - c, k) / comb(n, k)


def pass_product(n, c, k):
    if n - c < k: return 1.0
    return 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))


def pass_log_gamma(n, c, k):
    if n - c < k: return 1
    return -math.expm1(math.lgamma(n - c + 1) - math.lgamma(n - c - k + 1) - math.lgamma(n + 1) + math.lgamma(n - k + 1))


def pass_draw_by_draw(n, c, k):
    missed = Fraction(1)
    for i in range(k): missed *= Fraction(max(0, n - c - i), n - i)
    return 1 - missed


def pass_recursive(n, c, k):
    if k == 0: return 0.0
    return c / n + (1 - c / n) * (pass_recursive(n - 1, c, k - 1) if c < n else 0.0)


def pass_tensor(n, c, k):
    i = torch.arange(k, dtype=torch.float64)
    return 1 - ((n - c - i).clamp(min=0) / (n - i)).prod()


def pass_by_number_of_hits(n, c, k):
    return sum(comb(c, h) * comb(n - c, k - h) for h in range(1, min(c, k) + 1)) / comb(n, k)


def pass_tempting(n, c, k):
    return 1 - (1 - c / n) ** k


def pass_none_right(n, c, k):
    return comb(n - c, k) / comb(n, k)


def pass_in_floats(n, c, k):
    return 1 - float(comb(n - c, k)) / float(comb(n, k))


def pass_share(n, c, k):
    return c / n


def pass_wrong_where_few_are_wrong(n, c, k):
    return 1 - comb(n - c, k) / comb(n, k) if n - c >= k else 0.0


def pass_printed(n, c, k):
    print(1 - comb(n - c, k) / comb(n, k))


def pass_all_right(n, c, k):
    return comb(c, k) / comb(n, k)


RIGHT = {
    "6.1": [choose_masked_tensor, choose_numpy_argmin, choose_loop_of_floats, choose_zero_dim_tensor, choose_by_cumulative_sum,
            choose_in_place_on_a_copy, choose_lambda_sorted, choose_masked_array],
    "6.2": [core_generator, core_numpy_scalar, core_tensor, core_loop_in_place, core_fractions, core_one_element_array],
    "6.3": [interval_not_clipped, interval_clipped, interval_array_by_clip, interval_tensor, interval_by_counts, interval_quadratic_roots],
    "6.4": [paired_integers, paired_numpy, paired_fraction, paired_distribution_of_coins, paired_log_gamma, paired_decimal],
    "6.5": [pass_comb, pass_product, pass_log_gamma, pass_draw_by_draw, pass_recursive, pass_tensor, pass_by_number_of_hits],
}

WRONG = {
    "6.1": [(choose_smallest_sum, "smaller mean"), (choose_with_padding, "padding"), (choose_with_question, "Tokens of the question"),
            (choose_most_surprising, "surprises less"), (choose_shifted_by_one, "you chose"), (choose_the_loss_itself, "you chose"),
            (choose_divides_by_length, "you chose"), (choose_by_a_product, "any value")],
    "6.2": [(core_not_divided, "divided by"), (core_of_the_means, "Centre each task first"), (core_clipped, "stays so"),
            (core_divided_by_chance, "divided by"), (core_list, "is a list")],
    "6.3": [(interval_textbook, "60 right of 100"), (interval_without_shrinking, "60 right of 100"), (interval_z_is_fixed, "z used"),
            (interval_only_low, "two numbers"), (interval_root_too_short, "root over the whole sum")],
    "6.4": [(paired_one_sided, "two-sided"), (paired_all_questions, "tell you nothing"), (paired_uncapped, "at most 1"),
            (paired_chi_squared, "is off by"), (paired_exact_split_only, "at least as uneven"), (paired_first_model_only, "is off by")],
    "6.5": [(pass_tempting, "without replacement"), (pass_none_right, "as often as a sample"), (pass_share, "without replacement"),
            (pass_wrong_where_few_are_wrong, "cannot all be wrong"), (pass_printed, "return"), (pass_all_right, "without replacement"), (pass_in_floats, "OverflowError")],
}
