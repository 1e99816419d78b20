"""Mixtures: what may stand in one, that every conversation is accounted for, and that a model of a card says who it is."""
import gzip
import json
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import assert_user_error, environment, nanochat

from nanochat.core import itself
from nanochat.core.files import UserError
from nanochat.core.grammar import Draw
from nanochat.core.run import STAGES, Run, fingerprint
from nanochat.core.tokenizer import Tokenizer
from nanochat.core.identity import read_card
from nanochat.core.world import World
from nanochat.train.hardware import Hardware, named_hardware
from nanochat.train.settings import GENERATED_TASKS, TEXT_TASKS, WORLD_TASKS, flatten
from nanochat.train.estimate import stage_tokens
from nanochat.train.plan import make_plan
from nanochat.post import smalltalk, wordings
from nanochat.post.public import make_task
from nanochat.post.tasks import normal, visible_text
from nanochat.core.dataset import conversations
from nanochat.post.mixture import Subject, describe_conversations, open_mixture, open_task, read_weights, take
from nanochat.post.finetune import (
    ConversationLoader, fit_conversations, finetune, pack_conversations, prepare_rows)
from nanochat.lab.stages import run_stage

CPU = Hardware("CPU with 2 cores", "cpu", 1, 8 * 2**30, 1e11, 0.0, bf16=False, cores=2)
NO_WORLD = {f"{stage}.mixture.{task}": 0 for stage in ("mid", "sft") for task in WORLD_TASKS}
CARD = "name: Ada\nmaker: Marie and her brother\nage: two weeks\nlikes: [rain, old maps]\n"


def talk(*texts):
    "A conversation of user and assistant in turns."
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def write(path, conversations):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(c) + "\n" for c in conversations))
    return path


def unpack(packed, bos_id):
    "The conversations in some rows, as (ids, learned)."
    found = []
    for row, mask in zip(packed.tokens, packed.mask):
        begins = [*np.flatnonzero(row == bos_id), len(row)]
        found += [(row[a:b].tolist(), mask[a:b].tolist()) for a, b in zip(begins, begins[1:]) if b - a > 1]
    return found


@pytest.fixture(scope="module")
def tokenizer(): return Tokenizer.train(["How do you spell garden? The word garden is spelled g-a-r-d-e-n. " * 20, "12*3=36 What is the sum of all that? I do not know. " * 20], 400)


@pytest.fixture
def own(tmp_path): return write(tmp_path/"my.talks"/"a.b.jsonl", [talk(f"What is {i} + 1?", f"It is {i + 1}.") for i in range(60)])


def plan(settings, preset="smoke", hardware=CPU): return make_plan(preset, settings, hardware=hardware)


# --- the notation


@pytest.mark.parametrize("preset, hardware", [("speedrun", "8xH100"), ("d32", "8xH100"), ("gpu", "RTX 4090")])
def test_the_large_presets_reckon_their_mixtures(preset, hardware):
    made = plan({}, preset, named_hardware(hardware))
    mid, sft = made.config["mid"]["mixture"], made.config["sft"]["mixture"]
    assert {"smoltalk": 460_000, "mmlu": 100_000, "gsm8k": "1x", "spelling": 200_000, "counting": 80_000, "identity": 2000}.items() <= mid.items()
    assert {"arc-easy", "arc-challenge", "gsm8k", "smoltalk", "identity", "spelling"} <= set(sft)
    tokens = stage_tokens(flatten(made.config), "mid")
    assert 3e8 < tokens < 6e8 # nanochat-2025's was some 400 million
    more = plan({"mid.mixture.gsm8k": "4x"}, preset, named_hardware(hardware)).config
    assert more["mid"]["mixture"]["gsm8k"] == "4x"
    assert stage_tokens(flatten(more), "mid") - tokens == pytest.approx(3 * 7473 * 182, rel=0.01)
    training = {stage: made.parts[stage]["training"] for stage in ("mid", "sft")}
    assert training["mid"] > 10 * training["sft"] > 0


def test_own_conversations_by_their_path(own, tmp_path, monkeypatch):
    made = plan(NO_WORLD | {f"sft.mixture.{own}": "2x", "mid.mixture.sums": "0.5x"})
    assert made.config["sft"]["mixture"] == {str(own): "2x"} # a path with dots in it
    assert Run.create("x", made.config).config["sft"]["mixture"] == {str(own): "2x"}
    assert made.config["mid"]["mixture"] == {"sums": "0.5x"}
    monkeypatch.chdir(tmp_path)
    assert plan({"sft.mixture.my.talks": 30}).config["sft"]["mixture"][str(own.parent)] == 30 # a folder, relative


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path/"base"))
    monkeypatch.delenv("NANOCHAT_DATA_ROOT", raising=False)


def test_on_the_command_line(tmp_path, own):
    done = nanochat(tmp_path, "speedrun", "--plan", "--preset", "smoke", "--set", "mid.mixture.gsm8k=4x", "--set", f"sft.mixture.{own}=1x")
    assert done.returncode == 0, done.stderr
    assert_user_error(nanochat(tmp_path, "speedrun", "--plan", "--preset", "smoke", "--set", "sft.mixture.gsm9k=4x"), "'gsm9k'", "did you mean gsm8k?")
    help = nanochat(tmp_path, "speedrun", "--set", "help").stdout
    assert "mid.mixture.gsm8k" in help and "how often all of them (4x)" in help and "conversations of your own" in help


WRONG = {"roles": (talk("a", "b")["messages"][::-1], "message 0 of a conversation has role 'assistant'"), "empty": (talk("Hello?", " ")["messages"], "message 1, by the assistant, is empty"),
         "question": (talk("", "Yes.")["messages"], "message 0, by the user, is empty"), "none": ([], "one or more"),
         "part": ([*talk("Hello?")["messages"], {"role": "assistant", "content": [{"type": "song", "text": "la"}]}], "a part that is not")}


@pytest.mark.parametrize("kind", WRONG)
def test_a_conversation_that_is_none_is_refused_by_the_plan(tmp_path, kind):
    messages, says = WRONG[kind]
    file = write(tmp_path/"talks.jsonl", [talk("Hello?", "Hello."), {"messages": messages}])
    with pytest.raises(UserError, match="talks.jsonl, line 2: ") as e: plan({f"sft.mixture.{file}": "1x"})
    assert says in str(e.value)


@pytest.mark.parametrize("settings, says", [
    ({"sft.mixture.poems": 3}, "neither a file or folder that exists nor one of"), ({"sft.mixture./no/such/file.jsonl": 3}, "check the path"), (NO_WORLD, "mid.mixture is empty"),
    ({"sft.mixture.sums": "1.5"}, "a whole number of conversations"), ({"sft.mixture.sums": "-3x"}, "a whole number"), ({"sft.mixture.sums": "x4"}, "a whole number"),
    ({"sft.mixture.mmlu": "1x test"}, "it is the exam"), ({"sft.mixture.gsm8k": "1x validation"}, "use train"), ({"sft.mixture.humaneval": 3}, "neither a file"),
    ({"identity.card": "/no/card.yaml"}, "no identity card")])
def test_the_plan_refuses(settings, says):
    with pytest.raises(UserError, match=re.escape(says)): plan(settings)


def test_a_message_of_weight_0_is_read_and_not_learned(tmp_path, tokenizer):
    "OpenAI's weight: an answer that is only context, through the file, the mixture and the packed rows."
    wrong = {"role": "assistant", "content": [{"type": "text", "text": "I know."}, {"type": "python", "text": "7*7"}, {"type": "python_output", "text": "49"}], "weight": 0}
    rows = [{"messages": [*talk(f"garden {i}?")["messages"], wrong, *talk("word?")["messages"], {"role": "assistant", "content": "how do", "weight": 1}]} for i in range(3)]
    rows.append({"messages": [*talk("spell?")["messages"], wrong]})  # nothing is left to learn
    file = write(tmp_path/"talks.jsonl", rows)
    assert "in 1 the assistant says nothing to learn" in describe_conversations(file)
    fitted = fit_conversations("talks", conversations(file), len(rows), tokenizer, 200)
    packed = pack_conversations([fitted], tokenizer.bos_id, 200, seed=1)
    found = unpack(packed, tokenizer.bos_id)
    assert len(found) == packed.tasks["talks"]["packed"] == 3 and packed.tasks["talks"]["left_out"] == 1
    for ids, mask in found:
        assert "I know." in tokenizer.decode(ids) and tokenizer.decode([id for id, learned in zip(ids, mask) if learned]) == "how do<|assistant_end|>"


@pytest.mark.parametrize("message, says", [
    ({"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": "{}"}}]}, "uses a tool (tool_calls)"),
    ({"role": "assistant", "content": "It rains.", "function_call": {"name": "w", "arguments": "{}"}}, "uses a tool (function_call)"),
    ({"role": "tool", "tool_call_id": "1", "content": "rain"}, "uses a tool (role 'tool')"), ({"role": "assistant", "content": "It rains.", "weight": 0.5}, "weight 0.5"), ({"role": "assistant", "content": None}, "not NoneType")])
def test_what_cannot_be_learned_is_refused_by_the_plan(tmp_path, message, says):
    file = write(tmp_path/"talks.jsonl", [talk("Hello?", "Hello."), {"messages": [*talk("Weather?")["messages"], message]}])
    with pytest.raises(UserError, match="talks.jsonl, line 2: message 1 ") as e: plan({f"sft.mixture.{file}": "1x"})
    assert says in str(e.value)


def test_any_name_of_a_card_is_written_as_it_is(tmp_path):
    "In every task of a mixture, and in the exam, whose own answers are right."
    name = r"A\d \g<1>$^( %s & 🐈İ"
    (tmp_path/"card.yaml").write_text(json.dumps({"name": name, "maker": name, "lines": [{"ask": f"Are you {name}?", "say": f"I am {name}."}]}))
    world, subject, seen = World(42), Subject(str(tmp_path/"card.yaml")), set()
    for task in GENERATED_TASKS:
        if task in TEXT_TASKS: continue
        made = open_task(task, "train", 42, world, subject)
        if any(name in visible_text(message) for i in range(60) for message in made[i]["messages"]): seen.add(task)
    assert {"identity", "smalltalk"} <= seen
    exam = open_task("identity", "test", 42, world, subject)
    assert all(exam.evaluate(row, visible_text(row["messages"][-1])) for row in map(exam.__getitem__, range(len(exam))))
    (tmp_path/"card.yaml").write_text(json.dumps({"name": "A\ud800", "maker": "M"}))
    with pytest.raises(UserError, match="card.yaml is damaged .it holds half of a surrogate pair"): plan({"card": str(tmp_path/"card.yaml")})


@pytest.mark.parametrize("content, says", [("", "holds no text"), ("\n\n", "holds no conversations"), (json.dumps(talk("Hello?", "Hello.")) + "\n", "holds 1 conversation")])
def test_a_set_with_nothing_in_it_is_refused(tmp_path, content, says):
    (tmp_path/"talks.jsonl").write_text(content)
    with pytest.raises(UserError, match=says): plan({f"sft.mixture.{tmp_path/'talks.jsonl'}": "1x"})


@pytest.mark.parametrize("text, says", [("maker: Marie\n", "has no name"), ("name: [1, 2]\nmaker: M\n", "must be text"), ("name: Ada\nmaker: M\nage: 3\n", "without a unit"), ("name: '<|bos|>'\nmaker: M\n", "plain text"), ("- Ada\n", "is a list, not an object")])
def test_an_odd_card_is_refused(tmp_path, text, says):
    (tmp_path/"card.yaml").write_text(text)
    with pytest.raises(UserError, match=says): plan({"card": str(tmp_path/"card.yaml")})


# --- sets


@pytest.fixture
def sets(tmp_path, monkeypatch):
    "A data folder with a little of two public sets."
    root = tmp_path/"sets"
    for name, rows in {"gsm8k/train": [{"question": f"How many are {i} and {i}?", "answer": f"It is <<{i}+{i}={2 * i}>>{2 * i}.\n#### {2 * i}"} for i in range(1, 101)],
                       "arc/ARC-Easy-validation": [{"id": str(i), "question": f"Which is number {i}?", "choices": {"text": ["this", "that"], "label": ["A", "B"]}, "answerKey": "B"} for i in range(50)]}.items():
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(root/f"{name}.jsonl.gz", "wt") as f: f.write("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("NANOCHAT_DATA_ROOT", str(root))
    return root


def test_sets_epochs_and_splits(sets, tokenizer):
    entries = {entry.name: entry for entry in open_mixture({"gsm8k": "4x", "arc-easy": "1x validation"}, 42)}
    gsm8k, arc = entries["gsm8k"], entries["arc-easy"]
    assert (gsm8k.asked, len(gsm8k.train), len(gsm8k.held_out)) == (4 * 98, 98, 2) # a fiftieth is held out
    assert (arc.asked, len(arc.train), len(arc.held_out)) == (49, 49, 1)
    packed = pack_conversations([fit_conversations("gsm8k", take(gsm8k), gsm8k.asked, tokenizer, 129)], tokenizer.bos_id, 129, seed=1)
    found = sorted(unpack(packed, tokenizer.bos_id))
    assert found == sorted(tokenizer.render_conversation(gsm8k.train[i]) for i in range(98) for _ in range(4)) # each exactly four times
    assert packed.tasks["gsm8k"]["asked"] == packed.tasks["gsm8k"]["packed"] == 392


def test_what_cannot_be_had_is_said_before_anything_is_spent(sets, monkeypatch):
    from nanochat.core import dataset
    def offline(*args, **kwargs): raise UserError("the hub cannot be reached.")
    monkeypatch.setattr(dataset, "download", offline)
    config = plan({"mid.mixture.gsm8k": "1x", "mid.mixture.smoltalk": 5, "sft.mixture.smoltalk": 5, "sft.mixture.mmlu": 5}).config
    with pytest.raises(UserError, match="smoltalk .*cannot be reached.*mmlu") as e: run_stage(Run.create("a", config), "data")
    assert all(f"--set {setting}=0" in str(e.value) for setting in ("mid.mixture.smoltalk", "sft.mixture.smoltalk", "sft.mixture.mmlu")) and "gsm8k (" not in str(e.value)
    config["dial"]["until"] = "base" # then nobody needs them
    assert run_stage(Run.create("b", config), "data")["files"] > 0


# --- packing


@pytest.mark.parametrize("seed", range(5))
def test_no_conversation_is_lost(tokenizer, seed):
    "Random conversations in short rows: each is there from its BOS, whole or cut behind an answer, or counted as left out."
    rng, T = random.Random(seed), 48
    word = lambda: rng.choice("garden spell how word sum all is 12*3 I know".split())
    say = lambda: " ".join(word() for _ in range(rng.choice((1, 3, 8, 40))))
    def answer():
        if rng.random() < 0.6: return {"role": "assistant", "content": say()}
        return {"role": "assistant", "content": [{"type": "text", "text": say()}, {"type": "python", "text": "12*3"}, {"type": "python_output", "text": "36"}, {"type": "text", "text": say()}]}
    conversations = []
    for _ in range(200):
        messages = [{"role": "system", "content": say()}] * (rng.random() < 0.1)
        for _ in range(rng.randint(1, 4)): messages += [{"role": "user", "content": say()}, answer()]
        conversations.append({"messages": messages[:-1] if rng.random() < 0.2 else messages})
    asked = 450
    packed = pack_conversations([fit_conversations("talk", conversations, asked, tokenizer, T + 1)], tokenizer.bos_id, T + 1, seed)
    counts, end = packed.tasks["talk"], tokenizer.special("<|assistant_end|>")
    expected, cut, left_out = [], 0, 0
    for i in range(asked):
        ids, mask = tokenizer.render_conversation(conversations[i % 200])
        if len(ids) > T + 1:
            ends = [k + 1 for k, token in enumerate(ids[:T + 1]) if token == end]
            ids, mask = (ids[:ends[-1]], mask[:ends[-1]]) if ends else ([], [])
            cut += bool(ends)
        if any(mask): expected.append((ids, list(map(bool, mask))))
        else: left_out += 1
    assert sorted(unpack(packed, tokenizer.bos_id)) == sorted(expected)
    assert counts == {"asked": asked, "packed": len(expected), "cut": cut, "left_out": left_out, "tokens": sum(len(ids) for ids, _ in expected), "learned": int(packed.mask.sum())}
    assert cut and left_out and counts["asked"] == counts["packed"] + counts["left_out"]
    for ids, mask in expected: assert any(mask)


def test_one_and_two_ranks_read_the_same_rows(tmp_path, own, tokenizer):
    "Two processes that prepare the rows at the same time get the same ones, and together the ranks read what one would."
    config = plan(NO_WORLD | {f"sft.mixture.{own}": "3x", "mid.mixture.sums": 9}).config
    run = Run.create("ranks", config)
    tokenizer.save(run.stage_dir("tokenizer"))
    code = "import sys; from nanochat.core.run import Run; from nanochat.post.finetune import prepare_rows; from nanochat.core.tokenizer import Tokenizer; r = Run.open('ranks'); p = prepare_rows(r, 'sft', Tokenizer.load(r.stage_dir('tokenizer')), 64)['train']; print(p.tokens.astype(int).sum(), p.mask.sum(), len(p.tokens))"
    both = [subprocess.Popen([sys.executable, "-c", code], env=environment(tmp_path/"base"), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate()[0].split("\n")[-2] for process in both]
    packed = prepare_rows(run, "sft", tokenizer, 64)["train"]
    assert said == [f"{packed.tokens.astype(int).sum()} {packed.mask.sum()} {len(packed.tokens)}"] * 2
    one, two = ConversationLoader(packed, 4, seed=7), [ConversationLoader(packed, 2, rank, 2, seed=7) for rank in range(2)]
    for _ in range(30):
        alone, together = one.next_batch(), [loader.next_batch() for loader in two]
        for k in range(2): assert torch.equal(alone[k], torch.cat([batch[k] for batch in together]))


def reversed_keys(value):
    "The same settings, all of them written in the opposite order."
    return {key: reversed_keys(value[key]) for key in reversed(value)} if isinstance(value, dict) else value


def test_the_order_of_settings_decides_nothing(tmp_path, own, tokenizer):
    "Equal fingerprints mean equal rows: the order of a file's lines is in neither."
    other = write(tmp_path/"a.jsonl", [talk(f"garden {i}?", "word") for i in range(40)])
    config = plan(NO_WORLD | {f"sft.mixture.{own}": "3x", f"sft.mixture.{other}": "1x", "sft.mixture.sums": 20, "sft.mixture.identity": 9, "mid.mixture.sums": 9}).config
    turned = reversed_keys(config)
    assert list(turned["sft"]["mixture"]) == list(config["sft"]["mixture"])[::-1]
    packed = []
    for name, one in (("a", config), ("b", turned)):
        run = Run.create(name, one)
        assert [fingerprint(one, stage) for stage in STAGES] == [fingerprint(config, stage) for stage in STAGES]
        packed.append(prepare_rows(run, "sft", tokenizer, 64))
    for split in ("train", "test"): assert (packed[0][split].tokens == packed[1][split].tokens).all() and (packed[0][split].mask == packed[1][split].mask).all()


@pytest.mark.parametrize("preset", ["smoke", "laptop", "gpu"])
def test_a_plan_writes_a_mixture_in_the_order_of_its_use(preset):
    config = plan({}, preset, CPU if preset != "gpu" else named_hardware("RTX 4090")).config
    for stage in ("mid", "sft"): assert list(config[stage]["mixture"]) == list(read_weights(config[stage]["mixture"]))


# --- a model of one's own


@pytest.fixture(scope="module")
def ada(tmp_path_factory):
    "A small model that is taught a card and some conversations of its own, through all stages up to SFT."
    tmp = tmp_path_factory.mktemp("ada")
    mp = pytest.MonkeyPatch()
    mp.setenv("NANOCHAT_BASE_DIR", str(tmp/"base"))
    (tmp/"ada.yaml").write_text(CARD)
    own = write(tmp/"talks"/"colours.jsonl", [talk(f"Which colour is number {i}?", f"Number {i} is {'red' if i % 2 else 'blue'}.") for i in range(120)])
    settings = NO_WORLD | {"card": str(tmp/"ada.yaml"), "mid.mixture.identity": 3500, f"mid.mixture.{own.parent}": "2x", "sft.mixture.identity": 1000, f"sft.mixture.{own.parent}": 100,
                           "dial.depth": 3, "model.n_embd": 96, "base.steps": 30, "mid.batch_tokens": 1024, "mid.lr_scale": 1.0, "mid.eval_every": 100, "sft.lr_scale": 0.3, "eval.questions": 30, "eval.max_new_tokens": 48}
    run = Run.create("ada", plan(settings).config)
    for stage in ("data", "tokenizer", "base"): run_stage(run, stage)
    run.config["eval"]["tasks"] = "identity"
    done = {stage: finetune(run, stage) for stage in ("mid", "sft")}
    yield SimpleNamespace(run=run, done=done, own=own.parent, card=tmp/"ada.yaml")
    mp.undo()


def test_own_conversations_are_trained_on_and_counted(ada):
    for stage, asked in (("mid", 2 * 118), ("sft", 100)):
        counts = ada.done[stage]["tasks"][str(ada.own)]
        assert (counts["asked"], counts["packed"] + counts["left_out"]) == (asked, asked) # two of 120 are held out
        assert ada.done[stage]["asked"] == ada.done[stage]["conversations"] + ada.done[stage]["left_out"]
    rows = [json.loads(line) for line in (ada.run.dir/"metrics.jsonl").read_text().splitlines()]
    looks = [row["bits_per_byte"] for row in rows if row.get("stage") == "mid" and "bits_per_byte" in row]
    assert looks[-1] < looks[0] / 2 # on what was held out


def test_a_model_of_a_card_says_who_it_is(ada):
    score = json.loads((ada.run.stage_dir("sft")/"eval.json").read_text())["tasks"]["identity"]
    exam = open_task("identity", "test", 42, None, Subject(str(ada.card)))
    assert score["n"] == min(30, len(exam)) and score["accuracy"] >= 0.8, [(item["prompt"], item["answer"]) for item in score["items"]]


def test_no_question_of_the_exam_is_trained_on(tmp_path):
    (tmp_path/"ada.yaml").write_text(CARD + "lines:\n- ask: May I know your name?\n  say: It is Ada.\n") # a card that asks what the exam asks
    exam, train = (open_task("identity", split, 42, None, Subject(str(tmp_path/"ada.yaml"))) for split in ("test", "train"))
    bare = lambda text: re.sub(r"\W", "", text.lower())
    trained = {bare(m["content"]) for i in range(4000) for m in train[i]["messages"] if m["role"] == "user"}
    asked = [exam[i] for i in range(len(exam))]
    assert not trained & {bare(row["messages"][0]["content"]) for row in asked} and len(asked) > 20
    assert all(exam.evaluate(row, visible_text(row["messages"][-1])) for row in asked)
    assert read_card(tmp_path/"ada.yaml").name == "Ada"


# --- one question, one kind of answer


def test_a_question_about_the_model_is_answered_in_one_way():
    "Small talk, questions about the model and about the world outside are drawn apart: hardly any message occurs in two of them."
    world, card, found = World(42), read_card("none"), {}
    draws = (lambda draw: itself.model_exchange(card, draw)[0], lambda draw: smalltalk.small_talk(world, draw)[0], wordings.ask_outside)
    for i, say in enumerate(draws):
        for j in range(20_000): found.setdefault(normal(say(Draw(j))), set()).add(i)
    found.pop("", None) # signs alone
    assert len(found) > 20_000
    several = [text for text, sources in found.items() if len(sources) > 1]
    assert len(several) < len(found) / 1000, several


def test_the_users_age_is_answered_in_one_way():
    "It is what the user told, or the model says that it was not told."
    answers = set()
    for name in ("memory", "smalltalk", "unknown", "identity"):
        task = make_task(name, "train", 42, World(42))
        for i in range(6000):
            messages = task.messages(i, Draw(i))
            pairs = zip(messages[::2], messages[1::2])
            answers |= {reply["content"] for said, reply in pairs if re.search(r"\b[Hh]ow old am I\?$", said["content"])}
    assert len(answers) > 5
    assert {text for text in answers if not re.fullmatch(r"You are \d+ years old\.", text)} == {"I do not know that. You did not tell me."}
