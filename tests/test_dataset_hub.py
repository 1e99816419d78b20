"""Downloading from a hub: a small server on the loopback interface speaks as much of the hub's protocol as the client needs."""
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "c0ffee" * 6 + "c0de"
REPO = "someone/text"

# what the subprocess runs: five shards of 1,000 characters, of which 2,500 characters need three, and validation
CLIENT = f"""
import sys
from pathlib import Path
from nanochat.common import UserError
from nanochat.dataset import Source, download
try: download(Source("test", "{REPO}", "main", 5, 1000), Path(sys.argv[1]), 2500)
except UserError as e: sys.exit(f"UserError: {{e}}")
"""
NEEDED = [f"shard_{i:05d}.parquet" for i in (0, 1, 2, 4)]


class Hub:
    "Serves files and notes requests; `cut` and `flip` name files to be served badly, and how often."
    def __init__(self, folder):
        self.folder, self.requests, self.cut, self.flip = folder, [], {}, {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            def log_message(self, *args): pass
            def do_HEAD(self): self.answer(body=False)
            def do_GET(self): self.answer(body=True)

            def answer(self, body):
                name, wanted = self.path.rsplit("/", 1)[-1], self.headers.get("Range")
                if self.path.startswith("/datasets/"): hub.requests.append((self.command, self.path)) # the client asks for other things too
                file = hub.folder/name
                known = self.path.startswith((f"/datasets/{REPO}/resolve/main/", f"/datasets/{REPO}/resolve/{COMMIT}/"))
                if not known or not file.exists():
                    self.send_response(404)
                    self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
                    self.send_header("Content-Length", "0")
                    self.end_headers()
                    return
                data = file.read_bytes()
                sha = hashlib.sha256(data).hexdigest()
                start = int(wanted.split("=")[1].split("-")[0]) if wanted else 0
                self.send_response(206 if wanted else 200)
                for key, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{sha}"', "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": len(data),
                                   "Accept-Ranges": "bytes", "Content-Length": len(data) - start}.items(): self.send_header(key, str(value))
                if wanted: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                if not body: return
                out = bytearray(data[start:])
                if hub.flip.get(name, 0) > 0:
                    hub.flip[name] -= 1
                    out[len(out) // 2] ^= 1
                if hub.cut.get(name, 0) > 0:
                    hub.cut[name] -= 1
                    self.wfile.write(out[:len(out) // 2])
                    self.wfile.flush()
                    self.close_connection = True
                    return
                self.wfile.write(out)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def hub(tmp_path):
    folder = tmp_path/"served"
    folder.mkdir()
    for i in range(5):
        pq.write_table(pa.table({"text": [f"Shard {i}, document {j}: " + hashlib.sha256(bytes([i, j % 256])).hexdigest() for j in range(2000)]}),
                       folder/f"shard_{i:05d}.parquet", compression="zstd")
    hub = Hub(folder)
    yield hub
    hub.close()


def client(url, into):
    env = os.environ | {"HF_ENDPOINT": url, "NANOCHAT_QUIET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_XET": "1",
                        "HF_HUB_OFFLINE": "0", "HF_HOME": str(into.parent/"hf"), "NO_PROXY": "127.0.0.1"}
    return subprocess.run([sys.executable, "-c", CLIENT, str(into)], env=env, capture_output=True, text=True, timeout=120)


def check(hub, into):
    assert sorted(f.name for f in into.glob("*.parquet")) == NEEDED
    for name in NEEDED: assert (into/name).read_bytes() == (hub.folder/name).read_bytes()
    record = json.loads((into/"hub.json").read_text())
    assert record["commit"] == COMMIT
    assert {name: got["sha256"] for name, got in record["files"].items()} == {n: hashlib.sha256((into/n).read_bytes()).hexdigest() for n in NEEDED}


def test_fetches_what_is_needed_once_and_pins_the_commit(hub, tmp_path):
    into = tmp_path/"data"
    done = client(hub.url, into)
    assert done.returncode == 0, done.stderr
    check(hub, into)
    gets = [path for method, path in hub.requests if method == "GET"]
    assert sorted(path.rsplit("/", 1)[-1] for path in gets) == NEEDED
    assert all(f"/resolve/{COMMIT}/" in path for path in gets)
    before = len(hub.requests)
    assert client(hub.url, into).returncode == 0
    assert len(hub.requests) == before # nothing is asked again, so no network is needed


def test_goes_on_after_a_cut_connection(hub, tmp_path):
    hub.cut = {NEEDED[0]: 1, NEEDED[3]: 1}
    done = client(hub.url, tmp_path/"data")
    if done.returncode: # the client may give up, saying so in a sentence; then the same command again finishes
        assert done.stderr.startswith("UserError"), done.stderr
        done = client(hub.url, tmp_path/"data")
    assert done.returncode == 0, done.stderr
    check(hub, tmp_path/"data")


def test_a_wrong_byte_is_noticed_and_fetched_again(hub, tmp_path):
    hub.flip = {NEEDED[1]: 1}
    done = client(hub.url, tmp_path/"data")
    assert done.returncode == 0, done.stderr
    check(hub, tmp_path/"data")


def test_a_file_that_stays_wrong_is_refused_and_not_kept(hub, tmp_path):
    hub.flip = {NEEDED[1]: 99}
    done = client(hub.url, tmp_path/"data")
    assert done.returncode == 1 and "UserError" in done.stderr and "SHA-256" in done.stderr, done.stderr
    assert not (tmp_path/"data"/NEEDED[1]).exists()
    hub.flip = {}
    assert client(hub.url, tmp_path/"data").returncode == 0
    check(hub, tmp_path/"data")


def test_no_server_is_one_sentence(tmp_path):
    done = client("http://127.0.0.1:9", tmp_path/"data")
    assert done.returncode == 1 and done.stderr.startswith("UserError"), done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "HF_ENDPOINT" in done.stderr
