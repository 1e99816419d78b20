"""The command starts quickly, imports cost little, and what the README tells people to type exists."""
import json
import re
import resource
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPO

from nanochat.plan import known_presets, setting_name
from nanochat.speedrun import cli

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
    torch_alone, model = (min(seconds(sys.executable, "-c", f"import {module}")[1] for _ in range(3)) for module in ("torch", "nanochat.model"))
    assert model <= torch_alone + 0.5, (model, torch_alone)


@pytest.mark.parametrize("module", ["nanochat.speedrun", "nanochat.common", "nanochat.plan", "nanochat.world"])
def test_what_needs_no_torch_does_not_import_it(module):
    heavy = "import sys; print([m for m in ('torch', 'papermill', 'IPython', 'matplotlib', 'pyarrow', 'ipywidgets') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"import {module}; {heavy}"], capture_output=True, text=True, check=True, cwd=REPO)
    assert done.stdout.strip() == "[]"


def readme_commands():
    "Every line of the README's shell blocks, without comments and prompts."
    blocks = re.findall(r"^```(?:bash|sh|shell|console)?\n(.*?)^```", README, re.M | re.S) + re.findall(r"(?:^(?: {4}|\t)\S.*\n)+", README, re.M)
    lines = [line.strip().removeprefix("$ ") for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def nanochat_commands():
    "The arguments of every `nanochat …` in the README."
    return [words[words.index("nanochat") + 1:] for words in readme_commands() if "nanochat" in words[:3]]


def test_readme_is_short_and_says_how_to_begin():
    assert len(README.splitlines()) < 150
    starts = [" ".join(words[:4]) for words in readme_commands()]
    assert any(s.startswith("uv run nanochat speedrun") for s in starts) and any(s.startswith("uv run pytest") for s in starts), starts
    assert nanochat_commands()


def test_readme_commands_parse():
    for name, *arguments in nanochat_commands():
        if name in ("--help", "--version"): continue
        assert name in cli.commands, name
        given = cli.commands[name].make_context(name, list(arguments)).params # exits for an option that is not there
        if preset := given.get("preset"): assert preset in known_presets()
        for pair in given.get("settings") or (): assert pair == "help" or setting_name(pair.split("=")[0])


def test_readme_names_only_what_is_there():
    for words in readme_commands():
        for word in words:
            if word.startswith(("nbs/", "tests/", "rustbpe/", "lessons/", ".ci/")): assert (REPO/word).exists(), word
        if "papermill" in words[:3]:
            notebook = json.loads((REPO/next(word for word in words if word.startswith("nbs/"))).read_text())
            parameters = next("".join(cell["source"]) for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", []))
            for flag, name in zip(words, words[1:]):
                if flag == "-p": assert re.search(rf"^{name} = ", parameters, re.M), name
    for target in re.findall(r"\]\(([^)#\s]+)", README):
        if "://" not in target: assert (REPO/target).exists(), target
