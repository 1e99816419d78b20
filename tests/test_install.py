"""The command starts quickly, imports cost little, and what the README tells people to type exists."""
import json
import os
import pty
import re
import resource
import shutil
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path

import pytest
from conftest import REPO, check_parses, typed_commands

README = (REPO/"README.md").read_text()


def seconds(*command):
    "Wall-clock and processor seconds of a command."
    def cpu(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    started, before = time.perf_counter(), cpu()
    subprocess.run(command, check=True, capture_output=True, cwd=REPO)
    return time.perf_counter() - started, cpu() - before


def command():
    "The `nanochat` that this Python's environment has installed."
    path = Path(sys.executable).parent/"nanochat"
    return str(path) if path.exists() else shutil.which("nanochat")


def entry(*args):
    "The command that pyproject.toml names, even where another version's script is installed."
    code = "import sys; from nanochat.__main__ import main; sys.argv[0] = 'nanochat'; main()"
    assert tomllib.loads((REPO/"pyproject.toml").read_text())["project"]["scripts"]["nanochat"] == "nanochat.__main__:main"
    return [sys.executable, "-c", code, *args]


def test_help_is_quick():
    assert command(), "nanochat is not installed: run the tests with `uv run pytest`"
    assert min(seconds(command(), "--help")[0] for _ in range(3)) < 1


def test_help_tells_the_commands():
    done = subprocess.run([command(), "--help"], capture_output=True, text=True, check=True)
    for name in ("speedrun", "chat", "report"): assert name in done.stdout
    assert not re.search(r"^ +stage ", done.stdout, re.M) # an inner matter


@pytest.mark.parametrize("words", [("runs",), ("lessons",), ("eval",), ("speedrun",)], ids=" ".join)
def test_help_of_a_command_is_quick(words):
    assert min(seconds(*entry(*words, "--help"))[1] for _ in range(2)) <= 0.5 # of processor time


def test_version():
    done = subprocess.run(entry("--version"), capture_output=True, text=True, check=True)
    assert done.stdout == f"nanochat, version {tomllib.loads((REPO/'pyproject.toml').read_text())['project']['version']}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete_commands(shell):
    def ask(instruction, **env):
        env = os.environ | {"_NANOCHAT_COMPLETE": f"{shell}_{instruction}"} | env
        return subprocess.run(entry(), env=env, cwd=REPO, capture_output=True, text=True, check=True).stdout
    if shell != "bash": assert "nanochat" in ask("source") # for bash, click asks bash for its version
    typed = "ru" if shell == "fish" else "1"
    assert re.search(r"\bruns\b", ask("complete", COMP_WORDS="nanochat ru", COMP_CWORD=typed))


def test_a_bar_is_drawn_in_a_terminal_and_not_in_a_pipe():
    code = "from nanochat.core.run import progress_bar\nwith progress_bar(3, desc='work') as bar: bar.update(3)"
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    subprocess.run([sys.executable, "-c", code], stdout=theirs, check=True, cwd=REPO)
    assert b"work: 100%" in os.read(ours, 65536)
    for end in (ours, theirs): os.close(end)
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=REPO).stdout == b""


def test_importing_the_model_costs_little_beside_torch():
    # processor time, because other programs do not count in it
    torch_alone, model = (min(seconds(sys.executable, "-c", f"import {module}")[1] for _ in range(3)) for module in ("torch", "nanochat.model.gpt"))
    assert model <= torch_alone + 0.5, (model, torch_alone)


@pytest.mark.parametrize("module", ["nanochat.lab.speedrun", "nanochat.lab.stages", "nanochat.core.run", "nanochat.train.plan", "nanochat.core.world"])
def test_what_needs_no_torch_does_not_import_it(module):
    heavy = "import sys; print([m for m in ('torch', 'papermill', 'IPython', 'matplotlib', 'pyarrow', 'ipywidgets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"import {module}; {heavy}"], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == "[]"


def nanochat_commands():
    "The arguments of every `nanochat …` in the README."
    return [words[1:] for words in typed_commands(README) if words[0] == "nanochat"]


def test_readme_is_short_and_says_how_to_begin():
    assert 60 <= len(README.splitlines()) <= 80
    for command in ("uv run nanochat speedrun", "uv run pytest"): assert re.search(rf"^{command}\b", README, re.M), command


def test_readme_commands_exist():
    for program in {words[0] for words in typed_commands(README)}: assert (Path(sys.executable).parent/program).exists() or shutil.which(program), program


def test_readme_commands_parse(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"talks").mkdir() # the conversations of one's own that it speaks of
    (tmp_path/"talks"/"mine.jsonl").write_text("")
    assert len(nanochat_commands()) >= 3
    for words in typed_commands(README): check_parses(words)


def test_readme_papermill_commands_name_real_parameters():
    for words in typed_commands(README):
        if words[0] != "papermill": continue
        cells = json.loads((REPO/words[1]).read_text())["cells"]
        parameters = next("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
        for flag, name in zip(words, words[1:]):
            if flag == "-p": assert re.search(rf"^{name} = ", parameters, re.M), name


def test_readme_names_only_files_that_are_there():
    spans = re.findall(r"`((?:nbs|tests|rustbpe|lessons|nanochat|\.ci)/[\w./-]*)`", README)
    folders = [line.split()[0] for line in README.splitlines() if re.match(r"[\w/]+/ ", line) and "(to come)" not in line] # the map
    assert len(folders) > 3
    for path in spans + folders + re.findall(r"\]\(([^)#:\s]+)\)", README): assert (REPO/path).exists(), path
