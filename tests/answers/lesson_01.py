"""Answers to the exercises of lesson 1, right ones in many styles and plausible wrong ones."""
import heapq
import itertools
import re
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from fractions import Fraction
from functools import cache

import numpy as np
import torch

from nanochat.lab.exercises.tokens import SPECIAL, count_pairs, encode_piece, split_text

# 1.1 Count what repeats only once


def count_with_counter_per_piece(pieces):
    total = Counter()
    for ids, n in pieces.items(): total.update({pair: n * k for pair, k in Counter(zip(ids[:-1], ids[1:])).items()})
    return total


def count_with_defaultdict_and_index(pieces):
    counts = defaultdict(int)
    for piece in pieces:
        for i in range(len(piece) - 1): counts[piece[i], piece[i + 1]] += pieces[piece]
    return counts


def count_with_numpy(pieces):
    rows = [(a, b, n) for ids, n in pieces.items() for a, b in itertools.pairwise(ids)]
    if not rows: return {}
    table = np.array(rows)
    pairs, which = np.unique(table[:, :2], axis=0, return_inverse=True)
    counts = np.bincount(which.reshape(-1), weights=table[:, 2])
    return {tuple(pair): n for pair, n in zip(pairs, counts)}


def count_with_torch_numbers(pieces):
    counts = {}
    for ids, n in pieces.items():
        for pair in itertools.pairwise(ids): counts[pair] = counts.get(pair, torch.tensor(0)) + n
    return counts


def count_and_keep_zeros(pieces):
    every = {pair for ids in pieces for pair in zip(ids, ids[1:])} | {(9, 9)}
    return {pair: sum(n * list(zip(ids, ids[1:])).count(pair) for ids, n in pieces.items()) for pair in every}


def count_by_multiplying_lists(pieces): return Counter(pair for ids, n in pieces.items() for _ in range(n) for pair in zip(ids, ids[1:]))


def count_each_piece_once(pieces): return Counter(pair for ids in pieces for pair in zip(ids, ids[1:]))


def count_last_piece_wins(pieces): return {pair: n for ids, n in pieces.items() for pair in zip(ids, ids[1:])}


def count_without_overlap(pieces):
    counts = Counter()
    for ids, n in pieces.items():
        i = 0
        while i < len(ids) - 1:
            counts[ids[i], ids[i + 1]] += n
            i += 2 if ids[i] == ids[i + 1] else 1
    return counts


def count_across_pieces(pieces):
    tape = [i for ids, n in pieces.items() for i in ids]
    return Counter(zip(tape, tape[1:]))


# 1.2 Train it


def _merged(ids, pair, new_id):
    out = []
    for i in ids:
        if out and (out[-1], i) == pair: out[-1] = new_id
        else: out.append(i)
    return out


def _words(texts): return Counter(word for text in texts for word in split_text(text))


def train_by_sorting_pairs(texts, n_merges):
    rows = [[list(word.encode()), n] for word, n in _words(texts).items()]
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for ids, n in rows:
            for pair in itertools.pairwise(ids): counts[pair] += n
        ranking = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if not ranking or ranking[0][1] == 1: break
        pair = ranking[0][0]
        for row in rows: row[0] = _merged(row[0], pair, 256 + len(merges))
        merges.append(list(pair))
    return merges


def train_as_generator(texts, n_merges):
    pieces = {tuple(word.encode()): n for word, n in _words(texts).items()}
    for new_id in range(256, 256 + n_merges):
        counts = count_pairs(pieces)
        most = max(counts.values(), default=0)
        if most <= 1: return
        pair = min(p for p in counts if counts[p] == most)
        yield pair
        pieces = {tuple(_merged(ids, pair, new_id)): n for ids, n in pieces.items()}


def train_with_bytes_replace(texts, n_merges):
    "Ids are characters of a str, so that `str.replace` merges."
    words = {"".join(map(chr, word.encode())): n for word, n in _words(texts).items()}
    merges = []
    for new_id in range(256, 256 + n_merges):
        counts = Counter()
        for word, n in words.items():
            for a, b in zip(word, word[1:]): counts[a + b] += n
        if not counts: break
        best = min(counts, key=lambda ab: (-counts[ab], ab))
        if counts[best] < 2: break
        words = {word.replace(best, chr(new_id)): n for word, n in words.items()}
        merges.append(tuple(map(ord, best)))
    return merges


def train_to_numpy(texts, n_merges): return np.array([*train_as_generator(texts, n_merges)], dtype=np.int32).reshape(-1, 2)


def train_with_heap(texts, n_merges):
    pieces = {tuple(word.encode()): n for word, n in _words(texts).items()}
    merges = []
    for new_id in range(256, 256 + n_merges):
        heap = [(-n, pair) for pair, n in count_pairs(pieces).items() if n > 1]
        if not heap: break
        heapq.heapify(heap)
        _, pair = heap[0]
        pieces = {tuple(_merged(ids, pair, new_id)): n for ids, n in pieces.items()}
        merges.append(pair)
    return tuple(merges)


def train_with_largest_of_ties(texts, n_merges):
    pieces, merges = {tuple(word.encode()): n for word, n in _words(texts).items()}, []
    for new_id in range(256, 256 + n_merges):
        counts = count_pairs(pieces)
        if not counts or max(counts.values()) < 2: break
        pair = max(counts, key=lambda p: (counts[p], p))
        pieces = {tuple(_merged(ids, pair, new_id)): n for ids, n in pieces.items()}
        merges.append(pair)
    return merges


def train_on_characters(texts, n_merges):
    pieces, merges = {tuple(map(ord, word)): n for word, n in _words(texts).items()}, []
    for new_id in range(256, 256 + n_merges):
        counts = count_pairs(pieces)
        if not counts or max(counts.values()) < 2: break
        pair = min(counts, key=lambda p: (-counts[p], p))
        pieces = {tuple(_merged(ids, pair, new_id)): n for ids, n in pieces.items()}
        merges.append(pair)
    return merges


def train_without_split(texts, n_merges):
    rows, merges = [list(text.encode()) for text in texts], []
    for new_id in range(256, 256 + n_merges):
        counts = Counter(pair for row in rows for pair in zip(row, row[1:]))
        if not counts or max(counts.values()) < 2: break
        pair = min(counts, key=lambda p: (-counts[p], p))
        rows = [_merged(row, pair, new_id) for row in rows]
        merges.append(pair)
    return merges


def train_ids_from_257(texts, n_merges):
    return [tuple(i + (i > 255) for i in pair) for pair in train_as_generator(texts, n_merges)]


def train_never_stops_early(texts, n_merges):
    pieces, merges = {tuple(word.encode()): n for word, n in _words(texts).items()}, []
    for new_id in range(256, 256 + n_merges):
        counts = count_pairs(pieces)
        if not counts: break
        pair = min(counts, key=lambda p: (-counts[p], p))
        pieces = {tuple(_merged(ids, pair, new_id)): n for ids, n in pieces.items()}
        merges.append(pair)
    return merges


def train_returns_tokens(texts, n_merges):
    tokens = [bytes([i]) for i in range(256)]
    for a, b in train_as_generator(texts, n_merges): tokens.append(tokens[a] + tokens[b])
    return tokens[256:]


# 1.3 Encode in the order of ranks


def encode_in_place(piece, ranks):
    ids = list(piece)
    while True:
        best = min(range(len(ids) - 1), key=lambda i: ranks.get((ids[i], ids[i + 1]), 1 << 60), default=None)
        if best is None or (ids[best], ids[best + 1]) not in ranks: return ids
        ids[best:best + 2] = [ranks[ids[best], ids[best + 1]]]


def encode_one_merge_after_the_other(piece, ranks):
    ids = [*piece]
    for pair, new_id in sorted(ranks.items(), key=lambda item: item[1]): ids = _merged(ids, pair, new_id)
    return ids


def encode_with_numpy(piece, ranks):
    ids = np.frombuffer(piece, np.uint8).astype(np.int64)
    while len(ids) > 1:
        found = np.array([ranks.get((int(a), int(b)), 10**9) for a, b in zip(ids, ids[1:])])
        at = found.argmin()
        if found[at] == 10**9: break
        ids = np.concatenate([ids[:at], [found[at]], ids[at + 2:]])
    return ids


def encode_recursively(piece, ranks):
    def go(ids):
        possible = [(ranks[p], i) for i, p in enumerate(itertools.pairwise(ids)) if p in ranks]
        if not possible: return ids
        new_id, i = min(possible)
        return go(ids[:i] + (new_id,) + ids[i + 2:])
    return go(tuple(piece))


def encode_as_deque(piece, ranks): return deque(encode_in_place(piece, ranks))
def encode_as_array(piece, ranks): return array("l", encode_in_place(piece, ranks))
def encode_as_generator(piece, ranks): yield from encode_in_place(piece, ranks)
def encode_as_float_array(piece, ranks): return np.append(np.array([]), encode_in_place(piece, ranks))
def encode_as_uint16(piece, ranks): return torch.tensor(encode_in_place(piece, ranks), dtype=torch.int32)


def encode_from_left_to_right(piece, ranks):
    ids = []
    for i in piece:
        ids.append(i)
        while tuple(ids[-2:]) in ranks: ids[-2:] = [ranks[tuple(ids[-2:])]]
    return ids


def encode_highest_rank_first(piece, ranks):
    ids = list(piece)
    while possible := [(ranks[p], p) for p in zip(ids, ids[1:]) if p in ranks]:
        new_id, pair = max(possible)
        ids = _merged(ids, pair, new_id)
    return ids


def encode_only_first_bytes(piece, ranks):
    ids = list(piece)
    for new_id, pair in sorted((ranks[p], p) for p in set(zip(ids, ids[1:])) if p in ranks): ids = _merged(ids, pair, new_id)
    return ids


def encode_in_the_order_of_the_dictionary(piece, ranks):
    ids = list(piece)
    for pair, new_id in ranks.items(): ids = _merged(ids, pair, new_id)
    return ids


def encode_and_empty_ranks(piece, ranks):
    ids = encode_in_place(piece, ranks)
    ranks.clear()
    return ids


# 1.4 Your own tokenizer


class WithListsAndLoops:
    def __init__(self, merges):
        self.vocab = {i: bytes([i]) for i in range(256)}
        self.ranks = {}
        for i in range(len(merges)):
            a, b = merges[i]
            self.vocab[256 + i] = self.vocab[a] + self.vocab[b]
            self.ranks[(a, b)] = 256 + i
        self.special = OrderedDict()
        for name in SPECIAL:
            self.special[name] = len(self.vocab)
            self.vocab[len(self.vocab)] = b""
        self.vocab_size = len(self.vocab)
        self.token_bytes = tuple(len(self.vocab[i]) for i in range(self.vocab_size))
        self.cache = {}

    def encode(self, text):
        out = []
        for piece in split_text(text):
            ids = self.cache.get(piece)
            if ids is None: ids = self.cache[piece] = encode_in_place(piece.encode("utf-8"), self.ranks)
            out.extend(ids)
        return out

    def decode(self, ids):
        data = bytearray()
        for i in ids: data += self.vocab[int(i)]
        return data.decode("utf-8", errors="replace")


class WithProperties:
    def __init__(self, merges): self._merges = [tuple(pair) for pair in merges]

    @property
    def tokens(self):
        tokens = [bytes([i]) for i in range(256)]
        for a, b in self._merges: tokens.append(tokens[a] + tokens[b])
        return tokens + [b""] * len(SPECIAL)

    @property
    def vocab_size(self): return np.int64(256 + len(self._merges) + len(SPECIAL))

    @property
    def special(self): return {name: np.int32(256 + len(self._merges) + i) for i, name in enumerate(SPECIAL)}

    @property
    def token_bytes(self): return np.array([len(token) for token in self.tokens], dtype=np.int32)

    def encode(self, text):
        ranks = {pair: 256 + i for i, pair in enumerate(self._merges)}
        known = cache(lambda piece: tuple(encode_piece(piece.encode(), ranks)))
        return [i for piece in split_text(text) for i in known(piece)]

    def decode(self, ids):
        tokens = self.tokens
        return b"".join([tokens[i] for i in ids]).decode(errors="replace")


class WithTensorsAndClosures:
    def __init__(self, merges):
        tokens = [bytes((i,)) for i in range(256)]
        for a, b in merges: tokens += [tokens[a] + tokens[b]]
        first = len(tokens)
        self.special = dict(zip(SPECIAL, range(first, first + len(SPECIAL))))
        self.token_bytes = torch.tensor([*map(len, tokens)] + [0] * len(SPECIAL))
        self.vocab_size = self.token_bytes.numel()
        ranks = {pair: 256 + i for i, pair in enumerate(map(tuple, merges))}
        encode_cached = cache(lambda piece: encode_one_merge_after_the_other_of(piece, ranks))
        self.encode = lambda text: list(itertools.chain.from_iterable(encode_cached(p) for p in split_text(text)))
        self.decode = lambda ids: b"".join(tokens[i] for i in ids if i < first).decode("utf-8", "replace")


def encode_one_merge_after_the_other_of(piece, ranks): return tuple(encode_recursively(piece.encode(), ranks))


class WithoutCache(WithListsAndLoops):
    def encode(self, text): return sum((encode_in_place(piece.encode(), self.ranks) for piece in split_text(text)), [])


def made_by_a_function(merges): return WithListsAndLoops(merges)


class SpecialFromText(WithListsAndLoops):
    def encode(self, text):
        out = []
        for part in re.split("(" + "|".join(map(re.escape, SPECIAL)) + ")", text): out += [self.special[part]] if part in self.special else super().encode(part)
        return out


class SpecialBeforeMerges(WithListsAndLoops):
    def __init__(self, merges):
        super().__init__(merges)
        self.special = {name: 256 + i for i, name in enumerate(SPECIAL)}


class SpecialAsText(WithListsAndLoops):
    def decode(self, ids):
        names = {i: name.encode() for name, i in self.special.items()}
        return b"".join(names.get(i, self.vocab[i]) for i in ids).decode("utf-8", "replace")


class StrictDecode(WithListsAndLoops):
    def decode(self, ids): return b"".join(self.vocab[i] for i in ids).decode()


class DecodeEachByItself(WithListsAndLoops):
    def decode(self, ids): return "".join(self.vocab[i].decode("utf-8", "replace") for i in ids)


class WithoutSplit(WithListsAndLoops):
    def encode(self, text): return encode_in_place(text.encode(), self.ranks)


class ReturnsItsCache(WithListsAndLoops):
    texts = property(lambda self: self.__dict__.setdefault("_texts", {}))

    def encode(self, text): return self.texts.setdefault(text, super().encode(text))


class TokensAsBytes(WithListsAndLoops):
    def __init__(self, merges):
        super().__init__(merges)
        self.token_bytes = list(self.vocab.values())


class SizeWithoutSpecial(WithListsAndLoops):
    def __init__(self, merges):
        super().__init__(merges)
        self.vocab_size = 256 + len(merges)


class EncodesToArray(WithListsAndLoops):
    def encode(self, text): return np.array(super().encode(text))


class SizeAsMethod(WithListsAndLoops):
    def __init__(self, merges):
        super().__init__(merges)
        del self.vocab_size

    def vocab_size(self): return len(self.vocab)


# 1.5 Bytes per token


def ratio_with_loop(texts, encode):
    n_bytes, n_tokens = 0, 0
    for text in texts:
        n_bytes += len(bytes(text, "utf-8"))
        n_tokens += len(encode(text))
    return n_bytes / n_tokens


def ratio_with_numpy(texts, encode):
    table = np.array([(len(text.encode("utf8")), len(encode(text))) for text in texts])
    return np.divide(*table.sum(axis=0))


def ratio_with_torch(texts, encode):
    return torch.tensor([len(t.encode()) for t in texts]).sum() / torch.tensor([len(encode(t)) for t in texts]).sum()


def ratio_as_fraction(texts, encode): return Fraction(sum(len(t.encode()) for t in texts), sum(len(encode(t)) for t in texts))
def ratio_joined_bytes(texts, encode): return np.array([len("".join(texts).encode()) / sum(map(len, map(encode, texts)))])


def ratio_of_characters(texts, encode): return sum(map(len, texts)) / sum(len(encode(t)) for t in texts)
def ratio_upside_down(texts, encode): return 1 / ratio_with_loop(texts, encode)
def ratio_mean_of_texts(texts, encode): return np.mean([len(t.encode()) / len(encode(t)) for t in texts if t])
def ratio_of_joined_text(texts, encode): return ratio_with_loop(["".join(texts)], encode)


# 1.6 Where a decoder must wait


def _complete(data):
    try: data.decode("utf-8")
    except UnicodeDecodeError: return False
    return True


def unfinished_with_comprehension(tokens): return [i for i in range(len(tokens)) if not _complete(b"".join(tokens[:i + 1]))]
def unfinished_with_flatnonzero(tokens): return np.flatnonzero([not _complete(b"".join(tokens[:i + 1])) for i in range(len(tokens))])
def unfinished_as_set(tokens): return {i for i, data in enumerate(itertools.accumulate(tokens)) if not _complete(data)}
def unfinished_as_generator(tokens): return (i for i, data in enumerate(itertools.accumulate(tokens)) if not _complete(data))
def unfinished_as_tensor(tokens): return torch.tensor([not _complete(d) for d in itertools.accumulate(tokens)]).nonzero().flatten()


def unfinished_by_counting_bits(tokens):
    missing, places = 0, np.array([])
    for i, token in enumerate(tokens):
        for byte in token: missing = missing - 1 if byte >> 6 == 0b10 else (byte >= 0xC0) + (byte >= 0xE0) + (byte >= 0xF0)
        if missing: places = np.append(places, i)
    return places


def unfinished_with_codec(tokens):
    import codecs
    decoder = codecs.getincrementaldecoder("utf-8")()
    places = []
    for i, token in enumerate(tokens):
        decoder.decode(token)
        if decoder.getstate()[0]: places.append(i)
    return tuple(places)


def unfinished_each_by_itself(tokens): return [i for i, token in enumerate(tokens) if not _complete(token)]
def unfinished_one_late(tokens): return [i + 1 for i in unfinished_with_comprehension(tokens)]
def unfinished_by_replacement_mark(tokens): return [i for i, d in enumerate(itertools.accumulate(tokens)) if "\ufffd" in d.decode("utf-8", "replace")]
def unfinished_as_bools(tokens): return [not _complete(d) for d in itertools.accumulate(tokens)]


RIGHT = {
    "1.1": [count_with_counter_per_piece, count_with_defaultdict_and_index, count_with_numpy, count_with_torch_numbers,
            count_and_keep_zeros, count_by_multiplying_lists],
    "1.2": [train_by_sorting_pairs, train_as_generator, train_with_bytes_replace, train_to_numpy, train_with_heap],
    "1.3": [encode_in_place, encode_one_merge_after_the_other, encode_with_numpy, encode_recursively, encode_as_deque,
            encode_as_array, encode_as_generator, encode_as_float_array, encode_as_uint16],
    "1.4": [WithListsAndLoops, WithProperties, WithTensorsAndClosures, WithoutCache, made_by_a_function],
    "1.5": [ratio_with_loop, ratio_with_numpy, ratio_with_torch, ratio_joined_bytes, ratio_as_fraction],
    "1.6": [unfinished_with_comprehension, unfinished_with_flatnonzero, unfinished_as_set, unfinished_as_generator,
            unfinished_as_tensor, unfinished_by_counting_bits, unfinished_with_codec],
}

WRONG = {
    "1.1": [(count_each_piece_once, "7 times"), (count_last_piece_wins, "add up"), (count_without_overlap, "adjacent pairs"),
            (count_across_pieces, "occurs 7 times")],
    "1.2": [(train_with_largest_of_ties, "smaller ids"), (train_on_characters, "several bytes"),
            (train_without_split, "is the text split"), (train_ids_from_257, "makes id 256"),
            (train_never_stops_early, "No pair occurs twice"), (train_returns_tokens, "a merge is")],
    "1.3": [(encode_from_left_to_right, "lowest rank"), (encode_highest_rank_first, "lowest rank"),
            (encode_only_first_bytes, "another one possible"), (encode_and_empty_ranks, "changed"),
            (encode_in_the_order_of_the_dictionary, "wherever it is in the dictionary")],
    "1.4": [(SpecialFromText, "never becomes"), (SpecialBeforeMerges, "come after the merges"),
            (SpecialAsText, "no text"), (StrictDecode, "UnicodeDecodeError"), (DecodeEachByItself, "joined first"),
            (WithoutSplit, "split_text"), (ReturnsItsCache, "new list"), (TokensAsBytes, "whole number"),
            (SizeWithoutSpecial, "special tokens"), (EncodesToArray, "a list is"), (SizeAsMethod, "is a method")],
    "1.5": [(ratio_of_characters, "How many bytes"), (ratio_upside_down, "divided by which"),
            (ratio_mean_of_texts, "mean of the texts"), (ratio_of_joined_text, "three texts")],
    "1.6": [(unfinished_each_by_itself, "by itself"), (unfinished_one_late, "after token 0"),
            (unfinished_by_replacement_mark, "so far"), (unfinished_as_bools, "bool")],
}
