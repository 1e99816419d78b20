"""The report and the comparison: from whatever a run's folder holds, one page that needs nothing else and never runs what a model said."""
import json
import random
import shutil
from html.parser import HTMLParser

import mistune
import pytest
import yaml
from conftest import nanochat

from nanochat.core.files import UserError, atomic_write
from nanochat.core.run import STAGES, Run
from nanochat.post.core_eval import CORE, mean_interval, wilson_interval
from nanochat.lab.reading import read_run
from nanochat.lab.figures import Picture
from nanochat.lab.report import PUBLISHED, Report
from nanochat.lab.comparison import Comparison, difference
from nanochat.lab.speedrun import last_run

HOSTILE = '<script>alert(1)</script><img src=x onerror=alert(2)> ![x](http://evil.example/x.png) [y](javascript:z) </div>| `a` **b** $\\frac{ \x00\x1b[31m \ud800 \u202e {{7*7}} ' + "\n# h\n```\n"


class Tags(HTMLParser):
    "What a page consists of: its tags, and everything that it would fetch or run."
    VOID = {"meta", "br", "img", "path", "use", "rect", "hr"}

    def __init__(self, text):
        super().__init__()
        self.names, self.outside, self.open, self.text, self.css = set(), [], [], "", ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        if tag not in self.VOID: self.open.append(tag)
        for name, value in attrs:
            fetched = name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster") and not (value or "").startswith("#")
            if fetched or name.startswith("on") or "url(" in (value or "").replace("url(#", ""): self.outside.append((tag, name, value))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID: self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID: assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style": self.css += data
        else: self.text += data


def assert_alone(page):
    "A page that loads nothing, runs nothing, and closes what it opens. Gives its `Tags`."
    tags = Tags(page)
    assert not tags.outside and not tags.open
    assert not tags.names & {"script", "link", "iframe", "object", "embed", "img", "base", "form"}, tags.names
    for word in ("@import", "url(", "http"): assert word not in tags.css.replace("url(#", ""), word
    assert "color-scheme: light dark" in tags.css and ("currentColor" in page or "svg" not in tags.names)
    return tags


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr("nanochat.lab.report._code_commit", str) # a third of a second each time
    return tmp_path


def task(p, n, chance=0.0, seed=0, **more):
    "A task with n answers of which about p are right."
    right = "".join(str(int(random.Random(f"{seed} {i}").random() < p)) for i in range(n))
    k = right.count("1")
    return {"n": n, "accuracy": k / n, "ci95": list(wilson_interval(k, n)), "chance": chance, "tokens": 9, "seconds": 1.0, "right": right,
            "items": [{"index": 0, "prompt": "2 + 2?", "answer": "4", "right": right[0] == "1"}]} | more


def core_json(p=0.4, left_out=("jeopardy",), seed=0):
    "A core.json as the evaluation writes it."
    tasks = {}
    for t in CORE:
        if t.label in left_out: continue
        b = t.baseline / 100
        found = task(b + (1 - b) * p, 500, seed=f"{seed} {t.label}", rows=2376, type=t.type, shots=t.shots, baseline=b, cropped=1)
        tasks[t.label] = found | {"centred": (found["accuracy"] - b) / (1 - b), "centred_ci95": [(x - b) / (1 - b) for x in found["ci95"]]}
        del tasks[t.label]["items"]
    score, low, high = mean_interval([(t["centred"], *t["centred_ci95"]) for t in tasks.values()])
    return {"stage": "base", "step": 3, "score": score, "ci95": [low, high], "of": 22, "max_per_task": 500, "seconds": 5.0, "missing": list(left_out), "tasks": tasks}


def make(name="r", stages=("data", "tokenizer", "base", "mid", "sft", "rl"), config=None, **manifest):
    "A small run folder in which some stages are done."
    run = Run.create(name, {"preset": "laptop", "seed": 1, "data": {"source": "world"}, "hardware": {"nproc": 1}} | (config or {}))
    atomic_write(run.dir/"plan.json", json.dumps({"minutes": 2, "dollars": 0, "memory_bytes": 1e9, "seconds": {"data and tokenizer": 10, "base": 60, "mid": 30, "evaluation": 20}}))
    for stage in stages:
        if stage in ("base", "mid", "sft", "rl"):
            log = run.metrics(stage)
            for step in (1, 2, 3): log.log(step, steps=3, lr=1 - step / 4, tokens=step * 100, tokens_per_second=50.0, memory_mb=500.0, **({"reward": step / 4} if stage == "rl" else {"loss": 3.0 / step, "bits_per_byte": 1.0 / step}))
        if stage in ("mid", "sft", "rl"): atomic_write(run.dir/stage/"eval.json", json.dumps({"stage": stage, "step": 3, "tasks": {"sums": task(0.5, 100, seed=stage)}, "world_score": 0.5, "chat_core": None, "chat_core_of": 0, "missing": {}}))
        run.finish(stage, seconds=12.0, **manifest)
    return run


def written(run):
    "A run's report, as the page's tags and as Markdown; both must hold."
    page = Report(run.name).write()
    text = page.with_suffix(".md").read_text()
    rendered = Tags(mistune.create_markdown(escape=False, plugins=["table"])(text))
    assert not rendered.names & {"script", "iframe", "a"}, rendered.names
    assert all(tag == "img" and value.startswith("report_files/") and (run.dir/value).exists() for tag, _, value in rendered.outside), rendered.outside
    return assert_alone(page.read_text()), text


def test_whole_run(base):
    page, text = written(make())
    for stage in ("data", "tokenizer", "base", "mid", "sft", "rl"): assert f"| {stage} | done |" in text
    for heading in ("What happened", "Plan and measurement", "Scores", "Beside nanochat-2025", "CORE", "Samples", "Reinforcement learning", "Configuration", "Environment"):
        assert f"\n## {heading}\n" in text, heading
    for title in ("loss", "bits per byte", "reward", "learning rate, of its peak"): assert title in page.text # text of the pictures
    assert "| data and tokenizer | 10 s | 24 s | 2.40 |" in text and "| memory of a process | 1.0 GB | 500 MB | 0.50 |" in text
    assert "| evaluation | of mid, sft, rl | 3.0 s | – |" in text and "| together |  | 1 min 15 s |" in text
    assert "no score to compare with a published one" in text and "nanochat eval r --stage base --tasks core" in text.replace("\\", "")
    assert "Not finished" not in text and "damaged" not in text


def test_same_files_same_report(base):
    run = make()
    assert Report(run).write().read_bytes() == Report(run).write().read_bytes()


def test_nothing_but_a_configuration(base):
    page, text = written(make(stages=()))
    for sentence in ("Nothing has run yet", "Not finished: data, tokenizer, base, mid, sft, rl", "No stage has been evaluated", "CORE has not been measured"): assert sentence in text, sentence
    (base/"runs"/"r"/"plan.json").unlink()
    (base/"runs"/"r"/"config.yaml").write_text("{}")
    page, text = written(Run.open("r"))
    assert "svg" not in page.names and "config.yaml is empty" in text and "Plan and measurement" not in text


def test_failed_stage(base):
    run = make(stages=("data", "tokenizer", "base"))
    run.metrics("mid").log(7, steps=40, loss=2.0)
    atomic_write(run.dir/"mid"/"error.txt", "the loss became nan at step 8: lower <b>lr_scale</b>\nof mid.\n")
    page, text = written(run)
    assert "| mid | failed |" in text and "7 of 40" in text and "| sft | not run |" in text
    assert "mid failed: the loss became nan at step 8: lower <b>lr_scale</b> of mid." in page.text
    assert "Not finished: mid, sft, rl" in text
    run.finish("mid") # it went well the next time, whatever lies there
    assert "failed" not in written(run)[1]


def test_end_that_was_asked_for(base):
    page, text = written(make(stages=("data", "tokenizer", "base"), config={"dial": {"until": "base"}}))
    assert "| mid | not requested |" in text and "The run was told to end after base" in text and "Not finished" not in text


FILES = ("base/manifest.json", "mid/eval.json", "base/core.json", "plan.json", "metrics.jsonl")


def damage(path, kind):
    "Ruin a file in one of ten ways."
    if not path.exists(): atomic_write(path, json.dumps(core_json()))
    whole = path.read_text()
    bad = {"cut": whole[:len(whole) // 2], "list": "[1, 2]\n[3]\n", "string": '"x"\n"y"\n', "null": "null\nnull\n", "nan": "NaN\nNaN\n", "deep": "[" * 100_000 + "\n{}\n", "empty": "", "digits": "9" * 5000 + "\n{}\n"}
    path.unlink()
    if kind == "folder": path.mkdir()
    elif kind == "binary": path.write_bytes(b"\xff\xfe\x00{}\n\x80\n")
    else: path.write_text(bad[kind])


@pytest.mark.parametrize("kind", ["cut", "list", "string", "null", "nan", "deep", "binary", "folder", "empty", "digits"])
def test_damaged_files(base, kind):
    harmless = ("cut", "empty") # of metrics: what a crash leaves
    for name in FILES:
        run = make(name.replace("/", "-"))
        damage(run.dir/name, kind)
        problems, silent = read_run(run).problems, name == "metrics.jsonl" and kind in harmless
        assert len(problems) == (not silent) and (silent or problems[0].startswith(f"{name} is damaged") or problems[0].startswith("metrics.jsonl cannot be read")), problems
    run = make("all")
    for name in FILES: damage(run.dir/name, kind)
    text = written(run)[1].replace("\\", "")
    for name in FILES: assert f"\n{name} " in text or name == "metrics.jsonl" and kind in harmless
    assert "Not finished: base" in text and "| sft | done |" in text


@pytest.mark.parametrize("value", [None, {}, "x", -1, 10**400, float("nan"), [1, 2]], ids=lambda value: str(value)[:8])
def test_wrong_values_everywhere(base, value):
    "Every figure of every file in turn is something else."
    run = make(stages=("data", "tokenizer", "base", "mid"), bits_per_byte=1.0, bits_per_byte_of_beginnings=1.1, entropy_bits_per_byte=0.9, world_size=1, core_missing="why")
    atomic_write(run.dir/"base"/"core.json", json.dumps(core_json(left_out=[t.label for t in CORE[2:]])))
    evaluation = json.loads((run.dir/"mid"/"eval.json").read_text())
    evaluation["tasks"] |= {"humaneval": task(0.1, 50, pass_at={"1": 0.1, "10": 0.3}, samples=10, too_long=3)}
    atomic_write(run.dir/"mid"/"eval.json", json.dumps(evaluation))

    def places(x, path=()):
        for key in (x if isinstance(x, dict) else range(min(len(x), 1)) if isinstance(x, list) else ()):
            yield *path, key
            yield from places(x[key], (*path, key))
    drawn = {"base/manifest.json": "base", "mid/eval.json": "scores", "base/core.json": "core", "plan.json": None}
    for name in drawn:
        whole = (run.dir/name).read_text()
        found = list(places(json.loads(whole)))
        for path in random.Random(f"{name} {value}").sample(found, min(4, len(found))): # all of them would take a minute
            if path[-1] in ("fingerprint", "index", "tokens", "torch", "system", "python"): continue
            changed = inner = json.loads(whole)
            for key in path[:-1]: inner = inner[key]
            inner[path[-1]] = value
            (run.dir/name).write_text(json.dumps(changed))
            try: report = Report(run)
            except Exception as e: raise AssertionError(f"{name} with {value!r} at {path}") from e
            for b in report.blocks:
                if isinstance(b, Picture) and b.name == drawn.get(name): assert b.svg()
        (run.dir/name).write_text(whole)
    rows = [json.loads(line) for line in (run.dir/"metrics.jsonl").read_text().splitlines()]
    (run.dir/"metrics.jsonl").write_text("".join(json.dumps(row | {key: value}) + "\n" for row in rows for key in row if row["step"] == 3))
    assert written(run)


@pytest.mark.parametrize("config", [{"dial": [1]}, {"hardware": None, "data": 3}, {"base": "x"}, {1: 2, "mid": {"mixture": {1: 2, "a": 3}}}, {"hardware": {"nproc": "many"}}, {"dial": {"until": ["x"]}}, {"preset": ["x"], "seed": {}}])
def test_wrong_configuration(base, config):
    run = make()
    atomic_write(run.dir/"config.yaml", yaml.safe_dump(run.config | config))
    with pytest.raises(UserError, match="config.yaml is damaged"): written(run)


def test_hostile_text(base):
    "What a model, a task's author or a broken file says is shown and never obeyed."
    run = make(config={"preset": HOSTILE.replace("\ud800", "").replace("\x00", ""), "data": {"source": "<b>|"}}, core_missing=HOSTILE)
    bad = task(0.5, 100, items=[{"index": 0, "prompt": HOSTILE * 50, "answer": HOSTILE * 50, "right": False}])
    atomic_write(run.dir/"sft"/"eval.json", json.dumps({"tasks": {HOSTILE: bad, "__x": bad, "x" * 5000: bad, "mmlu": bad | {"too_long": HOSTILE, "pass_at": {HOSTILE: HOSTILE}}}, "missing": {HOSTILE: HOSTILE}}))
    core = core_json()
    core["tasks"] = {(HOSTILE + label if i == 0 else label): t | {"type": HOSTILE} for i, (label, t) in enumerate(core["tasks"].items())}
    atomic_write(run.dir/"mid"/"core.json", json.dumps(core | {"missing": [HOSTILE]}))
    (run.dir/"rl"/"manifest.json").unlink()
    (run.dir/"rl"/"error.txt").write_bytes(HOSTILE.encode("utf-8", "surrogatepass") * 1000)
    page, text = written(run)
    assert page.text.count("<script>alert(1)</script>") >= 5 and "<script>" not in text
    assert len(text) < 100_000 and not set("\x00\x1b\ud800\u202e") & set(text + page.text)
    assert "\n# h" not in text and "![x]" not in text


def test_metrics_that_a_crash_cut_short(base):
    run = make()
    with open(run.dir/"metrics.jsonl", "a") as f: f.write('{"stage": "rl", "st')
    assert read_run(run).problems == []
    with open(run.dir/"metrics.jsonl", "a") as f: f.write('\n{"stage": "rl", "step": 4, "steps": 4, "reward": NaN}\n')
    assert read_run(run).problems == ["metrics.jsonl is damaged: 1 of its lines hold no values of a stage and are left out."]
    assert "reward nan" in written(run)[1]


def test_changed_configuration(base):
    run = make()
    atomic_write(run.dir/"config.yaml", (run.dir/"config.yaml").read_text() + "mid: {lr_scale: 3}\n")
    text = written(Run.open("r"))[1]
    assert "config.yaml has changed since mid, sft, rl ran" in text.replace("\\", "") and "Not finished: mid, sft, rl" in text


def test_cost_counts_every_machine(base):
    "A run on two nodes: the configuration knows 8 devices, the manifest 16."
    run = make(config={"hardware": {"nproc": 8}}, world_size=16)
    for stage in STAGES:
        if (path := run.dir/stage/"manifest.json").exists():
            manifest = json.loads(path.read_text())
            if stage != "base": del manifest["world_size"]
            path.write_text(json.dumps(manifest | {"seconds": 3600, "environment": {"gpu": "NVIDIA H100 80GB HBM3"}}))
    text = written(run)[1].replace("\\", "")
    assert "| base | done | 1 h 0 min | $48.00 |" in text and "| mid | done | 1 h 0 min | $48.00 |" in text
    assert "| together |  | 6 h 0 min | $288.04 |" in text # with three seconds of questions
    assert "| cost | – | $288.04 | – |" in text and "$48.00 an hour" in text


def test_core_and_published_figures(base):
    run = make()
    atomic_write(run.dir/"base"/"core.json", json.dumps(core_json(0.2)))
    atomic_write(run.dir/"sft"/"core.json", json.dumps(core_json(0.3, left_out=()) | {"max_per_task": None}))
    found = {"sums": task(0.5, 100), "arc-easy": task(0.4, 2376, 0.25, too_long=2), "humaneval": task(0.1, 164, pass_at={"1": 0.1, "10": 0.25}, samples=10)}
    atomic_write(run.dir/"sft"/"eval.json", json.dumps({"tasks": found, "world_score": 0.5, "chat_core": 0.081, "chat_core_of": 2, "missing": {"mmlu": "its files are not here."}}))
    page, text = written(run)
    assert "the mean over only 21 of the 22 tasks" in text and "Missing: jeopardy. At most 500 questions" in text and "over all 22 tasks. All questions" in text
    assert "0.0165" in text and (run.dir/"report_files"/"core.png").stat().st_size > 10_000
    for t in CORE: assert t.label in page.text
    table = text.split("## Beside nanochat-2025\n\n")[1].split("\n\n")[0].splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == list(PUBLISHED)
    assert "| 0.2219 | – | – | – |" in table[2] and "<br>21 tasks" in table[2]
    assert "| – | 0.3561 | 0.3876 | – |" in table[4] and f"{found['arc-easy']['accuracy']:.4f}<br>(" in table[4]
    assert "0.0810<br>2 tasks" in table[-1]
    for sentence in ("ARC-Easy, SFT: 2 questions did not fit", "HumanEval, SFT: pass@1 0.1000, pass@10 0.2500, from 10 answers", "SFT was not evaluated on: mmlu (its files are not here.)"): assert sentence in page.text, sentence
    assert "arc-easy" not in text.split("## Beside")[0].split("![Scores")[0] # not in the world's table too


def test_why_there_is_no_core(base):
    assert "CORE could not be measured: no network." in written(make(core_missing="no network."))[1]


def answered(right, paired):
    "A task's answers, of questions that can be told to be the same or not."
    k, n = right.count("1"), len(right)
    return {"accuracy": k / n, "ci95": wilson_interval(k, n), "right": right if paired else None}


@pytest.mark.parametrize("common", [0.0, 0.8], ids=["own questions", "same questions"])
def test_interval_of_a_difference_holds_the_truth_95_times_of_100(common):
    rng, hits, widths = random.Random(3), 0, []
    for _ in range(600):
        pairs = []
        for _ in range(150): # with a chance of `common` both answers hang on one hard or easy question
            u, v = rng.random(), rng.random()
            pairs.append((str(int(u < 0.5)), str(int((u if rng.random() < common else v) < 0.6))))
        first, second = (answered("".join(right), bool(common)) for right in zip(*pairs))
        _, low, high = difference(first, second)
        hits += low <= 0.1 <= high
        widths.append(high - low)
    assert 0.925 <= hits / 600 <= 0.985, hits
    assert (sum(widths) / 600 < 0.16) == bool(common) # pairs tell smaller differences apart


def test_comparison(base):
    a, b = make("a"), make("b", config={"seed": 2, "hardware": {"nproc": 1, "tracker": "none"}})
    for run, p in ((a, 0.2), (b, 0.4)): atomic_write(run.dir/"base"/"core.json", json.dumps(core_json(p, seed=run.name)))
    shutil.copy(a.dir/"mid"/"eval.json", b.dir/"mid"/"eval.json")
    atomic_write(b.dir/"sft"/"eval.json", json.dumps({"tasks": {"sums": task(0.95, 100), "facts": task(0.2, 50)}}))
    before = last_run()
    path = Comparison(["a", b]).write()
    assert path == a.dir/"vs_b.html" and (a.dir/"vs_b.md").exists()
    assert last_run() == before and sorted(p.parent.name for p in (base/"runs").glob("*/config.yaml")) == ["a", "b"] # nothing that could pass for a run
    assert_alone(path.read_text())
    text = path.with_suffix(".md").read_text().replace("\\", "")
    assert "| seed | 1 | 2 |\n| hardware.tracker | – | none |\n\n" in text # and no other setting
    rows = {tuple(line.strip("| ").split(" | ")[:2]): line for line in text.split("## Scores")[1].splitlines() if line.startswith("| ")}
    assert rows["mid", "sums"].endswith("| not told apart |") and "+0.0 (" in rows["mid", "sums"]
    assert rows["sft", "sums"].endswith("| better |") and rows["sft", "facts"].endswith("| – | – |")
    assert "Over the 21 tasks that both have" in text and ": better." in text and "0.0165" in text
    assert "| base | 12 s | 12 s |" in text and "| base | bits per byte | 0.3333 | 0.3333 |" in text and "| rl | reward | 0.75 | 0.75 |" in text
    for picture in ("curves", "core_base"): assert (a.dir/"vs_b_files"/f"{picture}.png").stat().st_size > 3000


def test_comparison_of_runs_with_holes(base):
    make("a")
    broken, empty = make("b with space", stages=("data", "tokenizer", "base")), make("_c", stages=())
    atomic_write(broken.dir/"mid"/"error.txt", "no space is left.")
    atomic_write(broken.dir/"base"/"manifest.json", "{")
    (empty.dir/"plan.json").unlink()
    path = Comparison(["b with space", "a", "_c"]).write()
    text = path.with_suffix(".md").read_text().replace("\\", "")
    assert "b with space: mid failed: no space is left." in text and "b with space: base/manifest.json is damaged" in text
    assert "](vs_a_vs__c_files/curves.png)" in text
    assert "](vs_b%20with%20space_files/" in Comparison(["a", "b with space"]).write().with_suffix(".md").read_text()
    assert "None of the runs has been evaluated" in Comparison(["_c", "b with space"]).write().with_suffix(".md").read_text()
    assert len(Comparison(["a", *(make(f"{i}" * 120, stages=()).name for i in range(3))]).write().name) < 50


def test_comparison_refuses(base):
    make("a", stages=())
    for names, words in ((["a", "nobody"], "'nobody'"), (["a", "a"], "named twice"), (["a"], "two runs or more"), ([], "two runs or more"), (["a", "../b"], "'../b'")):
        with pytest.raises(UserError, match=words): Comparison(names)
    with pytest.raises(UserError, match="'nobody'"): Report("nobody")


def test_smoke_run(smoke, copy):
    page = assert_alone((smoke.run/"report.html").read_text())
    assert "Not finished" not in page.text and "is damaged" not in page.text
    for words in ("Plan and measurement", "together", "bits per byte on held-out text in rows as pretraining packs it", "Peak learning rates"): assert words in page.text, words
    half = copy("base")
    (half.run/"mid").mkdir()
    (half.run/"mid"/"error.txt").write_text("the disk is full.")
    done = nanochat(half.base, "report", "smoke")
    assert done.returncode == 0 and "mid failed: the disk is full." in (half.run/"report.html").read_text(), done.stderr
