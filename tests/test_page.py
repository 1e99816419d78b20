"""The page that holds a model, in a browser: its arithmetic is torch's, its tokens are the tokenizer's, it chats, and it asks the network for nothing."""
import random
import re
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from nanochat.core.files import UserError
from nanochat.core.run import Run
from nanochat.core.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat.lab.docs import _TALKING, _add_talk, build_docs
from nanochat.lab.speedrun import cli
from nanochat.model.engine import Engine, Sampling, trim_conversation
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.precision import quantize_int8
from nanochat.model.sandbox import calculator
from nanochat.talk.page import _pack, make_page, write_page
from nanochat.train.checkpoint import save_checkpoint

TEXT = "I am nanochat, a small model. Three boxes of twelve eggs are 36 eggs. What's your name? Größe, 数学, 🐱. <script>alert(1)</script>"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT] * 5, 330)


def random_model(tokenizer, seed=0, **shape):
    "A model in which every weight counts: fresh ones have matrices of zeros."
    shape = dict(n_layer=2, n_head=2, n_kv_head=2, n_embd=64, sequence_len=256) | shape
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **shape))
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        size = 0.3 if weight.ndim == 1 else 1.5 / weight.size(1) ** 0.5
        weight.data = weight.data + size * torch.randn(weight.shape, generator=generator)
    return model.eval()


def rounded(model):
    "The same model with the weights that a page holds."
    for weight in model.parameters():
        if weight.ndim > 1 and weight.size(1) >= 64:
            data, scale = quantize_int8(weight.data)
            weight.data = data * scale[:, None]
    return model


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory):
    "A base folder with a run of a tiny model."
    folder, model = tmp_path_factory.mktemp("base"), random_model(tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        run = Run.create("demo", {"seed": 1})
        tokenizer.save(run.stage_dir("tokenizer"))
        save_checkpoint(run.stage_dir("sft")/"checkpoints", 1, model.state_dict(), None, {"stage": "sft", "model": vars(model.config), "tokenizer": tokenizer.hash})
        run.finish("sft")
    return folder


@pytest.fixture(scope="module")
def file(base):
    "A page that the command has written."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        done = CliRunner().invoke(cli, ["page", "demo", "--out", str(base/"a page.html")], catch_exceptions=False)
    assert done.exit_code == 0 and re.fullmatch(r".*a page\.html: 0\.\d MB; open it in a browser\n", done.output), done.output
    return base/"a page.html"


@pytest.fixture(scope="module")
def opened(browser, file):
    "The page, its worker, and what it has requested and complained about."
    page = browser.new_page(viewport={"width": 390, "height": 844})
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(file.as_uri())
    status(page, "demo-sft")
    yield SimpleNamespace(page=page, worker=page.workers[0], requests=requests, errors=errors)
    page.close()


def status(page, text):
    "Wait for the line beside the title."
    from playwright.sync_api import expect # the policy forbids the page what `wait_for_function` does
    expect(page.locator("#model")).to_contain_text(text, timeout=20_000)


def load(worker, model, tokenizer, fp32):
    "Give a worker another model."
    worker.evaluate("([header, weights]) => { engine = new Engine(header, fromBase64(weights)); }", list(_pack(model, tokenizer, "other", "sft", fp32)))


LOGITS = "([ids, n]) => { engine.model.keep([]); return ids.map(id => { engine.model.read(id); return Array.from(engine.model.predict()); }).slice(-n); }"


def drawn_shapes(n):
    "Shapes that switch every addition on and off."
    draw = random.Random(7)
    for i in range(n):
        heads, wide = draw.choice([(2, 2), (2, 1), (4, 2), (3, 1)]), draw.choice([8, 12, 22])
        on = {name: draw.random() < 0.5 for name in ("value_embeds", "resid_lambdas", "smear", "key_offset", "backout")}
        yield dict(n_layer=draw.choice([1, 2, 3]), n_head=heads[0], n_kv_head=heads[1], n_embd=heads[0] * wide, window_pattern=draw.choice(["L", "S", "SL"]), sequence_len=150,
                   rope_base=draw.choice([1e4, 1e5]), qk_scale=draw.choice([1.0, 1.2]), softcap=draw.choice([15.0, 20.0]), **on)


@pytest.mark.parametrize("shape", list(drawn_shapes(12)), ids=lambda shape: "-".join(str(int(v) if isinstance(v, (bool, float)) else v) for v in shape.values()))
def test_logits_in_32_bits(opened, tokenizer, shape):
    model, length = random_model(tokenizer, **shape), 150 # longer than a short window
    load(opened.worker, model, tokenizer, fp32=True)
    ids = [tokenizer.bos_id] + random.Random(1).choices(range(tokenizer.vocab_size), k=length - 1)
    with torch.inference_mode(): wanted = model(torch.tensor([ids]))[0]
    # the first tokens have no or few before them; the last see less than all
    for found, some in ((opened.worker.evaluate(LOGITS, [ids[:4], 4]), wanted[:4]), (opened.worker.evaluate(LOGITS, [ids, 4]), wanted[-4:])):
        assert (torch.tensor(found) - some).abs().max() < 1e-3
    assert wanted.std() > 0.3 # not a model that always says the same


def greedy(worker, prompt, n, tools=True):
    how = {"temperature": 0, "topK": 0, "maxTokens": n, "tools": tools, "nTop": 0}
    return worker.evaluate("([prompt, how]) => [...engine.generate(prompt, how)].filter(Boolean).map(event => [event.id, event.forced, event.finish ?? null])", [prompt, how])


def test_greedy_ids_are_the_engines(opened, tokenizer):
    "With a context of 48, where some answers end; and prompts that begin with each other, whose tokens the page remembers."
    model = rounded(random_model(tokenizer, 3, n_layer=3, sequence_len=48, n_kv_head=1, key_offset=True))
    load(opened.worker, model, tokenizer, fp32=False)
    draw = random.Random(5)
    prompts = [[tokenizer.bos_id] + draw.choices(range(tokenizer.vocab_size), k=draw.randrange(1, 40)) for _ in range(6)]
    prompts += [prompts[0][:k] for k in range(1, len(prompts[0]), 5)] + [[*prompts[1], 7]]
    wanted = Engine(model, tokenizer).generate(prompts, Sampling(24, 0), max_rows=1)
    assert {answer.finish for answer in wanted} >= {"length"}
    for prompt, answer in zip(prompts, wanted): assert [event[0] for event in greedy(opened.worker, prompt, 24)] == answer.tokens


def test_draws_follow_temperature_and_top_k(opened):
    logits = [1.0, 3.0, 2.0, -1.0]
    def draws(temperature, top_k): return opened.worker.evaluate("([l, t, k]) => Array.from({length: 2000}, (_, i) => draw(l, t, k, (i + 0.5) / 2000))", [logits, temperature, top_k])
    assert set(draws(0, 0)) == {1} and set(draws(1, 2)) == {1, 2} and set(draws(2, 0)) == {0, 1, 2, 3}
    for temperature in (0.5, 2.0):
        shares = torch.tensor(logits).div(temperature).softmax(0)
        found = torch.bincount(torch.tensor(draws(temperature, 0)), minlength=4) / 2000
        assert (found - shares).abs().max() < 2e-3


@pytest.fixture
def tiny(opened, tokenizer):
    "The page with its own model again."
    load(opened.worker, random_model(tokenizer), tokenizer, fp32=False)
    return opened


def texts():
    "Texts of all kinds, and random ones of the characters that the split pattern tells apart."
    yield from ("", "What's YOUR name? I'LL say, it'ſ he'd", "12345 1,250.5", "  two  \n\n  lines \r\n\t end  ", "<|bos|><|user_start|>", "数学 हिन्दी עברית العربية ١٢٣", "e\u0301 \u00e9 🐱👩‍👩‍👧 \u200b\ufeff\u00a0\u2028\u0085x",
                "\ufeffa mark at the beginning", "a\x00b", "'s's 'S 'll'LL", "x" * 300, "Ⅷ ½ ²  ", "_-_ ...\n\n...")
    draw, alphabet = random.Random(2), ["a", "B", "ß", "é", "数", "ا", "1", "٣", "½", " ", "  ", "\u00a0", "\u0085", "\ufeff", "\u3000", "\n", "\r\n", "\t", "'", "'s", "'LL", ".", "!?", "🐱", "\u0301", "<|bos|>", "the", "ſ"]
    for _ in range(400): yield "".join(draw.choices(alphabet, k=draw.randrange(1, 14)))


def test_tokenizer(tiny, tokenizer):
    every = list(texts())
    found = tiny.worker.evaluate("texts => texts.map(text => engine.tokenizer.encode(text))", every)
    for text, ids in zip(every, found): assert ids == tokenizer.encode(text), text
    assert tiny.worker.evaluate("rows => rows.map(ids => engine.tokenizer.decode(ids))", found) == every
    broken = [tokenizer.encode("é")[0], *tokenizer.encode("🐱")[:2]] if len(tokenizer.encode("é")) > 1 else [0xc3, 0xf0, 0x9f, 65]
    assert tiny.worker.evaluate("ids => engine.tokenizer.decode(ids)", broken) == tokenizer.decode(broken)
    assert tiny.worker.evaluate("names => names.map(name => engine.tokenizer.special[name])", list(SPECIAL_TOKENS)) == [tokenizer.special(name) for name in SPECIAL_TOKENS]


def expressions():
    "Expressions that the calculator knows, and much that it does not."
    yield from ("1+1", "12 * (3 + 4)", '"strawberry".count("r")', "'a b'.count(' ')", '("a" "aa").count(("a"),) ** 2', '"é😀".count("")', '"a".count', '"a"+"b"', '"""a""".upper()', "1,250 + 1", "1,2", "12,34", "2**10", "-2**2", "2**-1", "(-8)**0.5", "2**65",
                "7//2", "-7//2", "7%-3", "7.5//-2", "-7.5%2", "0.1+0.2", "1/3", "10**18", "10**18+1", "999999999999999999*1", "1e18", "1e400", "0**-1", "5//0", "5%0.0", "0/0", "-0.0", "0.00001", "123456789012.5", "1234567890.5", "1234567891.5", "1_000", "1__0", "007", "00", "0x1f", "5.", ".5", "5.e1",
                "1 2", "2(3)", "(1", "1)", "", "  3 ", "1\n+1", "(1\n+1)", "1+1 # two", "x", "True", "1j", "not 1", "1<2", "__import__('os')", "(" * 20 + "1" + ")" * 20, "(" * 21 + "1" + ")" * 21, "1+" * 100 + "1", "1+" * 99 + "1", "--1", "+-+1", "3 * * 2", "3 ** 2 ** 2", "6 / 2 / 3", "4,000,000 / 2")
    draw = random.Random(4)
    for _ in range(600): yield "".join(draw.choices(["1", "2", "30", "0.5", "4.", "1,250", "(", ")", "+", "-", "*", "/", "//", "%", "**", " ", '"aba".count("a")'], k=draw.randrange(1, 8)))


def test_calculator(tiny):
    every = list(expressions())
    found = tiny.worker.evaluate("texts => texts.map(calculate)", every)
    assert [(text, result) for text, result in zip(every, found) if result != calculator(text)] == []
    assert sum(result is not None for result in found) > 80


def test_prompts_and_what_they_leave_out(tiny, tokenizer):
    def turn(i): return {"role": ("user", "assistant")[i % 2], "content": f"turn {i} of eggs"}
    parts = [{"type": "text", "text": "They are "}, {"type": "python", "text": "3*12"}, {"type": "python_output", "text": "36"}, {"type": "text", "text": "36 eggs."}]
    tools = [turn(0), {"role": "assistant", "content": parts}, turn(2)]
    for messages in ([turn(0)], tools, [{"role": "system", "content": "Be short."}, turn(0)], [turn(i) for i in range(21)], [turn(i) for i in range(401)]):
        for room in (40, 64, 128):
            kept, left_out = trim_conversation(tokenizer, {"messages": messages}, room)
            found = tiny.worker.evaluate("([messages, room]) => fitChat(engine.tokenizer, messages, room)", [messages, room])
            assert found == {"ids": tokenizer.render_for_completion(kept), "leftOut": left_out}
    for text in ("an egg " * 100, "x" * 100_000):
        with pytest.raises(UserError, match="shorten it"): trim_conversation(tokenizer, {"messages": [{"role": "user", "content": text}]}, 64)
        message = tiny.worker.evaluate("text => { try { fitChat(engine.tokenizer, [{role: 'user', content: text}], 64); } catch (error) { return error.message; } }", text)
        assert re.fullmatch(r"the message has (at least )?\d+ tokens and the model has room for 64: shorten it\.", message)


def follow(worker, tokenizer, script, pause=0):
    "Let the model choose what a script says: texts, and names of special tokens."
    ids = [id for text in script for id in ([tokenizer.special(text)] if text in SPECIAL_TOKENS else tokenizer.encode(text))]
    worker.evaluate("""([ids, pause]) => {
        engine.choose = () => {
          for (const start = performance.now(); performance.now() - start < pause;);
          return { id: ids.shift(), forced: false, logprob: Math.log(0.5), top: [[65, Math.log(0.5)], [66, Math.log(0.25)]] };
        };
      }""", [ids, pause])


def ask(page, text):
    "Send a message from the page."
    page.fill("#text", text)
    page.press("#text", "Enter")


def wait_for_the_end(page): page.locator("#log[aria-busy=false]").wait_for()


def test_the_calculator_answers_and_the_page_shows_it(tiny, tokenizer):
    page, script = tiny.page, ["Three boxes are ", "<|python_start|>", "3*12", "<|python_end|>", " eggs", "<|assistant_end|>"]
    follow(tiny.worker, tokenizer, script)
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": "eggs?"}]})
    forced = [id for id, by_calculator, _ in greedy(tiny.worker, prompt, 64) if by_calculator]
    assert forced == [tokenizer.special("<|output_start|>"), *tokenizer.encode("36"), tokenizer.special("<|output_end|>")]
    page.click("#clear")
    follow(tiny.worker, tokenizer, script)
    ask(page, "How many eggs are three boxes of twelve?")
    wait_for_the_end(page)
    status(page, "tokens a second")
    assert page.locator(".user").inner_text() == "How many eggs are three boxes of twelve?" and page.locator(".user .token").count() > 5
    assert page.locator(".assistant").text_content() == "Three boxes are 3*1236 eggs" and page.locator(".python_output").text_content() == "36"
    # hovering, touching, tokens in colour
    token = page.locator(".assistant .token").first
    assert token.get_attribute("title") == "50.0%; instead: \u201cA\u201d 50.0%, \u201cB\u201d 25.0%"
    page.locator(".assistant .text .token").last.click()
    assert "50.0%; instead" in page.locator("#why").text_content()
    page.locator("#tokens span").first.wait_for()
    shown, heads = page.locator("#tokens").text_content(), page.locator("#head option").all_text_contents()
    assert shown.startswith("<|bos|><|user_start|>How many eggs") and "<|output_start|>36<|output_end|>" in shown
    assert heads == ["all heads", "layer 1, head 1", "layer 1, head 2", "layer 2, head 1", "layer 2, head 2"]
    page.select_option("#head", "3")
    weights = [float(title.rstrip("%")) for title in page.locator("#tokens span").evaluate_all("spans => spans.map(span => span.title)")]
    assert abs(sum(weights) - 100) < 0.06 * len(weights)
    plain = token.evaluate("element => getComputedStyle(element).backgroundColor")
    page.check("#colours")
    assert token.evaluate("element => getComputedStyle(element).backgroundColor") != plain
    page.uncheck("#colours")


def test_a_reply_with_markup_stays_text(tiny, tokenizer):
    page, markup = tiny.page, "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"><b>bold</b>"
    page.click("#clear")
    follow(tiny.worker, tokenizer, [markup, "<|assistant_end|>"])
    title = page.title()
    ask(page, markup)
    wait_for_the_end(page)
    assert page.locator(".assistant").text_content() == page.locator(".user").text_content() == markup
    page.locator(".assistant .token").last.click()
    assert page.locator("#log").locator("script, img, b").count() == 0 and page.locator("#look").locator("script, img, b").count() == 0 and page.title() == title


def test_stop_and_go_on(tiny, tokenizer):
    page = tiny.page
    page.click("#clear")
    follow(tiny.worker, tokenizer, ["eggs " * 100], pause=30)
    ask(page, "eggs?")
    page.locator(".assistant .token").nth(2).wait_for()
    page.click("#stop")
    page.locator(".note", has_text="Stopped.").wait_for()
    n = page.locator(".assistant .token").count()
    assert 3 <= n < 50
    follow(tiny.worker, tokenizer, ["Yes.", "<|assistant_end|>"])
    ask(page, "more?")
    wait_for_the_end(page)
    assert page.locator(".assistant").nth(1).text_content() == "Yes."
    assert page.locator(".assistant").first.locator(".token").count() == n # the stopped answer has ended
    page.locator(".assistant").last.locator(".token").first.click()
    assert page.locator("#attention").is_visible()
    page.locator(".assistant").first.locator(".token").first.click() # of an earlier answer only the likely tokens are known
    assert page.locator("#why").is_visible() and not page.locator("#attention").is_visible()
    page.click("#close")


def test_a_message_that_is_too_long_is_refused(tiny):
    page = tiny.page
    page.click("#clear")
    ask(page, "eggs " * 200)
    page.locator(".error", has_text="tokens and the model has room for 128: shorten it.").wait_for()


def test_a_telephone_light_and_dark(tiny):
    page, grounds = tiny.page, []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1] and page.evaluate("document.documentElement.scrollWidth") <= 390
    page.emulate_media(color_scheme="light")


def test_no_requests_and_no_complaints(tiny, file):
    "After all that the tests above did. The policy refuses even what the page would ask for."
    assert [url for url in tiny.requests if url != file.as_uri() and not url.startswith("blob:null/")] == [] and tiny.errors == []
    tiny.page.evaluate("new Promise(resolve => { const image = new Image(); image.onerror = resolve; image.src = 'http://127.0.0.1:9/x.png'; })")
    assert "Content Security Policy" in tiny.errors.pop()


def test_a_base_model_continues_a_text(browser, tokenizer, tmp_path):
    (tmp_path/"base.html").write_text(make_page(random_model(tokenizer), tokenizer, "story", "base"), "utf-8")
    page = browser.new_page()
    page.goto((tmp_path/"base.html").as_uri())
    status(page, "story — a base model")
    follow(page.workers[0], tokenizer, [" of twelve", "<|bos|>"])
    ask(page, "Three boxes")
    wait_for_the_end(page)
    assert page.locator(".assistant").text_content() == " of twelve"
    sequence = page.workers[0].evaluate("engine.sequence")
    assert sequence == [tokenizer.bos_id, *tokenizer.encode("Three boxes"), *tokenizer.encode(" of twelve"), tokenizer.bos_id]
    page.close()


def test_pages_of_the_docs_talk_when_somebody_asks(browser, base, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    (tmp_path/"lessons").mkdir()
    for page in _TALKING: (tmp_path/page).write_text("<!doctype html><html><body><main>words</main></body></html>")
    _add_talk(tmp_path, "demo")
    page, requests = browser.new_page(), []
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path/"lessons"/"01_tokens.html").as_uri())
    page.locator("#talk-open").wait_for()
    assert len(requests) == 1
    page.click("#talk-open")
    chat = page.frame_locator("#talk-frame")
    chat.locator("#model", has_text="demo-sft").wait_for()
    assert chat.locator("#colours").is_checked() and [url for url in requests[1:] if not url.startswith("blob:")] == [(tmp_path/"talk.html").as_uri()]
    page.click("#talk-open")
    assert not page.locator("#talk-frame").is_visible()
    page.close()
    with pytest.raises(UserError, match="no such run"): build_docs(tmp_path/"site", talk="no such run")


def test_errors(base, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    for arguments, words in ((("demo", "rl"), "rl"), (("demo", "sft", str(tmp_path/"no"/"page.html")), "--out"), (("demo", "sft", str(tmp_path)), "--out")):
        with pytest.raises(UserError, match=words): write_page(*arguments)
    assert list(tmp_path.iterdir()) == []
