"""Preference training of a finished smoke run: simulated and from feedback, stopped and resumed, and what it refuses."""
import json
import shutil

import pytest
import torch
import yaml
from conftest import assert_user_error, nanochat

from nanochat.core.files import UserError
from nanochat.core.dataset import FEEDBACK
from nanochat.core.run import Run, read_metrics
from nanochat.train.checkpoint import load_model
from nanochat.post.dpo import train_dpo
from nanochat.talk.chat import save_feedback
from nanochat.lab.reading import read_run
from nanochat.post import dpo


def thumbs(run, n=12, first=0):
    "Feedback on n questions: the long answer is discarded, and the short one liked."
    for i in range(first, first + n):
        question = {"role": "user", "content": f"What is {i} and {i % 3}?"}
        save_feedback(run.dir/FEEDBACK, [question, {"role": "assistant", "content": f"It is {2 * i}."}], 1, instead_of=[{"content": f"The answer to that is {2 * i}.", "ended": True}])


@pytest.fixture
def here(copy, monkeypatch):
    "A copy of the smoke run up to RL, in this process."
    torch.set_num_threads(1)
    place = copy("rl")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(place.base))
    monkeypatch.setattr(dpo, "evaluate_stage", lambda *args: {"world_score": 0.0}) # which another test does
    return Run.open("smoke")


def weights(run): return load_model(run, "dpo")[0].state_dict()


def test_simulated_from_the_command_line_to_the_chat(copy):
    place = copy("rl")
    done = nanochat(place.base, "dpo", "smoke", "--simulate", 16)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "implicit-reward accuracy 50.0% →" in done.stdout and "choice" in done.stdout
    manifest = json.loads((place.run/"dpo"/"manifest.json").read_text())
    assert (manifest["start"], manifest["simulated"], manifest["pairs"] + manifest["heldout_pairs"]) == ("rl", 16, 16)
    rows = read_metrics(place.run/"metrics.jsonl", "dpo")
    assert rows[0]["heldout_accuracy"] == 0.5 and rows[0]["heldout_margin"] == 0 and rows[0]["drift"] == 0 # the reference is the model itself
    assert {"loss", "accuracy", "margin", "reward_chosen", "reward_rejected"} <= rows[1].keys()
    assert "world_score" in rows[-1]
    # the others know the stage
    assert nanochat(place.base, "chat", "--run", "smoke", "--stage", "dpo", "-p", "Hi").stdout == nanochat(place.base, "chat", "-p", "Hi").stdout
    assert nanochat(place.base, "eval", "--tasks", "identity", "--max-per-task", 2).returncode == 0
    assert json.loads((place.run/"dpo"/"eval.json").read_text())["tasks"]["identity"]["n"] == 2
    assert nanochat(place.base, "report").returncode == 0
    text = (place.run/"report.md").read_text()
    assert "| RL | DPO |" in text and "| dpo | done |" in text and "damaged" not in text
    again = nanochat(place.base, "dpo", "smoke", "--simulate", 16) # nothing is left to do
    assert again.returncode == 0 and "pairs to learn from" not in again.stdout
    assert json.loads((place.run/"dpo"/"manifest.json").read_text()) == manifest


def test_feedback_is_learned_and_more_of_it_begins_anew(here, capsys):
    thumbs(here)
    with open(here.dir/FEEDBACK, "a") as f: f.write('{"rating": 1, "conv\n')
    first = train_dpo(here, changed={"lr_scale": 0.2, "epochs": 8, "pairs_per_step": 4, "beta": 0.5})
    assert "1 damaged line is left out" in capsys.readouterr().out
    assert (first["simulated"], first["pairs"], first["heldout_pairs"], first["settings"]["beta"]) == (0, 9, 3, 0.5)
    assert first["heldout_accuracy"] == 1.0 and first["heldout_margin"] > 0.5, first # a tiny model learns a preference
    assert here.latest() == "dpo" and read_run(here).stages["dpo"].manifest["start"] == "rl"
    thumbs(here, 4, first=12)
    second = train_dpo(here, changed={"lr_scale": 0.2, "epochs": 8, "pairs_per_step": 4, "beta": 0.5})
    assert "training begins again" in capsys.readouterr().out
    assert second["pairs"] + second["heldout_pairs"] == 16 and second["identity"] != first["identity"]


def test_killed_and_resumed_is_the_same_bit_for_bit(here, monkeypatch):
    thumbs(here)
    settings = {"pairs_per_step": 3, "eval_every": 2}
    undisturbed = train_dpo(here, changed=settings)
    wanted, rows = weights(here), [row for row in here.rows("dpo") if "loss" in row]
    shutil.rmtree(here.dir/"dpo")
    gradient, calls = dpo.preference_gradient, []
    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6: raise KeyboardInterrupt
        return gradient(*args, **kwargs)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dpo, "preference_gradient", killed)
        train_dpo(here, changed=settings)
    assert here.latest() == "rl" # not finished
    resumed = train_dpo(here, changed=settings)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(here).items())
    different = ("seconds", "finished")
    assert {k: v for k, v in resumed.items() if k not in different} == {k: v for k, v in undisturbed.items() if k not in different}
    assert [row["loss"] for row in here.rows("dpo") if "loss" in row] == [row["loss"] for row in rows]


def test_a_run_from_before_there_were_preferences(here):
    config = yaml.safe_load((here.dir/"config.yaml").read_text())
    settings = config.pop("dpo")
    (here.dir/"config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    old = Run.open("smoke")
    assert old.manifest("rl") is not None and dpo.dpo_settings(old.config) == settings
    thumbs(old, 8)
    assert train_dpo(old)["pairs"] == 6
    assert Run.create("smoke", config | {"dpo": settings | {"beta": 0.7}}).latest() == "dpo" # neither refused nor undone


def test_what_is_refused(here, monkeypatch, copy):
    assert_user_error(nanochat(here.dir.parent.parent, "dpo", "smoke"), "has no feedback yet", "--keep-feedback", "--simulate 200")
    thumbs(here, 5)
    with pytest.raises(UserError, match="there are 5 pairs of answers, and training needs at least 8"): train_dpo(here)
    long = [{"role": "user", "content": "and then " * 200}, {"role": "assistant", "content": "Yes."}]
    save_feedback(here.dir/FEEDBACK, long, 1, instead_of=[{"content": "No.", "ended": True}])
    with pytest.raises(UserError, match="there are 5 pairs"): train_dpo(here) # the one that is too long is left out
    assert not (here.dir/"dpo"/"checkpoints").exists()
    thumbs(here, 5, first=5)
    with pytest.raises(UserError, match="the DPO loss became nan at step 1: lower dpo.lr_scale"): train_dpo(here, changed={"beta": float("nan")})
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dpo, "rank_and_world", lambda: (0, 2))
    with pytest.raises(UserError, match="one process"): train_dpo(here)
