"""CORE: prompts, spans and scores worked out by hand; the same answers as one question at a time; any model of transformers; files that are bad."""
import gzip
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import on_ranks, real_data

from nanochat.core.files import UserError
from nanochat.core.machine import distributed
from nanochat.core.tokenizer import Tokenizer
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.post.core_eval import (
    CHOICE, CORE, LM, SCHEMA, CoreTask, GPTReader, TransformersReader, ask, core_file, core_rows,
    decide, evaluate_core, examples_for, render, sample_rows, score_questions, to_question)
from nanochat.talk.export import to_transformers
from nanochat.lab.bench.eval import one_by_one, spread_model
from nanochat.post import core_eval


class ByHand:
    "A reader whose tokens are the bytes of a text, with BOS in front, and whose probabilities are a rule that a person can follow."
    context, vocab_size, device = 1000, 257, torch.device("cpu")

    def encode(self, texts): return [np.array([256, *text.encode()]) for text in texts]
    def read(self, prefixes, room): return prefixes

    def follow(self, prefixes, ids, lengths, judged):
        rows = [[*prefix.tolist(), *row[:n].tolist()] for prefix, row, n in zip(prefixes, ids, lengths)]
        return torch.stack([self.logits(row[:len(prefix) + t + 1]) for row, prefix, where in zip(rows, prefixes, judged) for t in where.nonzero()[:, 0].tolist()])


class Costs(ByHand):
    "A vowel costs 4 bits, a space 4, behind a vowel 2, and every other byte 10; what is left of the probability goes to BOS."
    def logits(self, text):
        bits = torch.full((257,), 10.0)
        bits[list(b"aeiou")] = 4
        bits[ord(" ")] = 2 if text[-1] in list(b"aeiou") else 4
        p = 2 ** -bits
        p[256] = 1 - p[:256].sum()
        return p.log()


class Alphabet(ByHand):
    "Expects the alphabet with spaces: behind a space the letter that follows the one before it (an a behind no letter), behind all else a space."
    def logits(self, text):
        before = chr(text[-2]) if len(text) > 1 and text[-2] < 256 else "?"
        expected = " " if text[-1] != ord(" ") else chr(ord(before) + 1) if before.isalpha() else "a"
        logits = torch.zeros(257)
        logits[ord(expected)] = 3
        return logits


def worked_out(task, row, examples, reader):
    "What is to be compared with the table: texts, spans (first and last + 1 position, BOS being 0), mean bits of each option, answer."
    texts = render(task, row, examples)
    q = to_question(task, 0, row.get("gold", 0), reader.encode(texts), reader.context)
    scores, = score_questions(reader, [q])
    spans = [(len(q.prefix) + 1 + q.starts[place], len(q.prefix) + len(q.tails[place])) for place in q.places]
    return texts, spans, [scores[place][0] / math.log(2) for place in q.places], decide(task, q, scores)[0]


CHOICES = [ # query, delimiter, options, examples, texts, spans, bits (a sum over a number of tokens), answer
    ("Sky?", " ", ["blue", "red"], [], ["Sky? blue", "Sky? red"], [(6, 10), (6, 9)], [28 / 4, 24 / 3], 0),
    ("Dry?\n", "\nAnswer: ", ["air", "cloth"], [], ["Dry?\n\nAnswer: air", "Dry?\n\nAnswer: cloth"], [(15, 18), (15, 20)], [18 / 3, 44 / 5], 0), # ends in a newline
    ("Word: ", " ", ["si", "no"], [], ["Word:  si", "Word:  no"], [(8, 10), (8, 10)], [14 / 2, 14 / 2], 0), # ends in a space; of equals the first
    ("He", " ", ["can", "cat"], [], ["He can", "He cat"], [(6, 7), (6, 7)], [10, 10], 0), # options that begin alike
    ("Is it", " ", ["no", "no, eh"], [], ["Is it no", "Is it no, eh"], [(8, 9), (8, 13)], [4, 32 / 5], 0), # one begins with all of the other
    ("Go", " ", ["up", "ode", "up"], [], ["Go up", "Go ode", "Go up"], [(4, 6), (4, 7), (4, 6)], [14 / 2, 18 / 3, 14 / 2], 1), # one stands there twice
    ("Q", " ", ["x", "aeiou a"], [], ["Q x", "Q aeiou a"], [(3, 4), (3, 10)], [10, 26 / 7], 1), # 26 bits are more than 10, and their mean is less
    ("", "", ["a", "b"], [], ["a", "b"], [(1, 2), (1, 2)], [4, 10], 0), # nothing but BOS in common
    ("2+2", "=", ["4", "ee"], [{"query": "1+1", "choices": ["2", "3"], "gold": 0}], ["1+1=2\n\n2+2=4", "1+1=2\n\n2+2=ee"], [(12, 13), (12, 14)], [10, 8 / 2], 1),
    ("Cafe", " ", ["é", "oo"], [], ["Cafe é", "Cafe oo"], [(6, 8), (6, 8)], [20 / 2, 8 / 2], 1), # a character of two tokens
    ("Dis", " ", ["été", "être"], [], ["Dis été", "Dis être"], [(6, 10), (6, 10)], [40 / 4, 34 / 4], 1), # é and ê begin with the same byte: what differs begins inside them
    ("Q: go\n", "\nAnswer: ", ["io", "xy"], [{"query": "Q: hi\n", "choices": ["a", "b"], "gold": 1}, {"query": "Q: ho\n", "choices": ["e", "d"], "gold": 0}], # two examples
     ["Q: hi\n\nAnswer: b\n\nQ: ho\n\nAnswer: e\n\nQ: go\n\nAnswer: io", "Q: hi\n\nAnswer: b\n\nQ: ho\n\nAnswer: e\n\nQ: go\n\nAnswer: xy"], [(52, 54), (52, 54)], [8 / 2, 20 / 2], 0),
    ("Lang: ", " ", ["en", "eu"], [{"query": "Lang: ", "choices": ["fr", "de"], "gold": 0}], ["Lang:  fr\n\nLang:  en", "Lang:  fr\n\nLang:  eu"], [(20, 21), (20, 21)], [10, 4], 1),
]
SCHEMAS = [ # contexts, continuation, examples, texts, spans, bits, answer
    (["The cat", "The dog"], "ran", [], ["The cat ran", "The dog ran"], [(8, 12), (8, 12)], [28 / 4, 28 / 4], 0),
    (["The tree", "The bush"], "fell", [], ["The tree fell", "The bush fell"], [(9, 14), (9, 14)], [36 / 5, 38 / 5], 0),
    (["Ann", "Amanda"], "sat", [], ["Ann sat", "Amanda sat"], [(4, 8), (7, 11)], [28 / 4, 26 / 4], 1), # contexts of different length
    (["big cat", "small cat"], "ate", [], ["big cat ate", "small cat ate"], [(4, 12), (6, 14)], [50 / 8, 50 / 8], 0), # contexts that end alike: all of that is judged
    (["So he", "So Bob"], "won", [], ["So he won", "So Bob won"], [(6, 10), (7, 11)], [26 / 4, 28 / 4], 0),
    (["a", "I"], "b", [{"context_options": ["Old", "Odd"], "continuation": "x", "gold": 1}], ["Odd x\n\na b", "Odd x\n\nI b"], [(9, 11), (9, 11)], [12 / 2, 14 / 2], 0),
    (["Jo", "Jo and I"], "go", [], ["Jo go", "Jo and I go"], [(3, 6), (9, 12)], [16 / 3, 18 / 3], 0), # one context begins with all of the other
    (["Zoë", "Zoe"], "cry", [], ["Zoë cry", "Zoe cry"], [(5, 9), (4, 8)], [34 / 4, 32 / 4], 1),
    (["A", "Bo", "C"], "up", [], ["A up", "Bo up", "C up"], [(2, 5), (3, 6), (2, 5)], [18 / 3, 16 / 3, 18 / 3], 1),
    (["a", "b"], " x ", [], ["a  x ", "b  x "], [(2, 6), (2, 6)], [20 / 4, 22 / 4], 0), # spaces around the continuation stay
    (["Ann fed Eve as Ann", "Ann fed Eve as Eve"], "ate", [], ["Ann fed Eve as Ann ate", "Ann fed Eve as Eve ate"], [(19, 23), (19, 23)], [22 / 4, 20 / 4], 1), # as in winograd
    (["Zoé", "Noé"], "ri", [], ["Zoé ri", "Noé ri"], [(2, 8), (2, 8)], [42 / 6, 42 / 6], 0), # é is two tokens
    (["Bo", "Bob"], "hid", [{"context_options": ["He", "It"], "continuation": "sat", "gold": 0}, {"context_options": ["Ox", "Ow"], "continuation": "ran", "gold": 1}],
     ["He sat\n\nOw ran\n\nBo hid", "He sat\n\nOw ran\n\nBob hid"], [(19, 23), (20, 24)], [26 / 4, 28 / 4], 0),
]
CONTINUATIONS = [ # context, delimiter, continuation, examples, prompt and whole, span, how many of its tokens are the likeliest: right if all are
    ("a b c", " ", "d", [], ["a b c", "a b c d"], (6, 8), 2),
    ("a b c", " ", "e", [], ["a b c", "a b c e"], (6, 8), 1),
    ("Who: ", " ", "a", [], ["Who:", "Who: a"], (5, 7), 2), # a context that ends in a space is stripped
    ("Q", "\nAnswer: ", "a", [], ["Q\nAnswer:", "Q\nAnswer: a"], (10, 12), 2), # and so is the prompt, whose delimiter ends in one
    ("x", " ", "y z", [], ["x", "x y z"], (2, 6), 4),
    ("x", " ", "y y", [], ["x", "x y y"], (2, 6), 3), # only the last token is wrong
    ("x", " ", "a b", [], ["x", "x a b"], (2, 6), 3), # only one in the middle
    ("m", " ", "n", [{"context": "a ", "continuation": "b"}], ["a b\n\nm", "a b\n\nm n"], (7, 9), 2),
    (" k", " ", "l", [], ["k", "k l"], (2, 4), 2),
    ("a", " ", " b ", [], ["a", "a  b "], (2, 6), 2), # spaces around the continuation stay
    ("n", " ", "é", [], ["n", "n é"], (2, 5), 1), # a character of two tokens
    ("P\nQ: R\nAnswer: ", " ", "a", [{"context": "S\nQ: T\nAnswer: ", "continuation": "u"}, {"context": "\nV: ", "continuation": "w x"}], # as in squad, two examples
     ["S\nQ: T\nAnswer: u\n\nV: w x\n\nP\nQ: R\nAnswer:", "S\nQ: T\nAnswer: u\n\nV: w x\n\nP\nQ: R\nAnswer: a"], (41, 43), 2),
]


@pytest.mark.parametrize("query, delimiter, options, examples, texts, spans, bits, answer", CHOICES)
def test_multiple_choice_by_hand(query, delimiter, options, examples, texts, spans, bits, answer):
    found = worked_out(CoreTask("", "", CHOICE, 0, delimiter, 0), {"query": query, "choices": options, "gold": 0}, examples, Costs())
    assert found[:2] == (texts, spans) and found[2] == pytest.approx(bits, abs=1e-4) and found[3] == answer


@pytest.mark.parametrize("contexts, continuation, examples, texts, spans, bits, answer", SCHEMAS)
def test_schema_by_hand(contexts, continuation, examples, texts, spans, bits, answer):
    found = worked_out(CoreTask("", "", SCHEMA, 0, " ", 0), {"context_options": contexts, "continuation": continuation, "gold": 0}, examples, Costs())
    assert found[:2] == (texts, spans) and found[2] == pytest.approx(bits, abs=1e-4) and found[3] == answer


@pytest.mark.parametrize("context, delimiter, continuation, examples, texts, span, likeliest", CONTINUATIONS)
def test_language_modelling_by_hand(context, delimiter, continuation, examples, texts, span, likeliest):
    task, row = CoreTask("", "", LM, 0, delimiter, 0), {"context": context, "continuation": continuation}
    found, n = worked_out(task, row, examples, Alphabet()), span[1] - span[0]
    assert found[:2] == (texts, [span]) and found[3] == (0 if likeliest == n else -1)
    # a likeliest token has probability e³ / (e³ + 256), every other one 1 / (e³ + 256)
    assert found[2] == pytest.approx([(math.log(math.e**3 + 256) - 3 * likeliest / n) / math.log(2)], abs=1e-4)


def test_a_token_that_is_only_one_of_the_likeliest_is_wrong():
    class Even(ByHand):
        def logits(self, text): return torch.zeros(257)
    assert worked_out(CoreTask("", "", LM, 0, " ", 0), {"context": "a", "continuation": "b"}, [], Even())[3] == -1


def test_spans_begin_where_a_merged_token_does():
    tokenizer = Tokenizer.train(["The capital of France is Paris. The capital of Italy is Rome. Paris and Rome are capitals. Answer: Paris Answer: Rome x==y x=y"] * 20, 340)
    encode = lambda texts: GPTReader(GPT(GPTConfig(vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_kv_head=1, n_embd=24)), tokenizer).encode(texts)
    lm = CoreTask("", "", LM, 0, "\nAnswer: ", 0)
    without, whole = encode(render(lm, {"context": "The capital of Italy is?", "continuation": "Rome"}))
    q = to_question(lm, 0, 0, [without, whole], 200)
    assert tokenizer.decode(q.tails[0][1:].tolist()) == " Rome" and [*q.prefix, *q.tails[0]] == whole.tolist()
    choice = CoreTask("", "", CHOICE, 0, " ", 0)
    q = to_question(choice, 0, 0, encode(render(choice, {"query": "is", "choices": ["Paris", "Rome"], "gold": 0})), 200)
    assert [tokenizer.decode(tail[1:].tolist()) for tail in q.tails] == [" Paris", " Rome"] # the space belongs to the token
    pieces = lambda ids: [tokenizer.decode([i]) for i in ids.tolist()]
    for task, query in ((choice, "is "), (lm, "is ")): # a question that ends in a space: in multiple choice there are two then, and the second still belongs to the token
        row = {"query": query, "choices": ["Paris", "Rome"], "gold": 0} if task is choice else {"context": query, "continuation": "Paris"}
        q = to_question(task, 0, 0, encode(render(task, row)), 200)
        assert pieces(q.tails[0][1:]) == [" Paris"] and tokenizer.decode([*q.prefix[1:], q.tails[0][0]]) == ("is " if task is choice else "is\nAnswer:")
    # what the delimiter forms one token with is judged as that token
    q = to_question(choice, 0, 0, encode(render(CoreTask("", "", CHOICE, 0, "=", 0), {"query": "x", "choices": ["=y", "y"], "gold": 0})), 200)
    assert [pieces(tail) for tail in q.tails] == [["x", "==", "y"], ["x", "=y"]]


# ---- together as one at a time

def questions_of(kind, n=40):
    names, things = ["Mira", "Tom", "Old Jon", "Ada", "Ben"], ["a cat", "two dogs", "an old grey mill near the river", "no bread"]
    rows = []
    for i in range(n):
        a, b, x, y = names[i % 5], names[(i + 1 + i // 5) % 5], things[i % 4], things[(i + 1 + i // 4 % 3) % 4]
        if kind == CHOICE: rows.append({"query": f"{a} has {x}{' and more' * (i % 7)}. What has {a}?", "choices": [x, y, x] if i % 9 == 0 else [x, y], "gold": i % 2})
        elif kind == SCHEMA: rows.append({"context_options": [f"{a} gave {b} {x} because {a}", f"{a} gave {b} {x} because {b}"], "continuation": "was hungry.", "gold": i % 2})
        else: rows.append({"context": f"{a} has {x}. {b} has {y}. Who has {x}?" + " Say it." * (i % 5), "continuation": a})
    return rows


TOKENIZER = Tokenizer.train([json.dumps(row) for kind in (CHOICE, SCHEMA, LM) for row in questions_of(kind)], 400)
SHAPES = {
    "all additions": dict(n_head=4, n_kv_head=2, window_pattern="L"),
    "windows": dict(n_head=2, n_kv_head=2, window_pattern="SSL", sequence_len=512),
    "2025": vars(GPTConfig.plain2025(n_head=2)) | dict(n_head=2, n_kv_head=2),
}


def sure_model(**shape):
    model = GPT(GPTConfig(**dict(sequence_len=256) | shape | dict(vocab_size=TOKENIZER.vocab_size, n_layer=3, n_embd=64)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in (model.lm_head.weight, *(part.c_proj.weight for block in model.transformer.h for part in (block.attn, block.mlp))): p.normal_(0, 0.2, generator=generator)
        if model.config.smear: model.smear_lambda.fill_(0.5)
    return model.eval()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", [CHOICE, SCHEMA, LM])
def test_batches_answer_as_one_at_a_time(name, kind):
    "Against whole texts without a cache; with windows, prompts of ten examples reach beyond them. Prompts beyond the context are cut alike."
    reader = GPTReader(sure_model(**{"sequence_len": 256} | SHAPES[name]), TOKENIZER)
    task, rows = CoreTask("", "", kind, 10, "\nAnswer: " if kind == LM else " ", 0), sample_rows(questions_of(kind))
    want = one_by_one(reader, task, rows)
    assert len(set(want)) > 1 or kind == LM
    for tokens in (1, 700, 10**6):
        found = ask(reader, task, rows, batch_tokens=tokens)
        assert [a["answer"] for a in found] == want
        assert [a["index"] for a in found] == list(range(len(rows)))
    assert any(a["cropped"] for a in found) == (reader.context == 256) or kind == SCHEMA


def read_plainly(model, encode, task, rows, i, context):
    "One question, from its text to the mean loss of each option (and whether every token is the likeliest), by nothing but the model and the rules; and whether it was cut."
    def whole(row, option):
        if task.type == CHOICE: return row["query"] + task.delimiter + row["choices"][option]
        if task.type == SCHEMA: return row["context_options"][option] + task.delimiter + row["continuation"]
        return row["context"].strip() + task.delimiter + row["continuation"]
    row, options = rows[i], len(rows[i].get("choices", rows[i].get("context_options", [0])))
    head = "".join(whole(e, e.get("gold", 0)) + "\n\n" for e in examples_for(rows, i, task.shots))
    texts = [encode(head + whole(row, option)) for option in range(options)]
    beside = [encode((head + row["context"].strip() + task.delimiter).strip()), *texts] if task.type == LM else texts
    if task.type == SCHEMA: # from the first token after which all are alike
        n = 0
        while n < min(map(len, texts)) - 1 and len({text[-1 - n] for text in texts}) == 1: n += 1
        firsts = [len(text) - n for text in texts]
    else: # from the first token that is not in all
        n = 0
        while all(n < len(text) for text in beside) and len({text[n] for text in beside}) == 1: n += 1
        firsts = [min(n, min(map(len, texts)) - 1)] * options
    cut = max(0, max(map(len, texts)) - 1 - context) # the last token is not read
    losses, likeliest = [], []
    for text, first in zip(texts, firsts):
        ids = torch.tensor([text[0], *text[1 + cut:]])
        with torch.inference_mode(): logits = model(ids[None, :-1])[0]
        logits, targets = logits[first - cut - 1:], ids[first - cut:]
        losses.append(torch.nn.functional.cross_entropy(logits, targets).item())
        likeliest.append(bool((logits.argmax(1) == targets).all()))
    return losses, likeliest, cut > 0


@pytest.mark.parametrize("shape", [
    dict(n_layer=4, n_head=4, n_kv_head=2, window_pattern="SSSL", sequence_len=512), # windows of 128
    dict(n_layer=2, n_head=4, n_kv_head=1, window_pattern="L", sequence_len=512),
    dict(n_layer=2, n_head=2, n_kv_head=2, window_pattern="SSSL", sequence_len=144), # all is cut
    vars(GPTConfig.plain2025(n_layer=2, n_head=2)) | dict(n_kv_head=2, sequence_len=512),
], ids=["windows", "one kv head", "short context", "2025"])
@pytest.mark.parametrize("kind", [CHOICE, SCHEMA, LM])
def test_against_texts_read_plainly(kind, shape):
    model = sure_model(**shape)
    reader, encode = GPTReader(model, TOKENIZER), lambda text: [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
    task, rows = CoreTask("", "", kind, 12 if kind == SCHEMA else 9, " ", 0), sample_rows(questions_of(kind, 20))
    if kind == LM: # whose answers would come by themselves in every second question
        for i in range(0, len(rows), 2):
            ids = torch.tensor([encode("".join(e["context"] + " " + e["continuation"] + "\n\n" for e in examples_for(rows, i, task.shots)) + rows[i]["context"])])
            with torch.inference_mode(): rows[i] = rows[i] | {"continuation": TOKENIZER.decode([model(ids[:, -reader.context:])[0, -1].argmax().item()])}
    questions = [to_question(task, i, row.get("gold", 0), reader.encode(render(task, row, examples_for(rows, i, task.shots))), reader.context) for i, row in enumerate(rows)]
    scores, found = score_questions(reader, questions), ask(reader, task, rows)
    cuts = []
    for i, (q, score) in enumerate(zip(questions, scores)):
        losses, likeliest, cut = read_plainly(model, encode, task, rows, i, reader.context)
        assert [score[place][0] for place in q.places] == pytest.approx(losses, abs=1e-4)
        assert found[i]["answer"] == ((0 if likeliest[0] else -1) if kind == LM else losses.index(min(losses)))
        assert found[i]["cropped"] == q.cropped == cut
        cuts.append(cut)
    assert reader.context == 144 or all(len(q) > 144 for q in questions) # beyond the windows
    assert all(cuts) == (reader.context == 144) and any(cuts) == (reader.context == 144)


class Noisy(ByHand):
    "Every second byte is likely and the others are not, which are which hangs on the last byte; so options are tied or far apart. And rounding that hangs on what is read together."
    def __init__(self):
        values = (torch.arange(257) % 2).float()
        self.table = torch.stack([values[torch.randperm(257, generator=torch.Generator().manual_seed(last))] for last in range(257)])

    def follow(self, prefixes, ids, lengths, judged):
        noise = torch.rand((*ids.shape, 257), generator=torch.Generator().manual_seed(1000 * len(ids) + max(map(len, prefixes))))
        return self.table[ids[judged]] + (0.05 if torch.is_autocast_enabled("cpu") else 1e-5) * noise[judged]


def short_questions(kind):
    draw = np.random.default_rng(0)
    word = lambda n: "".join(draw.choice(list("abcdefghij"), n))
    if kind == CHOICE: return [{"query": word(4 + i % 9), "choices": [word(2) for _ in range(3)], "gold": i % 3} for i in range(60)]
    if kind == SCHEMA: return [{"context_options": [word(3 + i % 9) for _ in range(3)], "continuation": word(1), "gold": i % 3} for i in range(60)]
    return [{"context": word(4 + i % 9), "continuation": word(1)} for i in range(60)]


def tied_reader():
    model = sure_model(n_head=2, n_kv_head=2)
    model.lm_head.weight.data *= 2e-6
    return GPTReader(model, TOKENIZER)


def answers_to_ties(batch_tokens):
    "What a noisy reader and a model without opinions answer, in each format and dtype."
    found, tied = [], tied_reader()
    for dtype in (torch.float32, torch.bfloat16):
        for kind in (CHOICE, SCHEMA, LM):
            found.append([a["answer"] for a in ask(Noisy(), CoreTask("", "", kind, 0, "", 0), short_questions(kind), dtype, batch_tokens)])
            found.append([a["answer"] for a in ask(tied, CoreTask("", "", kind, 2, " ", 0), sample_rows(questions_of(kind, 20)), dtype, batch_tokens)])
    return found


def one_rank(folder):
    with distributed(torch.device("cpu")): (folder/f"found-{os.environ['RANK']}.json").write_text(json.dumps([answers_to_ties(tokens) for tokens in (300, None)]))


def test_ties_hang_neither_on_the_batch_nor_on_the_ranks(tmp_path, monkeypatch):
    want = answers_to_ties(1)
    assert all(len(set(answers)) == (2 if i % 6 > 3 else 3) for i, answers in enumerate(want) if i % 2 == 0) # Noisy: each answer occurs
    for tokens in (300, 4096, 10**6): assert answers_to_ties(tokens) == want

    assert on_ranks(2, one_rank, tmp_path) == [0, 0]
    for rank in range(2): assert json.loads((tmp_path/f"found-{rank}.json").read_text()) == [want, want]

    # without the further passes the noise would decide, in every format and dtype
    monkeypatch.setattr(core_eval, "passes", lambda dtype: [core_eval._Pass(dtype, 0.0)])
    one, many = answers_to_ties(1), answers_to_ties(4096)
    assert all(a != b for a, b in zip(one[::2], many[::2]))


def test_near_ties_do_not_hang_on_the_batch():
    "With a head this small every option is within a hair of the others, and every token of the likeliest."
    model = sure_model(n_head=2, n_kv_head=2)
    model.lm_head.weight.data *= 2e-6
    reader = GPTReader(model, TOKENIZER)
    for kind in (CHOICE, SCHEMA, LM):
        task, rows = CoreTask("", "", kind, 2, " ", 0), sample_rows(questions_of(kind))
        for dtype in (torch.float32, torch.bfloat16):
            one, some, all_ = ([a["answer"] for a in ask(reader, task, rows, dtype, tokens)] for tokens in (1, 500, 10**6))
            assert one == some == all_


def test_what_is_cut_is_the_oldest_example():
    reader = Costs()
    reader.context = 40
    task, rows = CoreTask("", "", LM, 10, " ", 0), [{"context": f"number {i:02} comes before", "continuation": f"{i + 1:02}"} for i in range(12)]
    texts = render(task, rows[3], examples_for(rows, 3, 10))
    q = to_question(task, 3, 0, reader.encode(texts), reader.context)
    assert q.cropped and q.prefix[0] == 256 and len(q) == 40
    assert texts[1].encode().endswith(bytes([*q.prefix[1:].tolist(), *q.tails[0].tolist()])) and bytes(q.tails[0][1:].tolist()) == b" 04"


# ---- models of transformers

def same_as_alone(reader, kind):
    task, rows = CoreTask("", "", kind, 3, " ", 0), sample_rows(questions_of(kind))
    found = [a["answer"] for a in ask(reader, task, rows)]
    for i, row in enumerate(rows[:12]):
        q = to_question(task, i, 0, reader.encode(render(task, row, examples_for(rows, i, 3))), reader.context)
        scores = []
        for tail, start in zip(q.tails, q.starts):
            ids = torch.tensor([[*q.prefix, *tail]])
            with torch.inference_mode(): logits = reader.model(input_ids=ids[:, :-1]).logits[0].float()
            first, targets = len(q.prefix) + start, ids[0, 1:]
            losses = torch.nn.functional.cross_entropy(logits[first:], targets[first:], reduction="none")
            ahead = logits[first:].gather(1, targets[first:, None])[:, 0] - logits[first:].scatter(1, targets[first:, None], -math.inf).amax(1)
            scores.append((losses.mean().item(), ahead.min().item()))
        assert decide(task, q, scores)[0] == found[i]


def test_our_model_through_transformers(tmp_path):
    model = sure_model(**SHAPES["2025"])
    theirs, ours = TransformersReader(to_transformers(model, TOKENIZER, tmp_path/"model")), GPTReader(model, TOKENIZER)
    assert theirs.context == ours.context and theirs.vocab_size == ours.vocab_size
    for kind in (CHOICE, SCHEMA, LM):
        task, rows = CoreTask("", "", kind, 3, " ", 0), sample_rows(questions_of(kind))
        texts = [render(task, row, examples_for(rows, i, 3 if i % 2 else 0)) for i, row in enumerate(rows[:10])]
        assert all((a == b).all() for some in texts for a, b in zip(theirs.encode(some), ours.encode(some)))
        questions = [to_question(task, i, 0, ours.encode(some), 256) for i, some in enumerate(texts)]
        questions.append(to_question(task, 10, 0, [np.array([TOKENIZER.bos_id, 65 + i, 66]) for i in range(2)], 256)) # nothing in common
        assert len({len(q.prefix) for q in questions}) > 5
        for batch in ([q for q in questions if len(q.prefix)], [q for q in questions if not len(q.prefix)]):
            for a, b in zip(score_questions(theirs, batch), score_questions(ours, batch)): np.testing.assert_allclose(a, b, atol=1e-4)
        assert [a["right"] for a in ask(theirs, task, rows)] == [a["right"] for a in ask(ours, task, rows)]


def saved(config, folder):
    "A model of transformers with random weights and our tokenizer, as files."
    import transformers
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    TOKENIZER.save(folder)
    (folder/"tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|bos|>"}))
    return TransformersReader(folder)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_models_of_transformers(tmp_path, name):
    import transformers
    n = TOKENIZER.vocab_size
    config = (transformers.GPT2Config(vocab_size=n, n_positions=256, n_embd=48, n_layer=2, n_head=2, bos_token_id=TOKENIZER.bos_id, initializer_range=0.3) if name == "gpt2" else
              transformers.LlamaConfig(vocab_size=n, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                                       bos_token_id=TOKENIZER.bos_id, initializer_range=0.3))
    reader = saved(config, tmp_path)
    for kind in (CHOICE, SCHEMA, LM): same_as_alone(reader, kind)


def test_a_model_of_transformers_with_windows(tmp_path):
    import transformers
    reader = saved(transformers.MistralConfig(vocab_size=TOKENIZER.vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                              max_position_embeddings=256, sliding_window=16, bos_token_id=TOKENIZER.bos_id, initializer_range=0.3), tmp_path)
    for kind in (CHOICE, SCHEMA, LM): same_as_alone(reader, kind)


def test_a_full_context_beside_a_longer_option(tmp_path):
    import transformers
    reader = saved(transformers.GPT2Config(vocab_size=TOKENIZER.vocab_size, n_positions=64, n_embd=48, n_layer=2, n_head=2, bos_token_id=TOKENIZER.bos_id, initializer_range=0.3), tmp_path)
    task = CoreTask("", "", CHOICE, 0, " ", 0)
    rows = [{"query": "z" * 100, "choices": ["q", "x"], "gold": 0}, {"query": "z" * 20, "choices": ["q" * 20, "x" * 20], "gold": 0}]
    questions = [to_question(task, i, 0, reader.encode(render(task, row)), reader.context) for i, row in enumerate(rows)]
    assert [q.cropped for q in questions] == [True, False] and len(questions[0]) == 64
    np.testing.assert_allclose(score_questions(reader, questions), [score_questions(reader, [q])[0] for q in questions], atol=1e-4)


def test_a_tokenizer_that_others_made(tmp_path):
    "It puts BOS in front by itself, which must not make two of them; without any token that could be BOS it is refused."
    import tokenizers
    import transformers
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    made.train_from_iterator(map(json.dumps, questions_of(CHOICE)), tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                                                                                  show_progress=False))
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    config = transformers.GPT2Config(vocab_size=made.get_vocab_size(), n_positions=1024, n_embd=48, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None, initializer_range=0.3)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>").save_pretrained(tmp_path)
    reader = TransformersReader(tmp_path)
    a, b = reader.encode(["Mira has a cat.", ""])
    assert a[0] == 0 and 0 not in a[1:] and made.decode(a[1:].tolist()) == "Mira has a cat." and b.tolist() == [0]
    for kind in (CHOICE, SCHEMA, LM): same_as_alone(reader, kind)

    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no token that begins a text"): TransformersReader(tmp_path)


def test_nothing_from_a_folder_is_executed(tmp_path):
    "Neither code that came with a model nor a pickle, though the pickle holds the right weights."
    model = to_transformers(sure_model(**SHAPES["2025"]), TOKENIZER, tmp_path/"model")
    config, trace = json.loads((model/"config.json").read_text()), tmp_path/"executed"
    weights = TransformersReader(model).model.state_dict()
    (model/"evil.py").write_text(f"open({str(trace)!r}, 'w').close()\nclass Config: pass\nclass Model: pass\n")
    remote = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    (model/"config.json").write_text(json.dumps(config | remote))
    with pytest.raises(UserError, match="transformers cannot load") as e: TransformersReader(model)
    assert "\n" not in str(e.value)

    (model/"config.json").write_text(json.dumps(config))
    (model/"model.safetensors").unlink()
    torch.save(weights, model/"pytorch_model.bin")
    with pytest.raises(UserError, match="transformers cannot load") as e: TransformersReader(model)
    assert "\n" not in str(e.value) and not trace.exists()


def test_folders_that_hold_no_model(tmp_path):
    model = to_transformers(sure_model(**SHAPES["2025"]), TOKENIZER, tmp_path/"model")
    weights = (model/"model.safetensors").read_bytes()
    for damage in (lambda: (model/"model.safetensors").write_bytes(weights[:1000]), lambda: (model/"model.safetensors").unlink(),
                   lambda: torch.save({}, model/"pytorch_model.bin"), lambda: (model/"config.json").write_text("{")):
        damage()
        with pytest.raises(UserError, match="transformers cannot load") as e: TransformersReader(model)
        assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="has no config.json"): TransformersReader(tmp_path)


# ---- files

def test_the_table_and_the_real_files():
    folder = real_data("core")
    tasks = json.loads((folder/"core_tasks.json").read_text())
    assert [(t["label"], t["task_type"], t["num_fewshot"], t["continuation_delimiter"], t["random_baseline_percent"]) for t in tasks] == [(t.label, t.type, t.shots, t.delimiter, t.baseline) for t in CORE]
    folders = sorted(folder.parent.glob("core*"))
    there = 0
    for known, task in zip(tasks, CORE):
        if not (file := core_file(task, folders)): continue
        there += 1
        rows = core_rows(task, file)
        assert len(rows) == known["rows_here"]
        some = sample_rows(rows, 30)
        assert some == sample_rows(rows)[:30]
        for i in range(len(some)):
            for e in examples_for(some, i, task.shots): assert e is not some[i]
    assert there >= 10


def test_the_order_and_the_examples_are_those_of_nanochat():
    "A shuffle with seed 1337, then for each question a draw with seed 1234 + its number from all others: scores can be compared with published ones."
    assert sample_rows(range(12)) == [6, 0, 1, 4, 10, 7, 3, 11, 2, 5, 8, 9] and sample_rows(range(12), 5) == [6, 0, 1, 4, 10]
    assert [examples_for(range(12), i, 4) for i in (0, 3, 11)] == [[8, 2, 1, 10], [2, 7, 5, 4], [8, 10, 2, 0]]


def test_examples_are_others():
    "Never the question itself, none twice, and from the whole task."
    for n, shots in ((11, 10), (32, 10), (230, 3), (2117, 10)):
        drawn = set()
        for i in range(n):
            examples = examples_for(range(n), i, shots)
            assert len(set(examples) - {i}) == shots
            drawn |= set(examples)
        assert len(drawn) > 0.9 * n


def test_the_sample_is_the_same_in_another_process():
    code = "from nanochat.post.core_eval import *; rows = sample_rows(range(1000), 40); print(rows, [examples_for(rows, i, 10) for i in range(40)])"
    one, other = (subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert one == other and one.startswith("[")


@pytest.mark.parametrize("text, words", [
    ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "line 2: the right option is 2"),
    ('{"query": "a", "choices": ["b", "c"], "gold": "0"}', "line 2: the right option is '0'"),
    ('{"query": "a", "choices": [], "gold": 0}', "line 2: not a question"),
    ('{"query": ["a"], "choices": ["b", "c"], "gold": 0}', "line 2: not a question"),
    ('{"choices": ["b", "c"], "gold": 0}', "line 2: there is no 'query'"),
    ('{"query": "a", "choi', "line 2: not readable"),
    ("[1]", "line 2: expected an object"),
])
def test_a_bad_line_is_named(tmp_path, text, words):
    (file := tmp_path/"copa.jsonl").write_text('{"query": "It rained, so", "choices": ["yes", "no"], "gold": 0}\n' + text + "\n")
    with pytest.raises(UserError, match=words) as e: core_rows(CORE[5], file)
    assert str(file) in str(e.value)


def test_a_file_that_ends_too_early(tmp_path):
    whole = gzip.compress(b'{"query": "It rained, so", "choices": ["yes", "no"], "gold": 0}\n' * 5000)
    (file := tmp_path/"copa.jsonl.gz").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="not readable as JSON lines"): core_rows(CORE[5], file)


def test_the_mean_by_hand(tmp_path, capsys):
    "Under `Costs`: three of four right where half is chance, none of two, and one of two where half is chance."
    (folder := tmp_path/"eval_data").mkdir()
    def write(name, rows):
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write("commonsense_reasoning/copa.jsonl", [{"query": f"{i}", "choices": ["oo", "xx"], "gold": int(i == 3)} for i in range(4)])
    write("language_understanding/lambada_openai.jsonl", [{"context": f"{i}", "continuation": "x"} for i in range(2)])
    write("language_understanding/winograd_wsc.jsonl", [{"context_options": ["Bo", "Bob"], "continuation": "ran", "gold": i} for i in range(2)])
    result = evaluate_core(Costs(), folders=[tmp_path])
    assert {label: t["accuracy"] for label, t in result["tasks"].items()} == {"copa": 0.75, "lambada_openai": 0.0, "winograd": 0.5}
    assert result["score"] == pytest.approx((0.5 + 0.0 + 0.0) / 3) and result["ci95"][0] < result["score"] < result["ci95"][1]
    said = capsys.readouterr().out
    assert "over 3 of 22 tasks" in said and all(label in said for label in result["missing"])
    assert len(result["missing"]) == 19 and "copa" not in result["missing"] and sorted(result["tasks"]["copa"]["right"]) == ["0", "1", "1", "1"]


def test_too_few_questions(tmp_path):
    reader = Costs()
    with pytest.raises(UserError, match="ask at least 11"): ask(reader, CORE[3], [{"query": "a", "choices": ["b", "c"], "gold": 0}] * 10)
    with pytest.raises(UserError, match="0 questions cannot measure"): evaluate_core(reader, 0, folders=[tmp_path])
    with pytest.raises(UserError, match="no task 'copper'"): evaluate_core(reader, folders=[tmp_path], labels=["copper"])


def test_a_model_whose_logits_are_no_numbers():
    model = spread_model(1, TOKENIZER.vocab_size)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"): ask(GPTReader(model, TOKENIZER), CoreTask("", "", CHOICE, 2, " ", 0), questions_of(CHOICE))
