"""The stream of rows: the same for any number of ranks and after any stop, every token once, and little lost."""
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import environment, real_data

from nanochat.core.files import UserError
from nanochat.core.tokenizer import Tokenizer
from nanochat.core.dataset import iter_texts, make_world
from nanochat.core.dataloader import tokenize
from nanochat.core.dataloader import PackedLoader
from nanochat.lab.bench.measure import timed
from nanochat.lab.bench.data import lost_by_best_fit, lost_in_epoch

T, B = 128, 16 # rows of a step, over all ranks


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    "A folder of token shards of the world, several for training."
    base = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        folder = make_world(7, 1_000_000)
    return tokenize(folder, Tokenizer.train(iter_texts(folder), 512), base/"tokens", 1_000_000, 300_000)


def ranks(tokens, world_size, state=None, **options):
    loaders = [PackedLoader(tokens, "train", B // world_size, T, rank, world_size, seed=5, **options) for rank in range(world_size)]
    if state:
        for loader in loaders: loader.load_state(json.loads(json.dumps(state)))
    return loaders


def steps(loaders, n):
    "Inputs and targets of some steps, ranks one below the other."
    batches = [[loader.next_batch() for loader in loaders] for _ in range(n)]
    return torch.stack([torch.stack([torch.cat([x for x, _ in step]), torch.cat([y for _, y in step])]) for step in batches])


@pytest.mark.parametrize("crop", [False, True])
def test_the_stream_is_the_same_for_any_number_of_ranks_and_after_any_stop(tokens, crop):
    epoch = -(-PackedLoader(tokens, "train", 1, T, seed=5, crop=crop).epoch_rows // B)
    n = epoch + 12 # into the second epoch
    whole = steps(ranks(tokens, 1, crop=crop), n)
    for world_size in (2, 4, 8): assert torch.equal(steps(ranks(tokens, world_size, crop=crop), n), whole), world_size
    rng = np.random.default_rng(0)
    stops = sorted({int(stop) for stop in rng.integers(1, n - 3, 18)} | {epoch - 1, epoch})
    first, at = ranks(tokens, 2, crop=crop), 0
    for stop in stops:
        steps(first, stop - at)
        at = stop
        again = ranks(tokens, int(rng.choice([1, 2, 4, 8])), first[0].state(), crop=crop)
        assert torch.equal(steps(again, 3), whole[stop:stop + 3]), stop
        elsewhere = ranks(tokens, 4, crop=crop)
        for loader in elsewhere: loader.seek(stop * B)
        assert torch.equal(steps(elsewhere, 1), whole[stop:stop + 1]), stop


def test_every_token_once_in_an_epoch_though_the_number_of_ranks_changes(tokens):
    "The positions of documents that an epoch's rows are made of, with another number of ranks every few steps."
    loader = PackedLoader(tokens, "train", 1, T, seed=5)
    left, state, seen = loader.epoch_rows, None, [np.zeros(length, int) for length in loader.shards.length]
    for world_size in [1, 8, 2, 4] * 10_000:
        if left < B * 3: break
        loaders = ranks(tokens, world_size, state)
        for _ in range(3):
            for loader in loaders:
                for plan in loader.rows_at(loader.position)[0]:
                    for doc, start, length in zip(plan.doc, plan.start, plan.length): seen[doc][start:start + length] += 1
            for loader in loaders: loader.next_batch()
            left -= B
        state = loaders[0].state()
    rest = PackedLoader(tokens, "train", 1, T, seed=5)
    rest.load_state(state)
    for _ in range(left):
        for plan in rest.rows_at(rest.position)[0]:
            for doc, start, length in zip(plan.doc, plan.start, plan.length): seen[doc][start:start + length] += 1
        rest.next_batch()
    assert rest.position[0] == 1
    assert set(np.concatenate(seen).tolist()) == {1}


def test_tokens_of_another_tokenizer_are_refused(tokens):
    with pytest.raises(UserError, match="another tokenizer"): PackedLoader(tokens, "train", 1, T, tokenizer_hash="0" * 64)
    other = Tokenizer.train(["another text"], 270)
    with pytest.raises(UserError, match="another tokenizer"): tokenize(tokens, other, tokens)


@pytest.fixture(scope="module")
def wikipedia(tmp_path_factory):
    source = real_data("text_wiki_en")
    return tokenize(source, Tokenizer.train(iter_texts(source), 32768), tmp_path_factory.mktemp("wikipedia")/"tokens")


@pytest.mark.parametrize("seq_len", [512, 2048])
def test_little_is_lost_of_real_text(wikipedia, seq_len):
    packed = PackedLoader(wikipedia, "train", 32, seq_len)
    assert lost_in_epoch(packed) == 0
    padding = np.mean([(packed.next_batch()[1] < 0).float().mean().item() for _ in range(100)])
    assert padding < 0.05
    theirs = lost_by_best_fit(np.random.default_rng(0).permutation(packed.shards.length), seq_len + 1)
    assert lost_in_epoch(PackedLoader(wikipedia, "train", 32, seq_len, crop=True)) <= theirs


TOKENIZE = """
import sys
from pathlib import Path
from nanochat.core.dataloader import tokenize
from nanochat.core.tokenizer import Tokenizer
tokenize(Path(sys.argv[1]), Tokenizer.load(sys.argv[2]), Path(sys.argv[3]), None, 20_000)
"""


def test_tokenizing_survives_being_killed(tmp_path):
    "Whatever is on the disk when the power goes, the shards come out the same."
    texts = [f"Line {i}: " + "some words, and some more of them. " * (i % 50) for i in range(4000)]
    (tmp_path/"text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Tokenizer.train(texts, 512).save(tmp_path/"tokenizer")
    command = [sys.executable, "-c", TOKENIZE, str(tmp_path/"text.jsonl"), str(tmp_path/"tokenizer")]
    manifest = lambda out: json.loads((tmp_path/out/"manifest.json").read_text())
    seconds, done = timed(lambda: subprocess.run([*command, str(tmp_path/"whole")], env=environment(tmp_path), capture_output=True, timeout=120))
    assert done.returncode == 0, done.stderr[-2000:]
    kills, rng = 0, np.random.default_rng(1)
    for _ in range(12):
        process = subprocess.Popen([*command, str(tmp_path/"killed")], env=environment(tmp_path), stdout=subprocess.DEVNULL)
        while process.poll() is None and not (tmp_path/"killed").exists(): time.sleep(0.005)
        time.sleep(rng.uniform(0, seconds / 8))
        if process.poll() is None: kills += 1
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert kills > 2
    assert subprocess.run([*command, str(tmp_path/"killed")], env=environment(tmp_path), capture_output=True, timeout=120).returncode == 0
    assert manifest("killed") == manifest("whole") and len(manifest("whole")["shards"]) > 50
    assert {f.name for f in (tmp_path/"killed").iterdir() if not f.name.endswith(".part")} == {f.name for f in (tmp_path/"whole").iterdir()}


@pytest.mark.cuda
def test_batches_are_copied_while_the_gpu_computes(tokens):
    if not torch.cuda.is_available(): pytest.skip("needs a CUDA device")
    on_gpu, on_cpu = PackedLoader(tokens, "train", B, T, seed=5, device="cuda"), PackedLoader(tokens, "train", B, T, seed=5)
    assert all(buffer.is_pinned() for buffer in on_gpu._buffers)
    for _ in range(50):
        for theirs, ours in zip(on_gpu.next_batch(), on_cpu.next_batch()): assert torch.equal(theirs.cpu(), ours)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000) # keeps the stream of the computation busy for about half a second
    on_gpu.next_batch() # and has the one after it made
    _, copied, _ = on_gpu._coming[0].result()
    copied.synchronize()
    assert not torch.cuda.current_stream().query() # the copy has ended, the computation has not
    torch.cuda.synchronize()
