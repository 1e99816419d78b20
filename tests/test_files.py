"""Files that somebody changed, text of every kind, and disks that refuse: used, or refused in one sentence."""
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import assert_user_error, contents, environment, nanochat

from nanochat.core.dataset import conversations, damaged_files, iter_texts, read_feedback, show_set
from nanochat.core.download import hub_record
from nanochat.core.files import UserError
from nanochat.core.identity import read_card
from nanochat.core.run import Run
from nanochat.lab.reading import read_run
from nanochat.lab.runs import _describe
from nanochat.post.dpo import _task_changes
from nanochat.talk.chat import save_feedback
from nanochat.train.checkpoint import best_checkpoint, latest_checkpoint, load_model
from nanochat.train.pretrain import _written_plan

DAMAGE = {
    "list": b"[1, 2]", "null": b"null", "number": b"3", "text": b'"words"', "empty": b"", "zeros": bytes(500), "binary": b"\xff\xfe{}\n",
    "deep": b"[" * 100_000, "nested": b'{"a":' * 5000, "digits": b"9" * 5000, "cut": b'{"stage": "ba', "object": b"{}", "mark": b"\xef\xbb\xbf{}"}
YAML_DAMAGE = DAMAGE | {
    "tag": b"base: !!int x", "index": b"a: !!int ''", "python": b"a: !!python/object/apply:os.getcwd []", "keys": b"{1: 2, a: 3, [b]: 4}",
    "date": b"seed: 2024-01-01", "cycle": b"base: &b {a: *b}", "section": b"hardware: 3",
    "bomb": b"a0: &a0 [x, x]\n" + b"".join(b"a%d: &a%d [*a%d, *a%d]\n" % (n, n, n - 1, n - 1) for n in range(1, 60))}


def sentence(read):
    "Call a reader: it may work, or raise a `UserError` of one line."
    try: return read()
    except UserError as e: assert "\n" not in str(e) and len(str(e)) < 700, str(e)


def read_everything(run_name):
    "All that reads a run's files without training."
    def models():
        for stage in ("base", "sft"): load_model(run, stage)
    sentence(lambda: _describe(run_name))
    run = sentence(lambda: Run.open(run_name))
    if not run: return
    for stage in ("data", "tokenizer", "base", "mid", "sft", "rl", "report"): sentence(lambda: run.manifest(stage))
    for read in (run.latest, lambda: run.rows("base"), lambda: read_run(run), models, lambda: _written_plan(run), lambda: _task_changes(run, "sft"),
                 lambda: best_checkpoint(run.dir/"base"/"checkpoints"), lambda: damaged_files(), lambda: repr(run)): sentence(read)


@pytest.fixture
def mine(copy, monkeypatch):
    mine = copy("report")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(mine.base))
    return mine


OURS = ["config.yaml", "metrics.jsonl", "plan.json", "base/manifest.json", "sft/eval.json", "notebooks/seconds.json", "tokenizer/tokenizer.json", "checkpoint", "tokens"]


def file_of(mine, name):
    if name == "tokens": return next((mine.base/"tokens").glob("*/manifest.json"))
    return latest_checkpoint(mine.run/"sft"/"checkpoints")/"meta.json" if name == "checkpoint" else mine.run/name


def test_our_own_files_changed_by_somebody(mine):
    for name in OURS:
        file = file_of(mine, name)
        right = file.read_bytes()
        for damage in (YAML_DAMAGE if name.endswith(".yaml") else DAMAGE).values():
            file.write_bytes(damage)
            read_everything("smoke")
        file.write_bytes(right)


@pytest.mark.parametrize("damage", ["section", "bomb", "tag", "keys"])
def test_a_damaged_configuration_at_the_command_line(mine, damage):
    (mine.run/"config.yaml").write_bytes(YAML_DAMAGE[damage])
    before = contents(mine.base)
    for command in (["report", "smoke"], ["chat", "--run", "smoke", "-p", "Hi"], ["stage", "mid", "--run", "smoke"], ["speedrun", "--preset", "smoke"]):
        assert_user_error(nanochat(mine.base, *command), "config.yaml is damaged")
    assert contents(mine.base) == before


def test_a_wrong_value_in_a_configuration(mine):
    config = yaml.safe_load((mine.run/"config.yaml").read_text())
    for value, says in (("many", "base.steps is 'many'"), (-1, "base.steps is -1"), (None, "base.steps is null")):
        (mine.run/"config.yaml").write_text(yaml.safe_dump(config | {"base": config["base"] | {"steps": value}}))
        with pytest.raises(UserError, match=f"config.yaml is damaged .*{says}"): Run.open("smoke")
    (mine.run/"config.yaml").write_text(yaml.safe_dump({name: part for name, part in config.items() if name != "rl"}))
    with pytest.raises(UserError, match="config.yaml is damaged .it has no rl"): Run.open("smoke").config["rl"]


def test_records_of_downloads_and_cards(tmp_path):
    for damage in DAMAGE.values():
        (tmp_path/"hub.json").write_bytes(damage)
        sentence(lambda: hub_record(tmp_path))
    for damage in YAML_DAMAGE.values():
        (tmp_path/"card.yaml").write_bytes(damage)
        sentence(lambda: read_card(tmp_path/"card.yaml"))


def test_feedback_keeps_every_character(tmp_path):
    "Python's `splitlines` breaks at ten characters, and JSON lines at one."
    texts = [f"a{chr(c)}b" for c in (0, 10, 11, 12, 13, 28, 29, 30, 0x85, 0x2028, 0x2029, 0xFEFF, 0x1F642)]
    for text in texts:
        save_feedback(tmp_path/"feedback.jsonl", [{"role": "user", "content": text}, {"role": "assistant", "content": text}], 1)
    with open(tmp_path/"feedback.jsonl", "ab") as f: f.write(b'{"rating": 1, "conv') # a chat that was killed
    save_feedback(tmp_path/"feedback.jsonl", [{"role": "user", "content": "last"}, {"role": "assistant", "content": "last"}], 1)
    found, damaged = read_feedback(tmp_path/"feedback.jsonl")
    assert [record["conversation"]["messages"][1]["content"] for record in found] == [*texts, "last"] and damaged == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the fuzzer measures memory as Linux does")
def test_a_short_run_of_the_fuzzer(mine):
    "Longer ones are started by hand."
    for words in (["lines", "parquet", "conversations", "calculator", "api", "--cases", "100"], ["run", "--base", mine.base, "--cases", "15"]):
        command = [sys.executable, Path(__file__).with_name("fuzz.py"), *words]
        done = subprocess.run(command, env=environment(mine.base), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0 and "0 kinds of findings" in done.stdout, done.stdout[-3000:] + done.stderr[-3000:]


ARRAYS = {
    "strings": pa.array(["a text"] * 40), "nulls": pa.nulls(40), "binary": pa.array([b"a"] * 40), "struct": pa.array([{"text": "a"}] * 40), "lists": pa.array([["a"]] * 40),
    "numbers": pa.array([1] * 40), "dates": pa.array([0] * 40, pa.timestamp("ns")), "view": pa.array(["a text"] * 40).cast(pa.string_view()),
    "dictionary": pa.array(["a text"] * 40).dictionary_encode(), "latin": pa.array([b"caf\xe9"] * 40).view(pa.string()), "half": pa.array([b"\xed\xa0\xbd"] * 40).view(pa.string()),
    "decimals": pa.array([1] * 40, pa.decimal128(38, 2)), "empty": pa.array([], pa.string())}


def test_parquet_of_any_kind(tmp_path):
    used = []
    for name, array in ARRAYS.items():
        for column in ("text", "messages"):
            pq.write_table(pa.table({column: array}), tmp_path/"a.parquet")
            for read in (lambda: [*iter_texts(tmp_path/"a.parquet")], lambda: [*conversations(tmp_path/"a.parquet")], lambda: show_set(str(tmp_path/"a.parquet")).encode()):
                try: used += [name] if read() and column == "text" else []
                except UserError as e: assert "a.parquet" in str(e) and "\n" not in str(e), str(e)
    assert {"strings", "view", "dictionary"} <= set(used) and not {"latin", "half", "numbers"} & set(used)
    talk = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]] * 3
    for kind in (pa.string(), pa.large_string()):
        messages = pa.array(talk, pa.list_(pa.struct({"role": kind, "content": kind})))
        pq.write_table(pa.table({"messages": messages}), tmp_path/"a.parquet")
        assert [row["messages"] for row in conversations(tmp_path/"a.parquet")] == talk


def test_a_token_shard_with_one_wrong_byte(mine):
    shard = next((mine.base/"tokens").glob("*/tokens_00000.npy"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(data)
    for stage in ("base", "mid", "sft", "rl", "report"): shutil.rmtree(mine.run/stage)
    done = nanochat(mine.base, "stage", "base", "--run", "smoke")
    assert_user_error(done, "token shard 0", "tokens_00000.npy", "delete the folder")
    assert not (mine.run/"base"/"manifest.json").exists()


LIMITED = ["eval smoke --stage sft --tasks facts --max-per-task 2", "export smoke {out}/exported", "stage data --run smoke"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit of the file size")
def test_a_disk_that_takes_no_byte(mine, tmp_path):
    "A limit of the file size of zero fails where a full disk, a quota or a disk without inodes fails: at the first write."
    import resource
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for command in LIMITED:
        if command.startswith("stage"): (mine.run/"data"/"manifest.json").unlink()
        before = contents(mine.base)
        command = command.format(out=tmp_path).split()
        done = subprocess.run([sys.executable, "-m", "nanochat", *command], env=environment(mine.base), capture_output=True, text=True, timeout=300, preexec_fn=limit)
        assert done.returncode == 2 and "Traceback" not in done.stderr and "no space is left on the disk for" in done.stderr.strip().splitlines()[-1], done.stderr
        assert contents(mine.base) == before
    assert not list(tmp_path.glob("*exported*"))


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path/"base").write_text("a file")
    assert_user_error(nanochat(tmp_path/"base", "speedrun", "--preset", "smoke"), str(tmp_path/"base"), "cannot be used")


def read_only(base, *command):
    "Run a command while its base folder is mounted read-only; None where this process may not do that."
    script = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" || exit 99; exec "$@"'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, base, sys.executable, "-m", "nanochat", *command],
                          env=environment(base), capture_output=True, text=True, timeout=300)
    return None if done.returncode in (1, 99) and "nanochat:" not in done.stderr else done


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs Linux")
def test_a_read_only_disk(mine):
    if read_only(str(mine.base), "runs") is None: pytest.skip("this process may not mount anything")
    for command in (["runs"], ["data", "verify"], ["chat", "--run", "smoke", "-p", "Hello"]): # they only read
        assert (done := read_only(str(mine.base), *command)).returncode == 0, done.stderr
    done = read_only(str(mine.base), "report", "smoke")
    assert done.returncode == 2 and "Read-only file system" in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("arguments", [["--minutes", "nan"], ["--dollars", "nan"], ["--minutes", "inf"], ["--set", "sft.lr_scale=nan"], ["--set", "seed=" + "9" * 5000], ["--set", "base.steps=1e400"]])
def test_numbers_that_are_none(tmp_path, arguments):
    done = nanochat(tmp_path, "speedrun", "--preset", "smoke", *arguments)
    assert_user_error(done, "but it must be")
    assert len(done.stderr) < 500 and not list(tmp_path.iterdir())
