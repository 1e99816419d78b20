"""Scores are a property of the model: neither the batch size nor the number of ranks has a say, and what cannot be had is left out aloud."""
import gzip
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import on_ranks, real_data

from nanochat.core.files import UserError
from nanochat.core.machine import distributed
from nanochat.core.run import Run
from nanochat.core.tokenizer import Tokenizer
from nanochat.core.world import World
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.sandbox import calculator, sandbox_kind
from nanochat.model.engine import Engine, Sampling
from nanochat.post.tasks import visible_text
from nanochat.post.public import TASKS, answer_number, code_of, make_task
from nanochat.post.chat_eval import (
    chat_core, evaluate_chat, evaluate_stage, evaluate_task, greedy_answers, items_to_tell_apart,
    overlap, read_task_names, world_score)

TOKENIZER = Tokenizer.train(World(1).documents(0, 300), 500)
SETS = ("arc-easy", "arc-challenge", "mmlu", "gsm8k", "humaneval")


def engine(dtype=torch.float32, context=448) -> Engine:
    """A small model with opinions: its blocks hold random numbers, where an untrained model's begin as the identity."""
    model = GPT(GPTConfig(sequence_len=context, vocab_size=TOKENIZER.vocab_size, n_layer=4, n_head=2, n_kv_head=1, n_embd=32))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2: p.normal_(0, (6 if ".h." in name else 1.5) / p.size(1)**0.5, generator=generator)
    made = Engine(model, TOKENIZER)
    made.dtype = dtype # a CPU would take float32 on its own account
    return made


def write_set(folder, file, rows):
    """Rows as JSON lines, where a data folder has them."""
    (folder/file).parent.mkdir(exist_ok=True)
    with gzip.open(folder/file, "wt") as lines:
        for row in rows: lines.write(json.dumps(row) + "\n")


def science(i):
    """A question of ARC's layout with three to five options, some of them numbered."""
    n = 3 + i % 3
    labels = [str(k + 1) for k in range(n)] if i % 4 == 0 else list("ABCDE"[:n])
    return {"id": str(i), "question": f"Who lives at number {i}?" + " Think of the town." * (i % 5), "choices": {"text": [f"person {i + k}" for k in range(n)], "label": labels}, "answerKey": labels[i % n]}


def function(i):
    """A problem of HumanEval's layout, with an import and a helper before the function."""
    return {"task_id": f"t/{i}", "prompt": f"from math import sqrt\n\n\ndef add(x):\n    return x + {i}\n\n\ndef root(x):\n    \"\"\" The root of x + {i}. \"\"\"\n", "entry_point": "root",
            "canonical_solution": "    return sqrt(add(x))\n", "test": f"def check(candidate):\n    assert candidate({16 - i}) == 4\n"}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder with a few rows of each set."""
    folder = tmp_path/"data"
    folder.mkdir()
    monkeypatch.setenv("NANOCHAT_DATA_ROOT", str(folder))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path/"base"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1") # what is not in the folder cannot be had
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True) # where it was imported before
    write_set(folder, "arc/ARC-Easy-test.jsonl.gz", map(science, range(70)))
    write_set(folder, "arc/ARC-Challenge-test.jsonl.gz", map(science, range(70, 80)))
    write_set(folder, "mmlu/test.jsonl.gz", ({"question": f"What is {i}+2?", "subject": "sums", "choices": [str(i), str(i + 1), str(i + 2), "none"], "answer": 2} for i in range(75)))
    write_set(folder, "gsm8k/test.jsonl.gz", ({"question": f"Mira has {i} cups" + " and a hen" * (i % 3) + ". She buys 6 more. How many has she?",
                                                "answer": f"She has {i}+6=<<{i}+6={i + 6}>>{i + 6} cups.\n#### {i + 6}"} for i in range(12)))
    write_set(folder, "humaneval/HumanEval.jsonl.gz", map(function, range(4)))
    return folder


@pytest.fixture
def sandbox():
    try: sandbox_kind()
    except UserError as e: pytest.skip(str(e))


def without_times(found):
    for result in found["tasks"].values(): del result["seconds"]
    return found


# the batch size and the number of ranks


def test_results_do_not_depend_on_the_batch_size(data, sandbox):
    def found_by(tasks, questions):
        names = read_task_names(tasks)
        return [without_times(evaluate_chat(engine(), names, questions, batch=batch, max_new_tokens=4)) for batch in (1, 7, 64)]
    world, found = found_by("world", 9), found_by(",".join(SETS), 70) # the world's answers are long
    assert world[0] == world[1] == world[2] and not world[0]["missing"]
    assert found[0] == found[1] == found[2]
    assert not found[0]["missing"] and found[0]["chat_core_of"] == 5
    letters = [item["answer"] for item in found[0]["tasks"]["arc-easy"]["items"]]
    assert len(set(letters)) >= 3 and [item["index"] for item in found[0]["tasks"]["arc-easy"]["items"]] == list(range(70))
    assert len({item["answer"] for item in found[0]["tasks"]["gsm8k"]["items"]}) > 3


def test_letters_in_bfloat16_are_those_of_float32(data):
    exact = [item["answer"] for item in evaluate_task(engine(), make_task("arc-easy", "test"), 70)["items"]]
    for batch in (1, 7, 64):
        assert [item["answer"] for item in evaluate_task(engine(torch.bfloat16), make_task("arc-easy", "test"), 70, batch=batch)["items"]] == exact


def test_the_naive_way_chooses_the_same_letters(data):
    made, task = engine(), make_task("arc-easy", "test")
    for item in evaluate_task(made, task, 20)["items"]:
        letters = task[item["index"]]["letters"]
        with torch.inference_mode(): logits = made.model(torch.tensor([TOKENIZER.render_for_completion(task[item["index"]])]))[0, -1]
        assert item["answer"] == max(letters, key=lambda letter: logits[TOKENIZER.encode(letter)[0]])
        assert item["right"] == (item["answer"] == task[item["index"]]["messages"][-1]["content"])


class Noisy(Engine):
    """Many equal logits, and noise that hangs on the shape of the batch, as rounding does, only that here it decides all the time."""
    def logits(self, idx, cache, valid=None):
        logits = super().logits(idx, cache, valid)
        noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(len(idx) * 1000 + idx.size(1)))
        return (logits / 2).round() * 2 + 1e-5 * noise


def test_near_ties_are_decided_alone(data):
    noisy = Noisy(engine().model, TOKENIZER)
    prompts = [TOKENIZER.render_for_completion(row) for row in make_task("arc-easy", "test").conversations]
    naive = [[c.tokens for at in range(0, 70, batch) for c in noisy.generate(prompts[at:at + batch], Sampling(6, temperature=0))] for batch in (1, 7, 64)]
    assert sum(a != b for a, b in zip(naive[0], naive[1])) > 10 # the noise does its work …
    for name, n in (("arc-easy", 70), ("sums", 20)):
        found = [evaluate_task(noisy, make_task(name, "test"), n, batch=batch, max_new_tokens=6)["items"] for batch in (1, 7, 64)]
        assert found[0] == found[1] == found[2] # … and is kept from deciding


class Stubborn:
    """A task of which rank 1 cannot have its share."""
    name = "stubborn"
    def __len__(self): return 4
    def __getitem__(self, i):
        if i == 1: raise UserError("number 1 is broken")
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}
    def evaluate(self, conversation, text): return False


def one_rank(folder, names, environment):
    os.environ |= environment # a server that another test started has another
    with distributed(torch.device("cpu")):
        found = without_times(evaluate_chat(engine(), names, 20, max_new_tokens=4))
        sampled = evaluate_task(engine(), make_task("gsm8k", "test"), 3, max_new_tokens=4, temperature=1.0, samples=3)["items"]
        with pytest.raises(UserError, match="number 1 is broken"): evaluate_task(engine(), Stubborn(), 4)
    (folder/f"found-{os.environ['RANK']}.json").write_text(json.dumps([found, sampled]))


def test_results_do_not_depend_on_the_number_of_ranks(data, sandbox, tmp_path):
    names = ["choice", "sums", *SETS, "nothing"]
    alone = [without_times(evaluate_chat(engine(), names, 20, max_new_tokens=4)),
             evaluate_task(engine(), make_task("gsm8k", "test"), 3, max_new_tokens=4, temperature=1.0, samples=3)["items"]]
    assert on_ranks(2, one_rank, tmp_path, names, dict(os.environ)) == [0, 0]
    for rank in range(2): assert json.loads((tmp_path/f"found-{rank}.json").read_text()) == alone


# what an answer is given, and how it is judged


class Scripted(Engine):
    """An engine whose next token hangs on the last one alone."""
    script = ["<|assistant_start|>", "<|python_start|>", "6", "*", "7", "<|python_end|>"], ["<|output_end|>", "=", "4", "2", "<|assistant_end|>"]

    def logits(self, idx, cache, valid=None):
        logits = super().logits(idx, cache, valid) * 0
        ids = [[TOKENIZER.special(t) if "|" in t else TOKENIZER.encode(t)[0] for t in part] for part in self.script]
        follows = {a: b for part in ids for a, b in zip(part, part[1:])}
        last = idx[:, -1] if valid is None else idx[torch.arange(len(idx)), valid - 1]
        for row, token in zip(logits, last.tolist()): row[follows.get(token, 0)] = 9
        return logits


def test_gsm8k_has_the_calculator(data):
    write_set(data, "gsm8k/train.jsonl.gz", [{"question": "What is 6 times 7?", "answer": "#### 42"}] * 3)
    result = evaluate_task(Scripted(engine().model, TOKENIZER), make_task("gsm8k", "train"), 3, max_new_tokens=1, batch=2)
    assert result["accuracy"] == 1 and result["items"][2]["answer"] == "<|python_start|>6*7<|python_end|><|output_start|>42<|output_end|>=42"


def test_a_task_that_needs_longer_answers_gets_them(data, sandbox, monkeypatch):
    taken = []
    def short(engine, prompts, max_new_tokens):
        taken.append(max_new_tokens)
        return greedy_answers(engine, prompts, 1)
    monkeypatch.setattr("nanochat.post.chat_eval.greedy_answers", short)
    for name, given in (("gsm8k", 8), ("gsm8k", 300), ("humaneval", 8), ("sums", 8)): evaluate_task(engine(), make_task(name, "test"), 1, max_new_tokens=given)
    assert taken == [256, 300, 384, 8]


def test_letters_that_bfloat16_leaves_open_are_read_together(data, monkeypatch):
    """In float32 batches, and only those that are still level one by one."""
    read, prefill = [], Engine.prefill
    def noted(self, prompts):
        read.append((self.dtype, len(prompts)))
        return prefill(self, prompts)
    monkeypatch.setattr(Engine, "prefill", noted)
    rough = evaluate_task(engine(torch.bfloat16), make_task("arc-easy", "test"), 48, batch=16)
    again = [n for dtype, n in read if dtype == torch.float32]
    assert [n for dtype, n in read if dtype == torch.bfloat16] == [16, 16, 16] and max(again) > 4 and len(again) <= 6, read
    assert rough["right"] == evaluate_task(engine(), make_task("arc-easy", "test"), 48, batch=16)["right"]


def test_what_does_not_fit_the_context_counts_as_wrong(data):
    made = engine(context=64)
    result = evaluate_task(made, make_task("arc-easy", "test"), 70)
    lengths = [len(TOKENIZER.render_for_completion(row)) for row in make_task("arc-easy", "test").conversations]
    assert 0 < result["too_long"] == sum(n >= 64 for n in lengths) < 70
    for item, n in zip(result["items"], lengths):
        assert item.get("too_long", False) == (n >= 64)
        if n >= 64: assert (item["answer"], item["right"]) == ("", False)
    assert evaluate_task(engine(context=8), make_task("gsm8k", "test"), 5)["too_long"] == 5


def test_programs_are_sampled_and_judged(data, sandbox):
    task = make_task("humaneval", "test")
    answers = [visible_text(row["messages"][-1]) for row in task.conversations]
    assert task.evaluate_many(task.conversations, answers) == [True] * 4
    assert task.evaluate_many(task.conversations, answers[1:] + answers[:1]) == [False] * 4 # each is right for its own problem alone
    result = evaluate_task(engine(), task, 2, temperature=1.0, samples=3, batch=4)
    assert (result["samples"], result["n"], set(result["pass_at"])) == (3, 2, {"1", "3"})
    assert result["pass_at"]["1"] == result["accuracy"]


@pytest.mark.parametrize("name", SETS)
def test_a_bad_row_is_named(data, name):
    files = {"mmlu": "mmlu/test", "gsm8k": "gsm8k/test", "humaneval": "humaneval/HumanEval", "arc-easy": "arc/ARC-Easy-test", "arc-challenge": "arc/ARC-Challenge-test"}
    rows = [json.loads(line) for line in gzip.open(data/f"{files[name]}.jsonl.gz", "rt")]
    for column in rows[2]:
        if column in ("id", "task_id", "subject", "canonical_solution", "test"): continue # anything will do for these
        write_set(data, f"{files[name]}.jsonl.gz", [*rows[:2], rows[2] | {column: None}])
        with pytest.raises(UserError, match=f"{name}, split test, row 3"): len(make_task(name, "test"))


def test_looking_at_tasks_reads_and_imports_nothing_heavy():
    code = ("import sys; from nanochat.post.public import REAL_TASKS, make_task; [make_task(n, s) for n, t in REAL_TASKS.items() for s in t.splits]; "
            "assert not {'torch', 'pyarrow', 'huggingface_hub', 'pandas'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# a stage's exam


def test_a_set_that_cannot_be_had_is_left_out_aloud(data, tmp_path, capsys):
    (data/"mmlu"/"test.jsonl.gz").unlink()
    write_set(data, "arc/ARC-Challenge-test.jsonl.gz", [{"id": "0"}])
    run = Run(tmp_path/"run", {"seed": 1, "eval": {"questions": 25, "max_new_tokens": 4, "batch": 64, "tasks": "sums, arc-easy,mmlu,arc-challenge, poems,smoltalk"}})
    made = engine()
    summary = evaluate_stage(run, "sft", made.model, TOKENIZER, 5)
    said = capsys.readouterr().out
    assert list(summary["tasks"]) == ["sums", "arc-easy"]
    assert list(summary["missing"]) == ["mmlu", "arc-challenge", "poems", "smoltalk"]
    for name in summary["missing"]: assert said.count(f"{name} is left out of the evaluation: ") == 1
    assert "HF_HUB_OFFLINE" in summary["missing"]["mmlu"] and "line 1" in summary["missing"]["arc-challenge"]
    assert summary == json.loads((run.stage_dir("sft")/"eval.json").read_text())
    assert (summary["chat_core"], summary["chat_core_of"]) == (chat_core([summary["tasks"]["arc-easy"]]), 1)
    assert summary["world_score"] == world_score([summary["tasks"]["sums"]])
    assert len(summary["tasks"]["arc-easy"]["items"]) == 20 and summary["tasks"]["arc-easy"]["n"] == 25
    row, = run.rows("sft")
    assert row["chat_core"] == summary["chat_core"] and row["eval/arc-easy"] == summary["tasks"]["arc-easy"]["accuracy"]


def test_without_a_sandbox_humaneval_is_left_out_before_anything_is_written(data, monkeypatch):
    def none(): raise UserError("no sandbox can be built here")
    monkeypatch.setattr("nanochat.post.public.sandbox_kind", none)
    found = evaluate_chat(Engine(engine().model, TOKENIZER), ["humaneval"], 2)
    assert found == {"tasks": {}, "world_score": None, "chat_core": None, "chat_core_of": 0, "missing": {"humaneval": "no sandbox can be built here"}}


def test_without_a_setting_it_is_the_world(tmp_path):
    run = Run(tmp_path/"run", {"seed": 1, "eval": {"questions": 2, "max_new_tokens": 2, "batch": 64}})
    summary = evaluate_stage(run, "mid", engine().model, TOKENIZER)
    assert list(summary["tasks"]) == [*TASKS, "wild"] and not summary["missing"] and summary["chat_core"] is None
    assert "chat_core" not in run.rows("mid")[0]


def test_chance_is_that_of_the_letters(data):
    result = evaluate_task(engine(), make_task("arc-easy", "test"), 70)
    letters = [len(row["letters"]) for row in make_task("arc-easy", "test").conversations]
    assert set(letters) == {3, 4, 5} and result["chance"] == pytest.approx(sum(1 / n for n in letters) / 70)
    assert evaluate_task(engine(), make_task("mmlu", "test"), 9)["chance"] == 0.25
    assert evaluate_task(engine(), make_task("gsm8k", "test"), 2)["chance"] == 0


def test_two_models_told_apart_as_often_as_promised():
    n, trials = items_to_tell_apart(0.3, 0.1), 4000
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.binomial(torch.full((trials,), float(n)), torch.full((trials,), p), generator=generator) / n for p in (0.3, 0.4))
    mean = (a + b) / 2
    found = (b - a) / (2 * mean * (1 - mean) / n).sqrt() > 1.96
    assert found.float().mean() == pytest.approx(0.8, abs=0.03)


# the sets as they are


def real_task(monkeypatch, inside, name, split):
    monkeypatch.setenv("NANOCHAT_DATA_ROOT", str(real_data(inside).parent))
    return make_task(name, split)


@pytest.mark.parametrize("inside, name, split", [("arc", "arc-easy", "train"), ("arc", "arc-easy", "validation"), ("arc", "arc-challenge", "validation"), ("mmlu", "mmlu", "dev"), ("mmlu", "mmlu", "validation")])
def test_real_choices(monkeypatch, inside, name, split):
    task = real_task(monkeypatch, inside, name, split)
    for row in task.conversations:
        answer = row["messages"][-1]["content"]
        lines = row["messages"][0]["content"].split("\n- ")[1:]
        assert answer in row["letters"] and task.evaluate(row, answer) and not any(task.evaluate(row, letter) for letter in row["letters"] if letter != answer)
        assert len(lines) == len(row["letters"]) >= 3
    made = engine(context=512)
    found = [evaluate_task(made, task, 60, batch=batch)["items"] for batch in (1, 7, 64)]
    assert found[0] == found[1] == found[2]


def test_real_sums(monkeypatch):
    task = real_task(monkeypatch, "gsm8k", "gsm8k", "train")
    references = [visible_text(row["messages"][-1]) for row in task.conversations]
    assert all(task.evaluate(row, text) for row, text in zip(task.conversations, references))
    assert sum(task.evaluate(row, text) for row, text in zip(task.conversations, references[1:])) < 0.02 * len(task)
    raw = {row["question"]: row["answer"] for row in map(json.loads, gzip.open(real_data("gsm8k")/"train.jsonl.gz", "rt"))}
    calls = 0
    for row in task.conversations:
        solution = raw[row["messages"][0]["content"]]
        assert answer_number(solution) == answer_number(visible_text(row["messages"][-1])) == float(solution.split("####")[1].replace(",", ""))
        parts = row["messages"][-1]["content"]
        annotated = [result for _, result in re.findall(r"<<([^<>]*)=([^<>=]*)>>", solution)]
        outputs = [part["text"] for part in parts if part["type"] == "python_output"]
        assert [calculator(part["text"]) for part in parts if part["type"] == "python"] == outputs # what the engine will show
        assert [float(text) for text in outputs] == pytest.approx([float(text) for text in annotated], abs=1e-6) # and what the set says
        assert "".join(part["text"] for part in parts if part["type"] == "text") == re.sub(r"<<[^<>]*>>", "", solution)
        calls += len(outputs)
    assert len(task) != 7473 or calls == 23716


def test_real_programs(monkeypatch, sandbox):
    task = real_task(monkeypatch, "humaneval", "humaneval", "test")
    for row in task.conversations: assert code_of(visible_text(row["messages"][-1]), row["prompt"]) in visible_text(row["messages"][-1])
    bodies = [visible_text(row["messages"][-1]).split(row["prompt"])[1].rstrip("`") for row in task.conversations]
    assert all(task.evaluate_many(task.conversations, [body.strip() for body in bodies])) # without a block, and the first line has lost its indentation
    assert not any(task.evaluate_many(task.conversations[:20], ["    return None"] * 20))


def test_real_questions_are_found_in_a_text_that_holds_them(monkeypatch):
    task = real_task(monkeypatch, "arc", "arc-challenge", "validation")
    questions = [row["messages"][0]["content"] for row in task.conversations]
    assert overlap((f"So they asked: {question.upper()}" for question in questions[:40]), questions[:80]) == list(range(40))
    assert overlap(World(1).documents(0, 500), questions) == []
