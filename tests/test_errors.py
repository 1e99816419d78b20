"""Bad input and damaged files: one sentence, exit code 2, and nothing lost."""
import shutil

import pytest
from conftest import assert_user_error, contents, nanochat

from nanochat.train.checkpoint import latest_checkpoint

REFUSED = { # before anything is written: arguments, and what the sentence has to say
    "preset": (["--preset", "gigantic"], ["'gigantic'", "smoke"]),
    "setting": (["--preset", "smoke", "--set", "base.stepz=3"], ["'base.stepz'", "base.steps"]),
    "setting without value": (["--preset", "smoke", "--set", "base.steps"], ["'base.steps'", "key=value"]),
    "value": (["--preset", "smoke", "--set", "base.steps=many"], ["base.steps", "'many'", "number"]),
    "batch that does not divide": (["--preset", "smoke", "--set", "base.batch_tokens=1000"], ["1,000", "base.batch_tokens="]),
    "missing folder": (["--preset", "smoke", "--data", "no/such/folder"], ["no/such/folder"]),
    "depth beyond the memory": (["--preset", "smoke", "--plan", "--hardware", "RTX 3080", "--set", "hardware.device=cuda", "--depth", "100", "--set", "aspect_ratio=128", "--set", "head_dim=128"],
                                ["depth 100", "set depth="]),
    "hardware without plan": (["--preset", "smoke", "--hardware", "8xH100"], ["--plan"]),
    "unknown hardware": (["--preset", "speedrun", "--hardware", "8xQ9000", "--plan"], ["8xQ9000"]),
    "run name": (["--preset", "smoke", "--run", "../away"], ["'../away'"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_anything_is_written(tmp_path, what):
    arguments, words = REFUSED[what]
    assert_user_error(nanochat(tmp_path, "speedrun", *arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_depth_beyond_this_machine(tmp_path):
    done = nanochat(tmp_path, "speedrun", "--preset", "smoke", "--depth", 100, "--set", "dial.aspect_ratio=1024")
    assert_user_error(done, "depth 100", "set depth=")
    assert list(tmp_path.iterdir()) == []


def test_folder_without_text(tmp_path):
    base, folder = tmp_path/"base", tmp_path/"pictures"
    folder.mkdir()
    (folder/"cat.png").write_bytes(b"\x89PNG")
    done = nanochat(base, "speedrun", "--preset", "smoke", "--data", folder)
    assert_user_error(done, str(folder), ".txt")
    assert [path.name for path in folder.iterdir()] == ["cat.png"]
    (folder/"cat.txt").write_text("The cat sat on the mat. It did not move at all.\n\n" * 100) # with text in it, the same run goes on
    assert nanochat(base, "stage", "data", "--run", "smoke-pictures").returncode == 0


def test_no_run_to_talk_to(tmp_path):
    assert_user_error(nanochat(tmp_path, "chat", "-p", "Hello"), "nanochat speedrun")
    assert_user_error(nanochat(tmp_path, "chat", "--run", "mine", "-p", "Hello"), "'mine'")
    assert_user_error(nanochat(tmp_path, "report", "mine"), "'mine'")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_another_configuration(smoke):
    before = contents(smoke.base)
    done = nanochat(smoke.base, "speedrun", "--preset", "smoke", "--set", "base.steps=61")
    assert_user_error(done, "base.steps is 60 there and 61 here", "--run")
    assert contents(smoke.base) == before


def test_stage_too_early(copy):
    mine = copy("data")
    before = contents(mine.base)
    assert_user_error(nanochat(mine.base, "stage", "mid", "--run", "smoke"), "3_pretrain.ipynb first")
    assert contents(mine.base) == before


@pytest.fixture
def interrupted(copy):
    "A run in the middle of pretraining: its last checkpoint is one with optimizer state."
    mine = copy("base")
    (mine.run/"base"/"manifest.json").unlink()
    shutil.rmtree(latest_checkpoint(mine.run/"base"/"checkpoints"))
    assert (latest_checkpoint(mine.run/"base"/"checkpoints")/"optimizer.safetensors").exists()
    return mine


def truncate(path):
    "Leave the first half of a file."
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "meta.json"])
def test_damaged_checkpoint(interrupted, file):
    path = latest_checkpoint(interrupted.run/"base"/"checkpoints")
    truncate(path/file)
    before = contents(interrupted.base)
    assert_user_error(nanochat(interrupted.base, "stage", "base", "--run", "smoke"), file, "damaged", f"delete the folder {path}")
    assert contents(interrupted.base) == before


def test_damaged_checkpoint_through_the_driver(interrupted):
    path = latest_checkpoint(interrupted.run/"base"/"checkpoints")
    truncate(path/"model.safetensors")
    before = contents(interrupted.base, "3_pretrain.ipynb")
    assert_user_error(nanochat(interrupted.base, "speedrun", "--preset", "smoke"), "model.safetensors", f"delete the folder {path}")
    assert f"delete the folder {path}" in (interrupted.run/"base"/"error.txt").read_text() # for the report
    assert contents(interrupted.base, "3_pretrain.ipynb", "error.txt") == before


def test_damaged_checkpoint_on_two_ranks(interrupted):
    path = latest_checkpoint(interrupted.run/"base"/"checkpoints")
    truncate(path/"model.safetensors")
    but = ("3_pretrain.ipynb", "config.yaml", "error.txt", "ranks.log")
    before = contents(interrupted.base, *but)
    assert_user_error(nanochat(interrupted.base, "speedrun", "--preset", "smoke", "--nproc", 2), "model.safetensors", f"delete the folder {path}")
    after = contents(interrupted.base, *but)
    # the launcher may end the other rank while it writes error.txt
    assert {name: hash for name, hash in after.items() if not name.endswith(".part")} == before


def test_damaged_model_of_a_finished_run(copy):
    mine = copy("sft")
    truncate(latest_checkpoint(mine.run/"sft"/"checkpoints")/"model.safetensors")
    before = contents(mine.base)
    assert_user_error(nanochat(mine.base, "chat", "-p", "Hello"), "model.safetensors", "damaged")
    assert_user_error(nanochat(mine.base, "stage", "rl", "--run", "smoke"), "model.safetensors", "damaged")
    assert contents(mine.base) == before


@pytest.mark.parametrize("damage", ["{: [", "", "just words"])
def test_damaged_configuration(copy, damage):
    mine = copy("base")
    (mine.run/"config.yaml").write_text(damage)
    before = contents(mine.base)
    for command in (["speedrun", "--preset", "smoke"], ["stage", "mid", "--run", "smoke"]):
        assert_user_error(nanochat(mine.base, *command), "config.yaml", "damaged")
    assert contents(mine.base) == before


def test_damaged_manifest(copy):
    mine = copy("mid")
    truncate(mine.run/"base"/"manifest.json")
    before = contents(mine.base)
    assert_user_error(nanochat(mine.base, "speedrun", "--preset", "smoke"), "manifest.json", "damaged")
    assert contents(mine.base) == before


def test_damaged_tokenizer(copy):
    mine = copy("tokenizer")
    truncate(mine.run/"tokenizer"/"tokenizer.json")
    before = contents(mine.base, "3_pretrain.ipynb", "error.txt")
    assert_user_error(nanochat(mine.base, "stage", "base", "--run", "smoke"), "tokenizer.json")
    assert_user_error(nanochat(mine.base, "speedrun", "--preset", "smoke"), "tokenizer.json")
    assert contents(mine.base, "3_pretrain.ipynb", "error.txt") == before
