"""The tokenizer against others' word: tiktoken, Hugging Face's tokenizers and transformers, on generated text and on real text where there is some."""
import base64
import gzip
import hashlib
import http.server
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
import unicodedata
import warnings

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import REPO, real_data

from nanochat.core.files import UserError
from nanochat.rustbpe import GPT2_PATTERN, GPT4_PATTERN, PATTERN, RustBPE
from nanochat.core.tokenizer import RANK_FILES, SPECIAL_TOKENS, Tokenizer
from nanochat.core.world import World
from nanochat.core import tokenizer as module

tiktoken = pytest.importorskip("tiktoken")

CORNERS = ["", " ", "\n", "'", "''s", "It'S don'T we'LL I'vE they'RE I'm she'd x'ſ", "a  b   c \n\n d\t\te \r\n f", " \n", "\n ", "   \n   \n", "1 12 123 1234 12345 ٣٤٥ ²³ ½ Ⅷ",
           "naïve e\u0301 \u0301\u0302", "東京 한국어 ไทย हिन्दी", "🐈 👩🏽‍🚀 👨‍👩‍👧", "\u00a0\u2003\u3000x\u0085y\u200bz\ufeff", "a" * 300, "ab" * 200, "!?" * 100, "-" * 70 + "\n", "\x00\x01\x7f", "\U0010ffff\U000e0001\ue000",
           "".join(SPECIAL_TOKENS), "<|endoftext|> <|bos|><|user_start|>"]


def ranks_of(bpe):
    "A vocabulary as tiktoken wants it."
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in bpe.to_ranks().splitlines())}


def as_tiktoken(bpe, name="it"):
    "tiktoken with the same vocabulary and pattern."
    return tiktoken.Encoding(name, pat_str=bpe.pattern, mergeable_ranks=ranks_of(bpe), special_tokens={})


def generated_texts(n, seed=0):
    "Short texts from all planes of Unicode and from what the patterns treat in a special way."
    rng = random.Random(seed)
    letters, marks, spaces = "abcdefghijklmnopqrstuvwxyzABCXYZéßñжДλΩ中文字ぁ한ǅªʰا", "\u0300\u0301\u0302\u20d0\u0e31\u200d\ufe0f", " \t\n\r\x0b\x0c\u0085\u00a0\u1680\u2003\u2028\u202f\u3000"
    words = ["the", " of", " nanochat", "'s", "'S", "'ll", "'Ve", "'re", "'t", "'M", "'ſ", " don't", "\r\n", "\n\n", "  ", "    ", "1234567890" * 3, "🐈", "👩🏽\u200d🚀", "<|bos|>", "<|user_end|>", "_x1", "://", "...", " --", "ſ", "İ", "K"]
    def part():
        kind = rng.random()
        if kind < 0.3: return rng.choice(words)
        if kind < 0.5: return "".join(rng.choices(letters, k=rng.randint(1, 8)))
        if kind < 0.6: return "".join(rng.choices(spaces, k=rng.randint(1, 4)))
        if kind < 0.7: return "".join(rng.choices("0123456789٣४²½", k=rng.randint(1, 7)))
        if kind < 0.75: return "".join(rng.choices(marks, k=rng.randint(1, 3)))
        if kind < 0.85: return "".join(rng.choices("!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~«»…—", k=rng.randint(1, 4)))
        point = rng.randrange(0x110000 - 0x800)
        return chr(point + 0x800 if point >= 0xD800 else point)
    return ["".join(part() for _ in range(rng.randint(1, 8))) for _ in range(n)]


def real_texts():
    "All real texts that are at hand, document by document."
    folder = real_data()
    for file in sorted(folder.glob("text*/*.parquet")): yield pq.read_table(file, columns=["text"]).column("text").to_pylist()
    with gzip.open(folder/"humaneval"/"HumanEval.jsonl.gz", "rt", encoding="utf-8") as f:
        yield [value for line in f for value in json.loads(line).values() if isinstance(value, str)]


def differences(bpe, theirs, texts):
    "How many of the texts get other ids from tiktoken."
    ids, offsets, _ = bpe.encode_batch(texts)
    ids, offsets = np.frombuffer(ids, np.uint16 if bpe.vocab_size <= 1 << 16 else np.uint32), np.frombuffer(offsets, np.int64)
    return sum(not np.array_equal(ids[a:b], theirs.encode_to_numpy(text, disallowed_special=())) for text, a, b in zip(texts, offsets, offsets[1:]))


@pytest.fixture(scope="module")
def trained():
    "A vocabulary of English, code and a few other scripts."
    world = World(seed=1)
    texts = [world.document(i) for i in range(3000)] + [path.read_text() for path in sorted((REPO/"nanochat").glob("*.py"))] + CORNERS * 3
    return Tokenizer.train(texts, 4096)


@pytest.fixture(scope="module")
def published():
    "GPT-2's and GPT-4's vocabularies, where their files are at hand."
    folder = real_data()/"tokenizers"
    return {name: RustBPE.from_ranks(gzip.decompress((folder/f"{file}.gz").read_bytes()), pattern) for name, (file, _, pattern) in RANK_FILES.items()}


@pytest.mark.parametrize("pattern", [PATTERN, GPT2_PATTERN, GPT4_PATTERN], ids=["nanochat", "gpt2", "gpt4"])
def test_generated_texts_get_tiktokens_ids(trained, pattern):
    bpe = RustBPE.from_merges(trained.bpe.merges(), pattern)
    theirs = as_tiktoken(bpe)
    assert differences(bpe, theirs, CORNERS + generated_texts(30_000)) == 0
    assert all(bpe.encode(text) == theirs.encode_ordinary(text) for text in CORNERS)


def test_the_patterns_are_tiktokens(published):
    "Our spelling of GPT-2's and GPT-4's patterns, and tiktoken's own, cut alike; and both have a scanner."
    spellings = {"gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
                 "gpt4": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""}
    assert spellings["gpt2"] == pytest.importorskip("tiktoken_ext.openai_public").r50k_pat_str
    for name, pattern in spellings.items():
        bpe = published[name]
        with warnings.catch_warnings():
            warnings.simplefilter("error") # a pattern without a scanner warns
            same = RustBPE.from_ranks(bpe.to_ranks(), pattern)
        theirs = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks_of(bpe), special_tokens={})
        texts = CORNERS + generated_texts(20_000, seed=2)
        assert differences(bpe, theirs, texts) == 0 and differences(same, theirs, texts) == 0


def test_gpt2_says_hello(published):
    assert published["gpt2"].encode("Hello, world!") == [15496, 11, 995, 0]
    assert published["gpt4"].encode("Hello, world!") == [9906, 11, 1917, 0]


def test_real_texts_get_tiktokens_ids(trained, published):
    "Three hundred documents of each file; the slow test below has them all."
    for bpe in (trained.bpe, *published.values()):
        theirs = as_tiktoken(bpe)
        for texts in real_texts(): assert differences(bpe, theirs, texts[:300]) == 0


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("NANOCHAT_SLOW_TESTS"), reason="two or three minutes: set NANOCHAT_SLOW_TESTS=1")
@pytest.mark.timeout(3600)
def test_everything_gets_tiktokens_ids(trained, published):
    "All real text, and a million generated ones, with three vocabularies."
    for bpe in (trained.bpe, *published.values()):
        theirs = as_tiktoken(bpe)
        for texts in real_texts(): assert differences(bpe, theirs, texts) == 0
        for seed in range(10): assert differences(bpe, theirs, generated_texts(100_000, seed=100 + seed)) == 0


@pytest.mark.parametrize("name", ["nanochat", "gpt2", "gpt4"])
def test_hugging_face_reads_the_file(trained, request, name):
    "The file gives the same ids in `tokenizers` and in `transformers`."
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    if name == "nanochat": bpe = trained.bpe
    else:
        theirs = request.getfixturevalue("published")[name]
        bpe = RustBPE.from_ranks(theirs.to_ranks(), theirs.pattern, SPECIAL_TOKENS)
    hf = tokenizers.Tokenizer.from_str(bpe.to_json())
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=hf)
    def usual(text): # characters that Unicode added lately are other characters to an older regex library; and they read special tokens in texts
        return all(unicodedata.category(c) != "Cn" for c in text) and not any(name in text for name in SPECIAL_TOKENS)
    texts = [text for text in CORNERS + generated_texts(6000, seed=3) if usual(text)]
    assert len(texts) > 1000
    for text in texts:
        ids = bpe.encode(text)
        assert hf.encode(text, add_special_tokens=False).ids == ids, text
        assert hf.decode(ids, skip_special_tokens=False) == text
    assert fast(texts, add_special_tokens=False)["input_ids"] == [bpe.encode(text) for text in texts]
    assert hf.token_to_id("<|bos|>") == bpe.vocab_size - len(SPECIAL_TOKENS)
    assert RustBPE.from_json(hf.to_str(pretty=True).encode()).to_json() == bpe.to_json() # what they write, we read


def test_a_long_text_is_cut_where_it_changes_nothing(trained):
    text = "".join(generated_texts(60_000, seed=4))
    ids, _ = trained.encode_batch([text], num_threads=3)
    assert ids.tolist() == as_tiktoken(trained.bpe).encode_ordinary(text)
    assert trained.decode(ids) == text


def test_threads_may_share_a_tokenizer(trained):
    "Python's lock is released, so several threads are inside at once."
    texts = generated_texts(3000, seed=5)
    expected = [trained.encode(text) for text in texts]
    found = {}
    def work(k): found[k] = [trained.encode(text) for text in texts]
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert all(found[k] == expected for k in range(4))


def test_the_worst_texts_take_no_longer_than_others(trained):
    "A tenth of a megabyte in one piece: where the time grew with the square of the length, each would take minutes."
    letters = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=100_000))
    for text in ["a" * 100_000, letters, "7" * 100_000, "\n" * 100_000, "🐈" * 25_000, "\u0301" * 50_000, " " * 100_000 + "a"]:
        started = time.perf_counter()
        assert trained.decode(trained.encode(text)) == text
        assert time.perf_counter() - started < 5


def test_ctrl_c_ends_a_training():
    "Within half a second, while texts are read and while merges are learned."
    code = """
import itertools, random, sys
from nanochat.rustbpe import RustBPE
if sys.argv[1] == "reading": texts = itertools.repeat("it reads for ever, " * 1000)
else: texts = ["".join(random.choices("abcdefghijklmnopqrstuvwxyz  ", k=30_000_000))] # merges for many seconds
phases = []
def progress(phase, done, total):
    if phase == ("bytes read" if sys.argv[1] == "reading" else "merges") and not phases: phases.append(phase); print("ready", flush=True)
try: RustBPE.from_texts(texts, 1 << 20, progress=progress)
except KeyboardInterrupt: print("stopped", flush=True)
"""
    for phase in ("reading", "merging"):
        process = subprocess.Popen([sys.executable, "-c", code, phase], stdout=subprocess.PIPE, text=True, cwd=REPO, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        assert process.stdout.readline() == "ready\n"
        started = time.perf_counter()
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "stopped\n"
        assert time.perf_counter() - started < 0.5 + 0.5 # half a second, and as much for a busy machine
        process.wait(30)


@pytest.mark.parametrize("what", ["encode", "batch of one", "endless texts", "endless lists", "decode"])
def test_ctrl_c_ends_an_encoding(what):
    "Within half a second: in one long text, in texts that never end, and while ids become a list."
    code = """
import itertools, sys
from nanochat.rustbpe import RustBPE
bpe = RustBPE.from_texts(["How do you do? " * 100], 300)
line, long = "How do you do, and how are you? " * 100, "The quick brown fox jumps over the lazy dog. " * 3_000_000
def generated():
    while True: yield line
work = {"encode": lambda: [bpe.encode(long) for _ in range(9)], "batch of one": lambda: [bpe.encode_batch([long], 1) for _ in range(9)], "endless texts": lambda: bpe.encode_batch(generated()),
        "endless lists": lambda: bpe.encode_batch(itertools.repeat(line), 2), "decode": lambda: bpe.decode(itertools.repeat(65))}
print("ready", flush=True)
try: work[sys.argv[1]]()
except KeyboardInterrupt: print("stopped", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, what], stdout=subprocess.PIPE, text=True, cwd=REPO, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    started = time.perf_counter()
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "stopped\n"
    assert time.perf_counter() - started < 0.5 + 0.5 # half a second, and as much for a busy machine
    process.wait(30)


def test_a_batch_holds_few_texts():
    "Texts that are encoded are let go of, while others are still read."
    class Text(str): pass
    alive = weakref.WeakSet()
    most = 0
    def texts():
        nonlocal most
        for i in range(2000):
            text = Text("How do you do? " * 1000)
            alive.add(text)
            most = max(most, len(alive))
            yield text
    RustBPE.from_merges([]).encode_batch(texts(), 2)
    assert most < 500


def test_an_error_of_the_texts_is_handed_on():
    def texts():
        yield "spam" * 1000
        raise RuntimeError("the disk is gone")
    with pytest.raises(RuntimeError, match="the disk is gone"): RustBPE.from_texts(texts(), 300)
    with pytest.raises(RuntimeError, match="the disk is gone"): RustBPE.from_merges([]).encode_batch(texts())


def test_training_holds_no_text(tmp_path):
    "Ten times the text needs hardly more memory."
    code = """
import re, sys
from nanochat.rustbpe import RustBPE
from nanochat.core.world import World
world = World(seed=1)
texts = [world.document(i) for i in range(300)]
def status(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before = status("VmRSS")
RustBPE.from_texts((text + str(i) for i in range(int(sys.argv[1])) for text in texts), 2000)
print(status("VmHWM") - before)
"""
    if not os.path.exists("/proc/self/status"): pytest.skip("memory is read from /proc")
    used = [int(subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True, cwd=REPO).stdout) for n in (50, 500)]
    assert used[1] < used[0] + 30_000, used # kilobytes


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A web server on loopback that serves the rank files, as OpenAI's does."
    folder, place = real_data()/"tokenizers", tmp_path/"served"
    place.mkdir()
    for file, *_ in RANK_FILES.values(): (place/file).write_bytes(gzip.decompress((folder/f"{file}.gz").read_bytes()))
    handler = type("Handler", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *args: None, "__init__": lambda self, *args: http.server.SimpleHTTPRequestHandler.__init__(self, *args, directory=place)})
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    monkeypatch.setattr(module, "_RANK_FILES_URL", f"http://127.0.0.1:{served.server_port}")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path/"base"))
    yield place
    served.shutdown()


def test_published_vocabularies_are_fetched_once(server):
    gpt2 = Tokenizer.pretrained("gpt2")
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0] and gpt2.bos_id == 50256
    for file in server.iterdir(): file.unlink()
    assert Tokenizer.pretrained("gpt2").hash == gpt2.hash
    with pytest.raises(UserError, match="cannot be downloaded"): Tokenizer.pretrained("gpt4")


def test_a_vocabulary_that_is_not_the_published_one_is_refused(server, tmp_path):
    (server/"r50k_base.tiktoken").write_bytes(b"IQ== 0\n")
    with pytest.raises(UserError, match="SHA-256"): Tokenizer.pretrained("gpt2")
    assert not list((tmp_path/"base").rglob("*.tiktoken"))


def test_published_files_are_those_that_are_known():
    for file, sha256, _ in RANK_FILES.values():
        assert hashlib.sha256(gzip.decompress((real_data()/"tokenizers"/f"{file}.gz").read_bytes())).hexdigest() == sha256
