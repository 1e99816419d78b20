"""`nanochat eval`, and what the stages do by themselves: CORE, bits per byte, chat tasks; on one rank and on two, with files that are absent or bad."""
import gzip
import json
import shutil
import subprocess
import sys

import pytest
from conftest import assert_user_error, edit_config, environment, nanochat


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "A data folder with a task of CORE in each format, and ARC-Easy."
    root, names = tmp_path_factory.mktemp("data"), ["Mira", "Tom", "Old Jon", "Ada", "Ben", "Rosa"]
    places = ["the mill", "the harbour", "the market", "the school"]
    write_rows(root/"core"/"eval_data"/"commonsense_reasoning"/"copa.jsonl",
               [{"query": f"{name} went to {place}, so", "choices": [f"{name} was at {place}.", "it rained all day."], "gold": 0} for name in names for place in places])
    write_rows(root/"core"/"eval_data"/"language_understanding"/"winograd_wsc.jsonl",
               [{"context_options": [f"{a} thanked {b} because {a}", f"{a} thanked {b} because {b}"], "continuation": "had helped.", "gold": 1} for a in names for b in names if a != b])
    write_rows(root/"core_rebuilt"/"eval_data"/"reading_comprehension"/"squad.jsonl",
               [{"context": f"{name} lives near {place}.\nQuestion: Who lives near {place}?\nAnswer: ", "continuation": name} for name in names for place in places])
    rows = [{"id": str(i), "question": f"Which of these is number {i}?", "choices": {"text": [str(i), str(i + 1), str(i + 2)], "label": ["A", "B", "C"]}, "answerKey": "A"} for i in range(12)]
    (root/"arc").mkdir()
    (root/"arc"/"ARC-Easy-test.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    return root


def measured(run, stage="base"):
    "A stage's core.json without what a clock says."
    core = json.loads((run/stage/"core.json").read_text())
    for part in (core, *core["tasks"].values()): del part["seconds"]
    return core


def test_core_and_bits_per_byte_of_a_run(copy, data):
    place = copy("report")
    done = nanochat(place.base, "eval", "smoke", "--stage", "base", "--data-root", data)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "over 3 of 22 tasks; no file for hellaswag_zeroshot, jeopardy" in done.stdout and "bits per byte of the validation text: " in done.stdout
    first = measured(place.run)
    assert {label: (task["n"], task["rows"], len(task["right"])) for label, task in first["tasks"].items()} == {"copa": (24, 24, 24), "winograd": (30, 30, 30), "squad": (24, 24, 24)}
    assert first["ci95"][0] <= first["score"] <= first["ci95"][1] and first["step"] == 60

    # on two ranks: the same answers, question by question
    env = environment(place.base) | {"NANOCHAT_DATA_ROOT": str(data)}
    (place.run/"base"/"core.json").unlink()
    ranks = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "nanochat", "eval", "smoke", "--stage", "base"],
                           env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert ranks.returncode == 0, ranks.stderr[-3000:]
    assert measured(place.run) == first
    said = [line for text in (done.stdout, ranks.stdout) for line in text.splitlines() if line.startswith("bits per byte")]
    assert len(said) == 2 and said[0] == said[1]


def test_a_task_is_added_to_a_stages_evaluation(copy, data):
    place = copy("report")
    file = place.run/"rl"/"eval.json"
    before = json.loads(file.read_text())
    done = nanochat(place.base, "eval", "smoke", "--tasks", "arc-easy,poems", "--max-per-task", 10, "--data-root", data)
    assert done.returncode == 0, done.stderr[-3000:]
    after = json.loads(file.read_text())
    assert after["tasks"].keys() == before["tasks"].keys() | {"arc-easy"} and after["world_score"] == before["world_score"]
    assert after["tasks"]["arc-easy"]["n"] == 10 and after["chat_core_of"] == 1
    assert "poems" in after["missing"] and "poems: left out" in done.stdout
    assert json.loads((place.run/"metrics.jsonl").read_text().splitlines()[-1])["eval/arc-easy"] == after["tasks"]["arc-easy"]["accuracy"]


def test_pretraining_ends_with_core(tmp_path, data, monkeypatch):
    short = ["speedrun", "--preset", "smoke", "--until", "base", "--set", "base.steps=4", "--set", "base.warmup_steps=1", "--set", "data.characters=200000", "--set", "tokenizer.max_characters=100000"]
    done = nanochat(tmp_path, *short, "--run", "asked", "--set", "eval.core_questions=-1", "--data-root", data)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path/"runs"/"asked"
    manifest, core = (json.loads((run/"base"/name).read_text()) for name in ("manifest.json", "core.json"))
    assert manifest["core"] == core["score"] and len(core["tasks"]) == 3

    # the stage again: files that are bad cost the score, and not the run
    bad = tmp_path/"bad"
    write_rows(bad/"core"/"eval_data"/"commonsense_reasoning"/"copa.jsonl", [{"query": "It rained, so", "choices": ["yes", "no"], "gold": 2}])
    shutil.rmtree(run/"base")
    edit_config(run, eval={"core_questions": 20})
    monkeypatch.setenv("NANOCHAT_DATA_ROOT", str(bad))
    done = nanochat(tmp_path, "stage", "base", "--run", "asked")
    assert done.returncode == 0, done.stderr[-3000:]
    manifest = json.loads((run/"base"/"manifest.json").read_text())
    assert "copa.jsonl, line 1: the right option is 2" in manifest["core_missing"] and "core" not in manifest


@pytest.mark.parametrize("arguments, words", [
    (["smoke", "--stage", "basis"], ["stage 'basis' has no model"]),
    (["--model", "nowhere"], ["nowhere has no config.json"]),
    (["smoke", "--tasks", "core", "--data-root", "nowhere"], ["the data folder", "does not exist"]),
    (["smoke", "--tasks", "sums", "--samples", "4"], ["temperature above 0"]),
    (["smoke", "--tasks", "poems"], ["none of the tasks could be measured", "there is no task 'poems'"]),
], ids=lambda value: " ".join(value) if isinstance(value, list) else None)
def test_what_cannot_be_measured_is_refused(smoke, arguments, words):
    assert_user_error(nanochat(smoke.base, "eval", *arguments), *words)


def test_core_without_files(copy, tmp_path):
    place = copy("report")
    (tmp_path/"mine"/"core").mkdir(parents=True)
    assert_user_error(nanochat(place.base, "eval", "smoke", "--tasks", "core", "--data-root", tmp_path/"mine"), "none of CORE's files")
    # nobody asked for it: the rest is measured
    done = nanochat(place.base, "eval", "smoke", "--stage", "base", "--data-root", tmp_path/"mine")
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(words in done.stdout for words in ("run smoke, stage base", "CORE is left out: none of CORE's files", "bits per byte of the validation text: "))


def test_settings_are_checked_before_anything_runs(tmp_path):
    assert_user_error(nanochat(tmp_path, "speedrun", "--preset", "smoke", "--set", "eval.tasks=world,mmmlu"), "'mmmlu'", "mmlu")
    assert_user_error(nanochat(tmp_path, "speedrun", "--preset", "smoke", "--set", "eval.core_questions=7"), "more than ten")
