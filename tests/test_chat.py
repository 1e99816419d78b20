"Talking as a person does: in JupyterLab with a browser and its keyboard, and in a terminal."
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from browser import open_browser
from conftest import REPO, assert_user_error, environment, nanochat

from nanochat.core.run import Run
from nanochat.core.tokenizer import Tokenizer
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.train.checkpoint import save_checkpoint

NASTY = ('<script>window.ran = 1; alert(1)</script><img src="/ran.png" onerror="window.ran = 1">**bold** [link](javascript:alert(1)) $x$ 🐱𝄞 "\'&amp;</div></span>\n' * 80)[:10_000]

# What the notebook's kernel runs. An engine that answers what it is asked for, at a pace that a test can follow, and a real one that babbles.
SETUP = '''
import json, time
from pathlib import Path
from nanochat.talk.widget import Chat, open_chat
from nanochat.core.run import Run
from nanochat.model.engine import TokenEvent
from nanochat.core.tokenizer import StreamDecoder

run = Run.open("demo")
real = open_chat("demo", max_new_tokens=12)
tokenizer = real.talk.engine.tokenizer
nasty = json.loads(Path("nasty.json").read_text())
eggs = [{"type": "text", "text": "Three boxes are "}, {"type": "python", "text": "3*12"}, {"type": "python_output", "text": "36"}, {"type": "text", "text": "36 eggs."}]

class Scripted:
    "Answers by a word in the question."
    context, log = 30_000, Path("stopped.txt")
    def __init__(self, name): self.name, self.tokenizer, self.n = name, tokenizer, 0
    def stream(self, prompt, sampling, *, stop, **settings):
        self.n += 1
        question = tokenizer.decode(prompt).split("<|user_start|>")[-1]
        word = next((word for word in ("slow", "nasty", "eggs") if word in question), "")
        content = {"slow": "one two three " * 200, "nasty": nasty, "eggs": eggs}.get(word, f"Answer {self.n} of {self.name}.")
        ids, mask = tokenizer.render_conversation({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]})
        start = ids.index(tokenizer.special("<|assistant_start|>")) + 1
        decoder = StreamDecoder(tokenizer)
        for token, chosen in zip(ids[start:], mask[start:]):
            if stop.is_set():
                with open(self.log, "a") as f: f.write(f"{time.time()}\\n")
                return
            time.sleep({"slow": 0.03, "nasty": 0}.get(word, 0.02))
            last = token == tokenizer.special("<|assistant_end|>")
            yield TokenEvent(token, "" if last else decoder.add(token), 0.75, [("<b>", 0.125)], not chosen, "stop" if last else None)
'''
CELLS = [SETUP, 'chat = Chat(Scripted("one"), run, "base")\nchat', "real", 'both = Chat({"demo/one": Scripted("one"), "demo/two": Scripted("two")}, run)\nboth']


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A base folder with a run whose tiny model has learned nothing."
    base = tmp_path_factory.mktemp("chat")
    tokenizer = Tokenizer.train(["I am nanochat, a small model. one two three boxes of twelve eggs are 36 eggs. What is your name? **bold** <script>"] * 5, 300)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"))
    model.init_weights(0)
    before = os.environ.get("NANOCHAT_BASE_DIR")
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    try: run = Run.create("demo", {"preset": "none", "seed": 42})
    finally: os.environ.pop("NANOCHAT_BASE_DIR") if before is None else os.environ.update(NANOCHAT_BASE_DIR=before)
    tokenizer.save(run.stage_dir("tokenizer"))
    save_checkpoint(run.stage_dir("base")/"checkpoints", 1, model.state_dict(), None, {"stage": "base", "model": vars(model.config), "tokenizer": tokenizer.hash})
    run.finish("base", step=1)
    return base


@contextmanager
def jupyter_lab(folder, base):
    "JupyterLab on a loopback port, its files in `folder`; yields the address of a path inside it."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {f"JUPYTER_{name}_DIR": str(folder/".jupyter"/name) for name in ("CONFIG", "DATA", "RUNTIME")} | {"JUPYTERLAB_SETTINGS_DIR": str(folder/".jupyter"/"settings"), "JUPYTERLAB_WORKSPACES_DIR": str(folder/".jupyter"/"spaces")}
    token = "loopback-only"
    with open(folder/"lab.log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}",
                                    "--expose-app-in-browser", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"], env=environment(base) | own, stdout=log, stderr=log, cwd=folder)
    try:
        until = time.monotonic() + 60
        while True:
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status?token={token}", timeout=5).close(); break
            except OSError: assert process.poll() is None and time.monotonic() < until, (folder/"lab.log").read_text()[-2000:]
            time.sleep(0.1)
        yield lambda path: f"http://127.0.0.1:{port}/{path}?token={token}"
    finally:
        process.send_signal(signal.SIGTERM) # ends the kernels, too
        process.wait(30)


class Cell:
    "A chat cell on the page, as a person sees it."
    def __init__(self, page, n):
        self.page, self.at = page, page.locator(".jp-CodeCell").nth(n).locator(".jp-OutputArea-output")
        self.box, self.answers, self.turns = self.at.locator("input[type=text][placeholder]"), self.at.locator(".assistant"), self.at.locator(".turns > *")

    def button(self, name): return self.at.get_by_role("button", name=re.compile(rf"\b{name}$")) # an icon may stand before it
    def click(self, name): self.button(name).click()
    def text(self): return self.at.locator(".nc-columns").inner_text()

    def until(self, condition, seconds=15):
        "Wait for something that is asked of this side of the connection."
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited {seconds} s in vain; the cell says: {self.text()[-300:]}"
            time.sleep(0.01)

    def idle(self): self.until(lambda: self.button("Send").is_enabled() and self.button("Stop").is_disabled())

    def ask(self, text):
        "Type a question and press Enter; returns when it is answered."
        before = self.answers.count()
        self.box.fill(text)
        self.page.wait_for_timeout(300) # a person takes longer; a widget may send its text later than the key
        self.box.press("Enter")
        self.until(lambda: self.answers.count() > before, 30) # the question may show before the buttons change
        self.idle()

    def hover(self, token):
        "What the page shows while the mouse is on a token."
        token.hover()
        return token.evaluate("e => getComputedStyle(e, '::after').content"), token.get_attribute("title")


@pytest.fixture(scope="module")
def lab(base, tmp_path_factory):
    "A notebook of chat cells that has been run in JupyterLab, open in a browser."
    folder = tmp_path_factory.mktemp("lab")
    (folder/"nasty.json").write_text(json.dumps(NASTY))
    code = lambda i, text: {"cell_type": "code", "id": f"cell{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": text}
    notebook = {"cells": [code(i, text) for i, text in enumerate(CELLS)], "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}, "nbformat": 4, "nbformat_minor": 5}
    (folder/"talk.ipynb").write_text(json.dumps(notebook))
    with open_browser() as browser, jupyter_lab(folder, base) as address:
        page = browser.new_page(viewport={"width": 1300, "height": 1400})
        seen = SimpleNamespace(dialogs=[], errors=[], requests=[])
        page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: seen.errors.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(address("lab/tree/talk.ipynb"))
        page.locator(".jp-CodeCell").nth(len(CELLS) - 1).wait_for(timeout=60_000)
        page.wait_for_function("window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'", timeout=60_000)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        cells = [Cell(page, i) for i in range(len(CELLS))]
        for cell in cells[1:]: cell.box.wait_for(timeout=60_000)
        yield SimpleNamespace(page=page, chat=cells[1], real=cells[2], both=cells[3], folder=folder, seen=seen)


@pytest.fixture
def chat(lab):
    "The chat cell with one scripted model, cleared."
    lab.chat.idle()
    lab.chat.click("Clear")
    lab.chat.until(lambda: "Nothing said yet" in lab.chat.text())
    return lab.chat


def is_focused(box): return box.evaluate("e => e === document.activeElement")


def test_enter_sends_and_the_answer_streams(lab, chat):
    chat.box.click()
    lab.page.keyboard.type("Is it slow?")
    lab.page.keyboard.press("Enter")
    lengths = []
    while len(set(lengths)) < 4:
        lengths.append(len(chat.answers.last.inner_text()) if chat.answers.count() else 0)
        assert len(lengths) < 500
        time.sleep(0.02)
    assert lengths == sorted(lengths)
    assert is_focused(chat.box) and chat.box.input_value() == "" and chat.button("Send").is_disabled()
    lab.page.keyboard.type("typed meanwhile")
    chat.click("Stop")
    chat.idle()
    assert chat.box.input_value() == "typed meanwhile" # an answer does not disturb the next question
    chat.box.fill("")


def test_stop_ends_the_engines_work_at_once(lab, chat):
    def asked():
        log.unlink(missing_ok=True)
        before = chat.answers.count()
        chat.box.fill("Is it slow?")
        chat.box.press("Enter")
        chat.until(lambda: chat.answers.count() > before and len(chat.answers.last.inner_text()) > 10)
    log, took, shown = lab.folder/"stopped.txt", [], []
    for _ in range(3):
        asked()
        chat.button("Stop").hover()
        start = time.time()
        lab.page.mouse.down()
        lab.page.mouse.up()
        chat.until(lambda: chat.button("Stop").is_disabled() and chat.button("Send").is_enabled())
        shown.append(time.time() - start)
        took.append(float(log.read_text()) - start)
    print(f"after the click, the engine stopped in {[round(1000 * t) for t in took]} ms, the buttons in {[round(1000 * t) for t in shown]} ms")
    assert min(took) < 0.3 and min(shown) < 0.5 # the best of three: the machine may be busy
    assert "Stopped." in chat.text() and len(chat.answers.last.inner_text()) < 2000
    assert is_focused(chat.box)
    asked()
    lab.page.keyboard.press("Tab") # past Send, which cannot be pressed now
    lab.page.keyboard.press("Space")
    chat.idle()
    assert "Stopped." in chat.text() and is_focused(chat.box)


def test_regenerate_edit_and_clear(lab, chat):
    chat.ask("Who are you?")
    first = chat.answers.last.inner_text()
    assert re.fullmatch(r"Answer \d+ of one\.", first)
    chat.click("Regenerate")
    chat.until(lambda: re.fullmatch(r"Answer \d+ of one\.", chat.answers.last.inner_text()) and chat.answers.last.inner_text() != first)
    chat.idle()
    assert chat.answers.count() == 1
    chat.click("Edit")
    chat.until(lambda: chat.box.input_value() == "Who are you?" and chat.answers.count() == 0)
    assert is_focused(chat.box)
    lab.page.keyboard.press("End")
    lab.page.keyboard.type(" And how many eggs?")
    lab.page.keyboard.press("Enter")
    chat.until(lambda: "Who are you? And how many eggs?" in chat.text())
    chat.idle()
    assert chat.at.locator(".assistant .python").inner_text() == "3*12" and chat.at.locator(".assistant .python_output").inner_text() == "36"
    assert "calculator" in chat.at.locator(".assistant .python").evaluate("e => getComputedStyle(e, '::before').content")
    chat.click("Clear")
    chat.until(lambda: "Nothing said yet" in chat.text())


def test_thumbs_want_consent(base, chat):
    kept = base/"runs"/"demo"/"feedback.jsonl"
    chat.ask("Who are you?")
    assert chat.button("Good").is_disabled() and chat.button("Bad").is_disabled() and not kept.exists()
    chat.at.get_by_label("Keep my feedback").check()
    chat.until(lambda: chat.button("Good").is_enabled())
    chat.click("Good")
    chat.until(lambda: "👍 kept" in chat.text())
    chat.click("Regenerate")
    chat.until(lambda: "New answer kept" in chat.text())
    chat.at.get_by_label("Keep my feedback").uncheck()
    chat.until(lambda: chat.button("Good").is_disabled())
    chat.click("Regenerate")
    chat.idle()
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [line["rating"] for line in lines] == [1, 0]
    assert lines[0]["top_p"] == 1.0 and lines[0]["conversation"]["messages"][0]["content"] == "Who are you?"


def test_hovering_shows_probabilities(lab):
    lab.real.ask("Who are you?")
    assert "error" not in (lab.real.turns.last.get_attribute("class") or "")
    tokens = lab.real.at.locator(".assistant .t")
    shown, title = next((content, title) for i in range(tokens.count()) if tokens.nth(i).inner_text().strip() for content, title in [lab.real.hover(tokens.nth(i))])
    assert re.match(r"\d+\.\d%; instead: “", title), title
    assert json.loads(shown) == title # what is shown at once is what a browser shows after a second
    lab.page.mouse.move(0, 0)
    assert tokens.first.evaluate("e => getComputedStyle(e, '::after').content") == "none"


def test_what_a_model_says_stays_text(lab, chat):
    before, old_errors = len(lab.seen.requests), list(lab.seen.errors)
    chat.ask("Be nasty")
    assert chat.answers.last.text_content() == NASTY
    assert chat.at.locator(".assistant :not(span)").count() == 0 # no element but ours
    assert lab.page.evaluate("window.ran") is None and lab.seen.dialogs == [] and lab.seen.errors == old_errors == []
    assert not any("ran.png" in url for url in lab.seen.requests[before:])
    token = chat.at.locator(".assistant .t").first
    assert chat.hover(token)[1] == "75.0%; instead: “<b>” 12.5%"
    chat.ask(NASTY[:300].replace("\n", " "))
    assert lab.page.evaluate("window.ran") is None and lab.seen.dialogs == []


def test_bad_input_is_refused_in_a_sentence(lab, chat):
    chat.box.press("Enter")
    chat.until(lambda: "is empty" in chat.text())
    lab.real.box.fill("egg " * 25_000)
    lab.real.box.press("Enter")
    lab.real.until(lambda: "shorten it" in lab.real.text(), 30)
    lab.real.idle()
    chat.ask("\x01\x1b[2J control")
    assert "Answer" in chat.answers.last.inner_text()


def test_save_and_load(base, lab, chat):
    chat.ask("How many eggs?")
    chat.click("Save")
    chat.until(lambda: "Saved as " in chat.text())
    saved, = (base/"runs"/"demo"/"chats").glob("*.json")
    assert saved.name in chat.text()
    chat.click("Clear")
    chat.until(lambda: chat.answers.count() == 0)
    def upload(file):
        with lab.page.expect_file_chooser() as chooser: chat.at.get_by_role("button", name="Load").click()
        chooser.value.set_files(file)
    upload({"name": "broken.json", "mimeType": "application/json", "buffer": b"{"})
    chat.until(lambda: "not JSON" in chat.text())
    upload(str(saved))
    chat.until(lambda: "Loaded." in chat.text())
    assert chat.at.locator(".assistant .python").inner_text() == "3*12" and "How many eggs?" in chat.text()
    chat.ask("Who are you?")
    assert chat.answers.count() == 2


def test_side_by_side(lab):
    both = lab.both
    both.ask("Who are you?")
    assert both.at.locator(".nc-name").all_inner_texts() == ["demo/one", "demo/two"]
    assert [re.sub(r"\d+", "N", text) for text in both.answers.all_inner_texts()] == ["Answer N of one.", "Answer N of two."]
    columns = [column.bounding_box() for column in both.at.locator(".nc-column").all()]
    assert columns[0]["y"] == columns[1]["y"] and columns[0]["x"] + columns[0]["width"] <= columns[1]["x"]
    both.box.fill("Is it slow?")
    both.box.press("Enter")
    both.until(lambda: both.answers.count() == 4 and all(len(text) > 10 for text in both.answers.all_inner_texts()))
    (lab.folder/"stopped.txt").unlink(missing_ok=True)
    both.click("Stop")
    both.idle()
    both.until(lambda: both.text().count("Stopped.") == 2)
    assert len((lab.folder/"stopped.txt").read_text().splitlines()) == 2
    both.click("Regenerate")
    both.until(lambda: both.button("Stop").is_enabled())
    both.click("Stop")
    both.idle()
    lab.page.set_viewport_size({"width": 560, "height": 1400}) # a narrow page: below each other
    both.until(lambda: len({round(column.bounding_box()["x"]) for column in both.at.locator(".nc-column").all()}) == 1)
    lab.page.set_viewport_size({"width": 1300, "height": 1400})


# ---- the terminal ----

# the command, with an engine that takes its time
SLOW = '''
import sys, time
from nanochat.model.engine import Engine
stream = Engine.stream
def slow(self, *args, **settings):
    for event in stream(self, *args, **settings):
        time.sleep(0.1)
        yield event
Engine.stream = slow
from nanochat.lab.speedrun import main
main()
'''


class Terminal:
    "A program on a pseudo-terminal."
    def __init__(self, base, code, *args):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(REPO)
            signal.signal(signal.SIGINT, signal.SIG_DFL) # a shell's background commands ignore it, and that is inherited
            os.execve(sys.executable, [sys.executable, "-c", code, *args], environment(base) | {"TERM": "dumb"})
        self.shown = ""

    def until(self, pattern, seconds=60):
        "Read until a pattern has come; what is before it is done with."
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown)):
            assert time.monotonic() < end, f"{pattern!r} did not come: {self.shown[-500:]!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try: self.shown += os.read(self.fd, 4096).decode("utf-8", "replace")
                except OSError: assert re.search(pattern, self.shown), f"ended without {pattern!r}: {self.shown[-500:]!r}"
        before, self.shown = self.shown[:found.end()], self.shown[found.end():]
        return before

    def type(self, keys): os.write(self.fd, keys.encode("utf-8", "surrogateescape"))

    def interrupt_until(self, pattern):
        "Press Ctrl-C, again if it came too early: at the end of an answer it only stops this."
        for _ in range(5):
            self.type("\x03")
            try: return self.until(pattern, 12)
            except AssertionError as e: error = e
        raise error

    def ended(self, seconds=20):
        "The exit code."
        end = time.monotonic() + seconds
        while (done := os.waitpid(self.pid, os.WNOHANG))[0] == 0:
            assert time.monotonic() < end, "it goes on"
            if select.select([self.fd], [], [], 0.05)[0]:
                try: os.read(self.fd, 4096)
                except OSError: pass
        os.close(self.fd)
        return os.waitstatus_to_exitcode(done[1])


@pytest.fixture
def terminal(base):
    started = []
    def start(*args):
        started.append(Terminal(base, SLOW, *args))
        return started[-1]
    yield start
    for t in started:
        try: os.kill(t.pid, signal.SIGKILL); os.waitpid(t.pid, 0)
        except (ProcessLookupError, ChildProcessError): pass


def test_terminal(terminal):
    t = terminal("chat", "--run", "demo")
    t.until(r"Talking to demo, stage base[^>]+> ")
    t.type("Who are you?\n")
    t.until(r"Who are you\?\r\n(?s:.+)\r\n\r\n> ") # the echo, an answer, the next prompt
    t.type("/temperature 0\n")
    t.until(r"\(temperature is 0\.0\)\r\n\r\n> ")
    t.type("/top_p 7\n")
    t.until(r"\(top_p '7' is not a number from 0\.05 to 1: 1\.0 is usual\.\)")
    t.type("/regenerate\n")
    greedy = t.until(r"/regenerate\r\n(?s:.+?)\r\n\r\n> ")
    t.type("/regenerate\n")
    t.until(r"regenerate\r\n.{1}")
    t.type("\x03") # Ctrl-C, in the middle of the answer
    stopped = t.until(r"\(stopped\)\r\n\r\n> ")
    assert len(stopped) < len(greedy)
    t.type("/clear\n")
    t.until(r"> ")
    t.type("/regenerate\n")
    t.until(r"ask one first\.\)\r\n\r\n> ")
    t.type("caf\udce9 broken bytes\n") # Latin-1, where UTF-8 is expected
    t.until(r"\r\n(?s:.+)\r\n\r\n> ")
    t.interrupt_until(r"\(Ctrl-D or /quit leaves\)\r\n\r\n> ")
    t.type("\x04")
    assert t.ended() == 0


def test_one_question(base):
    one, other = nanochat(base, "chat", "--run", "demo", "-p", "Who are you?"), nanochat(base, "chat", "--run", "demo", "-p", "Who are you?", "--top-p", "0.05")
    assert [(done.returncode, done.stderr) for done in (one, other)] == [(0, "")] * 2 and len(one.stdout) > 1 and one.stdout != other.stdout
    assert_user_error(nanochat(base, "chat", "--run", "demo", "-p", os.fsdecode(b"caf\xe9")), "surrogate")
