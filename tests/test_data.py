"""Text of one's own, in every form that is read, becomes a model that knows something of it; a hub's text arrives while the tokenizer trains; what is wrong is one sentence."""
import errno
import gzip
import json
import os
import subprocess
import sys
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import assert_user_error, environment, nanochat, real_data
from hub import Hub, hub_environment

from nanochat.core.files import UserError
from nanochat.core.run import Run
from nanochat.core.tokenizer import Tokenizer
from nanochat.core.world import World
from nanochat.core.download import SETS
from nanochat.core.dataset import conversations, set_rows, take_characters
from nanochat.core.dataloader import tokenize
from nanochat.train.plan import make_plan
from nanochat.post.mixture import open_task, subject_of
from nanochat.lab.report import Report
from nanochat.lab.stages import run_stage


def write_txt(folder, texts):
    for i, text in enumerate(texts): (folder/f"{i:03d}.txt").write_text(text)


def write_parquet(folder, texts):
    for i in range(4): pq.write_table(pa.table({"text": texts[i::4], "id": list(range(len(texts[i::4])))}), folder/f"shard_{i:05d}.parquet", compression="zstd")


def write_jsonl_gz(folder, texts):
    with gzip.open(folder/"texts.jsonl.gz", "wt", encoding="utf-8") as f: f.writelines(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))


def pretrain(monkeypatch, tmp_path, source, **overrides):
    "Data, tokenizer and base model of a small run on a folder of text; returns the run."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path/"base"))
    plan = make_plan("smoke", {"base.eval_tokens": 4096, "base.warmup_steps": 2, "eval.core_questions": 0, "eval.tasks": "world"} | overrides, data=str(source))
    run = Run.create("own", plan.config)
    for stage in ("data", "tokenizer", "base"): run_stage(run, stage)
    return run


def bits_per_byte(run):
    return [row["bits_per_byte"] for row in run.rows("base") if "bits_per_byte" in row]


def test_own_text_becomes_an_assistant_that_reads_it(monkeypatch, tmp_path):
    "Conversations are about passages of the text, and the exam is about held-out documents, beside what simpler methods answer."
    folder = tmp_path/"text"
    folder.mkdir()
    write_txt(folder, list(World(7).documents(0, 600)))
    fewer = {"base.steps": 5, "base.eval_every": 5, "data.characters": 100_000, "eval.questions": 3, "rl.steps": 1, "rl.eval_problems": 4, "rl.max_new_tokens": 8}
    run = pretrain(monkeypatch, tmp_path, folder, **fewer, **{"eval.tasks": "reading,smalltalk"})
    assert set(run.config["mid"]["mixture"]) == {"reading", "smalltalk", "identity", "memory", "repeat"}
    for stage in ("mid", "sft", "rl"): run_stage(run, stage)
    found = json.loads((run.stage_dir("rl")/"eval.json").read_text())["tasks"]
    assert not found["reading"]["too_long"] and found["reading"]["n"] == 12 and found["smalltalk"]["n"] == 3
    asked = {kind: n for kind, (_, n) in found["reading"]["kinds"].items()}
    assert sum(asked.values()) == 12 and "continue" not in asked
    assert all(0 <= n <= asked[kind] for right in found["reading"]["methods"].values() for kind, n in right.items())
    assert len(found["reading"]["methods"]) == 3
    # the exam's passages are those of held-out documents
    exam, learned = (open_task("reading", split, run.seed, subject=subject_of(run.config)) for split in ("test", "train"))
    seen = {sentence for passage in learned.text.passages for sentence in passage}
    shown = [sentence for i in range(len(exam)) for sentence in exam[i]["question"].passage]
    assert sum(sentence in seen for sentence in shown) < len(shown) / 2 # the town's documents repeat some sentences
    assert "documents of your text that training has not seen" in Report(run).write().read_text()


@pytest.mark.parametrize("document", ["- a list\n- of things\n", "total: 17, 18, 19\n", "NO SENTENCE HERE\n", "これは文です。\n"])
def test_text_without_sentences_is_refused_before_training(monkeypatch, tmp_path, document):
    folder = tmp_path/"text"
    folder.mkdir()
    write_txt(folder, [document * (5 + i) for i in range(40)])
    with pytest.raises(UserError, match="no passage of two or more full sentences for training.*--until base"): pretrain(monkeypatch, tmp_path, folder)
    plan = make_plan("smoke", {"base.eval_tokens": 4096, "eval.core_questions": 0, "until": "base", "data.characters": 2000}, data=str(folder))
    run_stage(Run.create("base alone", plan.config), "data")


@pytest.mark.parametrize("write", [write_txt, write_parquet, write_jsonl_gz])
def test_own_text(monkeypatch, tmp_path, write):
    folder, texts = tmp_path/"text", list(World(7).documents(0, 400))
    folder.mkdir()
    write(folder, texts)
    run = pretrain(monkeypatch, tmp_path, folder, **{"base.steps": 10, "base.eval_every": 10, "data.characters": 50_000})
    counts = run.manifest("data")
    assert counts["source"] == str(folder) and counts["train"]["documents"] + counts["val"]["documents"] <= 400
    curve = bits_per_byte(run)
    assert len(curve) == 2 and curve[1] < curve[0] - 0.3, curve
    assert not (tmp_path/"base"/"data").exists() # used where it lies
    assert sorted(path.parent for path in folder.rglob("*")) == [folder] * len(list(folder.iterdir())) # and nothing is put beside it


def test_real_english(monkeypatch, tmp_path):
    source = real_data("text_wiki_en") # English Wikipedia
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    run = pretrain(monkeypatch, tmp_path, source, **{"base.steps": 60, "base.eval_every": 20})
    assert run.manifest("data")["train"]["characters"] >= run.config["data"]["characters"]
    curve = bits_per_byte(run)
    assert len(curve) == 4 and curve == sorted(curve, reverse=True) and curve[0] > 3.5 and curve[-1] < 3.0, curve
    assert run.manifest("tokenizer")["bytes_per_token"]["val"] > 1.5
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before


HUB_RUN = """
import nanochat.core.dataset as d
from nanochat.core.run import Run
from nanochat.train.plan import make_plan
from nanochat.lab.stages import run_stage
d.SOURCES["climbmix"] = d.Source("a test", "none", repo="someone/text", shards=5, shard_characters=40_000)
run = Run.create("hub", make_plan("smoke", {"data.characters": 120_000, "tokenizer.max_characters": 40_000, "eval.core_questions": 0, "eval.tasks": "world"}, data="climbmix").config)
for stage in ("data", "tokenizer"): run_stage(run, stage)
"""


def test_a_hubs_text_arrives_while_the_tokenizer_trains(tmp_path):
    "The third shard is not sent before tokens of the first are on the disk: whoever waits for all of them waits in vain."
    served, base = tmp_path/"served", tmp_path/"base"
    served.mkdir()
    for i in range(5): pq.write_table(pa.table({"text": list(take_characters(World(7).documents(300 * i, 300 * i + 300), 40_000))}), served/f"shard_{i:05d}.parquet")
    hub, in_time, early = Hub(served), [], []
    def hold(name):
        if name == "shard_00001.parquet": early.append((base/"runs"/"hub"/"data"/"manifest.json").exists()) # the first stage fetched only what a tokenizer needs
        until = time.monotonic() + 60
        while name == "shard_00002.parquet" and time.monotonic() < until:
            if list(base.glob("tokens/*/tokens_00000.npy")): return in_time.append(True)
            time.sleep(0.05)
    hub.hold = hold
    env = environment(base) | hub_environment(hub.url, tmp_path)
    try: done = subprocess.run([sys.executable, "-c", HUB_RUN], env=env, capture_output=True, text=True, timeout=300)
    finally: hub.close()
    assert done.returncode == 0, done.stderr[-3000:]
    assert early == [True] and in_time == [True]
    assert hub.gets() == [f"shard_{i:05d}.parquet" for i in (0, 1, 2, 4)]
    manifest = json.loads(next(base.glob("tokens/*/manifest.json")).read_text())
    assert [(shard["split"], shard["file"]) for shard in manifest["shards"]] == [("train", f"shard_{i:05d}.parquet") for i in range(3)] + [("val", "shard_00004.parquet")]
    assert_user_error(nanochat(base, "data", "verify", "climbmx"), "climbmx", "did you mean climbmix?")
    assert nanochat(base, "data", "verify").returncode == 0
    file = base/"data"/"climbmix"/"shard_00001.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert_user_error(nanochat(base, "data", "verify"), "damaged", "shard_00001.parquet")


def test_a_download_in_the_background_ends_with_the_stage(tmp_path):
    "Stopping the stage does not wait for the rest of the download."
    served, base = tmp_path/"served", tmp_path/"base"
    served.mkdir()
    for i in range(5): (served/f"shard_{i:05d}.parquet").write_bytes(os.urandom(20_000_000)) # at 100 kB a second each: 200 seconds
    hub = Hub(served, bytes_per_second=100_000)
    code = HUB_RUN[:HUB_RUN.index("run = ")] + "import time\nfrom nanochat.core.dataloader import start_download\nwith start_download({'data': {'source': 'climbmix', 'characters': 120_000}}): time.sleep(2); raise SystemExit('stopped')"
    env = environment(base) | hub_environment(hub.url, tmp_path)
    began = time.monotonic()
    try: done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    finally: hub.close()
    assert done.stderr.strip() == "stopped" and time.monotonic() - began < 100
    assert list((base/"data"/"climbmix").glob(".*.part")) # what has arrived is kept


def test_what_is_in_the_data_folder_is_used_without_a_network(monkeypatch, tmp_path):
    root = tmp_path/"root"
    (root/"climbmix").mkdir(parents=True)
    (root/"gsm8k").mkdir()
    write_parquet(root/"climbmix", list(World(7).documents(0, 400)))
    with gzip.open(root/"gsm8k"/"train.jsonl.gz", "wt") as f: f.write(json.dumps({"question": "What is 1 + 1?", "answer": "#### 2"}) + "\n")
    monkeypatch.setenv("NANOCHAT_DATA_ROOT", str(root))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert list(set_rows("gsm8k", "train")) == [{"question": "What is 1 + 1?", "answer": "#### 2"}]
    run = pretrain(monkeypatch, tmp_path, "climbmix", **{"base.steps": 2, "base.eval_every": 2, "base.warmup_steps": 1, "data.characters": 50_000})
    assert run.manifest("data")["train"]["characters"] >= 50_000
    assert not (tmp_path/"base"/"data").exists()


def test_real_sets(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_ROOT", str(real_data()))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    counts = {(name, split): sum(1 for _ in set_rows(name, split)) for name, split in
              [("gsm8k", "train"), ("arc-easy", "train"), ("arc-easy", "validation"), ("arc-challenge", "train"), ("mmlu", "dev"), ("mmlu", "validation"), ("humaneval", "test")]}
    assert list(counts.values()) == [7473, 2251, 570, 1119, 285, 1531, 164]
    assert sum(1 for _ in conversations("sft_sgd/train.jsonl.gz")) == 6000


def lines(*rows): return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


FINE = {"text": "A line that is fine. " * 20}
REFUSED = { # what lies there, and what the sentence has to say
    "no such source": (lambda folder: folder/"nowhere", ["nowhere", "climbmix"]),
    "empty folder": (lambda folder: folder, ["holds no text"]),
    "not JSON": (lambda folder: (folder/"a.jsonl").write_text(lines(FINE, FINE, "{'text': 1}")) and folder, ["a.jsonl, line 3"]),
    "no text in a line": (lambda folder: (folder/"a.jsonl").write_text(lines(FINE, {"body": "x"})) and folder, ["a.jsonl, line 2", "'text'"]),
    "no column text": (lambda folder: pq.write_table(pa.table({"body": ["x"] * 9}), folder/"a.parquet") or folder, ["a.parquet", "no column 'text'", "body"]),
    "half a parquet file": (lambda folder: (folder/"a.parquet").write_bytes(b"PAR1 and no more") and folder, ["a.parquet is damaged"]),
    "not UTF-8": (lambda folder: (folder/"a.txt").write_bytes(b"caf\xe9 " * 99) and folder, ["a.txt", "UTF-8"]),
    "one document": (lambda folder: (folder/"a.jsonl").write_text(lines(FINE)) and folder, ["training and validation need one each"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(monkeypatch, tmp_path, what):
    make, words = REFUSED[what]
    (tmp_path/"text").mkdir()
    with pytest.raises(UserError) as refused: pretrain(monkeypatch, tmp_path, make(tmp_path/"text"))
    assert "\n" not in str(refused.value)
    for word in words: assert word in str(refused.value)


def test_conversations_out_of_order(tmp_path):
    talk = lambda *roles: {"messages": [{"role": role, "content": "Well?"} for role in roles]}
    file = tmp_path/"talks.jsonl"
    for roles, word in ((("assistant", "user"), "message 0"), (("user", "user"), "message 1"), (("user", "assistant", "system"), "message 2"), ((), "messages")):
        file.write_text(lines(talk("user", "assistant"), talk(*roles)))
        with pytest.raises(UserError, match=f"talks.jsonl, line 2: .*{word}"): list(conversations(file))
    file.write_text(lines(talk("system", "user", "assistant", "user", "assistant")))
    assert len(list(conversations(file))) == 1


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert_user_error(nanochat(tmp_path, "data", "get", "gsm8k"), "could not be downloaded", "check the network")


def test_a_full_disk_while_tokenizing(monkeypatch, tmp_path):
    texts = list(World(7).documents(0, 200))
    (tmp_path/"text.jsonl").write_text(lines(*({"text": text} for text in texts)))
    tokenizer, writes = Tokenizer.train(texts, 300), []
    def full(fd):
        writes.append(fd)
        if len(writes) > 12: raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space is left"): tokenize(tmp_path/"text.jsonl", tokenizer, tmp_path/"tokens", None, 2000)
    made = {f.name: f.stat().st_mtime_ns for f in (tmp_path/"tokens").glob("tokens_*")}
    assert made and not list((tmp_path/"tokens").glob(".*"))
    tokenize(tmp_path/"text.jsonl", tokenizer, tmp_path/"tokens", None, 2000)
    assert {name: (tmp_path/"tokens"/name).stat().st_mtime_ns for name in made} == made # what was finished is kept


def test_every_set_is_pinned_and_licensed():
    for name, source in SETS.items():
        assert source.licence and (source.sha256 or len(source.revision) == 40), name


def test_the_world_is_written_by_processes_that_end(tmp_path, monkeypatch):
    "A helper of the pool that stays, and ignores signals, keeps a notebook's kernel from ending for half a minute."
    from nanochat.core import dataset, machine
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(machine, "n_cores", lambda: 2)
    before = {p.pid for p in psutil.Process().children()}
    dataset.make_world(7, shards=2)
    assert {p.pid for p in psutil.Process().children()} <= before
