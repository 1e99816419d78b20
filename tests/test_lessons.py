"""The lessons run from top to bottom, every check fails on the untouched stub and passes on the folded solution, and they keep the form that a learner can lean on."""
import contextlib
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import jupytext
import psutil
import pytest
from conftest import REPO, commands, family

from nanochat.lab import checks # registers the exercises of all lessons
from nanochat.lab.course import EXERCISES, LESSONS, exercises_of

PATHS = sorted((REPO/"lessons").glob("*.ipynb"))
MOST_SECONDS, MOST_MB = 360, 4000  # on two cores


def cells_of(path): return [(cell["cell_type"], "".join(cell["source"]), cell) for cell in json.loads(path.read_text())["cells"]]


def each(function): return pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)(function)


def memory(process):
    "Bytes that a process and all that it has started occupy, what they share counted once."
    used = 0
    with contextlib.suppress(psutil.Error):
        for member in family(process):
            with contextlib.suppress(psutil.Error, AttributeError): used += member.memory_full_info().pss # one may have ended meanwhile; not every system tells it
    return used


@each
def test_runs_and_every_check_fails_and_passes(path, tmp_path):
    started, most, server = time.perf_counter(), 0, commands()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(server.run, tmp_path, "nanochat.lab.course", [str(path), "--solved"], 600)
        while not work.done():
            most = max(most, memory(server.process))
            time.sleep(2) # looking costs time, too
    done, seconds = work.result(), time.perf_counter() - started
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith(("○ ", "✗ ", "✓ "))]
    print(f"{path.stem}: {seconds:.0f} s, {most / 1e6:.0f} MB")
    for number in exercises_of(json.loads(path.read_text())):
        marks = [line[0] for line in lines if line.split()[1] == number]
        assert len(marks) == 2 and marks[0] in "○✗" and marks[1] == "✓", [line for line in lines if line.split()[1] == number]
    assert most < MOST_MB * 1e6 and seconds < MOST_SECONDS, f"{seconds:.0f} s, {most / 1e6:.0f} MB"


@each
def test_form(path):
    cells = cells_of(path)
    prose = "\n".join(source for kind, source, _ in cells if kind == "markdown")
    n = int(path.stem[:2])
    assert (path.stem, prose.splitlines()[0]) == (LESSONS[n][0], f"# {n} · {LESSONS[n][1]}")
    for part in ("## What you will be able to do", "## What to remember", "## Where to read on"): assert part in prose
    assert f"lesson_map({n})" in "".join(source for kind, source, _ in cells if kind == "code")
    assert re.search(r"nbs/\w+/\d\d[a-z]?_\w+\.ipynb", prose) # the library's own notebook
    for m in {n - 1, n + 1} & LESSONS.keys(): assert f"]({LESSONS[m][0]}.ipynb)" in prose
    headings = re.findall(rf"^### Exercise ({n}\.\d+) · (.+)\n\n(★+☆*), (\d+) minutes", prose, re.M)
    assert [number for number, *_ in headings] == list(exercises_of(json.loads(path.read_text()))) and len(headings) >= 3
    assert [title for _, title, *_ in headings] == [EXERCISES[number][0] for number, *_ in headings]
    assert all(len(stars) == 3 for _, _, stars, _ in headings)


@each
def test_no_walls(path):
    "At most 200 words between two things to see, and no cell of more than 25 lines. Folded solutions are no reading matter."
    words = 0
    for kind, source, cell in cells_of(path):
        if kind == "markdown":
            words += len(re.sub(r"<details>.*?</details>", "", source, flags=re.S).split())
            if "![" in source or "|--" in source: words = 0
            assert words <= 200, source[-300:]
        if kind == "code":
            assert len(source.splitlines()) <= 25, source
            words = 0


@each
def test_text_and_back(path):
    "As text and back again, a lesson is the same."
    notebook = jupytext.read(path)
    again = jupytext.reads(jupytext.writes(notebook, "py:percent"), "py:percent")
    assert [(c.cell_type, c.source) for c in again.cells] == [(c.cell_type, c.source) for c in notebook.cells]


def test_the_course_is_whole():
    assert [path.stem for path in PATHS] == [stem for stem, *_ in LESSONS.values()]
    used = [number for path in PATHS for number in exercises_of(json.loads(path.read_text()))]
    assert used == list(EXERCISES) and len(used) >= 30
