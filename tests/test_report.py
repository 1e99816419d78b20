"""Reports of real runs: whole, unfinished, failed, damaged; self-contained; and two runs side by side."""
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from conftest import assert_user_error, edit_config, nanochat

from nanochat.common import STAGES, Run
from nanochat.report import Report, read_run, write_report

HOSTILE = "<script>alert(1)</script>|`*_[x](http://example.com) \u202e\x00"


class Outside(HTMLParser):
    "Collects what a page would load, and what it would run."
    def __init__(self):
        super().__init__()
        self.loads, self.tags = [], set()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "srcset", "data", "poster", "xlink:href") or (name == "href" and tag != "a"):
                if not (value or "").startswith("#"): self.loads.append((tag, name, value)) # within an SVG a # points into the page
            if name.startswith("on"): self.loads.append((tag, name, value))


def page_of(run):
    "The report's page and its Markdown, after a look at what the page would load."
    path = write_report(Run.open(run.name) if not isinstance(run, Run) else run)
    page, text = path.read_text(), path.with_suffix(".md").read_text()
    outside = Outside()
    outside.feed(page)
    assert outside.loads == [] and not outside.tags & {"script", "link", "iframe", "img", "object", "embed"}
    assert "@import" not in page and "url(http" not in page
    return page, text



@pytest.fixture
def run(copy, monkeypatch):
    "A copy of the finished smoke run."
    place = copy("report")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place.base))
    return Run.open("smoke")


def test_a_finished_run(run):
    page, text = page_of(run)
    for heading in ("What happened", "Plan and measurement", "Scores", "CORE", "Samples", "Configuration", "Environment", "Size of the code"): assert heading in page, heading
    for stage in ("base", "mid", "sft", "rl"): assert f"report_files/{stage}.png" in text and (run.dir/"report_files"/f"{stage}.png").stat().st_size > 5000
    assert page.count("<svg") >= 5 and "nanochat eval smoke" in page # how to get a CORE
    assert (run.dir/"report.html").stat().st_size < 2_000_000


@pytest.mark.parametrize("last", ["data", "base", "sft"])
def test_a_run_without_its_last_stages(copy, monkeypatch, last):
    place = copy(last)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place.base))
    page, _ = page_of(Run.open("smoke"))
    missing = [s for s in list(STAGES)[list(STAGES).index(last) + 1:] if s != "report"]
    assert f"Not finished: {', '.join(missing)}" in page


def test_a_failed_stage_says_why(copy, monkeypatch):
    place = copy("base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place.base))
    tokenizer = place.run/"tokenizer"/"tokenizer.json"
    whole = tokenizer.read_bytes()
    tokenizer.write_bytes(whole[:100])
    failed = nanochat(place.base, "speedrun", "--preset", "smoke")
    assert_user_error(failed, "tokenizer.json")
    page, _ = page_of(Run.open("smoke"))
    assert "mid failed: " in page and "tokenizer.json" in page
    tokenizer.write_bytes(whole)
    done = nanochat(place.base, "speedrun", "--preset", "smoke", "--until", "mid") # goes on, and nothing of it is left
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(place.run.rglob("error.txt"))


BAD = {"nothing": "", "half of it": '{"tasks": {"sums": {"n": 8, "accur', "a list": "[1, 2]", "a word": '"yes"', "null": "null", "NaN": '{"score": NaN, "ci95": [NaN, NaN], "seconds": NaN, "tasks": {"sums": {"n": 8, "accuracy": NaN, "ci95": [0, 1]}}}',
       "other types": '{"score": "high", "ci95": 3, "seconds": "long", "environment": [], "missing": 3, "of": [], "minutes": {}, "tasks": {"sums": [], "facts": {"n": "8", "accuracy": 2, "ci95": [1, 0], "items": 3}}}',
       "deep": "[" * 100_000}


FILES = ["mid/manifest.json", "mid/eval.json", "base/core.json", "plan.json", "metrics.jsonl"]


@pytest.mark.parametrize("damage", BAD)
def test_damaged_files_cost_only_themselves(run, damage):
    for name in FILES: # each by itself is read over …
        before = (run.dir/name).read_bytes() if (run.dir/name).exists() else None
        (run.dir/name).write_text(BAD[damage])
        record = read_run(run)
        assert "sft" in record.manifests and "rl" in record.evals
        if name.endswith("eval.json") and damage in ("half of it", "a list", "NaN", "deep"): assert any("mid/eval.json" in problem for problem in record.problems)
        if before is None: (run.dir/name).unlink()
        else: (run.dir/name).write_bytes(before)
    for name in FILES: (run.dir/name).write_text(BAD[damage]) # … and all of them together
    page, text = page_of(run)
    assert "What happened" in page and "Configuration" in text
    if damage in ("half of it", "a list", "deep"): assert "damaged" in page


def test_nothing_but_a_configuration(run):
    for path in run.dir.iterdir():
        if path.name != "config.yaml": shutil.rmtree(path) if path.is_dir() else path.unlink()
    page, _ = page_of(run)
    assert "Not finished: data, tokenizer, base, mid, sft, rl" in page and "Nothing has run yet" in page


def test_hostile_text_is_only_text(run):
    file = run.dir/"sft"/"eval.json"
    found = json.loads(file.read_text())
    for task in found["tasks"].values():
        for item in task["items"]: item |= {"prompt": HOSTILE, "answer": HOSTILE * 2000}
    found["tasks"][HOSTILE] = found["tasks"]["sums"]
    found["missing"] = {HOSTILE: HOSTILE}
    file.write_text(json.dumps(found))
    (run.dir/"rl"/"manifest.json").unlink()
    (run.dir/"rl"/"error.txt").write_text(HOSTILE)
    edit_config(run.dir, data={"source": HOSTILE})
    page, text = page_of(run)
    assert "<script" not in page + text and "\x00" not in page + text and not re.search(r"(?<!\\)\]\(http", text)
    assert len(page) < 3_000_000


def test_core_and_the_published_figures(run):
    task = {"n": 100, "rows": 400, "type": "multiple_choice", "shots": 10, "accuracy": 0.4, "ci95": [0.31, 0.5], "baseline": 0.25, "centred": 0.2, "centred_ci95": [0.08, 0.33], "cropped": 3, "seconds": 1.0, "right": "01" * 50}
    (run.dir/"base"/"core.json").write_text(json.dumps({"stage": "base", "step": 60, "score": 0.2, "ci95": [0.08, 0.33], "of": 22, "max_per_task": 100, "seconds": 1.0, "missing": ["jeopardy"], "tasks": {"arc_easy": task}}))
    file = run.dir/"sft"/"eval.json"
    found = json.loads(file.read_text())
    found["tasks"]["mmlu"] = {"name": "mmlu", "n": 200, "accuracy": 0.325, "ci95": [0.26, 0.39], "chance": 0.25, "items": [], "seconds": 2.0, "too_long": 7}
    file.write_text(json.dumps(found | {"chat_core": 0.1, "chat_core_of": 1, "missing": {"gsm8k": "no network"}}))
    page, text = page_of(run)
    for words in ("0.2219", "0.3111", "0.0758", "0.2000", "0.3250", "jeopardy", "0.0165", "no network"): assert words in page, words
    assert "core.png" in text


def test_two_runs_side_by_side(run):
    other = run.dir.with_name("other")
    shutil.copytree(run.dir, other)
    file = other/"rl"/"eval.json"
    found = json.loads(file.read_text())
    found["tasks"]["facts"] |= {"accuracy": 1.0, "ci95": [0.68, 1.0], "right": "1" * 8}
    file.write_text(json.dumps(found))
    done = nanochat(run.dir.parent.parent, "report", "smoke", "other")
    assert done.returncode == 0 and done.stdout.strip() == str(run.dir/"vs_other.html"), done.stderr[-2000:]
    page, text = (run.dir/"vs_other.html").read_text(), (run.dir/"vs_other.md").read_text()
    assert "the configurations are the same" in page and "better" in page and "not told apart" in page and "vs_other_files/curves.png" in text
    outside = Outside()
    outside.feed(page)
    assert outside.loads == []
    for names, words in ((["smoke", "smoke"], "named twice"), (["smoke", "nowhere"], "there is no run 'nowhere'")):
        assert_user_error(nanochat(run.dir.parent.parent, "report", *names), words)


def test_it_shows_itself_in_a_notebook(run):
    report = Report("smoke")
    assert report._repr_html_().startswith("<div") and "smoke" in repr(report)
