"""Other people's folders, names, terminals and habits: what is legal works, and what is refused changes nothing."""
import json
import os
import random
import subprocess
import sys
from functools import partial

import pytest
from conftest import assert_user_error, contents, environment, nanochat, nanochat_process, start, wait_for

from nanochat.core.files import Busy, file_lock
from nanochat.core.run import Run
from nanochat.post.dpo import train_dpo
from nanochat.post.finetune import finetune
from nanochat.post.rl import train_rl
from nanochat.train.pretrain import pretrain

WORDS = "cat dog bird sat ran flew mat hill tree the a over under big small".split()


def write_books(folder):
    "A small shelf of text."
    folder.mkdir()
    for i in range(3):
        draw = random.Random(i)
        paragraphs = (" ".join(draw.choices(WORDS, k=20)).capitalize() + "." for _ in range(2000))
        (folder/f"{i}.txt").write_text("\n\n".join(paragraphs))


def snapshot(folder):
    "Everything below a folder, locks and empty folders included."
    return sorted(map(str, folder.rglob("*"))), contents(folder)


def test_odd_folders_and_a_foreign_kernel(tmp_path, monkeypatch):
    "Relative folders with braces, percent signs and quotes; modules that lie around; a kernel of somebody else's; a terminal in latin-1."
    write_books(tmp_path/"shelf")
    (tmp_path/"linked").mkdir()
    (tmp_path/"linked"/"books").symlink_to(tmp_path/"shelf")
    kernel = tmp_path/"share"/"kernels"/"python3"
    kernel.mkdir(parents=True)
    (kernel/"kernel.json").write_text(json.dumps({"argv": ["/bin/false", "{connection_file}"], "display_name": "Theirs", "language": "python"}))
    base, name = "base {x} %s 'q' \"é\"", "run {x} %d \"é\""
    run = tmp_path/base/"runs"/name
    run.mkdir(parents=True)
    for folder in (tmp_path, run):
        for module in ("torch", "nanochat", "ipykernel_launcher", "json", "multiprocessing"):
            (folder/f"{module}.py").write_text(f"open({str(tmp_path/'executed')!r}, 'w')")
    monkeypatch.setenv("JUPYTER_PATH", str(kernel.parent.parent))
    monkeypatch.setenv("PYTHONIOENCODING", "latin-1")
    # the program that is installed, because `python -m` would import from the current folder
    program = [sys.executable, "-P", "-m", "nanochat"]
    arguments = ["speedrun", "--preset", "smoke", "--run", name, "--data", "linked", "--until", "base", "--nproc", "2", "--set", "base.steps=4"]
    done = subprocess.run([*program, *arguments], cwd=tmp_path, env=environment(base), stdin=subprocess.DEVNULL, capture_output=True, timeout=300)
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-2000:])
    assert rb"1_data \u2026" in done.stdout
    assert json.loads((run/"data"/"manifest.json").read_text())["files"] == 3 # the shelf's, not the world's
    assert json.loads((run/"base"/"manifest.json").read_text())["step"] == 4
    assert not (tmp_path/"executed").exists()
    assert [path.name for path in tmp_path.rglob("config.yaml")] == ["config.yaml"] # no other run


@pytest.mark.parametrize("base", ["{tmp}/file", "{tmp}/file/below", "{tmp}/" + "a" * 300, "{tmp}/\udcff", "~nobody-here"])
def test_a_base_folder_that_cannot_be_one(tmp_path, base):
    (tmp_path/"file").write_text("mine")
    before = snapshot(tmp_path)
    for command in (["speedrun", "--preset", "smoke"], ["runs"], ["chat", "-p", "Hello"], ["data", "get", "world"], ["report", "mine"]):
        assert_user_error(nanochat_process(base.format(tmp=tmp_path), *command) if command == ["runs"] else nanochat(base.format(tmp=tmp_path), *command),
                          "NANOCHAT_BASE_DIR is", "set it to another folder")
    assert snapshot(tmp_path) == before


REFUSED = { # on a finished run: arguments, and what the sentence has to say
    "another configuration": (["speedrun", "--preset", "smoke", "--set", "base.steps=61"], ["base.steps is 60 there and 61 here"]),
    "long name": (["speedrun", "--preset", "smoke", "--run", "a" * 256], ["cannot name a run", "at most 200"]),
    "control characters": (["speedrun", "--preset", "smoke", "--run", "\x1b[2J"], ["\\x1b[2J", "cannot name a run"]),
    "a name that is no UTF-8": (["speedrun", "--preset", "smoke", "--run", "\udcff"], ["\\udcff", "cannot name a run"]),
    "a path to nothing": (["speedrun", "--preset", "smoke", "--data", "{tmp}/\x1b[31m{{}}"], ["\\x1b[31m", "neither an existing folder"]),
    "preferences": (["dpo", "smoke", "--set", "dpo.beta=none"], ["dpo.beta"]),
    "import of nothing": (["import", "{tmp}/none", "--run", "smoke"], ["none"]),
    "export to a file": (["export", "smoke", "{tmp}/file"], ["file"]),
    "page into a file's folder": (["page", "smoke", "--out", "{tmp}/file/x.html"], ["file"]),
    "lessons into a file": (["lessons", "{tmp}/file"], ["file"]),
    "unknown stage": (["chat", "--run", "smoke", "--stage", "wash", "-p", "Hello"], ["wash"]),
    "unknown task": (["eval", "smoke", "--tasks", "juggling"], ["juggling"]),
    "unknown set": (["data", "get", "juggling"], ["juggling"]),
    "devices": (["serve", "--run", "smoke", "--devices", "²"], ["--devices '²' is not"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_refused_command_changes_nothing(smoke, tmp_path, what):
    (tmp_path/"file").write_text("mine")
    arguments, words = REFUSED[what]
    before = snapshot(smoke.base), snapshot(tmp_path)
    done = nanochat(smoke.base, *(argument.format(tmp=tmp_path) for argument in arguments))
    assert_user_error(done, *words)
    assert "\x1b" not in done.stdout + done.stderr
    assert (snapshot(smoke.base), snapshot(tmp_path)) == before


def test_a_run_on_which_another_process_works(copy, tmp_path):
    "From wherever a second one is started, it is refused, and the first one's files stay as they are."
    mine, out = copy("tokenizer"), tmp_path/"out.ipynb"
    (mine.run/"base").mkdir()
    (mine.run/"base"/"error.txt").write_text("of the first one")
    before, busy = snapshot(mine.base), "another process is working on run 'smoke': wait for it"
    with file_lock(mine.run/".lock", "training"):
        for more in (["--nproc", 2], ["--set", "hardware.tracker=tensorboard"], ["--until", "base"]):
            assert_user_error(nanochat(mine.base, "speedrun", "--preset", "smoke", *more), busy)
        assert_user_error(nanochat(mine.base, "stage", "base", "--run", "smoke"), busy)
        assert_user_error(nanochat(mine.base, "dpo", "smoke", "--simulate", 4), busy)
        notebook = [sys.executable, "-m", "papermill", "nbs/speedrun/3_pretrain.ipynb", out, "-p", "preset", "smoke"]
        done = subprocess.run(notebook, env=environment(mine.base), capture_output=True, text=True, timeout=300)
        assert done.returncode and busy in done.stderr
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=3", "-m", "--", "nanochat", "stage", "base", "--run", "smoke"]
        done = subprocess.run(launcher, env=environment(mine.base), capture_output=True, text=True, timeout=300)
        assert done.returncode and done.stderr.count(busy) == 1, done.stderr[-2000:] # not started again
        assert snapshot(mine.base) == before
        assert nanochat(mine.base, "report", "smoke").returncode == 0 # it may be read meanwhile
    assert nanochat(mine.base, "stage", "base", "--run", "smoke").returncode == 0 # free again


def test_every_writer_of_a_run_locks_it(copy, monkeypatch):
    mine = copy("rl")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(mine.base))
    run, writers = Run.open("smoke"), {"base": pretrain, "mid": partial(finetune, stage="mid"), "sft": partial(finetune, stage="sft"), "rl": train_rl, "dpo": partial(train_dpo, simulate=4)}
    with file_lock(mine.run/".lock", "training"):
        for stage, write in writers.items():
            if stage != "dpo": (mine.run/stage/"manifest.json").rename(mine.run/"kept.json") # or the stage is done
            before = snapshot(mine.base)
            with pytest.raises(Busy, match="another process is working on run 'smoke'"): write(run)
            assert snapshot(mine.base) == before
            if stage != "dpo": (mine.run/"kept.json").rename(mine.run/stage/"manifest.json")
        measure = ["eval", "smoke", "--stage", "sft", "--max-per-task", 2, "--tasks"]
        assert_user_error(nanochat(mine.base, *measure, "facts"), "another process is working on run 'smoke'")
        assert nanochat(mine.base, *measure, "bpb").returncode == 0 # writes nothing
        assert snapshot(mine.base) == before
    assert nanochat(mine.base, *measure, "facts").returncode == 0


def test_a_notebook_first_and_a_command_second(copy, tmp_path):
    mine = copy("tokenizer")
    notebook = start(mine.base, "-m", "papermill", "nbs/speedrun/3_pretrain.ipynb", tmp_path/"out.ipynb", "-p", "preset", "smoke")
    wait_for(lambda: (mine.run/"base"/"checkpoints").exists() or (mine.run/"base"/"manifest.json").exists(), notebook)
    if not (mine.run/"base"/"manifest.json").exists():
        assert_user_error(nanochat(mine.base, "stage", "base", "--run", "smoke"), "another process is working on run 'smoke'")
    assert notebook.wait(300) == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_that_lacks_characters(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    command = [sys.executable, "-m", "nanochat", "speedrun"]
    done = subprocess.run([*command, "--set", "help"], env=environment(tmp_path), capture_output=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, b"") and b"mid.mixture" in done.stdout
    done = subprocess.run([*command, "--preset", "größer …"], env=environment(tmp_path), capture_output=True, timeout=100)
    assert done.returncode == 2 and b"nanochat: " in done.stderr and b"Traceback" not in done.stderr


def test_output_that_was_closed(tmp_path):
    "A process can be started without stdout or stderr."
    command = f"{sys.executable} -m nanochat runs >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], env=environment(tmp_path), timeout=100).returncode == 0


SCRIPT = """
import sys
from operator import add
from nanochat.core.files import file_lock
from nanochat.core.machine import in_processes
with file_lock(sys.argv[1], "counting"): print(in_processes(add, [1, 2], [3, 4]))
"""


def test_a_script_without_a_guard(tmp_path):
    "Worker processes do not run the script again, and so do not wait for the lock that it holds."
    (tmp_path/"mine.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path/"mine.py", tmp_path/"lock"], env=os.environ, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[4, 6]\n", "")
