"""Damaged and strange input, at random: each case is used, or refused in one sentence, within 5 seconds of processor time and 500 MB.

    python tests/fuzz.py lines --seconds 600 --seed 0

A case is drawn from the seed and its own number. What is wrong with one is printed with the command that repeats it."""
import copy
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import click
import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from nanochat.__main__ import cli
from nanochat.core.dataloader import _tokens_state
from nanochat.core.dataset import conversations as read_conversations, damaged_files, iter_texts, read_feedback, show_set
from nanochat.core.files import UserError, append_json_line, read_json
from nanochat.core.machine import peak_memory
from nanochat.core.run import TRAINED, Run
from nanochat.core.tokenizer import Tokenizer
from nanochat.lab.checks import progress
from nanochat.lab.comparison import Comparison
from nanochat.lab.golden import golden_blocks, summarize_runs, write_golden
from nanochat.lab.hub import _about
from nanochat.lab.reading import read_run, simulate_run
from nanochat.lab.report import Report
from nanochat.lab.speedrun import make_plan_for
from nanochat.lab.stages import _note_seconds, _token_counts
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.sandbox import calculator as compute
from nanochat.post.dpo import _task_changes, pair_rows, preferences_from
from nanochat.post.finetune import _load_rows, fit_conversations, pack_conversations
from nanochat.post.mixture import Subject, describe_conversations, open_task
from nanochat.post.public import EXAMS, TASKS, answer_number, code_of
from nanochat.post.tasks import closing_text, final_number, numbers_in, spoken_text, visible_text
from nanochat.talk.chat import Talk, resume_talk
from nanochat.talk.export import from_transformers
from nanochat.talk.serve import in_thread
from nanochat.train.checkpoint import best_checkpoint
from nanochat.train.pretrain import _written_plan

SECONDS, MB, SIZE = 5, 500, 1_000_000 # the most that a call may take, for an input of at most so many bytes

# Documents with odd parts, and bytes with damage

DEEP = 10_000
ODD = [None, True, False, -1, 0, 1, 2.5, -0.0, 1e308, 10**30, 2**63, "x", "", " ", "60", "²", "٣", "a\nb", "a\x00\x1b[31mb\x85\u2028\u202e", "\ud83d", "\udc00\ud800", "🏳️‍🌈e\u0301", "%s {0} $x \\1 ../..", "<|assistant_end|>", "####",
       [], {}, [None], [[]], {"": 1}, {"a": {"a": 1}}, [1, "a", {}], "x" * 5000, [0] * 500]
RAW = ["NaN", "-Infinity", "1e999", "9" * 5000, "9" * 400, "1." + "3" * 5000, "[" * DEEP + "]" * DEEP, '{"a":' * DEEP + "1" + "}" * DEEP, '{"a": 1, "a": [2]}', '"\\u0000\\ud83d"', "0x1F", "1_000", "'x'", "", "}", "/* */ 1"] # no value of Python's
BOMB = "[&a0 [x, x]" + "".join(f", &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60)) + "]"
RAW_YAML = [*RAW, BOMB, "&a [*a]", "*b", "!!int x", "!!float ''", "!!python/object/apply:os.getcwd []", "2024-01-01", "12:30:45", ".nan", "-.inf", "on", "!!binary aGk=", "!!set {a, b}", "{[1]: 2}", "{1: 2, null: 3}", "{<<: {a: 1}}", "{<<: 3}", "&x [&y [*x, *x], *y]",
            "!!timestamp 2024-99-99", "!!omap [a: 1]", "0o17", "! x", "@x", "|", "- a: b: c"]
PIECES = [b"\xef\xbb\xbf", b"\xff", b"\xed\xa0\xbd", b"\x00", b"9" * 5000, *(text.encode() for text in (
    "\u2028 \r \r\n \n \x1b[31m \t null NaN 1e999 9 - . , : \" ' \\ \\ud83d \\u0000 { } [ ] {\"a\": a &a * !!int - ? # % < <<1+ #### ``` ```python\n <|python_start|> <|python_end|> ( ) ** // e+ 1,000 .count( $ ² ٣ − × 🐱 \u0301 \u202e").split(" ")), b" "]


def places(value):
    "Every part of a document, as its container and the key or index there."
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def changed(value, draw, raws=RAW):
    "The JSON of a document in which some parts are replaced, removed, renamed, repeated or wrapped."
    whole = [copy.deepcopy(value)]
    for _ in range(draw.choice((0, 1, 1, 1, 2, 4))):
        inside, key = draw.choice([*places(whole)])
        kind, part = draw.choice(("odd", "odd", "odd", "raw", "raw", "other", "wrap", "repeat", "remove", "rename")), inside[key]
        if kind == "odd": inside[key] = copy.deepcopy(draw.choice(ODD))
        elif kind == "raw": inside[key] = f"<raw {draw.randrange(len(raws))}>"
        elif kind == "other": inside[key] = copy.deepcopy(draw.choice([holder[k] for holder, k in places(whole)]))
        elif kind == "wrap": inside[key] = draw.choice(([part], {"text": part}, {"": part}))
        elif kind == "repeat" and isinstance(part, (list, str)): inside[key] = part * draw.choice((2, 50))
        elif inside is not whole:
            del inside[key]
            if kind == "rename" and isinstance(inside, dict): inside[key + draw.choice(("s", " ", "\x00", "é"))] = part
    text = json.dumps(whole[0], ensure_ascii=draw.random() < 0.5)
    for n, raw in enumerate(raws): text = text.replace(f'"<raw {n}>"', raw)
    return text.encode("utf-8", "surrogatepass")


def damaged(data, draw):
    "Bytes of which some are flipped, cut, repeated or in another encoding, or that have others among them; sometimes a megabyte of them."
    data = bytearray(data)
    for _ in range(draw.choice((0, 0, 1, 1, 2, 5))):
        at, n, kind = draw.randrange(len(data) + 1), draw.choice((1, 1, 3, 20, 300)), draw.choice(("flip", "insert", "insert", "cut", "repeat", "end"))
        if kind == "flip" and at < len(data): data[at] ^= 1 << draw.randrange(8)
        elif kind == "insert": data[at:at] = draw.choice(PIECES) * draw.choice((1, 1, 1, 3, 100))
        elif kind == "cut": del data[at:at + n]
        elif kind == "repeat": data[at:at] = data[at:at + n] * draw.choice((1, 3, 100))
        elif kind == "end": del data[at:]
    if draw.random() < 0.03:
        at, piece = draw.randrange(len(data) + 1), draw.choice([*PIECES, bytes(data[:200]) or b"x", draw.choice(PIECES) + draw.choice(PIECES)])
        data[at:at] = piece * (SIZE // len(piece))
    if draw.random() < 0.05: data = data.decode("utf-8", "replace").encode(draw.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-7")), "replace")
    return bytes(data[:SIZE])


# The subjects. Each prepares a folder, and returns a function from a draw to the calls of one case

TALK = {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "How much are 3 boxes of 12 eggs?"},
                     {"role": "assistant", "content": [{"type": "python", "text": "3*12"}, {"type": "python_output", "text": "36"}, {"type": "text", "text": "36 eggs."}]},
                     {"role": "user", "content": "Thanks!"}, {"role": "assistant", "content": "You are welcome.", "weight": 0}]}
FEEDBACK = {"time": 1.5, "rating": 1, "ended": True, "stage": "sft", "instead_of": [{"content": "No.", "ended": True}], "conversation": {"messages": TALK["messages"][1:3]}}
TEXT = {"text": "Once upon a time there was a \u2028 town by the sea. " * 5, "source": "town"}
CARD = {"name": "Ada", "maker": "Marie", "kind": "a model", "age": "2 years", "likes": ["rain"], "lines": ["I am small.", {"ask": "Who?", "say": "Me."}]}


def small_tokenizer(): return Tokenizer.train([TEXT["text"], "I am nanochat. 3 boxes of 12 eggs are 36 eggs. How much?"] * 5, 300)


def read_text(path):
    "What the data stage does with somebody's own text, and what `data show` prints."
    return [lambda: [text.encode() for split in ("train", "val") for text in iter_texts(path, split)], lambda: show_set(str(path)).encode()]


def read_talks(path, tokenizer):
    "What the plan, `mixture check` and the stages do with somebody's own conversations."
    def pack(): pack_conversations([fit_conversations("own", read_conversations(path), 20, tokenizer, 129)], tokenizer.bos_id, 129)
    return [lambda: describe_conversations(path).encode(), pack]


def lines(folder):
    "JSON lines: somebody's own text, and feedback that a chat kept."
    tokenizer = small_tokenizer()
    def pairs(path): pair_rows(preferences_from(read_feedback(path)[0]), tokenizer, 129)
    def add(path):
        before = len(read_feedback(path)[0])
        append_json_line(path, FEEDBACK)
        assert len(read_feedback(path)[0]) == before + 1, "feedback that was added is not read"
    def case(draw):
        rows = draw.choices((TEXT, FEEDBACK, TALK), (2, 2, 1), k=draw.randint(1, 6))
        data = draw.choice((b"\n", b"\n", b"\r\n")).join(changed(row, draw) if draw.random() < 0.4 else json.dumps(row).encode() for row in rows)
        path = folder/draw.choice(("a.jsonl", "a.jsonl", "a.jsonl", "a.jsonl.gz", "a.txt"))
        path.write_bytes(damaged(gzip.compress(data) if path.suffix == ".gz" and draw.random() < 0.8 else data, draw))
        return [*read_text(path), lambda: pairs(path), lambda: add(path)]
    return case


def conversations(folder):
    "Somebody's own conversations, a conversation that a chat saved, and identity cards."
    tokenizer, talk = small_tokenizer(), Talk.__new__(Talk) # without a model
    talk.engine, talk.clear = SimpleNamespace(tokenizer=tokenizer), lambda: None
    def introduce(path):
        task = open_task("identity", subject=Subject(str(path)))
        for n in range(20): tokenizer.render_conversation(task[n])
    def case(draw):
        path = folder/draw.choice(("a.jsonl", "a.jsonl", "a.jsonl", "talk.json", "card.yaml"))
        row, raws = (CARD, RAW_YAML) if path.suffix == ".yaml" else (TALK, RAW)
        path.write_bytes(damaged(b"\n".join(changed(row, draw, raws) for _ in range(draw.randint(1, 5) if path.suffix == ".jsonl" else 1)), draw))
        if path.suffix == ".jsonl": return read_talks(path, tokenizer)
        return [lambda: introduce(path) if path.suffix == ".yaml" else resume_talk(talk, read_json(path, "choose another file."))]
    return case


def parquet(folder):
    "Somebody's own text and conversations as parquet files, of every type, and damaged."
    tokenizer, said = small_tokenizer(), pa.struct({"role": pa.string(), "content": pa.string(), "weight": pa.int64()})
    talks = [[message | {"content": str(message["content"])} for message in TALK["messages"][start:]] for start in (0, 1, 2)] + [None, []]
    def arrays(n, draw):
        text, raw = draw.choices([TEXT["text"], "", None, "é \u2028 🐱", "a\x00b"], k=n), pa.array(draw.choices([b"text", b"\xff", b"\xed\xa0\xbd", b"", b"caf\xe9"], k=n), pa.binary())
        strings, numbers, talk = pa.array(text, pa.string()), pa.array(range(n), pa.int64()), pa.array(draw.choices(talks, k=n), pa.list_(said))
        others = [raw, pa.nulls(n), numbers, numbers.cast(pa.timestamp("ns")), numbers.cast(pa.decimal128(38, 2)), pa.array([float("nan")] * n), pa.array([2**62] * n, pa.duration("us")), pa.array([2**40] * n, pa.date64()),
                  pa.array([[t] for t in text], pa.list_(pa.string())), pa.array([{"text": t} for t in text], pa.struct({"text": pa.string()})), pa.array([[("a", 1)]] * n, pa.map_(pa.string(), pa.int64()))]
        return [strings, strings.cast(pa.large_string()), strings.cast(pa.string_view()), strings.dictionary_encode(), raw.view(pa.string())], [talk, talk.cast(pa.large_list(said))], others
    def case(draw):
        path, n = folder/"a.parquet", draw.choice((0, 1, 2, 7, 300))
        names = draw.choice((["text"], ["text"], ["messages"], ["messages"], ["text", "messages"], ["text", "text"], ["messages", "messages"], ["Text"], [""], ["text.a"], ["é\n"]))
        columns = [draw.choice(draw.choices(arrays(n, draw), (1, 5, 3) if name == "messages" else (5, 1, 3))[0]) for name in names]
        how = {"compression": draw.choice(("snappy", "zstd", "none", "gzip")), "use_dictionary": draw.random() < 0.5, "row_group_size": draw.choice((1, 3, 1000)), "data_page_version": draw.choice(("1.0", "2.0")), "store_schema": draw.random() < 0.7}
        try: pq.write_table(pa.Table.from_arrays(columns, names=names), path, **how)
        except (pa.ArrowException, ValueError): pq.write_table(pa.table({"text": ["one", "two"]}), path) # there is no such parquet file
        if draw.random() < 0.6: path.write_bytes(damaged(path.read_bytes(), draw))
        return [*read_text(path), *read_talks(path, tokenizer)]
    return case


def command(*words):
    "Run a `nanochat` command in this process."
    try: cli.main(list(map(str, words)), standalone_mode=False)
    except click.ClickException as e: raise UserError(e.format_message()) from None


def make_run(base):
    "Make two runs and all other files that our own code reads again. Returns these files, without notebooks."
    if not (base/"runs"/"smoke"/"report"/"manifest.json").exists(): command("speedrun", "--preset", "smoke")
    run, simulated, exported, hub = base/"runs"/"smoke", base/"runs"/"simulated-1", base/"exported", base/"data"/"own"/"hub.json"
    if not simulated.exists(): simulate_run(1, public=True)
    if not exported.exists(): command("export", "smoke", exported)
    hub.parent.mkdir(exist_ok=True)
    hub.write_text(json.dumps({"repo": "a/b", "revision": "main", "commit": None, "files": {"a.parquet": {"sha256": "0" * 64, "size": 3}}}))
    (base/"lessons.json").write_text('{"1.1": "2026-01-01T00:00:00"}')
    write_golden(base/"golden.json", "smoke", summarize_runs([read_run("smoke")] * 2))
    append_json_line(run/"feedback.jsonl", FEEDBACK)
    for shards in base.glob("tokens/*/manifest.json"): shutil.copy(shards, shards.with_name("progress.json"))
    kept = [path for folder in (run, simulated, exported) for kind in ("config.*", "*.json", "*/*.json", "*/rows/*.json", "*.jsonl", "sft/checkpoints/*/*.json", "*/checkpoints/*.json") for path in folder.glob(kind)]
    return sorted({*kept, hub, base/"lessons.json", base/"golden.json", *base.glob("tokens/*/*.json")})


def run(base):
    "A run's files, and others of ours: what reads them, with one command in each second case."
    kept, scratch, exported = base/"kept", base/"scratch", base/"exported"
    if kept.exists(): shutil.copytree(kept, base, dirs_exist_ok=True) # a case was interrupted
    files, tokens = make_run(base), next(base.glob("tokens/*"))
    for path in files:
        copied = kept/path.relative_to(base)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copied)
    right, model = {path: path.read_bytes() for path in files}, GPT(GPTConfig(16, 64, 1, 1, 1, 16))
    of_any = [repr, Run.latest, lambda run: run.rows("base"), _written_plan, read_run, lambda run: _task_changes(run, "sft")]
    of_smoke = [lambda run: _load_rows(run.stage_dir("sft")/"rows", "x"), lambda run: _note_seconds(run, "base", 1.0), lambda run: [best_checkpoint(run.dir/stage/"checkpoints") for stage in TRAINED]]
    others = {tokens: [damaged_files, lambda: _token_counts(tokens), lambda: _tokens_state(tokens, json.loads(right[tokens/"manifest.json"])["settings"])], exported: [lambda: from_transformers(exported), lambda: _about(exported, model)],
              base: [progress, lambda: golden_blocks(read_run("smoke"))], base/"data"/"own": [damaged_files]}
    quick = [("runs",), ("runs", "--json"), ("chat", "--run", "smoke", "-p", "Hi"), ("page", "smoke", "--out", scratch/"page.html"), ("export", "smoke", scratch/"out"), ("data", "verify"),
             ("eval", "smoke", "--tasks", "facts", "--max-per-task", "1"), ("import", exported, "--run", "imported")]
    slow = [lambda: Report("smoke")._repr_html_(), lambda: Report("simulated-1")._repr_html_(), lambda: Comparison(["smoke", "simulated-1"])._repr_html_(), lambda: str(make_plan_for("gpu", {}, "8xH100", Run.open("smoke").config)), lambda: command("dpo", "smoke")]
    def calls(path):
        if path.parent in others: return others[path.parent]
        name = path.relative_to(base/"runs").parts[0]
        return [lambda read=read: read(Run.open(name)) for read in (*of_any, *(of_smoke if name == "smoke" else ()))]
    def case(draw):
        for path, data in right.items():
            if not path.exists() or path.read_bytes() != data: path.write_bytes(data)
        for path in (scratch, base/"runs"/"imported", base/"runs"/"smoke"/"dpo"): shutil.rmtree(path, ignore_errors=True)
        scratch.mkdir()
        path = draw.choice(files)
        raws, parse = (RAW_YAML, yaml.safe_load) if path.suffix == ".yaml" else (RAW, json.loads)
        parts = right[path].splitlines()[-40:] if path.suffix == ".jsonl" else [right[path]]
        data = b"\n".join(changed(parse(part), draw, raws) if len(parts) == 1 or draw.random() < 0.2 else part for part in parts)
        path.write_bytes(damaged(data, draw) if draw.random() < 0.5 else data)
        words, chance = draw.choice(quick), draw.random()
        return [*calls(path), *([draw.choice(slow)] if chance < 0.04 else [lambda: command(*words)] if chance < 0.5 else [])]
    return case


def calculator(folder):
    "Expressions for the calculator, and answers that the tasks and the judge of GSM8K parse."
    asked = [(task, task[n]) for task in (open_task(name, "test") for name in (*TASKS, *EXAMS)) for n in range(5)]
    pieces = ["0", "1", "7", "12", "1,000", "0.1", ".5", "1e3", "1e400", "1_0", "9" * 30, "+", "-", "*", "/", "//", "%", "**", "(", ")", "((", "))", " ", "−", "×", "÷", '"strawberry".count("r")', "'a\\'b'", ".count(", "²", "٣", "½", "j", "=", "\n", "∞", "nan"]
    def check(text):
        result = compute(text)
        assert result is None or Decimal(result).is_finite() and result != "-0", f"the calculator says {result!r} of {text!r}"
    def case(draw):
        text, (task, conversation) = "".join(draw.choices(pieces, k=draw.randint(1, 12))), draw.choice(asked)
        right = visible_text(conversation["messages"][-1])
        answer = draw.choice((right, right, f"<<{text}=1>> #### {text}", f"So it is {text}.", f"```python\ndef f(a):\n    return {text}\n```", ""))
        text, answer = (damaged(t.encode(), draw).decode("utf-8", draw.choice(("replace", "surrogateescape"))) for t in (text, answer))
        reads = [lambda read=read: read(answer) for read in (answer_number, final_number, numbers_in, closing_text, spoken_text)]
        return [lambda: check(text), *reads, lambda: code_of(answer, "import math\n\ndef f(a):\n"), lambda: task.evaluate(conversation, answer)]
    return case


def api(folder):
    "Bodies of requests to the server: answered, or refused with a status of 4xx and a message."
    from test_serve import scripted
    bodies = {"/v1/chat/completions": {"messages": TALK["messages"][:4], "max_tokens": 5, "temperature": 0.5, "stop": ["a"], "stream": False, "logprobs": True, "top_logprobs": 2, "metadata": {"a": "b"}}, "/v1/completions": {"prompt": ["Hi", "You"], "max_tokens": 3, "n": 2, "logprobs": 1}}
    server = in_thread(scripted(small_tokenizer(), lambda question: "Yes."))
    client = httpx.Client(base_url=server.__enter__(), timeout=30)
    def post(path, body):
        answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 200 or 400 <= answer.status_code < 500 and len(answer.json()["error"]["message"]) < 1000, (answer.status_code, answer.text[:500])
    def case(draw, _=server): # kept as long as the function, or it would be closed
        path = draw.choice([*bodies])
        body = damaged(changed(bodies[path], draw), draw)
        return [lambda: post(path, body)]
    return case


SUBJECTS = {subject.__name__: subject for subject in (lines, parquet, conversations, run, calculator, api)}

# How they are run: in a process that may hang or die


def watched(call):
    "Call a function. Returns its seconds of processor time, the megabytes it needed, and what is wrong, if anything."
    before, start, wrong = peak_memory(reset=True) or 0, time.process_time(), ""
    try: call()
    except UserError as e:
        if "\n" in str(e) or len(str(e)) > 1100: wrong = f"not one sentence: {e}"
    except Exception: wrong = traceback.format_exc()
    seconds, mb = time.process_time() - start, (peak_memory() or 0) - before
    if not wrong and (seconds > SECONDS or mb > MB): wrong = f"took {seconds:.1f} s and {mb:.0f} MB"
    return seconds, mb, wrong


def work(subject, folder, seed, numbers, pipe):
    "Try cases. Sends the number of each before it begins, and then what came of it."
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (12 * 10**9, resource.getrlimit(resource.RLIMIT_AS)[1])) # a `MemoryError` before the machine is full
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    sys.stdout = open(os.devnull, "w")
    case = SUBJECTS[subject](folder)
    for n in numbers:
        pipe.send((n, None))
        signal.setitimer(signal.ITIMER_PROF, 60) # of processor time; then the process is killed
        seconds, mb, wrong = zip(*map(watched, case(random.Random(f"{subject} {seed} {n}"))))
        pipe.send((n, (max(seconds), max(mb), "\n".join(filter(None, wrong)))))


def results(subject, folder, seed, numbers):
    "Yield each case's number, seconds, megabytes, and what is wrong. A process that hangs or dies is replaced."
    context, n = multiprocessing.get_context("fork"), None
    while numbers:
        here, there = context.Pipe(False)
        process = context.Process(target=work, args=(subject, folder, seed, numbers, there))
        process.start()
        there.close()
        try:
            here.poll(None) # until everything is prepared
            while here.poll(1800):
                n, result = here.recv()
                if result: yield n, *result
            wrong = "still waits after half an hour"
        except EOFError:
            process.join()
            if process.exitcode == 0: return
            wrong = f"the process ended with {process.exitcode}"
        finally: process.kill()
        if n is None: raise SystemExit(f"{subject}: {wrong}")
        yield n, 0, 0, wrong
        numbers = numbers[numbers.index(n) + 1:]


@click.command()
@click.argument("subjects", nargs=-1, required=True, type=click.Choice([*SUBJECTS]))
@click.option("--seconds", default=600.0, help="Of each subject.")
@click.option("--seed", default=0)
@click.option("--first", default=0, help="The number of the first case.")
@click.option("--cases", default=10**9, help="Most cases of each subject.")
@click.option("--base", type=click.Path(path_type=Path), help="For the subject run: a folder in which `nanochat speedrun --preset smoke` has run, or runs now. What is in it changes.")
def main(subjects, seconds, seed, first, cases, base):
    "Try damaged and strange input, and print what is neither used nor refused in a sentence."
    kinds = set() # where findings come from
    with tempfile.TemporaryDirectory() as folder:
        for subject in subjects:
            here = base if base and subject == "run" else Path(folder)/subject
            here.mkdir(exist_ok=True)
            until, n_cases, slowest, largest = time.monotonic() + seconds, 0, (0, 0), (0, 0)
            for n, took, mb, wrong in results(subject, here, seed, range(first, first + cases)):
                n_cases, slowest, largest = n_cases + 1, max(slowest, (took, n)), max(largest, (mb, n))
                kind = [subject, *(line for line in wrong.splitlines() if line.startswith("  File "))][-1] + wrong[:5]
                if wrong and kind not in kinds: print(f"\npython tests/fuzz.py {subject} --seed {seed} --first {n} --cases 1\n{wrong}", flush=True)
                if wrong: kinds.add(kind)
                if time.monotonic() > until: break
            print(f"{subject}: {n_cases:,} cases, the slowest {slowest[0]:.2f} s (case {slowest[1]}), most memory {largest[0]:.0f} MB (case {largest[1]}); {len(kinds)} kinds of findings so far", flush=True)
    sys.exit(bool(kinds))


if __name__ == "__main__": main()
