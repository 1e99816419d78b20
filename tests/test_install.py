"""The command starts quickly, imports cost little, and what the README tells people to type exists."""
import json
import re
import resource
import shutil
import subprocess
import sys
import time
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


def test_help_is_quick():
    assert command(), "nanochat is not installed: run the tests with `uv run pytest`"
    assert min(seconds(command(), "--help")[0] for _ in range(3)) < 1


def test_help_tells_the_commands():
    done = subprocess.run([command(), "--help"], capture_output=True, text=True, check=True)
    for name in ("speedrun", "chat", "report"): assert name in done.stdout
    assert not re.search(r"^ +stage ", done.stdout, re.M) # an inner matter


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
