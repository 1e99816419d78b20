"""What the tests share: nanochat in processes of its own, one finished smoke run, copies of it, and how an error has to look."""
import hashlib
import importlib.util
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import click
import psutil
import pytest
import yaml
from browser import open_browser

from nanochat.core.files import file_lock
from nanochat.core.run import STAGES, Run, read_metrics
from nanochat.train.settings import known_presets, setting_name

# without cached bytecode, every kernel, rank and command would spend five seconds on importing torch instead of two
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# matrices this small gain nothing from threads, which only wait for each other where cores are few
os.environ["OMP_NUM_THREADS"] = "1"

REPO = Path(__file__).resolve().parent.parent
# files that take more than half a minute, the longest first: two processes that take one file after the other end at the same time
LONG = ("notebooks", "lessons", "ranks", "crate", "docs", "fake_cuda", "resume", "multinode", "serve", "chat", "eval", "errors", "preflight", "compile",
        "exact_ranks", "mixture", "chaos", "download", "habits", "golden", "report", "sandbox", "core")


def pytest_collection_modifyitems(items):
    "Put the tests of long files first."
    def place(item):
        name = item.path.stem.removeprefix("test_")
        return LONG.index(name) if name in LONG else len(LONG)
    items.sort(key=place)


def drawn(n, of):
    "Is it the turn of number n? Without CI it always is. In CI, where all would take too long, the commit draws one of each `of` numbers."
    if "CI" not in os.environ: return True
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPO, capture_output=True, text=True).stdout.strip()
    return (n + int(commit or "0", 16)) % of == 0


def real_data(*inside):
    "The folder of real texts and vocabularies that somebody has put in reach, or a path inside it. Without one the test is skipped."
    for folder in (os.environ.get("NANOCHAT_TEST_DATA"), REPO.parent/"shared"/"data"):
        if folder and (path := Path(folder).joinpath(*inside)).is_dir(): return path
    pytest.skip(f"no real data in reach: NANOCHAT_TEST_DATA names no folder{' that holds ' + '/'.join(inside) if inside else ''}")


def typed_commands(text):
    "What a page of markdown tells people to type, in blocks of shell and in spans: lists of words, without `uv run`."
    blocks = re.findall(r"^```(?:bash|sh|console)\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`((?:uv run|nanochat|papermill) [^`\n]+)`", text)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()] + spans
    commands = [words for line in lines if (words := shlex.split(line, comments=True))]
    def run_by_uv(words): return run_by_uv(words[2:]) if words[:2] == ["uv", "run"] or words[0] == "--group" else words
    return [run_by_uv(words) for words in commands]


def entry_point(name):
    "The click command that `python -m NAME` runs."
    main = f"{name}.__main__"
    module = importlib.import_module(main if importlib.util.find_spec(name).submodule_search_locations else name)
    return module.cli


def check_parses(words):
    "That a command is one of ours (`nanochat …`, `python -m nanochat.…`) with options, settings and presets that exist, or somebody else's."
    if words[0] == "nanochat": command, arguments = entry_point("nanochat"), words[1:]
    elif words[:2] == ["python", "-m"] and words[2].startswith("nanochat"): command, arguments = entry_point(words[2]), words[3:]
    else: return
    name = words[0]
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        command = command.get_command(click.Context(command), name)
        assert command is not None, words
    try: given = command.make_context(name, list(arguments)).params # an option that is not there is refused
    except click.exceptions.Exit: return # --help
    if preset := given.get("preset"): assert preset in known_presets(), words
    for pair in given.get("settings") or (): assert pair == "help" or setting_name(pair.split("=")[0]), words


def environment(base):
    "The environment of a process whose files all go below `base`."
    return os.environ | {"NANOCHAT_BASE_DIR": str(base), "PYTHONUNBUFFERED": "1"}


def without_zmq(stderr):
    "What a command said, without the lines by which libzmq and ipykernel now and then complain while a kernel shuts down, when its work is done."
    return "".join(line for line in stderr.splitlines(keepends=True) if "src/signaler.cpp" not in line and "IOStream.flush timed out" not in line)


def nanochat_process(base, *args, timeout=600):
    "Run the `nanochat` command to its end, as a shell does."
    return subprocess.run([sys.executable, "-m", "nanochat", *map(str, args)], env=environment(base), stdin=subprocess.DEVNULL,
                          capture_output=True, text=True, timeout=timeout)


class Commands:
    "Runs `nanochat` commands in forks of one process (`commands.py`), because importing torch takes longer than most of them."
    def __init__(self):
        self.process = subprocess.Popen([sys.executable, Path(__file__).with_name("commands.py")], env=environment(REPO),
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def run(self, base, module, args, timeout):
        with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
            job = dict(module=module, args=[module, *args], env=environment(base), folder=os.getcwd(), stdout=out.name, stderr=err.name)
            print(json.dumps(job), file=self.process.stdin)
            timer = threading.Timer(timeout, kill_tree, [self.process])
            timer.start()
            code = self.process.stdout.readline()
            timer.cancel()
            if not code:
                timer.join()
                raise subprocess.TimeoutExpired([module, *args], timeout, out.read(), err.read())
            return subprocess.CompletedProcess([module, *args], int(code), out.read(), err.read())


def commands(_started=[]):
    "The `Commands` of this process."
    if not _started or _started[-1].process.poll() is not None: _started.append(Commands())
    return _started[-1]


def nanochat(base, *args, timeout=600):
    "Run the `nanochat` command to its end, in a process in which torch has been imported already."
    if os.name != "posix": return nanochat_process(base, *args, timeout=timeout)
    return commands().run(base, "nanochat", [*map(str, args)], timeout)


def start(base, *command):
    "Start a Python process in a session of its own; what it prints goes to `base/output.txt`."
    with open(base/"output.txt", "ab") as output:
        # a shell starts what it puts into the background with SIGINT ignored, and that is inherited; here it must be heard
        return subprocess.Popen([sys.executable, *map(str, command)], env=environment(base), stdin=subprocess.DEVNULL, stdout=output,
                                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def one_rank(rank, world_size, port, function, args):
    "What each process of `on_ranks` does."
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    function(*args)


def on_ranks(world_size, function, *args):
    "Call a function of a module on some ranks, which are forks of one process that has imported torch. Returns their exit codes."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nanochat.post.rl", "nanochat.post.chat_eval", "pytest", "psutil"])
    with socket.create_server(("127.0.0.1", 0)) as free: port = free.getsockname()[1]
    ranks = [context.Process(target=one_rank, args=(rank, world_size, port, function, args)) for rank in range(world_size)]
    for rank in ranks: rank.start()
    for rank in ranks: rank.join(600)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks: rank.kill()
    return codes


def family(process):
    "A process and everything that it has started so far."
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def kill_tree(process):
    "What a power cut does to a process and everything that it started."
    members = family(process)
    for member in members:
        try: member.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    process.wait(30)
    assert not psutil.wait_procs(members, 30)[1]


def wait_for(condition, process, seconds=180):
    "Wait until a condition holds while a process works. Fails if the process ends first."
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the process ended too early"
        assert time.monotonic() < until, f"waited {seconds} s in vain"
        time.sleep(0.003)


def between_checkpoints(run, stage):
    "Whether a stage has a checkpoint, and has taken steps since."
    saved = [int(path.name.split("_")[1]) for path in (run/stage/"checkpoints").glob("step_*")]
    return bool(saved) and max((row["step"] for row in read_metrics(run/"metrics.jsonl", stage)), default=0) > max(saved)


def contents(folder, *but):
    "Every file below a folder, except those of these names: path → SHA-256."
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in (".lock", *but)}


def edit_config(run, **sections):
    "Change settings of a run that the stages done so far do not depend on."
    config = yaml.safe_load((run/"config.yaml").read_text())
    for name, values in sections.items(): config[name] |= values
    (run/"config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def assert_user_error(done, *words):
    "An error that is the user's: exit code 2, one sentence on stderr that says these words, and no traceback."
    assert done.returncode == 2, (done.returncode, done.stdout[-2000:], done.stderr[-2000:])
    lines = without_zmq(done.stderr).strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("nanochat: "), done.stderr[-3000:]
    assert "Traceback" not in done.stdout, done.stdout[-3000:]
    for word in words: assert word in lines[0], (word, lines[0])


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    "The undisturbed smoke run, which other tests copy and compare with: one for all processes that test side by side."
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: root = root.parent
    base, kept = root/"smoke", root/"smoke.json"
    with file_lock(root/"smoke.lock", "makes the smoke run"):
        if not kept.exists():
            base.mkdir(exist_ok=True) # a failed run is tried by the other process, too
            done = nanochat_process(base, "speedrun", "--preset", "smoke")
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
            kept.write_text(json.dumps(vars(done)))
    return SimpleNamespace(base=base, run=base/"runs"/"smoke", done=SimpleNamespace(**json.loads(kept.read_text())))


@pytest.fixture(scope="module")
def browser():
    "A browser for the tests of one file; they are skipped where there is none."
    with open_browser() as browser: yield browser


@pytest.fixture
def copy(smoke, tmp_path):
    "Makes a copy of the smoke run's base folder in which a given stage is the last that has run."
    def make(last, name="copy"):
        base = tmp_path/name
        shutil.copytree(smoke.base, base)
        run, stages = base/"runs"/"smoke", list(STAGES)
        after = stages[stages.index(last) + 1:]
        for stage in after:
            shutil.rmtree(run/stage)
            (run/"notebooks"/f"{STAGES[stage][0]}.ipynb").unlink()
        (run/"notebooks"/"8_chat.ipynb").unlink()
        for stage in after: Run(run, {}).metrics(stage) # drops the stage's lines
        if last == "data": shutil.rmtree(base/"tokens")
        return SimpleNamespace(base=base, run=run)
    yield make
    for process in psutil.process_iter(): # what a test that failed has left behind
        try:
            if process.environ().get("NANOCHAT_BASE_DIR", "").startswith(f"{tmp_path}/"): process.kill()
        except psutil.Error: pass
