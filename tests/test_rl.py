"""Reinforcement learning: each switch against its formula, off against plain REINFORCE bit for bit, killed, on two ranks, with a broken reward, and on GSM8K."""
import copy
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import on_ranks, real_data

from nanochat.core.files import UserError
from nanochat.core.machine import barrier, distributed
from nanochat.core.run import Metrics, Run, read_metrics
from nanochat.core.tokenizer import Tokenizer
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.optim import make_optimizer
from nanochat.model.engine import Engine, Sampling
from nanochat.train.plan import make_plan
from nanochat.train.loop import LoopSettings
from nanochat.post.tasks import visible_text
from nanochat.post.rl import (
    HeldOutTasks, PolicySettings, RolloutSettings, Rollouts, lay_out, note_distance,
    policy_gradient, reinforce, rl_tasks, rollout, show_rollouts)

EVERYTHING = {"sigma_norm": True, "clip": 0.1, "kl": 0.2, "updates": 3}
SAMPLING = RolloutSettings(prompts_per_step=4, samples_per_prompt=4, sampling=Sampling(3, temperature=0.7, top_k=40), seed=3)
MICRO_TOKENS = 64
TOKENIZER = Tokenizer.train([], 265)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Vowels:
    "Rewards an answer of an even number of bytes: a model of chance is right half of the time."
    def __init__(self, name="vowels", reward=None):
        self.name = name
        if reward: self.reward = reward
    def __len__(self): return 50
    def __getitem__(self, i): return {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "a"}]}
    def evaluate(self, conversation, text): return len(text.encode()) % 2 == 0
    def reward(self, conversation, text): return float(self.evaluate(conversation, text))


def random_model(seed=0, vocab_size=TOKENIZER.vocab_size, sequence_len=32):
    "A model that is not sure, but not the same everywhere."
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2: p.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return model.eval()


def train(folder, tasks=None, model=None, steps=6, checkpoints=None, lr=0.01, **changes):
    "A few steps; the model, what was returned, and the log without what depends on the clock."
    engine = Engine(model or random_model(), TOKENIZER)
    tasks = tasks or [Vowels()]
    result = reinforce(engine, optimizer_of(engine.model, lr), tasks, HeldOutTasks(tasks, problems=4, batch=4), LoopSettings(steps, eval_every=3, checkpoints=checkpoints, desc="RL"),
                       SAMPLING, PolicySettings(**changes), micro_tokens=MICRO_TOKENS, metrics=lambda step: Metrics(Path(folder)/"metrics.jsonl", "rl", step))
    rows = [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in read_metrics(Path(folder)/"metrics.jsonl")]
    return engine.model, {k: v for k, v in result.items() if k != "seconds"}, rows


def optimizer_of(model, lr=0.01): return make_optimizer(model, matrix_lr=lr, embedding_lr=lr, head_lr=lr, scalar_lr=lr, weight_decay=0.0)


def same_weights(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_switched_off_it_is_plain_reinforce_bit_for_bit(tmp_path):
    model, _, rows = train(tmp_path)
    plain = random_model()
    engine, optimizer = Engine(plain, TOKENIZER), optimizer_of(plain)
    for step in range(6):
        answers = rollout(engine, [Vowels()], step, SAMPLING)
        n = sum(sum(a.completion.mask) for a in answers)
        plain.zero_grad()
        for b in lay_out(answers, MICRO_TOKENS)[0]:
            nll = plain(b.x, b.y, loss_reduction="none")
            ((b.advantage[:, None] * nll).sum() / n).backward()
        optimizer.step(lr_mult=1 - step / 6, wd_mult=0.0)
    assert same_weights(model, plain) and not same_weights(model, random_model())
    logged = [row for row in rows if "reward" in row]
    assert len(logged) == 6 and logged[0]["kl"] == 0.0 and all(row["kl"] > 0 for row in logged[1:])


def naive_loss(model, answers, n, old=None, reference=None, clip=0.0, kl=0.0):
    "The whole loss, a token at a time; the other two are functions from ids to log-probabilities."
    total = 0.0
    for a in answers:
        ids = torch.tensor([a.prompt + a.completion.tokens])
        log_p, before, ref = (m(ids).log_softmax(-1)[0] for m in (model, old or model, reference or model))
        for t, (token, sampled) in enumerate(zip(a.completion.tokens, a.completion.mask), start=len(a.prompt) - 1):
            if not sampled: continue
            ratio, A = log_p[t, token].exp() / before[t, token].detach().exp(), a.advantage
            gain = ratio * A
            if clip and (A > 0 and ratio > 1 + clip or A < 0 and ratio < 1 - clip): gain = gain.detach()
            r = ref[t, token].detach().exp() / log_p[t, token].exp()
            total = total - gain + kl * (r - 1 - r.log())
    return total / n


@pytest.mark.parametrize("clip, kl", [(0.0, 0.0), (0.05, 0.0), (0.0, 0.7), (0.05, 0.7)])
def test_second_gradient_against_autograd(clip, kl):
    "Answers of one model, drawn at another temperature; a second one is trained, a third is the reference."
    old, model, reference = random_model(), random_model(), random_model()
    for seed, moved in ((1, model), (2, reference)):
        with torch.no_grad():
            for p in moved.parameters(): p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)), alpha=0.02)
    answers = rollout(Engine(old, TOKENIZER), [Vowels()], 0, replace(SAMPLING, sampling=Sampling(3, temperature=0.3, top_k=40), seed=1))
    n = sum(sum(a.completion.mask) for a in answers)
    batches, others = lay_out(answers, 64, all_train=kl > 0)
    note_distance(old, reference, batches, others)
    policy_gradient(old, batches, n)  # the first update: notes what the policy that answered thought
    for b in batches: b.old = b.old.clone()
    loss, beyond = policy_gradient(model, batches, n, clip=clip, kl=kl)
    twin = copy.deepcopy(model)
    twin.zero_grad()
    naive_loss(twin, answers, n, old, reference, clip, kl).backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters()):
        if q.grad is not None: torch.testing.assert_close(p.grad, q.grad, atol=2e-5, rtol=1e-3, msg=name)
    assert (beyond > 0) == (clip > 0) and math.isfinite(loss)


def test_sigma_gives_every_prompt_the_same_weight(tmp_path):
    plain, normed = (rollout(Engine(random_model(), TOKENIZER), [Vowels()], 0, replace(SAMPLING, seed=1), sigma_norm=s) for s in (False, True))
    assert [a.completion.tokens for a in plain] == [a.completion.tokens for a in normed]
    for i in range(0, 16, 4):
        a, b = ([x.advantage for x in answers[i:i + 4]] for answers in (plain, normed))
        if any(a): assert sum(x * x for x in b) == pytest.approx(4) and [x * b[0] for x in a] == pytest.approx([x * a[0] for x in b])
        else: assert not any(b)
    assert not same_weights(train(tmp_path/"a")[0], train(tmp_path/"b", sigma_norm=True)[0])


@pytest.mark.parametrize("switches", [{}, EVERYTHING], ids=["off", "on"])
def test_killed_and_resumed(tmp_path, switches):
    asked = 0
    def reward(conversation, text):
        nonlocal asked
        asked += 1
        if asked > 4 * 16: raise KeyboardInterrupt  # in step 5, after the checkpoint of step 3
        return Vowels.evaluate(None, conversation, text)
    with pytest.raises(KeyboardInterrupt): train(tmp_path/"killed", [Vowels(reward=reward)], checkpoints=tmp_path/"checkpoints", **switches)
    resumed = train(tmp_path/"killed", checkpoints=tmp_path/"checkpoints", **switches)
    undisturbed = train(tmp_path/"undisturbed", **switches)
    assert same_weights(resumed[0], undisturbed[0]) and resumed[1:] == undisturbed[1:]
    assert not same_weights(resumed[0], random_model())
    assert all("clipped" in row for row in resumed[2] if "reward" in row) == bool(switches)


@pytest.mark.parametrize("reward, said", [(lambda conversation, text: 1 / 0, "failed (ZeroDivisionError"), (lambda conversation, text: math.nan, "is nan, which is not a finite number"),
                                          (lambda conversation, text: "good", "is 'good', which is not a finite number")])
def test_a_broken_reward_is_one_sentence(tmp_path, reward, said):
    with pytest.raises(UserError) as error: train(tmp_path, [Vowels("my own task", reward)])
    assert "the reward of task 'my own task'" in str(error.value) and said in str(error.value) and "\n" not in str(error.value)


def test_settings_are_refused_when_the_plan_is_made():
    for settings, said in (({"rl.task": "sums,chess"}, "rl.task names 'chess'"), ({"rl.task": "humaneval"}, "rl.task names 'humaneval'"), ({"rl.clip": 0.2}, "rl.updates to 2 or more"),
                           ({"rl.updates": 0}, "rl.updates"), ({"rl.kl": -1}, "rl.kl"), ({"rl.sigma_norm": "maybe"}, "rl.sigma_norm")):
        with pytest.raises(UserError) as error: make_plan("smoke", settings)
        assert said in str(error.value)
    plan = make_plan("smoke", {"rl.task": "sums, gsm8k", "rl.updates": 2, "rl.clip": 0.2}).config["rl"]
    assert (plan["task"], plan["updates"], plan["clip"], plan["kl"], plan["sigma_norm"]) == ("sums, gsm8k", 2, 0.2, 0.0, False)


def test_two_tasks_share_alike(tmp_path):
    rows = [row for row in train(tmp_path, [Vowels("odd"), Vowels("even")])[2]]
    steps, looks = [row for row in rows if "reward" in row], [row for row in rows if "heldout_accuracy" in row]
    assert all(row["reward"] == pytest.approx((row["reward/odd"] + row["reward/even"]) / 2) for row in steps)
    assert all({"heldout/odd", "heldout/even", "heldout_finished"} <= row.keys() for row in looks) and len(looks) == 3


def on_rank(folder, broken):
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    with distributed(torch.device("cpu")):
        if broken:
            task = Vowels(reward=(lambda conversation, text: 1 / 0) if rank else None)
            try: train(Path(folder)/str(rank), [task])
            except UserError as e: (Path(folder)/f"said_{rank}.txt").write_text(str(e))
        else:
            model, result, rows = train(Path(folder), **EVERYTHING)
            torch.save((model.state_dict(), result, rows), Path(folder)/f"rank_{rank}.pt")
        barrier()


def start_ranks(world_size, folder, broken=False):
    folder.mkdir()
    assert on_ranks(world_size, on_rank, str(folder), broken) == [0] * world_size


def test_two_ranks_do_what_one_does(tmp_path):
    start_ranks(2, tmp_path/"two")
    two = [torch.load(tmp_path/"two"/f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]
    _, result, rows = train(tmp_path/"one", **EVERYTHING)
    model = train(tmp_path/"again", **EVERYTHING)[0].state_dict()
    assert all(torch.equal(a, b) for a, b in zip(two[0][0].values(), two[1][0].values()))
    for name, p in model.items(): torch.testing.assert_close(two[0][0][name], p, atol=2e-3, rtol=1e-3, msg=name)
    assert two[0][1]["tokens"] == result["tokens"] and two[0][1]["step"] == 6
    ours = [row for row in two[0][2] if row["stage"] == "rl"]
    assert len(ours) == len(rows)
    for a, b in zip(ours, rows):
        assert a.keys() == b.keys()
        for key, value in b.items():
            if key != "stage": assert a[key] == pytest.approx(value, rel=1e-3, abs=1e-4), (key, b["step"])


def test_a_reward_that_fails_on_one_rank_ends_both(tmp_path):
    start_ranks(2, tmp_path/"broken", broken=True)
    said = [(tmp_path/"broken"/f"said_{rank}.txt").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and "ZeroDivisionError" in said[0]


def test_twenty_steps_on_gsm8k(tmp_path, monkeypatch):
    "A run on the real problems: it logs, and goes on after a kill. A model of chance solves none, so the reward here is another: the share of digits in an answer."
    monkeypatch.setenv("NANOCHAT_DATA_ROOT", str(real_data("gsm8k").parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # there is no test split in the folder: a tenth is held out
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path/"base"))
    tasks, heldout = rl_tasks("gsm8k", 1)
    assert len(tasks[0]) > 6000 and len(heldout[0]) > 700
    assert not {task["messages"][0]["content"] for task in map(tasks[0].__getitem__, range(len(tasks[0])))} & {heldout[0][i]["messages"][0]["content"] for i in range(len(heldout[0]))}
    tokenizer = Tokenizer.train([m["content"] for i in range(300) for m in tasks[0][i]["messages"][:1]], 1024)
    assert [tasks[0].reward(tasks[0][0], visible_text(tasks[0][i]["messages"][-1])) for i in (0, 1)] == [1.0, 0.0]
    tasks[0].reward = lambda conversation, text: sum(c.isdigit() for c in text) / max(1, len(text))

    def run(folder, stop_at=None, steps=20):
        engine = Engine(random_model(vocab_size=tokenizer.vocab_size, sequence_len=128), tokenizer)
        calls, reward = 0, tasks[0].reward
        def counted(conversation, text):
            nonlocal calls
            calls += 1
            if stop_at is not None and calls > stop_at * 16: raise KeyboardInterrupt
            return reward(conversation, text)
        tasks[0].reward = counted
        try:
            loop = LoopSettings(steps, eval_every=8, checkpoints=folder/"checkpoints", desc="RL")
            return reinforce(engine, optimizer_of(engine.model), tasks, HeldOutTasks(heldout, problems=4, batch=4), loop, replace(SAMPLING, sampling=Sampling(24, temperature=0.7, top_k=40)),
                             micro_tokens=1024, metrics=lambda step: Metrics(folder/"metrics.jsonl", "rl", step)), engine.model
        finally: tasks[0].reward = reward

    with pytest.raises(KeyboardInterrupt): run(tmp_path/"killed", stop_at=12)
    result, resumed = run(tmp_path/"killed")
    undisturbed_result, undisturbed = run(tmp_path/"undisturbed")
    assert same_weights(resumed, undisturbed) and result["tokens"] == undisturbed_result["tokens"]
    rows = [row for row in read_metrics(tmp_path/"killed"/"metrics.jsonl") if "reward" in row]
    assert [row["step"] for row in rows] == list(range(1, 21)) and all(math.isfinite(row[k]) for row in rows for k in ("reward", "loss", "kl", "entropy", "length", "finished", "useful"))
    assert sum(row["useful"] for row in rows) > 0 and not same_weights(resumed, random_model(vocab_size=tokenizer.vocab_size, sequence_len=128))


def test_show_rollouts_of_a_run(smoke):
    run = Run(smoke.run, yaml.safe_load((smoke.run/"config.yaml").read_text()))
    for stage in ("sft", "rl"):
        shown = show_rollouts(run, problems=2, samples=3, stage=stage)
        assert isinstance(shown, Rollouts) and len(shown.answers) == 6 and len(shown.groups()) == 2
        assert shown._repr_html_().count("reward ") == 6
