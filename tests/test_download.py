"""Downloads end with the right bytes or with one sentence, whatever the network, the server, the disk or the power do."""
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import COMMIT, Hub, hub_environment

REPO = "someone/text"
NAMES = [f"shard_{i:05d}.parquet" for i in range(4)]

CLIENT = f"""
import sys
from nanochat.core.files import UserError
from nanochat.core.download import download
import nanochat.core.download as d
d.RETRY_SECONDS = 0.01
try: download("{REPO}", {NAMES}, sys.argv[1], *sys.argv[2:])
except UserError as e: sys.exit(f"UserError: {{e}}")
"""


def write_parquets(folder, rows, width=32):
    folder.mkdir()
    for i, name in enumerate(NAMES):
        rng = random.Random(i)
        pq.write_table(pa.table({"text": [rng.randbytes(width).hex() for _ in range(rows)]}), folder/name, compression="zstd")


@pytest.fixture
def hub(tmp_path):
    write_parquets(tmp_path/"served", 1000)
    hub = Hub(tmp_path/"served")
    yield hub
    hub.close()


def environment(url, tmp_path, **more):
    return os.environ | hub_environment(url, tmp_path) | more


def start(url, into, *args, **more):
    return subprocess.Popen([sys.executable, "-c", CLIENT, str(into), *args], env=environment(url, into.parent, **more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(url, into, *args, **more):
    process = start(url, into, *args, **more)
    out, err = process.communicate(timeout=180)
    return subprocess.CompletedProcess(args, process.returncode, out, err)


def check(hub, into, names=NAMES):
    "Every file is there, equal to what is served, and nothing else is."
    for name in names: assert (into/name).read_bytes() == (hub.folder/name).read_bytes(), name
    assert {f.name for f in into.iterdir()} == {*names, "hub.json", ".lock"}
    record = json.loads((into/"hub.json").read_text())
    assert record["commit"] == COMMIT
    assert {name: got["sha256"] for name, got in record["files"].items()} == {n: hashlib.sha256((into/n).read_bytes()).hexdigest() for n in names}


def one_sentence(done, *words):
    assert done.returncode == 1 and done.stderr.startswith("UserError: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words: assert word in done.stderr, (word, done.stderr)


def test_each_file_once_from_the_commit_that_was_pinned(hub, tmp_path):
    into = tmp_path/"data"
    assert run(hub.url, into).returncode == 0
    check(hub, into)
    assert hub.gets() == NAMES
    before = len(hub.requests)
    assert run(hub.url, into).returncode == 0
    assert len(hub.requests) == before # nothing is asked again, so no network is needed
    # another revision is asked about, and what is the same there need not come again
    (hub.folder/NAMES[2]).write_bytes((hub.folder/NAMES[1]).read_bytes())
    assert run(hub.url, into, COMMIT).returncode == 0
    assert hub.gets() == sorted([*NAMES, NAMES[2]])
    check(hub, into)


SCHEDULES = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from nanochat.core.files import UserError
import nanochat.core.download as d
d.RETRY_SECONDS = 0.01
names, base = json.loads(sys.argv[1]), Path(sys.argv[2])
def one(k):
    try: d.download(f"schedule/{k}", names, base/str(k))
    except UserError as e: return str(e)
with ThreadPoolExecutor(13) as pool: results = list(pool.map(one, range(50)))
(base/"results.json").write_text(json.dumps(results))
"""


def test_fifty_schedules_of_faults(hub, tmp_path):
    "Each request of each schedule may meet any fault; in every tenth schedule one file never comes right."
    draws, hopeless, met = {}, {k: NAMES[k // 10 % 4] for k in range(0, 50, 10)}, set()

    def fault(repo, name, method):
        k = int(repo.split("/")[1])
        rng = draws.setdefault((k, name), random.Random(f"{k} {name}"))
        size = (hub.folder/name).stat().st_size
        kinds = [429, 500, 503, ("cut", rng.randrange(size)), ("flip", rng.randrange(size)), ("stall", 4), ("long", rng.randrange(1, 1000)), ("short", rng.randrange(1, size))]
        if method == "HEAD": kinds = [429, 500]
        found = None
        if hopeless.get(k) == name and method == "GET": found = kinds[(1, 4)[k // 10 % 2]] # always 500, or always a wrong byte
        elif rng.random() < 0.4: found = rng.choice(kinds)
        met.add(found[0] if isinstance(found, tuple) else found)
        return found

    hub.fault = fault
    base = tmp_path/"data"
    base.mkdir()

    def download():
        env = environment(hub.url, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="2", HF_HUB_ETAG_TIMEOUT="2")
        done = subprocess.run([sys.executable, "-c", SCHEDULES, json.dumps(NAMES), str(base)], env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((base/"results.json").read_text())

    sentences = download()
    assert met == {None, 429, 500, 503, "cut", "flip", "stall", "long", "short"}
    for k, sentence in enumerate(sentences):
        assert sentence or k not in hopeless
        assert not sentence or ("\n" not in sentence and len(sentence) < 400), sentence
        for file in (base/str(k)).glob("*.parquet"): assert file.read_bytes() == (hub.folder/file.name).read_bytes()
        if sentence is None: check(hub, base/str(k))
    assert sentences.count(None) >= 35 # a file fails for good only when five requests in a row do
    hub.fault = lambda repo, name, method: None
    assert download() == [None] * 50 # nothing is left that would stand in the way
    for k in range(50): check(hub, base/str(k))


def test_half_a_minute_of_silence(hub, tmp_path):
    "With the time-outs that users have."
    stalls = [("stall", 30)]
    hub.fault = lambda repo, name, method: stalls.pop() if stalls and method == "GET" else None
    began = time.monotonic()
    assert run(hub.url, tmp_path/"data").returncode == 0
    assert time.monotonic() - began < 29 # it was not waited for
    check(hub, tmp_path/"data")


def test_a_file_that_stays_wrong_is_refused_and_not_kept(hub, tmp_path):
    hub.fault = lambda repo, name, method: ("flip", 7) if name == NAMES[1] else None
    one_sentence(run(hub.url, tmp_path/"data"), "SHA-256", NAMES[1])
    assert not (tmp_path/"data"/NAMES[1]).exists()
    hub.fault = lambda repo, name, method: None
    assert run(hub.url, tmp_path/"data").returncode == 0
    check(hub, tmp_path/"data")


def test_killed_twenty_times(tmp_path):
    "What has arrived stays: a download that is never left in peace for long completes nevertheless."
    write_parquets(tmp_path/"served", 450, 1 << 15) # four files of about 15 MB
    hub = Hub(tmp_path/"served", bytes_per_second=20e6)
    rng, into, kills = random.Random(0), tmp_path/"data", 0
    try:
        while kills < 20:
            process = start(hub.url, into)
            seen, until = len(hub.requests), time.monotonic() + 30
            while len(hub.requests) == seen and process.poll() is None and time.monotonic() < until: time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.25 if kills < 16 else 1))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            for file in into.glob("*.parquet"): assert file.read_bytes() == (hub.folder/file.name).read_bytes() # never half a file in place
            if into.exists() and len(list(into.glob("*.parquet"))) == 4: # done before its time: lose a file
                (into/NAMES[kills % 4]).unlink()
        assert run(hub.url, into).returncode == 0
        check(hub, into)
        assert any(method == "GET" and start for method, _, _, start in hub.requests) # resumed within a file
    finally: hub.close()


def test_two_processes_fetch_each_file_once(hub, tmp_path):
    hub.hold = lambda name: time.sleep(0.5)
    both = [start(hub.url, tmp_path/"data") for _ in range(2)]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    check(hub, tmp_path/"data")
    assert hub.gets() == NAMES
    assert sum("Another process is downloading" in out for out, _ in said) == 1


def test_the_users_cache_and_the_offline_mode(hub, tmp_path):
    fill = f"from huggingface_hub import hf_hub_download\nfor n in {NAMES}: hf_hub_download('{REPO}', n, repo_type='dataset', revision='{COMMIT}')"
    assert subprocess.run([sys.executable, "-c", fill], env=environment(hub.url, tmp_path), capture_output=True, timeout=120).returncode == 0
    before = len(hub.requests)
    assert run(hub.url, tmp_path/"data", COMMIT, HF_HUB_OFFLINE="1").returncode == 0
    assert len(hub.requests) == before
    check(hub, tmp_path/"data")
    one_sentence(run(hub.url, tmp_path/"other", HF_HUB_OFFLINE="1"), "HF_HUB_OFFLINE")


def test_no_server(tmp_path):
    one_sentence(run("http://127.0.0.1:9", tmp_path/"data"), "HF_ENDPOINT", "check the network")


def test_no_such_repository_or_file(hub, tmp_path):
    (hub.folder/NAMES[3]).unlink()
    one_sentence(run(hub.url, tmp_path/"data"), "does not give")


def test_a_refused_token_is_not_tried_again(hub, tmp_path):
    hub.fault = lambda repo, name, method: 401
    one_sentence(run(hub.url, tmp_path/"data"), "HF_TOKEN")
    assert len(hub.requests) == 1


def test_a_full_disk(hub, tmp_path):
    "Too little room is known before anything is fetched; room that is used up meanwhile is one sentence too."
    small = CLIENT.replace("d.RETRY_SECONDS", "d.shutil.disk_usage = lambda folder: d.shutil._ntuple_diskusage(1, 1, 1000)\nd.RETRY_SECONDS")
    done = subprocess.run([sys.executable, "-c", small, str(tmp_path/"data")], env=environment(hub.url, tmp_path), capture_output=True, text=True, timeout=60)
    one_sentence(done, "GB free", "NANOCHAT_BASE_DIR")
    assert hub.gets() == []
    limit = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    done = subprocess.run([sys.executable, "-c", CLIENT, str(tmp_path/"data")], env=environment(hub.url, tmp_path), capture_output=True, text=True, timeout=60, preexec_fn=limit)
    one_sentence(done, "no space is left")
    assert run(hub.url, tmp_path/"data").returncode == 0
    check(hub, tmp_path/"data")
