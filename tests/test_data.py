"""Text of one's own, in every form that is read, becomes a model that knows something of it."""
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import real_data

from nanochat.common import Run
from nanochat.plan import make_plan
from nanochat.speedrun import run_stage
from nanochat.world import World


def write_txt(folder, texts):
    for i, text in enumerate(texts): (folder/f"{i:03d}.txt").write_text(text)


def write_parquet(folder, texts):
    for i in range(4): pq.write_table(pa.table({"text": texts[i::4], "id": list(range(len(texts[i::4])))}), folder/f"shard_{i:05d}.parquet", compression="zstd")


def write_jsonl_gz(folder, texts):
    with gzip.open(folder/"texts.jsonl.gz", "wt", encoding="utf-8") as f: f.writelines(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts))


def pretrain(monkeypatch, tmp_path, source, **overrides):
    "Data, tokenizer and base model of a small run on a folder of text; returns the run."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path/"base"))
    plan = make_plan("smoke", {"base.eval_tokens": 4096, "base.warmup_steps": 2} | overrides, data=str(source))
    run = Run.create("own", plan.config)
    for stage in ("data", "tokenizer", "base"): run_stage(run, stage)
    return run


def bits_per_byte(run):
    return [row["bits_per_byte"] for row in run.rows("base") if "bits_per_byte" in row]


@pytest.mark.parametrize("write", [write_txt, write_parquet, write_jsonl_gz])
def test_own_text(monkeypatch, tmp_path, write):
    folder, texts = tmp_path/"text", list(World(7).documents(0, 400))
    folder.mkdir()
    write(folder, texts)
    run = pretrain(monkeypatch, tmp_path, folder, **{"base.steps": 10, "base.eval_every": 10, "data.characters": 50_000})
    counts = run.manifest("data")
    assert counts["source"] == str(folder) and counts["train"]["documents"] + counts["val"]["documents"] <= 400
    curve = bits_per_byte(run)
    assert len(curve) == 2 and curve[1] < curve[0] - 0.3, curve
    assert not (tmp_path/"base"/"data").exists() # used where it lies
    assert sorted(path.parent for path in folder.rglob("*")) == [folder] * len(list(folder.iterdir())) # and nothing is put beside it


def test_real_english(monkeypatch, tmp_path):
    source = real_data("text_wiki_en") # English Wikipedia
    before = {path: path.stat().st_mtime_ns for path in source.iterdir()}
    run = pretrain(monkeypatch, tmp_path, source, **{"base.steps": 60, "base.eval_every": 20})
    assert run.manifest("data")["train"]["characters"] >= run.config["data"]["characters"]
    curve = bits_per_byte(run)
    assert len(curve) == 4 and curve == sorted(curve, reverse=True) and curve[0] > 3.5 and curve[-1] < 3.0, curve
    assert run.manifest("tokenizer")["bytes_per_token"]["val"] > 1.5
    assert {path: path.stat().st_mtime_ns for path in source.iterdir()} == before
