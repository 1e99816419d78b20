"""The lessons run from top to bottom, every check fails on the untouched stub and passes on the folded solution, other people's answers are judged rightly, and all solutions
together are a ChatGPT."""
import ast
import contextlib
import importlib.util
import json
import linecache
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jupytext
import psutil
import pytest
from conftest import REPO, commands, drawn, family

from nanochat.lab import checks # registers the exercises of all lessons
from nanochat.lab.course import EXERCISES, LESSONS, PARTS, assess, exercises_of
from nanochat.lab.mine import FILE, mine, own_parts

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
    if not drawn(int(path.stem[:2]), of=5): pytest.skip("another commit's turn; without CI all lessons run")
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
    for part in ("## What you will be able to do", "## What to remember", "## Further reading"): assert part in prose
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
def test_lines_of_code(path):
    "Short lines: half of them have at most 45 characters, and hardly any is longer than 100."
    code = [source for kind, source, _ in cells_of(path) if kind == "code" and not source.startswith("#| hide")]
    lengths = [len(line) for source in code for line in source.splitlines() if line.strip()]
    median, long = statistics.median(lengths), sum(n > 100 for n in lengths)
    print(f"{path.stem}: {len(lengths)} lines, median {median:.0f}, {long} above 100, longest {max(lengths)}")
    assert median <= 45 and long <= 0.02 * len(lengths) and max(lengths) <= 115


@each
def test_text_and_back(path):
    "As text and back again, a lesson is the same."
    notebook = jupytext.read(path)
    again = jupytext.reads(jupytext.writes(notebook, "py:percent"), "py:percent")
    assert [(c.cell_type, c.source) for c in again.cells] == [(c.cell_type, c.source) for c in notebook.cells]


def answers_to(number):
    "The right and wrong answers that people may give to an exercise; a wrong one has a part of the sentence that is said."
    stem = f"lesson_{int(number.split('.')[0]):02}"
    if stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(stem, REPO/"tests"/"answers"/f"{stem}.py")
        module = sys.modules[stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[stem].RIGHT[number], sys.modules[stem].WRONG[number]


@pytest.mark.parametrize("number", EXERCISES)
def test_other_peoples_answers(number):
    right, wrong = answers_to(number)
    assert len(right) >= 3 and len(wrong) >= 3
    for answer in right: assert assess(number, answer) == ("✓", "right."), (getattr(answer, "__name__", answer), assess(number, answer))
    for answer, hint in wrong:
        mark, sentence = assess(number, answer)
        assert mark == "✗" and hint in sentence, (getattr(answer, "__name__", answer), mark, sentence)


def defines(node):
    "Does a statement of a lesson only define something: an import, a function, a class or a constant?"
    constant = isinstance(node, ast.Assign) and all(isinstance(part, (ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Load)) for part in ast.walk(node.value))
    return constant or isinstance(node, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef))


def solve_all(folder, monkeypatch):
    "Run all solutions, as a learner's cells, in a folder: what they leave is the learner's file."
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder/"base"))
    for path in PATHS:
        names = {"__name__": "__main__", **{name: mine(name) for name in PARTS}}
        for kind, source, _ in cells_of(path):
            if kind != "code": continue
            filename = f"<{path.stem} {len(linecache.cache)}>"
            linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
            for node in filter(defines, ast.parse(source).body):
                with contextlib.suppress(NameError): exec(compile(ast.Module([node], []), filename, "exec"), names) # a default value may need what was not computed
        for number, (_, source) in exercises_of(json.loads(path.read_text())).items():
            filename = f"<solution {number}>"
            linecache.cache[filename] = len(source), None, source.splitlines(keepends=True), filename
            exec(compile(source, filename, "exec"), names)


def test_all_solutions_are_a_chatgpt(tmp_path, monkeypatch, capsys):
    "The learner's file needs nothing of nanochat; what it describes is trained through all stages, answers the exam and chats."
    solve_all(tmp_path, monkeypatch)
    said = capsys.readouterr().out
    assert said.count("✓") == len(EXERCISES), [line for line in said.splitlines() if "✗" in line]
    wanted = {name for name, versions in PARTS.items() if any("." in number for number in versions)}
    assert set(own_parts()) == wanted, said
    text = (tmp_path/FILE).read_text()
    alone = "import sys; sys.modules['nanochat'] = None; import my_nanochat; print(len(vars(my_nanochat)))"
    done = subprocess.run([sys.executable, "-c", alone], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "nanochat" not in re.sub(r'"""My nanochat.*"""', "", text), done.stderr
    from nanochat.lab import finale
    made = finale.train_mine("smoke")
    assert made.losses["base"][-1] < made.losses["base"][0] - 1 and set(made.seconds) == {"tokenizer", "base", "mid", "sft", "rl"}
    found = finale.exam(made, questions=2)
    assert "identity" in found and all(set(marks) <= {"0", "1"} and marks for marks in found.values())
    said = finale.chat(made, "Who are you?")
    talk = [] # a conversation, and its beginning is forgotten when the context is full
    for _ in range(12): finale.chat(made, "Anna has 9 plums. How many plums does Anna have?", talk)
    assert talk[-1]["role"] == "assistant" and 2 <= len(talk) < 24
    letters = {"messages": [{"role": "user", "content": "A or B?"}], "letters": ["A", "B"]}
    assert finale._answer(made, letters) in ("A", "B")
    finale.save(made, tmp_path/"model")
    assert finale.chat(finale.load(tmp_path/"model"), "Who are you?") == said


def test_the_course_is_whole():
    assert [path.stem for path in PATHS] == [stem for stem, *_ in LESSONS.values()]
    used = [number for path in PATHS for number in exercises_of(json.loads(path.read_text()))]
    assert used == sorted(EXERCISES, key=lambda number: [int(n) for n in number.split(".")]) and len(used) >= 30
