"""Answers to the exercises of lesson 2, right ones in many styles and plausible wrong ones."""
import itertools
from bisect import bisect_right, insort
from collections import Counter, defaultdict, deque

import numpy as np
import torch

# 2.1 Nearly the same


def _runs(text, n):
    words = text.lower().split()
    return {" ".join(words[i:i + n]) for i in range(len(words) - n + 1)}


def near_with_combinations(texts, n, least):
    sets = [_runs(text, n) for text in texts]
    return [(i, j) for i, j in itertools.combinations(range(len(texts)), 2)
            if sets[i] | sets[j] and len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= least]


def near_as_set_of_larger_first(texts, n, least): return {(j, i) for i, j in near_with_combinations(texts, n, least)}
def near_as_frozensets(texts, n, least): return [frozenset(pair) for pair in near_with_combinations(texts, n, least)]
def near_as_generator(texts, n, least): yield from map(list, near_with_combinations(texts, n, least))


def near_with_numpy(texts, n, least):
    sets = [_runs(text, n) for text in texts]
    names = {run: k for k, run in enumerate(sorted(set().union(*sets)))}
    has = np.zeros((len(texts), len(names)))
    for i, s in enumerate(sets): has[i, [names[run] for run in s]] = 1
    both = has @ has.T
    either = has.sum(1)[:, None] + has.sum(1)[None] - both
    return np.argwhere(np.triu((both >= least * either) & (either > 0), 1))


def near_with_torch_index(texts, n, least):
    pairs = near_with_combinations(texts, n, least)
    return torch.tensor(pairs).reshape(-1, 2)


def near_by_inverted_index(texts, n, least):
    sets, where, shared = [_runs(text, n) for text in texts], defaultdict(list), Counter()
    for j, some in enumerate(sets):
        for run in some:
            for i in where[run]: shared[i, j] += 1
            where[run].append(j)
    return [pair for pair, k in shared.items() if k / (len(sets[pair[0]]) + len(sets[pair[1]]) - k) >= least]


def near_divided_by_smaller(texts, n, least):
    sets = [_runs(text, n) for text in texts]
    return [(i, j) for i, j in itertools.combinations(range(len(texts)), 2)
            if sets[i] and sets[j] and len(sets[i] & sets[j]) / min(len(sets[i]), len(sets[j])) >= least]


def near_with_counted_runs(texts, n, least):
    def runs(text):
        words = text.lower().split()
        return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))
    bags = [runs(text) for text in texts]
    return [(i, j) for i, j in itertools.combinations(range(len(texts)), 2)
            if bags[i] and bags[j] and (bags[i] & bags[j]).total() / (bags[i] | bags[j]).total() >= least]


def near_with_capitals(texts, n, least):
    def runs(text): return set(zip(*(text.split()[k:] for k in range(n))))
    sets = [runs(text) for text in texts]
    return [(i, j) for i, j in itertools.combinations(range(len(texts)), 2)
            if sets[i] | sets[j] and len(sets[i] & sets[j]) >= least * len(sets[i] | sets[j])]


def near_with_themselves(texts, n, least): return [*near_with_combinations(texts, n, least), *((i, i) for i in range(len(texts)))]


def near_above_least(texts, n, least):
    sets = [_runs(text, n) for text in texts]
    return [(i, j) for i, j in itertools.combinations(range(len(texts)), 2)
            if sets[i] and sets[j] and len(sets[i] & sets[j]) / len(sets[i] | sets[j]) > least]


def near_split_at_each_space(texts, n, least):
    sets = [set(zip(*(text.lower().split(" ")[k:] for k in range(n)))) for text in texts]
    return [(i, j) for i, j in itertools.combinations(range(len(texts)), 2)
            if sets[i] and sets[j] and len(sets[i] & sets[j]) / len(sets[i] | sets[j]) >= least]


def near_only_neighbours(texts, n, least): return [(i, j) for i, j in near_with_combinations(texts, n, least) if j == i + 1]


def near_by_exact_equality(texts, n, least): return [(i, j) for i, j in itertools.combinations(range(len(texts)), 2) if texts[i] == texts[j]]


# 2.2 The exam in the training text


def contaminated_with_set(questions, documents, n):
    known = {run for document in documents for run in _runs(document, n)}
    return [i for i, q in enumerate(questions) if not known.isdisjoint(_runs(q, n))]


def contaminated_looking_up_documents(questions, documents, n):
    of_questions = defaultdict(set)
    for i, question in enumerate(questions):
        for run in _runs(question, n): of_questions[run].add(i)
    found = set()
    for document in documents:
        for run in _runs(document, n): found |= of_questions.get(run, set())
    return found


def contaminated_with_padded_text(questions, documents, n):
    text = " | ".join(f" {' '.join(d.lower().split())} " for d in documents)
    return np.flatnonzero([any(f" {run} " in text for run in _runs(q, n)) for q in questions])


def contaminated_as_generator(questions, documents, n):
    known = set().union(*(_runs(d, n) for d in documents))
    return (i for i, q in enumerate(questions) if known & _runs(q, n))


def contaminated_backwards(questions, documents, n): return torch.tensor(contaminated_with_set(questions, documents, n)[::-1])


def contaminated_with_hashes(questions, documents, n):
    known = set()
    for document in documents: known.update(map(hash, _runs(document, n)))
    return tuple(i for i, q in enumerate(questions) if any(hash(run) in known for run in _runs(q, n)))


def contaminated_by_whole_question(questions, documents, n): return [i for i, q in enumerate(questions) if any(q.lower() in d.lower() for d in documents)]


def contaminated_across_documents(questions, documents, n): return contaminated_with_set(questions, [" ".join(documents)], n)


def contaminated_by_shared_words(questions, documents, n):
    return [i for i, q in enumerate(questions) if any(len(set(q.lower().split()) & set(d.lower().split())) >= n for d in documents)]


def contaminated_in_letters(questions, documents, n):
    return [i for i, q in enumerate(questions) if any(run in d.lower() for run in _runs(q, n) for d in documents)]


def contaminated_as_bools(questions, documents, n):
    found = set(contaminated_with_set(questions, documents, n))
    return [i in found for i in range(len(questions))]


def contaminated_split_at_each_space(questions, documents, n):
    def runs(text): return set(zip(*(text.lower().split(" ")[i:] for i in range(n))))
    known = set().union(*map(runs, documents))
    return [i for i, q in enumerate(questions) if known & runs(q)]


def contaminated_as_texts(questions, documents, n): return [questions[i] for i in contaminated_with_set(questions, documents, n)]


# 2.3 One step later


def shifted_with_where(rows, bos_id): return torch.where(rows[:, :-1] < 0, bos_id, rows[:, :-1]), rows[:, 1:]


def shifted_in_place_on_copies(rows, bos_id):
    x = rows[:, :-1].clone()
    x[x == -1] = bos_id
    return [x, rows[:, 1:].clone()]


def shifted_with_loops(rows, bos_id):
    B, T = rows.shape[0], rows.shape[1] - 1
    x, y = torch.empty(B, T, dtype=torch.int32), torch.zeros(B, T, dtype=torch.int64)
    for b in range(B):
        for t in range(T):
            x[b, t] = rows[b, t] if rows[b, t] >= 0 else bos_id
            y[b, t] = rows[b, t + 1]
    return x, y


def shifted_through_numpy(rows, bos_id):
    table = rows.numpy()
    x = np.where(table[:, :-1] == -1, bos_id, table[:, :-1])
    return torch.from_numpy(x), torch.as_tensor(table[:, 1:].copy())


def shifted_with_unfold(rows, bos_id):
    pairs = rows.unfold(1, 2, 1)
    return pairs[..., 0].masked_fill(pairs[..., 0] < 0, bos_id), pairs[..., 1]


def shifted_padding_filled_in_both(rows, bos_id):
    rows = torch.where(rows < 0, bos_id, rows)
    return rows[:, :-1], rows[:, 1:]


def shifted_not_filled(rows, bos_id): return rows[:, :-1], rows[:, 1:]
def shifted_swapped(rows, bos_id): return shifted_with_where(rows, bos_id)[::-1]


def shifted_writes_into_rows(rows, bos_id):
    x, y = rows[:, :-1], rows[:, 1:].clone()
    x[x < 0] = bos_id
    return x, y


def shifted_by_roll(rows, bos_id): return torch.where(rows < 0, bos_id, rows), rows.roll(-1, 1)
def shifted_with_zero_as_padding(rows, bos_id): return torch.where(rows[:, :-1] > 0, rows[:, :-1], bos_id), rows[:, 1:]
def shifted_filled_with_zero(rows, bos_id): return rows[:, :-1].clamp(min=0), rows[:, 1:]


# 2.4 Best fit


def best_fit_step_by_step(lengths, capacity):
    waiting, rows = set(range(len(lengths))), []
    while waiting:
        row, gap = [], capacity
        while True:
            fits = [d for d in waiting if lengths[d] <= gap]
            if not fits: break
            longest = max(fits, key=lengths.__getitem__)
            waiting -= {longest}
            row += [longest]
            gap -= lengths[longest]
        rows += [row]
    return rows


def best_fit_with_numpy(lengths, capacity):
    lengths, rows = np.array(lengths, dtype=int), []
    free = np.ones(len(lengths), bool)
    while free.any():
        gap, row = capacity, []
        while (free & (lengths <= gap)).any():
            d = np.argmax(np.where(free & (lengths <= gap), lengths, -1))
            free[d] = False
            row.append(d)
            gap -= lengths[d]
        rows.append(np.array(row))
    return rows


def best_fit_decreasing(lengths, capacity):
    "The longest document first, each into the fullest row that has room."
    rows, gaps = [], []
    for d in np.argsort(lengths, kind="stable")[::-1]:
        fits = [r for r, gap in enumerate(gaps) if gap >= lengths[d]]
        if not fits:
            rows.append([])
            gaps.append(capacity)
            fits = [len(rows) - 1]
        r = min(fits, key=lambda r: gaps[r])
        rows[r].append(d)
        gaps[r] -= lengths[d]
    return rows


def best_fit_with_bisect(lengths, capacity):
    waiting, rows = [], deque()
    for d, n in enumerate(lengths): insort(waiting, (n, d))
    gap = 0
    while waiting:
        at = bisect_right(waiting, (gap, len(lengths)))
        if not at:
            rows.append(())
            gap = capacity
            continue
        n, d = waiting.pop(at - 1)
        rows[-1] += (d,)
        gap -= n
    return tuple(rows)


def best_fit_as_sets(lengths, capacity): return [set(row) for row in best_fit_step_by_step(lengths, capacity)]
def best_fit_as_generator(lengths, capacity): yield from (torch.tensor(row) for row in best_fit_with_bisect(lengths, capacity))


def next_fit(lengths, capacity):
    rows, gap = [[]], capacity
    for d, n in enumerate(lengths):
        if n > gap: rows, gap = [*rows, []], capacity
        rows[-1].append(d)
        gap -= n
    return rows


def best_fit_of_lengths(lengths, capacity): return [[lengths[d] for d in row] for row in best_fit_step_by_step(lengths, capacity)]
def best_fit_without_last_row(lengths, capacity): return best_fit_step_by_step(lengths, capacity)[:-1]


def best_fit_shortest_first(lengths, capacity):
    order, rows, gap = sorted(range(len(lengths)), key=lengths.__getitem__), [], 0
    for d in order:
        if lengths[d] > gap: rows, gap = [*rows, []], capacity
        rows[-1].append(d)
        gap -= lengths[d]
    return rows


def best_fit_strictly_smaller(lengths, capacity):
    rows = best_fit_step_by_step(lengths, max([capacity - 1, *lengths]))
    return rows


# 2.5 Count the waste


def waste_with_numpy(rows, lengths, capacity):
    used = sum(piece[2] for row in rows for piece in row)
    return 1 - used / np.array([capacity * len(rows), np.sum(lengths)])


def waste_with_loops(rows, lengths, capacity):
    empty = held = 0
    for row in rows:
        gap = capacity
        for _, _, n in row: gap -= n
        empty += gap
        held += capacity - gap
    return [empty / capacity / len(rows), (sum(lengths) - held) / sum(lengths)]


def waste_with_torch(rows, lengths, capacity):
    used = torch.tensor([n for row in rows for *_, n in row]).sum()
    return 1 - used / (capacity * len(rows)), 1 - used / torch.tensor(lengths).sum()


def waste_in_float32(rows, lengths, capacity):
    used = np.float32(sum(n for row in rows for *_, n in row))
    return torch.tensor([1 - used / np.float32(capacity * len(rows)), 1 - used / np.float32(sum(lengths))])


def waste_swapped(rows, lengths, capacity): return waste_with_loops(rows, lengths, capacity)[::-1]
def waste_in_percent(rows, lengths, capacity): return tuple(100 * w for w in waste_with_loops(rows, lengths, capacity))


def waste_of_placed_documents(rows, lengths, capacity):
    placed = {d for row in rows for d, *_ in row}
    used = sum(n for row in rows for *_, n in row)
    return 1 - used / capacity / len(rows), 1 - used / sum(lengths[d] for d in placed)


def waste_mean_of_documents(rows, lengths, capacity):
    used = Counter()
    for row in rows:
        for d, _, n in row: used[d] += n
    return waste_with_loops(rows, lengths, capacity)[0], np.mean([1 - used[d] / n for d, n in enumerate(lengths)])


# 2.6 Rows for training


def rows_with_bisect(documents, T, bos_id):
    waiting = sorted((len(ids) + 1, d) for d, ids in enumerate(documents))
    rows, row = [], []
    while waiting:
        gap = T + 1 - len(row)
        at = bisect_right(waiting, (gap, len(documents)))
        if at: _, d = waiting.pop(at - 1)
        else: _, d = waiting.pop(0)
        row += ([bos_id] + list(documents[d]))[:gap]
        if len(row) == T + 1:
            rows.append(torch.tensor(row))
            row = []
    return torch.stack(rows) if rows else torch.empty(0, T + 1, dtype=torch.int64)


def rows_with_stacks_of_lengths(documents, T, bos_id):
    stacks = defaultdict(list)
    for d, ids in enumerate(documents): stacks[min(len(ids), T) + 1].append(d)
    rows, left = [], len(documents)
    while left:
        row = []
        while len(row) < T + 1 and left:
            gap = T + 1 - len(row)
            n = next((n for n in range(gap, 0, -1) if stacks.get(n)), None)
            if n is None: n = next(n for n in range(gap, T + 2) if stacks.get(n))
            d = stacks[n].pop()
            left -= 1
            row.extend([bos_id, *documents[d]][:gap])
        if len(row) == T + 1: rows.append(row)
    return torch.LongTensor(rows).reshape(len(rows), T + 1)


def rows_in_buffers_of_500(documents, T, bos_id):
    rows = [rows_with_bisect(documents[i:i + 500], T, bos_id) for i in range(0, len(documents), 500)]
    return torch.cat(rows) if rows else torch.empty(0, T + 1, dtype=torch.int64)


def rows_filled_in_numpy(documents, T, bos_id):
    plan = rows_with_stacks_of_lengths(documents, T, bos_id).tolist()
    out = np.full((len(plan), T + 1), bos_id, dtype=np.int64)
    for r, row in enumerate(plan): out[r] = row
    return torch.from_numpy(out)


def rows_in_order_cropped(documents, T, bos_id):
    rows, row = [], []
    for ids in documents:
        row += [bos_id, *ids][:T + 1 - len(row)]
        if len(row) == T + 1: rows, row = [*rows, row], []
    return torch.tensor(rows, dtype=torch.long).view(-1, T + 1)


def rows_of_a_tape(documents, T, bos_id):
    tape = [i for ids in documents for i in (bos_id, *ids)]
    n = len(tape) // (T + 1)
    return torch.tensor(tape[:n * (T + 1)], dtype=torch.long).view(n, T + 1)


def rows_with_padding(documents, T, bos_id):
    lengths = [min(len(ids), T) + 1 for ids in documents]
    rows = [[i for d in row for i in [bos_id, *documents[d][:T]]] for row in best_fit_with_bisect(lengths, T + 1)]
    return torch.tensor([row + [-1] * (T + 1 - len(row)) for row in rows])


def rows_padded_with_bos(documents, T, bos_id):
    rows = rows_with_padding(documents, T, bos_id)
    return torch.where(rows < 0, bos_id, rows)


def rows_of_T(documents, T, bos_id): return rows_with_bisect(documents, T - 1, bos_id)


def rows_that_use_the_rest(documents, T, bos_id):
    parts = [ids[i:i + T] for ids in documents for i in range(0, len(ids), T)]
    return rows_with_bisect(parts, T, bos_id)


def rows_in_int32(documents, T, bos_id): return rows_with_bisect(documents, T, bos_id).int()
def rows_as_lists(documents, T, bos_id): return rows_with_bisect(documents, T, bos_id).tolist()


def rows_bos_only_at_the_start(documents, T, bos_id):
    longer = rows_with_bisect(documents, T, bos_id).tolist()
    rows = [[bos_id, *(i for i in row if i != bos_id)] for row in longer]
    return torch.tensor([(row + row[1:])[:T + 1] for row in rows])


# 2.7 Stop, and go on


def next_with_range(position, rank, world_size, batch_size):
    return range(position + rank * batch_size, position + (rank + 1) * batch_size), position + world_size * batch_size


def next_with_arange(position, rank, world_size, batch_size):
    return np.arange(batch_size) + position + rank * batch_size, np.int64(position + world_size * batch_size)


def next_with_tensors(position, rank, world_size, batch_size):
    rows = torch.arange(position, position + world_size * batch_size).view(world_size, batch_size)
    return [rows[rank], rows[-1, -1] + 1]


def next_with_loop(position, rank, world_size, batch_size):
    mine = []
    for r in range(world_size):
        for _ in range(batch_size):
            if r == rank: mine.append(position)
            position += 1
    return mine, position


def next_as_generator(position, rank, world_size, batch_size):
    first = position + rank * batch_size
    return (first + i for i in range(batch_size)), position + world_size * batch_size


def next_interleaved(position, rank, world_size, batch_size):
    end = position + world_size * batch_size
    return list(range(position + rank, end, world_size)), end


def next_of_own_rank(position, rank, world_size, batch_size):
    first = position + rank * batch_size
    return list(range(first, first + batch_size)), first + batch_size


def next_all_the_same(position, rank, world_size, batch_size): return list(range(position, position + batch_size)), position + batch_size * world_size
def next_only_own_batch(position, rank, world_size, batch_size): return next_with_loop(position, rank, world_size, batch_size)[0], position + batch_size
def next_counts_steps(position, rank, world_size, batch_size): return next_with_loop(position, rank, world_size, batch_size)[0], position + 1


RIGHT = {
    "2.1": [near_with_combinations, near_as_set_of_larger_first, near_as_frozensets, near_as_generator, near_with_numpy,
            near_with_torch_index, near_by_inverted_index],
    "2.2": [contaminated_with_set, contaminated_looking_up_documents, contaminated_with_padded_text, contaminated_as_generator,
            contaminated_backwards, contaminated_with_hashes],
    "2.3": [shifted_with_where, shifted_in_place_on_copies, shifted_with_loops, shifted_through_numpy, shifted_with_unfold],
    "2.4": [best_fit_step_by_step, best_fit_with_numpy, best_fit_decreasing, best_fit_with_bisect, best_fit_as_sets,
            best_fit_as_generator],
    "2.5": [waste_with_numpy, waste_with_loops, waste_with_torch, waste_in_float32],
    "2.6": [rows_in_int32, rows_with_bisect, rows_with_stacks_of_lengths, rows_in_buffers_of_500, rows_filled_in_numpy],
    "2.7": [next_with_range, next_with_arange, next_with_tensors, next_with_loop, next_as_generator],
}

WRONG = {
    "2.1": [(near_divided_by_smaller, "divided by"), (near_with_counted_runs, "counts once"), (near_with_capitals, "capitals"),
            (near_with_themselves, "near-duplicate of itself"), (near_only_neighbours, "Every pair counts"),
            (near_by_exact_equality, "three of five"), (near_above_least, "exactly `least`"),
            (near_split_at_each_space, "without an argument")],
    "2.2": [(contaminated_by_whole_question, "Three words in a row"), (contaminated_across_documents, "not adjacent"),
            (contaminated_by_shared_words, "never three in a row"), (contaminated_in_letters, "whole words"),
            (contaminated_as_bools, "bool"), (contaminated_as_texts, "a whole number is expected"),
            (contaminated_split_at_each_space, "without an argument")],
    "2.3": [(shifted_padding_filled_in_both, "padding"), (shifted_not_filled, "holds -1"), (shifted_swapped, "comes after"),
            (shifted_writes_into_rows, "changed"), (shifted_by_roll, "shape"), (shifted_filled_with_zero, "BOS"),
            (shifted_with_zero_as_padding, "all but the last token")],
    "2.4": [(next_fit, "longest document that fits"), (best_fit_of_lengths, "not their lengths"),
            (best_fit_without_last_row, "in no row"), (best_fit_shortest_first, "longest document that fits"),
            (best_fit_strictly_smaller, "best fit needs")],
    "2.5": [(waste_swapped, "row space"), (waste_in_percent, "between 0 and 1"), (waste_of_placed_documents, "no row at all"),
            (waste_mean_of_documents, "no row")],
    "2.6": [(rows_in_order_cropped, "longest document that fits"), (rows_of_a_tape, "begins with"),
            (rows_with_padding, "no padding"), (rows_padded_with_bos, "padding"), (rows_of_T, "T + 1"),
            (rows_that_use_the_rest, "begins at its beginning"), (rows_as_lists, "a tensor is"),
            (rows_bos_only_at_the_start, "how a document begins")],
    "2.7": [(next_interleaved, "stretch"), (next_of_own_rank, "disagree"), (next_all_the_same, "twice"),
            (next_only_own_batch, "all ranks read together"), (next_counts_steps, "all ranks read together")],
}
