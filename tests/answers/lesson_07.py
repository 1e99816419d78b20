"""Answers to the exercises of lesson 7: right ones in several styles, and wrong ones with a part of what the check says."""
import copy
from collections import Counter, OrderedDict, defaultdict
from fractions import Fraction
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.lab.exercises.chat import pack, render


# 7.1 · Render a conversation

def pieces(conversation, encode, special):
    "Yield (ids, trained) of the right template."
    yield [special("<|bos|>")], 0
    for message in conversation["messages"]:
        role, content = message["role"], message["content"]
        yield [special("<|" + role + "_start|>")], 0
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "python": yield [special("<|python_start|>"), *encode(part["text"]), special("<|python_end|>")], 1
            elif part["type"] == "python_output": yield [special("<|output_start|>"), *encode(part["text"]), special("<|output_end|>")], 0
            else: yield encode(part["text"]), int(role == "assistant")
        yield [special("<|" + role + "_end|>")], int(role == "assistant")


def render_two_lists(conversation, encode, special):
    ids, mask = [], []
    for new, trained in pieces(conversation, encode, special):
        ids += new
        mask += [trained] * len(new)
    return ids, mask


def render_numpy_arrays(conversation, encode, special):
    ids, mask = render_two_lists(conversation, encode, special)
    return np.array(ids, np.uint16), np.array(mask, bool)


def render_tensors_int32(conversation, encode, special):
    ids, mask = render_two_lists(conversation, encode, special)
    return [torch.tensor(ids, dtype=torch.int32), torch.tensor(mask, dtype=torch.bool)]


def render_zip_of_pairs(conversation, encode, special):
    pairs = [(id, trained == 1) for new, trained in pieces(conversation, encode, special) for id in new]
    return zip(*pairs)


def render_generators(conversation, encode, special):
    all_pieces = list(pieces(conversation, encode, special))
    return (id for new, _ in all_pieces for id in new), (float(trained) for new, trained in all_pieces for _ in new)


def render_stacked_array(conversation, encode, special):
    return np.stack([np.array(part) for part in render_two_lists(conversation, encode, special)])


def render_ids_first_mask_after(conversation, encode, special):
    ids = list(chain.from_iterable(new for new, _ in pieces(conversation, encode, special)))
    mask, speaking, tool = [], False, False
    for id in ids:
        if id == special("<|output_start|>"): tool = True
        mask.append(np.bool_(speaking and not tool))
        if id == special("<|output_end|>"): tool = False
        if id == special("<|assistant_start|>"): speaking = True
        if id == special("<|assistant_end|>"): speaking = False
    return tuple(ids), tuple(mask)


class _Builder:
    def __init__(self, special): self.ids, self.mask, self.special = [special("<|bos|>")], [0], special

    def between(self, name, ids, inside, marks):
        new = [self.special(f"<|{name}_start|>"), *ids, self.special(f"<|{name}_end|>")]
        self.ids.extend(new)
        self.mask.extend([marks, *[inside] * len(ids), marks])


def render_with_a_class(conversation, encode, special):
    builder = _Builder(special)
    for message in conversation["messages"]:
        content = message["content"]
        if message["role"] == "user":
            builder.between("user", encode(content), 0, 0)
            continue
        builder.ids.append(special("<|assistant_start|>"))
        builder.mask.append(0)
        for part in content if isinstance(content, list) else [dict(type="text", text=content)]:
            match part:
                case {"type": "python", "text": text}: builder.between("python", encode(text), 1, 1)
                case {"type": "python_output", "text": text}: builder.between("output", encode(text), 0, 0)
                case {"text": text}:
                    ids = encode(text)
                    builder.ids += ids
                    builder.mask += [1] * len(ids)
        builder.ids.append(special("<|assistant_end|>"))
        builder.mask.append(1)
    return builder.ids, builder.mask


def render_without_end_in_mask(conversation, encode, special):
    ids, mask = render_two_lists(conversation, encode, special)
    return ids, [m and id != special("<|assistant_end|>") for id, m in zip(ids, mask)]


def render_output_trained(conversation, encode, special):
    ids, mask = render_two_lists(conversation, encode, special)
    inside = False
    for i, id in enumerate(ids):
        inside = inside or id == special("<|output_start|>")
        mask[i] = int(mask[i] or inside)
        inside = inside and id != special("<|output_end|>")
    return ids, mask


def render_everything_trained(conversation, encode, special):
    ids, _ = render_two_lists(conversation, encode, special)
    return ids, [1] * len(ids)


def render_start_trained(conversation, encode, special):
    ids, mask = render_two_lists(conversation, encode, special)
    return ids, [m or id == special("<|assistant_start|>") for id, m in zip(ids, mask)]


def render_no_bos(conversation, encode, special):
    ids, mask = render_two_lists(conversation, encode, special)
    return ids[1:], mask[1:]


def render_names_encoded_as_text(conversation, encode, special):
    text = "".join(f"<|{m['role']}_start|>{m['content']}<|{m['role']}_end|>" for m in conversation["messages"])
    ids = [special("<|bos|>"), *encode(text)]
    return ids, [0] * len(ids)


def render_pairs(conversation, encode, special):
    return list(zip(*render_two_lists(conversation, encode, special)))


def render_bos_before_each_message(conversation, encode, special):
    ids, mask = [], []
    for message in conversation["messages"]:
        new, trained = render_two_lists({"messages": [message]}, encode, special)
        ids += new
        mask += trained
    return ids, mask


def render_changes_the_messages(conversation, encode, special):
    for message in conversation["messages"]:
        if isinstance(message["content"], str): message["content"] = [{"type": "text", "text": message["content"]}]
    return render_two_lists(conversation, encode, special)


# 7.2 · The masked loss

def loss_gather(logits, ids, mask):
    each = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    trained = mask[:, 1:]
    return (each * trained).sum() / trained.sum().clamp(min=1)


def loss_cross_entropy_ignore(logits, ids, mask):
    targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="sum")
    return total / max(1, int((targets >= 0).sum()))


def loss_selects_positions(logits, ids, mask):
    rows, places = torch.nonzero(mask[:, 1:], as_tuple=True)
    if len(rows) == 0: return 0 * logits.sum()
    chosen = logits[rows, places]
    return torch.mean(torch.logsumexp(chosen, -1) - chosen[range(len(rows)), ids[rows, places + 1]])


def loss_loops(logits, ids, mask):
    total, n = logits.new_zeros(()), 0
    for b in range(len(ids)):
        for t in range(1, ids.shape[1]):
            if mask[b, t]:
                total = total - torch.log_softmax(logits[b, t - 1], 0)[ids[b, t]]
                n += 1
    return total / n if n else total


def loss_one_hot_float64(logits, ids, mask):
    log_p = torch.log_softmax(logits.double()[:, :-1], 2)
    hot = F.one_hot(ids[:, 1:], logits.shape[-1])
    weight = mask[:, 1:, None].double()
    return -(log_p * hot * weight).sum() / weight.sum().clamp_(min=1.0)


def loss_one_element(logits, ids, mask):
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    own = mask[:, 1:].to(each.dtype)
    own /= own.sum().clamp(min=1)
    return (each * own).sum().reshape(1)


def loss_nan_to_zero(logits, ids, mask):
    keep = mask[:, 1:].bool()
    return F.cross_entropy(logits[:, :-1][keep], ids[:, 1:][keep]).nan_to_num(0.0)


def loss_not_shifted(logits, ids, mask):
    each = -logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return (each * mask).sum() / mask.sum().clamp(min=1)


def loss_without_mask(logits, ids, mask):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def loss_mean_of_rows(logits, ids, mask):
    each = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return ((each * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1).clamp(min=1)).mean()


def loss_divided_by_all(logits, ids, mask):
    each = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (each * mask[:, 1:]).mean()


def loss_counts_first_token(logits, ids, mask):
    each = -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (each * mask[:, 1:]).sum() / mask.sum().clamp(min=1)


def loss_is_nan_when_empty(logits, ids, mask):
    keep = mask[:, 1:].bool()
    return F.cross_entropy(logits[:, :-1][keep], ids[:, 1:][keep])


def loss_wrong_sign(logits, ids, mask):
    return -loss_gather(logits, ids, mask)


def loss_detached(logits, ids, mask):
    return torch.tensor(loss_gather(logits, ids, mask).item())


def loss_float(logits, ids, mask):
    return loss_gather(logits, ids, mask).item()


# 7.3 · Weights to counts

def counts_sorted(weights, total):
    shares = {k: w * total / sum(weights.values()) for k, w in weights.items()}
    counts = {k: int(s) for k, s in shares.items()}
    for k in sorted(shares, key=lambda k: counts[k] - shares[k])[:total - sum(counts.values())]: counts[k] += 1
    return counts


def counts_numpy_integers(weights, total):
    shares = np.array(list(weights.values())) * total / sum(weights.values())
    n = np.floor(shares).astype(np.int32)
    order = np.argsort(n - shares, kind="stable")
    n[order[:total - n.sum()]] += 1
    return dict(zip(weights, n))


def counts_exact_fractions(weights, total):
    whole = sum(map(Fraction, weights.values()))
    shares = {k: Fraction(w) * total / whole for k, w in weights.items()}
    counts = Counter({k: s.numerator // s.denominator for k, s in shares.items()})
    while sum(counts.values()) < total:
        best = max(shares, key=lambda k: shares[k] - counts[k])
        counts[best] += 1
    return counts


def counts_floats(weights, total):
    n = {k: np.floor(w * total / sum(weights.values())) for k, w in weights.items()}
    rest = {k: w * total / sum(weights.values()) - n[k] for k, w in weights.items()}
    left = int(total - sum(n.values()))
    for k in sorted(rest, key=rest.get, reverse=True)[:left]: n[k] += 1
    return n


def counts_tensors(weights, total):
    w = torch.tensor(list(weights.values()), dtype=torch.float64)
    shares = w * total / w.sum()
    n = shares.floor().long()
    order = torch.sort(n - shares, stable=True).indices
    n[order[:total - int(n.sum())]] += 1
    return OrderedDict(zip(weights, n))


def counts_defaultdict_divmod(weights, total):
    counts, rests = defaultdict(int), []
    whole = sum(weights.values())
    for place, (k, w) in enumerate(weights.items()):
        share = w * total / whole
        counts[k], rest = int(share // 1), share % 1
        rests.append((-rest, place, k))
    for _, _, k in sorted(rests)[:total - sum(counts.values())]: counts[k] += 1
    return counts


def counts_rounded(weights, total):
    return {k: round(w * total / sum(weights.values())) for k, w in weights.items()}


def counts_rounded_down(weights, total):
    return {k: w * total // sum(weights.values()) for k, w in weights.items()}


def counts_rest_to_first(weights, total):
    counts = {k: int(w * total / sum(weights.values())) for k, w in weights.items()}
    counts[next(iter(counts))] += total - sum(counts.values())
    return counts


def counts_rest_to_largest_weight(weights, total):
    counts = {k: int(w * total / sum(weights.values())) for k, w in weights.items()}
    for k in sorted(weights, key=weights.get, reverse=True)[:total - sum(counts.values())]: counts[k] += 1
    return counts


def counts_last_of_equals(weights, total):
    shares = {k: w * total / sum(weights.values()) for k, w in weights.items()}
    counts = {k: int(s) for k, s in shares.items()}
    for k in sorted(reversed(list(shares)), key=lambda k: counts[k] - shares[k])[:total - sum(counts.values())]: counts[k] += 1
    return counts


def counts_equals_by_name(weights, total):
    return counts_sorted({k: weights[k] for k in sorted(weights)}, total)


def counts_list(weights, total):
    return list(counts_sorted(weights, total).values())


def counts_shares(weights, total):
    return {k: w * total / sum(weights.values()) for k, w in weights.items()}


# 7.4 · Pack conversations

def pack_best_fit(lengths, capacity):
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[i]]
        if fits: r = min(fits, key=lambda r: room[r])
        else:
            r = len(rows)
            rows.append([])
            room.append(capacity)
        rows[r].append(i)
        room[r] -= lengths[i]
    return rows


def pack_numpy(lengths, capacity):
    lengths = np.array(lengths, int)
    room, rows = np.zeros(0, int), []
    for i in np.argsort(-lengths, kind="stable"):
        left = np.where(room >= lengths[i], room, capacity + 1)
        if len(room) == 0 or left.min() > capacity:
            rows.append([])
            room = np.append(room, capacity)
            r = len(rows) - 1
        else: r = left.argmin()
        rows[r] = [*rows[r], i]
        room[r] -= lengths[i]
    return [np.array(row) for row in rows]


def pack_tuples(lengths, capacity):
    rows = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        used = [sum(lengths[j] for j in row) for row in rows]
        fits = [r for r, n in enumerate(used) if n + lengths[i] <= capacity]
        if fits:
            r = max(fits, key=used.__getitem__)
            rows[r] = (*rows[r], i)
        else: rows.append((i,))
    return tuple(rows)


def pack_sorted_by_room(lengths, capacity):
    rows = []  # (room, row), the fullest first
    for n, i in sorted(((n, i) for i, n in enumerate(lengths)), reverse=True):
        for place, (room, row) in enumerate(rows):
            if room >= n:
                rows[place] = room - n, row + [i]
                break
        else: rows.append((capacity - n, [i]))
        rows.sort(key=lambda pair: pair[0])
    return [row for _, row in rows]


def pack_tensor_rows(lengths, capacity):
    order = torch.tensor(lengths, dtype=torch.long).argsort(descending=True)
    rows, room = [], []
    for i in order.tolist():
        best = None
        for r, left in enumerate(room):
            if left >= lengths[i] and (best is None or left < room[best]): best = r
        if best is None:
            rows.append([i])
            room.append(capacity - lengths[i])
        else:
            rows[best].append(i)
            room[best] -= lengths[i]
    return [torch.tensor(row) for row in rows]


def pack_in_order(lengths, capacity):
    rows, room = [], []
    for i, n in enumerate(lengths):
        fits = [r for r in range(len(rows)) if room[r] >= n]
        r = min(fits, key=lambda r: room[r]) if fits else len(rows)
        if r == len(rows): rows, room = rows + [[]], room + [capacity]
        rows[r].append(i)
        room[r] -= n
    return rows


def pack_alone(lengths, capacity):
    return [[i] for i in range(len(lengths))]


def pack_lengths_for_indices(lengths, capacity):
    return [[lengths[i] for i in row] for row in pack_best_fit(lengths, capacity)]


def pack_forgets_last_row(lengths, capacity):
    return pack_best_fit(lengths, capacity)[:-1]


def pack_one_row(lengths, capacity):
    return [list(range(len(lengths)))] if lengths else []


def pack_next_fit(lengths, capacity):
    rows, room = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if room < lengths[i]: rows, room = rows + [[]], capacity
        rows[-1].append(i)
        room -= lengths[i]
    return rows


def pack_sorts_the_lengths(lengths, capacity):
    lengths.sort(reverse=True)
    return pack_best_fit(lengths, capacity)


# 7.5 · Rows of conversations

def ready(conversations, tokenizer, T):
    pairs = [render(c, tokenizer.encode, tokenizer.special.get) for c in conversations]
    return [(ids, mask) for ids, mask in pairs if len(ids) <= T + 1]


def rows_token_by_token(conversations, tokenizer, T):
    pairs = ready(conversations, tokenizer, T)
    rows = pack([len(ids) for ids, _ in pairs], T + 1)
    x = torch.full((len(rows), T + 1), tokenizer.special["<|bos|>"])
    y = torch.full((len(rows), T + 1), -1)
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            for id, trained in zip(*pairs[i]):
                x[r, start] = id
                if trained: y[r, start] = id
                start += 1
    return x[:, :-1], y[:, 1:]


def rows_lists_then_tensor(conversations, tokenizer, T):
    pairs = ready(conversations, tokenizer, T)
    x, y = [], []
    for row in pack([len(ids) for ids, _ in pairs], T + 1):
        ids = [id for i in row for id in pairs[i][0]]
        mask = [m for i in row for m in pairs[i][1]]
        empty = T + 1 - len(ids)
        ids, mask = ids + [0] * empty, mask + [0] * empty
        x.append(ids[:-1])
        y.append([id if m else -1 for id, m in zip(ids[1:], mask[1:])])
    return torch.tensor(x, dtype=torch.long).view(-1, T), torch.tensor(y, dtype=torch.long).view(-1, T)


def rows_numpy_inside(conversations, tokenizer, T):
    pairs = ready(conversations, tokenizer, T)
    rows = pack([len(ids) for ids, _ in pairs], T + 1)
    ids = np.full((len(rows), T + 1), 7, np.int64)
    mask = np.zeros((len(rows), T + 1), bool)
    for r, row in enumerate(rows):
        joined = np.concatenate([pairs[i][0] for i in row])
        ids[r, :len(joined)] = joined
        mask[r, :len(joined)] = np.concatenate([pairs[i][1] for i in row])
    y = np.where(mask, ids, -1)[:, 1:]
    return [torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(y.copy())]


def rows_pad_sequence_reversed(conversations, tokenizer, T):
    pairs = ready(conversations, tokenizer, T)
    both = [torch.full((0, T + 1), 0)] * 2
    for row in reversed(pack([len(ids) for ids, _ in pairs], T + 1)):
        ids = torch.cat([torch.tensor(pairs[i][0]) for i in reversed(row)])
        mask = torch.cat([torch.tensor(pairs[i][1]) for i in reversed(row)])
        targets = ids.masked_fill(mask == 0, -1)
        both = [torch.cat([both[0], F.pad(ids, (0, T + 1 - len(ids)), value=0)[None]]),
                torch.cat([both[1], F.pad(targets, (0, T + 1 - len(ids)), value=-1)[None]])]
    return both[0][:, :-1].contiguous(), both[1][:, 1:].contiguous()


def rows_stacked_in_one_tensor(conversations, tokenizer, T):
    return torch.stack(rows_token_by_token(conversations, tokenizer, T))


def rows_in_place_shift(conversations, tokenizer, T):
    x, y = rows_token_by_token(copy.deepcopy(conversations), tokenizer, T)
    x, y = x.clone(), y.clone()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    x[:], y[:] = x[order], y[order]
    return (part for part in (x, y))


def rows_all_targets(conversations, tokenizer, T):
    x, y = rows_token_by_token(conversations, tokenizer, T)
    return x, torch.cat([x[:, 1:], y[:, -1:]], 1)


def rows_not_shifted(conversations, tokenizer, T):
    pairs = ready(conversations, tokenizer, T)
    rows = pack([len(ids) for ids, _ in pairs], T)
    x, y = torch.full((len(rows), T), tokenizer.special["<|bos|>"]), torch.full((len(rows), T), -1)
    for r, row in enumerate(rows):
        ids = torch.tensor([id for i in row for id in pairs[i][0]])
        mask = torch.tensor([m for i in row for m in pairs[i][1]])
        x[r, :len(ids)] = ids
        y[r, :len(ids)] = torch.where(mask == 1, ids, -1)
    return x, y


def rows_mask_not_shifted(conversations, tokenizer, T):
    pairs = ready(conversations, tokenizer, T)
    rows = pack([len(ids) for ids, _ in pairs], T + 1)
    ids, mask = torch.full((len(rows), T + 1), 0), torch.zeros(len(rows), T + 1)
    for r, row in enumerate(rows):
        joined = [id for i in row for id in pairs[i][0]]
        ids[r, :len(joined)] = torch.tensor(joined)
        mask[r, :len(joined)] = torch.tensor([m for i in row for m in pairs[i][1]]).float()
    return ids[:, :-1], ids[:, 1:].masked_fill(mask[:, :-1] == 0, -1)


def rows_one_per_conversation(conversations, tokenizer, T):
    parts = [rows_token_by_token([c], tokenizer, T) for c in conversations]
    if not parts: return rows_token_by_token([], tokenizer, T)
    return tuple(torch.cat(part) for part in zip(*parts))


def rows_cut_where_too_long(conversations, tokenizer, T):
    pairs = [render(c, tokenizer.encode, tokenizer.special.get) for c in conversations]
    pairs = [(ids[:T + 1], mask[:T + 1]) for ids, mask in pairs]
    rows = pack([len(ids) for ids, _ in pairs], T + 1)
    ids, y = torch.full((len(rows), T + 1), 0), torch.full((len(rows), T + 1), -1)
    for r, row in enumerate(rows):
        joined = torch.tensor([id for i in row for id in pairs[i][0]])
        mask = torch.tensor([m for i in row for m in pairs[i][1]])
        ids[r, :len(joined)], y[r, :len(joined)] = joined, torch.where(mask == 1, joined, -1)
    return ids[:, :-1], y[:, 1:]


def rows_leave_out_the_longest_that_fits(conversations, tokenizer, T):
    short = [c for c in conversations if len(render(c, tokenizer.encode, tokenizer.special.get)[0]) <= T]
    return rows_token_by_token(short, tokenizer, T)


def rows_padding_is_minus_one(conversations, tokenizer, T):
    x, y = rows_token_by_token(conversations, tokenizer, T)
    empty = (x == tokenizer.special["<|bos|>"]) & (x.roll(-1, 1) == x)
    return x.masked_fill(empty, -1), y


def rows_numpy_result(conversations, tokenizer, T):
    return tuple(part.numpy() for part in rows_token_by_token(conversations, tokenizer, T))


def rows_a_token_too_wide(conversations, tokenizer, T):
    return rows_token_by_token(conversations, tokenizer, T + 1)


def rows_split_stream(conversations, tokenizer, T):
    pairs = ready(conversations, tokenizer, T)
    ids = torch.tensor([id for p in pairs for id in p[0]], dtype=torch.long)
    mask = torch.tensor([m for p in pairs for m in p[1]], dtype=torch.long)
    n = len(ids) // (T + 1)
    rows, kept = ids[:n * (T + 1)].view(-1, T + 1), mask[:n * (T + 1)].view(-1, T + 1)
    return rows[:, :-1], torch.where(kept == 1, rows, -1)[:, 1:]


RIGHT = {
    "7.1": [render_two_lists, render_numpy_arrays, render_tensors_int32, render_zip_of_pairs, render_generators, render_stacked_array,
            render_ids_first_mask_after, render_with_a_class],
    "7.2": [loss_gather, loss_cross_entropy_ignore, loss_selects_positions, loss_loops, loss_one_hot_float64, loss_one_element, loss_nan_to_zero],
    "7.3": [counts_sorted, counts_numpy_integers, counts_exact_fractions, counts_floats, counts_tensors, counts_defaultdict_divmod],
    "7.4": [pack_best_fit, pack_numpy, pack_tuples, pack_sorted_by_room, pack_tensor_rows],
    "7.5": [rows_token_by_token, rows_lists_then_tensor, rows_numpy_inside, rows_pad_sequence_reversed, rows_stacked_in_one_tensor, rows_in_place_shift],
}

WRONG = {
    "7.1": [(render_without_end_in_mask, "who writes"), (render_output_trained, "who writes"), (render_everything_trained, "who writes"),
            (render_start_trained, "who writes"), (render_no_bos, "<|bos|> is expected"), (render_names_encoded_as_text, "look at the template"),
            (render_pairs, "two lists"), (render_bos_before_each_message, "look at the template"), (render_changes_the_messages, "was changed")],
    "7.2": [(loss_not_shifted, "at t + 1"), (loss_without_mask, "no difference"), (loss_mean_of_rows, "the rows' means"),
            (loss_divided_by_all, "all positions"), (loss_counts_first_token, "first token"), (loss_is_nan_when_empty, "no token to train on"),
            (loss_wrong_sign, "sign"), (loss_detached, "no gradient"), (loss_float, "where a tensor")],
    "7.3": [(counts_rounded, "add up to"), (counts_rounded_down, "add up to"), (counts_rest_to_first, "left over"),
            (counts_rest_to_largest_weight, "left over"), (counts_last_of_equals, "left over"), (counts_equals_by_name, "equal ones"), (counts_list, "a dictionary"), (counts_shares, "a whole number")],
    "7.4": [(pack_in_order, "choose its row first"), (pack_alone, "choose its row first"), (pack_lengths_for_indices, "indices"),
            (pack_forgets_last_row, "last row"), (pack_one_row, "holds"), (pack_next_fit, "would do"), (pack_sorts_the_lengths, "was changed")],
    "7.5": [(rows_all_targets, "who writes it"), (rows_not_shifted, "comes next"), (rows_mask_not_shifted, "target"), (rows_one_per_conversation, "would do"),
            (rows_cut_where_too_long, "not a whole conversation"), (rows_leave_out_the_longest_that_fits, "in no row"),
            (rows_padding_is_minus_one, "no token's id"), (rows_numpy_result, "where a tensor"), (rows_a_token_too_wide, "(N, 48)"),
            (rows_split_stream, "not a whole conversation")],
}
