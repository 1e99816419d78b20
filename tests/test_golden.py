"""Golden numbers from runs that are finished, the report beside them, and the commands that compare runs."""
import json
import shutil

import pytest
import yaml
from conftest import commands

from nanochat.core.run import Run, fingerprint
from nanochat.lab.golden import run_figures
from nanochat.lab.reading import read_run
from nanochat.lab.report import Report

SEEDS = (42, 43, 44)


def bench(base, *args):
    "Run a benchmark to its end."
    return commands().run(base, "nanochat.lab.bench", [*map(str, args)], timeout=600)


def with_seed(smoke, base, seed):
    "The smoke run under a golden name, as if it had been made with another seed: sums of RL as many right as the seed says."
    dir = base/"runs"/f"golden-smoke-{seed}"
    shutil.copytree(smoke.run, dir)
    config = yaml.safe_load((dir/"config.yaml").read_text()) | {"seed": seed}
    (dir/"config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for path in dir.glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {"fingerprint": fingerprint(config, path.parent.name)}))
    path = dir/"rl"/"eval.json"
    scores = json.loads(path.read_text())
    scores["tasks"]["sums"]["accuracy"] = (seed - 42) / 8
    path.write_text(json.dumps(scores))


@pytest.fixture(scope="module")
def golden(smoke, tmp_path_factory):
    "A base folder with three finished golden runs, and the file that the command made of them."
    base = tmp_path_factory.mktemp("golden")
    for seed in SEEDS: with_seed(smoke, base, seed)
    before = {path: path.stat().st_mtime_ns for path in base.glob("runs/*/*/manifest.json")}
    done = bench(base, "golden", "--preset", "smoke", "--seeds", ",".join(map(str, SEEDS)), "--out", base/"golden.json", "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in before} == before # nothing was computed again
    return base


def test_the_file_holds_what_the_runs_gave(golden, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(golden))
    entry = json.loads((golden/"golden.json").read_text())["smoke"]
    assert entry["seeds"] == list(SEEDS) and len(entry["machines"]) == 1
    assert entry["figures"]["rl/sums"] == {"mean": 0.125, "sd": 0.125, "n": 3, "values": [0.0, 0.125, 0.25], "questions": 8}
    assert entry["figures"].keys() == run_figures(read_run("golden-smoke-42")).keys() # every one of them
    assert {"base/bits_per_byte", "base/bits_per_byte_above_floor", "mid/facts", "sft/world_score", "rl/wild"} <= entry["figures"].keys()


def test_the_report_judges_a_run_of_the_same_settings(golden, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(golden))
    def text(name): return Report(name).write().with_suffix(".md").read_text()
    shutil.copytree(golden/"runs"/"golden-smoke-42", golden/"runs"/"mine")
    assert "as 2 runs did" in text("mine") and "outside: 2" not in text("mine")
    path = golden/"runs"/"mine"/"rl"/"eval.json"
    scores = json.loads(path.read_text())
    scores["tasks"]["facts"]["accuracy"] = 1.0
    path.write_text(json.dumps(scores))
    assert "outside: 2 runs had" in text("mine")
    run = Run.open("mine")
    (run.dir/"config.yaml").write_text(yaml.safe_dump(run.config | {"sft": run.config["sft"] | {"lr_scale": 0.5}}))
    assert "As other runs of this preset" not in text("mine") # other settings: not a word


def test_other_settings_are_refused(golden, tmp_path):
    shutil.copytree(golden, tmp_path/"base")
    dir = tmp_path/"base"/"runs"/"golden-smoke-43"
    config = yaml.safe_load((dir/"config.yaml").read_text())
    config["sft"]["lr_scale"] = 0.5
    (dir/"config.yaml").write_text(yaml.safe_dump(config))
    done = bench(tmp_path/"base", "golden", "--preset", "smoke", "--seeds", "42,43", "--out", tmp_path/"golden.json", "--quiet")
    assert done.returncode == 2 and "another configuration (sft.lr_scale is 0.5" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path/"golden.json").exists()


def test_a_variant_is_compared_with_finished_runs(golden):
    "The runs of the variant are another name for the same settings: all stages are copied, and there is no difference."
    done = bench(golden, "ablations", "--preset", "smoke", "--set", "mid.lr_scale=0.8", "--seeds", 2, "--until", "rl", "--figure", "rl/sums", "--quiet")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "data, tokenizer, base, mid, sft, rl as in golden-smoke-43" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.startswith("mid.lr_scale"))
    assert line.split()[1:5] == ["rl/sums", "0.0625", "0.0625", "0.0000"] and line.endswith("not told apart")


@pytest.mark.parametrize("args, words", [
    (["ablations"], "nothing says what to compare"), (["ablations", "--set", "mid.lr=1", "--seeds", "2"], "there is no setting 'mid.lr'"),
    (["ablations", "--null", "2"], "at least 2"), (["golden", "--seeds", "42"], "at least two different numbers")])
def test_mistakes_are_found_first(tmp_path, args, words):
    done = bench(tmp_path, *args)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
