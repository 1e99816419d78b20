"""The notebooks are the source: they run, the package is what they export, and they are clean."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
from conftest import REPO, contents, drawn, environment

LIBRARY = sorted(path for path in (REPO/"nbs").glob("*/**/*.ipynb") if re.match(r"\d\d[a-z]?_", path.name))
WINGS = ("core", "model", "train", "post", "talk", "lab")
STAGE_NOTEBOOKS = sorted((REPO/"nbs"/"speedrun").glob("*.ipynb"))
OTHERS = sorted((REPO/"lessons").rglob("*.ipynb"))


def nbdev(code, cwd, **env):
    "Run some Python, as nbdev's commands do, in a project's folder."
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=os.environ | env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1200)


def test_every_notebook_runs(tmp_path):
    "Through nbdev's own test runner, two at a time; what they write goes into a folder of its own. The lessons have a test of their own."
    before, chosen = contents(REPO/"nbs"), [path for i, path in enumerate(LIBRARY) if drawn(i, of=2)]
    names = None if chosen == LIBRARY else "|".join(f"^{re.escape(path.name)}$" for path in chosen)
    done = nbdev("from nbdev.test import nbdev_test; "
                 f"nbdev_test({str(REPO/'nbs')!r}, file_re={names!r}, n_workers=2, do_print=True, timing=True)", REPO, **environment(tmp_path))
    assert done.returncode == 0, done.stderr[-6000:]
    assert {str(path) for path in chosen} <= set(re.findall(r"- Completed (\S+?\.ipynb)", done.stdout)) # the two may write into one line
    assert contents(REPO/"nbs") == before # nothing is left beside the notebooks


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the notebooks, exported and cleaned afresh."
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("nbs", "lessons"):
        if (REPO/folder).exists(): shutil.copytree(REPO/folder, copy/folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_*"))
    (copy/"nanochat").mkdir()
    for file in ("settings.ini", "pyproject.toml", "nanochat/__init__.py"): shutil.copy(REPO/file, copy/file)
    done = nbdev("from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; nbdev_export(); nbdev_clean()", cwd=copy)
    assert done.returncode == 0, done.stderr[-3000:]
    return copy


def test_the_package_is_what_the_notebooks_export(exported):
    theirs, ours = ({str(path.relative_to(root)): path.read_text() for path in (root/"nanochat").rglob("*.py")} for root in (exported, REPO))
    assert ours.keys() == theirs.keys() # _modidx.py is one of them
    assert [name for name in theirs if ours[name] != theirs[name]] == [], "run nbdev_export"


@pytest.mark.parametrize("path", LIBRARY + STAGE_NOTEBOOKS + OTHERS, ids=lambda path: path.stem)
def test_clean(exported, path):
    assert path.read_bytes() == (exported/path.relative_to(REPO)).read_bytes(), "run nbdev_clean"
    notebook = json.loads(path.read_text())
    assert "widgets" not in notebook["metadata"]
    homes = [f"{REPO}/", f"{tempfile.gettempdir()}/", "/tmp/", "/home/", "/root/", "/Users/"]
    for cell in notebook["cells"]:
        assert cell.get("execution_count") is None
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error", "".join(cell["source"])
            data = output.get("data", {})
            assert len(data.get("image/png", "")) < 100_000 * 4 / 3, "an image of more than 100 kB"
            text = json.dumps([output.get("text"), {kind: value for kind, value in data.items() if not kind.startswith("image/")}])
            text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
            for place in homes: assert place not in text, f"the path of a machine in the output of: {''.join(cell['source'])}"


@pytest.mark.parametrize("path", STAGE_NOTEBOOKS, ids=lambda path: path.stem)
def test_stage_notebook_has_parameters(path):
    cells = json.loads(path.read_text())["cells"]
    tagged = ["".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    namespace = {}
    exec(tagged[0], namespace) # nothing but plain values
    assert namespace["run_name"] == "" and namespace["preset"] == ""


def test_stage_notebooks_are_all_there():
    assert [path.stem for path in STAGE_NOTEBOOKS] == ["1_data", "2_tokenizer", "3_pretrain", "4_midtrain", "5_sft", "6_rl", "7_report", "8_chat"]


def exports(path):
    "The module that a notebook exports, as in `core.run`."
    for cell in json.loads(path.read_text())["cells"]:
        if found := re.search(r"^#\| default_exp (\S+)", "".join(cell["source"]), re.M): return found[1]


def imported(module):
    "The modules of the package that a module imports, late imports too: `core.run` for `from ..core.run import x`."
    file = REPO/"nanochat"/f"{module.replace('.', '/')}.py"
    package = ["nanochat", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, node.module or ""])]
            names += [f"{names[0].rstrip('.')}.{alias.name}" for alias in node.names] # `from nanochat.model import attention`
        else: continue
        yield from (name.removeprefix("nanochat.") for name in names if name.startswith("nanochat."))


def number_of(path):
    "A notebook's number, such as (32, \"\") or (32, \"a\"); a number with a letter comes after the bare one."
    number, letter = re.match(r"(\d\d)([a-z]?)_", path.name).groups()
    return int(number), letter


def test_numbers_are_unique_and_belong_to_their_wing():
    numbers = [number_of(path) for path in LIBRARY]
    assert len(numbers) == len(set(numbers)) > 30
    for path, (number, _) in zip(LIBRARY, numbers):
        wing, *rooms = path.relative_to(REPO/"nbs").parts[:-1]
        decades = {"lab": (5, 7, 8), "lab/bench": (6,), "lab/exercises": (7, 8)} # the course is the last that the lab holds
        assert number // 10 in decades.get("/".join([wing, *rooms]), (WINGS.index(wing),)), path
        module = exports(path)
        # nbdev's links to a name lead to a page that is called as the notebook
        assert module.endswith("__main__") or module == ".".join([wing, *rooms, path.stem.partition("_")[2]]), (path, module)


def test_a_notebook_imports_only_from_those_before_it():
    number = {exports(path): number_of(path) for path in LIBRARY}
    del number["__main__"]
    arrows = 0
    for module in number:
        for used in set(imported(module)) & number.keys():
            arrows += 1
            assert number[used] < number[module], f"{module} imports {used}"
    assert arrows > 100
