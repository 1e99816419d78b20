"""The first large run at its real counts with tiny content: shards beyond the limit on open files, half a million conversations, a vocabulary above 32,768, millions of documents."""
import errno
import json
import os
import resource
import threading
import time
from contextlib import nullcontext
from multiprocessing import get_context

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.core.dataloader import PackedLoader, Shards, tokenize
from nanochat.core import dataloader, machine
from nanochat.core.dataset import iter_texts
from nanochat.core.files import UserError, sha256_file
from nanochat.core.machine import peak_memory
from nanochat.core.run import Run
from nanochat.core.tokenizer import Tokenizer
from nanochat.lab import stages
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optim import make_optimizer
from nanochat.post.finetune import ConversationLoader, fit_conversations, pack_conversations, prepare_rows
from nanochat.train.loop import LoopSettings, bits_per_byte, train

CALM = {"lr_mult": 1.0, "wd_mult": 0.0}
FULL = (pytest.mark.slow, pytest.mark.skipif("CI" in os.environ, reason="half a minute; a tenth of it is tested everywhere"))


@pytest.fixture(scope="module")
def in_a_process():
    "Calls a function of this file in another process, whose limits may be lowered; returns or raises what it does."
    with get_context("spawn").Pool(1) as pool: yield lambda work, *args: pool.apply(work, args)


def write_shards(folder, lengths_of_shards, vocab_size=64):
    "Token shards as `tokenize` writes them, without text: BOS is 0, the last shard is validation."
    folder.mkdir()
    shards, rng = [], np.random.default_rng(0)
    for k, lengths in enumerate(lengths_of_shards):
        offsets = np.r_[0, np.cumsum(lengths)]
        tokens = rng.integers(1, vocab_size, offsets[-1], np.uint16)
        tokens[offsets[:-1]] = 0
        np.save(folder/f"tokens_{k:05d}.npy", tokens)
        np.save(folder/f"docs_{k:05d}.npy", offsets)
        hashes = {name: sha256_file(folder/name) for name in (f"tokens_{k:05d}.npy", f"docs_{k:05d}.npy")}
        shards.append({"split": "train", "tokens": len(tokens), "sha256": hashes})
    shards[-1]["split"] = "val"
    (folder/"manifest.json").write_text(json.dumps({"settings": {"tokenizer": "t"}, "bos_id": 0, "shards": shards}))
    return folder


def limit_open_files(soft, hard):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Log:
    "As `Metrics`, in memory."
    writes, rows = False, []
    def log(self, step, **values): self.rows.append(values)


def train_on(folder, open_files):
    "Train on a folder under a limit of open files that cannot be raised: the loss of every step, and the number of files that the loaders keep open."
    limit_open_files(open_files, open_files)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    rows, val = (PackedLoader(folder, split, 4, 32) for split in ("train", "val"))
    kept = len(os.listdir("/proc/self/fd")) - before if before else 0
    model = GPT(GPTConfig(sequence_len=32, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32, window_pattern="L"))
    model.init_weights(0)
    def evaluate(): return {"bits_per_byte": bits_per_byte(model, val, torch.ones(64, dtype=torch.int32), 2)}
    log = Log()
    result = train(model, make_optimizer(model), rows, LoopSettings(6, eval_every=3), schedule=lambda step: CALM, metrics=log, evaluate=evaluate, grad_accum=2)
    return result, [row["loss"] for row in log.rows if "loss" in row], kept


def test_twelve_hundred_shards_train_where_a_process_may_open_1024_files(tmp_path, in_a_process):
    folder = write_shards(tmp_path/"tokens", [[20, 13]] * 1200)
    result, losses, kept = in_a_process(train_on, folder, 1024)
    assert result["step"] == 6 and len(losses) == 6 and np.isfinite(losses).all() and result["bits_per_byte"] > 0
    assert kept < 10


def what_readers_say(folder, *texts):
    "The errors of opening a token shard and files of text when no more files may be opened."
    for text in texts: list(iter_texts(text)) # imports what reading needs
    said, taken, (soft, hard) = [], [], resource.getrlimit(resource.RLIMIT_NOFILE)
    limit_open_files(200, hard)
    try:
        while True: taken.append(os.open(os.devnull, os.O_RDONLY))
    except OSError: pass
    try:
        for read in (lambda: dataloader._open_shard(folder, 0, 33), *(lambda text=text: list(iter_texts(text)) for text in texts)):
            try: read()
            except UserError as e: said.append(str(e))
    finally:
        for number in taken: os.close(number)
        limit_open_files(soft, hard)
    return said


def test_too_many_open_files_are_never_called_damage(tmp_path, in_a_process, monkeypatch):
    folder = write_shards(tmp_path/"tokens", [[20, 13]] * 2)
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path/"text.parquet")
    (tmp_path/"text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path/"text.txt").write_text("one two " * 20)
    said = in_a_process(what_readers_say, folder, *(tmp_path/f"text.{kind}" for kind in ("parquet", "jsonl", "txt")))
    assert len(said) == 4
    for text in said: assert "ulimit -n 65536" in text and "is damaged (" not in text and "delete" not in text and "remove" not in text, text
    def refuse(*args, **how): raise OSError(errno.ENFILE, os.strerror(errno.ENFILE)) # the limit of the whole system
    monkeypatch.setattr(dataloader.np, "load", refuse)
    with pytest.raises(UserError, match="ulimit -n 65536"): Shards(folder, "train")


def limits_after_start(soft):
    "The limit on open files before and after a command starts, and after a training stage joins its process group."
    from nanochat.core.files import run_command
    from nanochat.core.machine import distributed
    hard, found = resource.getrlimit(resource.RLIMIT_NOFILE)[1], []
    def here(): found.append(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    for start in (lambda: run_command(here), lambda: distributed(torch.device("cpu")).__enter__() or here()):
        limit_open_files(soft, hard)
        start()
    return hard, found


def test_the_soft_limit_on_open_files_is_raised_at_the_start(in_a_process):
    hard, found = in_a_process(limits_after_start, 512)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    assert found == [wanted, wanted] and wanted > 512


def test_shards_grow_with_the_text_and_small_texts_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda number: None) # hundreds of files take seconds to reach a disk
    texts = [f"Document {i:04}: " + "words and more words. " * 20 for i in range(3000)]
    (tmp_path/"text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer.train(texts, 300)
    def entries(name, size, characters=None):
        manifest = json.loads((tokenize(tmp_path/"text.jsonl", tokenizer, tmp_path/name, characters, size)/"manifest.json").read_text())
        return [shard for shard in manifest["shards"] if shard["split"] == "train"]
    small = entries("small", 20_000, 1_200_000) # up to 64 shards, all have the same size
    assert {shard["documents"] for shard in small[:-1]} == {small[0]["documents"]} and len(small) > 50
    large = entries("large", 2_000)
    sizes = [shard["characters"] for shard in large]
    assert sum(sizes) / 2_000 > 600 and len(sizes) < 250 # more than 600 shards of one size
    assert max(sizes[:60]) < 3_000 and 15_000 < sizes[-2] < 21_000
    # shards of one size, as they were written before, are continued and not made again
    fixed, state = 2_000, {"settings": json.loads((tmp_path/"large"/"manifest.json").read_text())["settings"], "shards": [], "finished": []}
    (tmp_path/"old").mkdir()
    for k, shard in enumerate(large[:40]):
        for name in shard["sha256"]: (tmp_path/"old"/name).write_bytes((tmp_path/"large"/name).read_bytes())
        state["shards"].append(shard)
    (tmp_path/"old"/"progress.json").write_text(json.dumps(state))
    assert entries("old", fixed) == large


def test_the_loaders_thread_chooses_its_gpu_before_anything_else(tmp_path, monkeypatch):
    "On a GPU other than 0, or every rank's thread would take memory on GPU 0."
    calls = []
    def note(what): calls.append((what, threading.current_thread().name))
    class Stream:
        def __init__(self, device=None): assert device == torch.device("cuda", 3)
        def wait_event(self, event): pass
    class Event:
        def synchronize(self): note("synchronize")
        def record(self, stream): note("record")
    class OnStream:
        def __init__(self, stream): pass
        def __enter__(self): note("stream")
        def __exit__(self, *error): note("leave")
    empty, to = torch.empty, torch.Tensor.to
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **how: empty(*shape, **how))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, **how: self if torch.device(device).type == "cuda" else to(self, device, **how))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    for name, fake in (("Stream", Stream), ("Event", Event), ("stream", OnStream), ("current_stream", Stream), ("set_device", lambda device: note(("set_device", torch.device(device))))):
        monkeypatch.setattr(torch.cuda, name, fake)
    loader = PackedLoader(write_shards(tmp_path/"tokens", [[20, 13]] * 2), "train", 2, 16, device="cuda:3")
    loader.next_batch()
    of_thread = [what for what, thread in calls if thread.startswith("loader")]
    assert of_thread[0] == ("set_device", torch.device("cuda", 3)) and "leave" in of_thread
    assert calls[0][1].startswith("loader") # the process chose its own device before


def test_the_loader_is_as_deep_as_a_step_and_keeps_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, "_BLOCK", 64)
    folder = write_shards(tmp_path/"tokens", [np.random.default_rng(k).integers(3, 40, 100) for k in range(4)])
    def stream(loader, n): return torch.stack([torch.stack(loader.next_batch()) for _ in range(n)])
    whole = stream(PackedLoader(folder, "train", 4, 32), 60) # several epochs of five blocks
    deep, made = PackedLoader(folder, "train", 4, 32), []
    deep.prefetch(5)
    monkeypatch.setattr(deep, "_fill", lambda flat, plans, fill=deep._fill: made.append(1) or fill(flat, plans), raising=False)
    def idle(): deep._thread.submit(int).result()
    first = stream(deep, 1)
    idle()
    assert len(made) == 6 # the batch that was taken, and those of a step of four and one more
    assert torch.equal(first, whole[:1])
    planned = []
    plan_block = dataloader._plan_block
    monkeypatch.setattr(dataloader, "_plan_block", lambda *args: planned.append(threading.current_thread().name) or plan_block(*args))
    for i in range(1, 40):
        here = deep.position
        assert torch.equal(stream(deep, 1), whole[i:i + 1])
        idle()
        assert deep._after(*here[:2]) in deep._plans or deep.position[:2] != here[:2] # the next block is planned before it begins
    assert planned and set(planned) == {"loader_0"}
    state, again = deep.state(), PackedLoader(folder, "train", 2, 32, 1, 2)
    again.prefetch(3)
    again.load_state(state)
    assert torch.equal(stream(again, 10), whole[40:50, :, 2:])
    deep.load_state(state) # with batches under way
    assert torch.equal(stream(deep, 10), whole[40:50])


@pytest.fixture(scope="module")
def wide():
    "A tokenizer of 49,152 tokens, and texts that use all of it."
    rng = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in rng.integers(0, 26, 7)) for _ in range(18_000)]
    texts = [" ".join(words[i] for i in rng.permutation(len(words))[:2000]) for _ in range(60)]
    return Tokenizer.train(texts, 49_152), texts


def test_a_vocabulary_above_32768_survives_shards_loader_and_packing(tmp_path, wide):
    tokenizer, texts = wide
    assert tokenizer.vocab_size == 49_152 and tokenizer.dtype == np.uint16
    (tmp_path/"text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    loader = PackedLoader(tokenize(tmp_path/"text.jsonl", tokenizer, tmp_path/"tokens"), "train", 4, 256)
    expected = np.bincount(np.concatenate([tokenizer.encode(text) for text in texts[:57]]), minlength=49_152)
    assert expected[32_768:].sum() > 1000
    found = np.zeros(49_152, int)
    rows = loader.epoch_rows
    for n in range(0, rows, 4):
        x, y = loader.next_batch()
        y = y[:rows - n].numpy()
        assert x.min() >= 0 and x.max() <= tokenizer.bos_id
        found += np.bincount(y[y >= 0], minlength=49_152)
    found[tokenizer.bos_id] = 0
    assert (found == expected).all()
    chats = [{"messages": [{"role": "user", "content": text[:200]}, {"role": "assistant", "content": text[200:900]}]} for text in texts]
    packed = pack_conversations([fit_conversations("chats", chats, 60, tokenizer, 2049)], tokenizer.bos_id, 2049, folder=tmp_path)
    x, y = ConversationLoader(packed, len(packed.tokens)).next_batch()
    ids, learned = (np.concatenate(parts) for parts in zip(*map(tokenizer.render_conversation, chats)))
    assert packed.tokens.dtype == np.uint16 and x.max() == tokenizer.special("<|assistant_end|>") == y.max() > 32_768
    assert sorted(y[y >= 0].tolist()) == sorted(ids[learned > 0].tolist())


def pack_many(folder, n, repeats=1):
    "Pack conversations that are made one at a time: seconds, megabytes above those of the program, and the counts."
    words = "the baker sold bread to a man who asked for more of it and paid with a coin".split()
    tokenizer = Tokenizer.train([" ".join(words)] * 2, 300)
    def chats():
        for i in range(n): yield {"messages": [{"role": "user", "content": f"{words[i % 17]} {i}?"}, {"role": "assistant", "content": " ".join(words[i % 7:i % 17 + 1] * repeats) + "."}]}
    before, began = peak_memory(reset=True), time.perf_counter()
    task = fit_conversations("chats", chats(), n, tokenizer, 2049)
    packed = pack_conversations([task], tokenizer.bos_id, 2049, 0, folder)
    n_tokens = packed.total("tokens")
    return time.perf_counter() - began, peak_memory() - before, packed.total("packed"), n_tokens, len(packed.tokens)


@pytest.mark.parametrize("n, repeats", [(50_000, 1), (10_000, 60), pytest.param(460_000, 1, marks=FULL)])
def test_hundreds_of_thousands_of_conversations_are_packed_in_bounded_memory(tmp_path, in_a_process, n, repeats):
    seconds, megabytes, packed, n_tokens, rows = in_a_process(pack_many, tmp_path, n, repeats)
    print(f"{n:,} conversations, {n_tokens:,} tokens: {seconds:.1f} s, {megabytes:.0f} MB")
    assert packed == n and rows < 1.2 * n_tokens / 2049 + 1
    assert megabytes < 30 + n * 400 / 1e6 + n_tokens * 10 / 1e6 # a token and its mark are 3 bytes, and 3 in the rows


def test_an_index_of_millions_of_documents(tmp_path):
    began = time.perf_counter()
    folder = write_shards(tmp_path/"tokens", [np.full(500_000, 5)] * 6 + [[5]])
    loader = PackedLoader(folder, "train", 8, 64)
    assert len(loader.shards) == 3_000_000 and loader._after(0, 366) == (1, 0)
    where = {"row": 0, "rows_id": loader.rows_id, "epoch": 0, "block": 366} # the last block of the epoch
    loader.load_state(where)
    x, y = loader.next_batch()
    assert x.shape == (8, 64) and (y >= 0).float().mean() > 0.9
    rank = PackedLoader(folder, "train", 4, 64, 1, 2)
    rank.load_state(where)
    assert torch.equal(rank.next_batch()[0], x[4:])
    print(f"{time.perf_counter() - began:.1f} s")


def test_rows_of_later_stages_are_made_while_a_gpu_pretrains(tmp_path, monkeypatch):
    config = {"seed": 1, "model": {"sequence_len": 512}, "dial": {"until": "report"}, "hardware": {"device": "auto", "nproc": 1}}
    run = Run(tmp_path, config | {"mid": {"mixture": {"sums": 40}}, "sft": {"mixture": {"sums": 20}}})
    tokenizer = Tokenizer.train(["what is 1 + 2? it is 3. "] * 9, 280)
    tokenizer.save(run.stage_dir("tokenizer"))
    done = [tmp_path/stage/"rows"/"manifest.json" for stage in ("mid", "sft")]
    def pretraining(run, stage): # ends when the other process has made the rows
        until = time.monotonic() + 60
        while not all(file.exists() for file in done) and time.monotonic() < until: time.sleep(0.05)
    monkeypatch.setattr(stages, "compute_stage", pretraining)
    monkeypatch.setattr(machine, "pick_device", lambda name: torch.device("cuda", 0))
    stages.run_stage(run, "base")
    assert all(file.exists() for file in done)
    made = [file.stat().st_mtime_ns for file in done]
    assert prepare_rows(run, "mid", tokenizer, 512)["train"].total("asked") == 40
    assert [file.stat().st_mtime_ns for file in done] == made # found, not made again
    monkeypatch.setattr(machine, "pick_device", lambda name: torch.device("cpu"))
    assert isinstance(stages._rows_meanwhile(run), nullcontext)


def test_text_is_read_encoded_and_written_at_the_same_time(tmp_path, monkeypatch):
    "The first shard is on the disk only after the second is encoded and the third is read: whoever does one after the other waits in vain."
    texts = [f"Document {i:04}: " + "words and more words. " * 20 for i in range(200)]
    (tmp_path/"text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer, read, encoded, in_time = Tokenizer.train(texts, 300), threading.Event(), threading.Event(), []
    def watched(make, after, event):
        calls = []
        def call(*args, **how):
            made = make(*args, **how)
            calls.append(1)
            if len(calls) == after: event.set()
            return made
        return call
    save = np.save
    def hold(*args):
        if not in_time: in_time.append((read.wait(20), encoded.wait(20)))
        save(*args)
    monkeypatch.setattr(dataloader, "_shard_size", watched(dataloader._shard_size, 3, read))
    monkeypatch.setattr(Tokenizer, "encode_batch", watched(Tokenizer.encode_batch, 2, encoded))
    monkeypatch.setattr(dataloader.np, "save", hold)
    tokenize(tmp_path/"text.jsonl", tokenizer, tmp_path/"tokens", None, 10_000)
    assert in_time == [(True, True)]
