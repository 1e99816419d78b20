"""nanochat away from its clone: what the wheel holds, the lessons that are copied out, hosted notebooks, and the files that build and publish it."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import yaml
from conftest import REPO, assert_user_error, check_parses

HOSTED = sorted([*(REPO/"lessons").glob("*.ipynb"), *(REPO/"nbs"/"speedrun").glob("*.ipynb")])


def build_script(tmp, out):
    "Run rustbpe/build.rs as cargo runs it before it compiles the wheel's library."
    rustc, program = shutil.which("rustc"), tmp/"build"
    if not rustc: pytest.skip("there is no rustc")
    if not program.exists(): subprocess.run([rustc, "--edition", "2021", "-o", program, REPO/"rustbpe"/"build.rs"], check=True)
    out.mkdir(parents=True)
    subprocess.run([program], check=True, cwd=REPO/"rustbpe", env={"OUT_DIR": str(out), "CARGO_FEATURE_PYTHON": "1"}, capture_output=True)
    return out


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The package as a wheel lays it out, outside the clone, and a function that runs its command."
    tmp = tmp_path_factory.mktemp("installed")
    shutil.copytree(REPO/"nanochat", tmp/"site"/"nanochat", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(build_script(tmp, tmp/"target"/"release"), tmp/"site"/"nanochat", dirs_exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(tmp/"site"), "NANOCHAT_BASE_DIR": str(tmp/"base")}
    def run(*args): return subprocess.run([sys.executable, "-m", "nanochat", *map(str, args)], cwd=tmp, env=env, capture_output=True, text=True, timeout=120)
    return SimpleNamespace(tmp=tmp, run=run)


def test_the_installed_package_finds_its_presets(installed):
    done = installed.run("speedrun", "--plan", "--json", "--preset", "gpu", "--hardware", "L4")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout) # and nothing else
    assert found["config"]["preset"] == "gpu" and found["minutes"] > 0 and found["memory_bytes"] > 0
    assert_user_error(installed.run("docs"), "clone")


def test_lessons_are_copied_out_and_never_overwritten(installed):
    course = installed.tmp/"course"
    done = installed.run("lessons", course)
    assert done.returncode == 0 and "jupyter lab" in done.stdout, done.stderr
    lessons = sorted((course/"lessons").glob("*.ipynb"))
    assert [path.read_bytes() for path in lessons] == [path.read_bytes() for path in sorted((REPO/"lessons").glob("*.ipynb"))] and len(lessons) == 14
    for path in lessons: # every link to a file leads somewhere
        text = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "markdown")
        for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)", text): assert (path.parent/unquote(link)).exists(), (path.name, link)
    lessons[0].write_text("my solution")
    assert_user_error(installed.run("lessons", course), "00_gradients.ipynb", "--overwrite")
    assert lessons[0].read_text() == "my solution"
    assert installed.run("lessons", course, "--overwrite").stdout.startswith("1 files copied")
    assert lessons[0].read_bytes() == (REPO/"lessons"/"00_gradients.ipynb").read_bytes()


def test_an_editable_install_reads_the_clone(tmp_path):
    assert list(build_script(tmp_path, tmp_path/"target"/"editable"/"build"/"out").iterdir()) == []
    settings = (REPO/"pyproject.toml").read_text()
    assert 'editable-profile = "editable"' in settings and '{ path = "_notebooks/**/*", from = "out-dir", to = "nanochat/" }' in settings
    assert "[profile.editable]" in (REPO/"rustbpe"/"Cargo.toml").read_text()


@pytest.mark.slow
@pytest.mark.skipif("CI" in os.environ, reason="minutes; wheels.yml does it on every system")
@pytest.mark.timeout(3600)
def test_the_wheel_needs_neither_clone_nor_compiler(tmp_path):
    "Build it, install it into a new environment, and run it where no folder but that of Python is on the PATH."
    if not (uv := shutil.which("uv")): pytest.skip("there is no uv")
    subprocess.run([uv, "build", "--wheel", "--out-dir", tmp_path/"dist", REPO], check=True)
    wheel, python = next((tmp_path/"dist").glob("*.whl")), tmp_path/"env"/"bin"/"python"
    assert "-abi3-" in wheel.name and wheel.stat().st_size < 12e6
    subprocess.run([uv, "venv", "--python", sys.executable, tmp_path/"env"], check=True)
    subprocess.run([uv, "pip", "install", "--python", python, wheel], check=True)
    def run(*args):
        env = {"HOME": str(tmp_path), "PATH": str(python.parent), "NANOCHAT_BASE_DIR": str(tmp_path/"base"), "OMP_NUM_THREADS": "1"}
        return subprocess.run([python.parent/"nanochat", *args], cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
    assert "report.html" in run("speedrun", "--preset", "smoke")
    assert json.loads(run("runs", "--json"))["runs"][0]["next"] is None
    run("lessons", "course")
    assert (tmp_path/"course"/"lessons"/"12_speedrun.ipynb").exists()
    assert not (python.parent.parent/"lib"/f"python3.{sys.version_info[1]}"/"site-packages"/"nbs").exists()


def first_cell(path):
    "The cell that installs nanochat on Colab and Kaggle."
    return next("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code")


def test_hosted_notebooks_begin_with_the_same_cell(tmp_path, monkeypatch):
    assert len(HOSTED) == 22 and len({first_cell(path) for path in HOSTED}) == 1
    calls = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", lambda command, check: calls.append((command, check)))
    exec(first_cell(HOSTED[0]), {})
    assert calls == [] # nanochat is there
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="upload nanochat's wheel"): exec(first_cell(HOSTED[0]), {})
    (tmp_path/"nanochat-0.1.0-cp311-abi3-linux_x86_64.whl").touch()
    exec(first_cell(HOSTED[0]), {})
    [(command, check)] = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and check
    assert command[-1] == "nanochat-0.1.0-cp311-abi3-linux_x86_64.whl"


def test_the_workflow_types_commands_that_exist():
    jobs = yaml.safe_load((REPO/".github"/"workflows"/"wheels.yml").read_text())["jobs"]
    lines = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    commands = [shlex.split(part) for line in lines for part in line.split("&&")]
    assert ["nanochat", "speedrun", "--preset", "smoke"] in commands
    for words in commands: check_parses(words)
    built, tried = ({entry["name"] for entry in jobs[job]["strategy"]["matrix"]["include"]} for job in ("wheel", "smoke"))
    assert built == tried and {name.split("-")[0] for name in built} == {"linux", "macos", "windows"}
    assert "smoke" in jobs["publish"]["needs"] and jobs["publish"]["permissions"] == {"id-token": "write"} and "tags" in jobs["publish"]["if"]


def test_containers_name_files_that_exist():
    text = (REPO/"Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert {"pyproject.toml", "rustbpe", "nanochat", "nbs", "lessons"} <= set(copied)
    for name in copied: assert (REPO/name).exists(), name
    for line in re.findall(r"^# +docker run .* nanochat(?:-gpu)? (.+)$", text, re.M): check_parses(["nanochat", *shlex.split(line)])
    assert json.loads((REPO/".devcontainer"/"devcontainer.json").read_text())["postCreateCommand"].endswith("uv sync")
