"""The server as its users meet it: OpenAI's client, a fuzzer, many callers at once, callers that vanish, a worker that dies, and a browser."""
import asyncio
import concurrent.futures
import contextlib
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from types import SimpleNamespace

import httpx
import openai
import psutil
import pytest
from conftest import assert_user_error, environment, nanochat

from nanochat.core.run import Run
from nanochat.core.tokenizer import StreamDecoder, Tokenizer
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.model.engine import Engine, Sampling, TokenEvent
from nanochat.model.scheduler import Scheduler
from nanochat.train.checkpoint import save_checkpoint
from nanochat.talk.chat import Piece, content_of, readable
from nanochat.talk.api import ServerLimits
from nanochat.talk.stream import Service
from nanochat.talk.serve import in_thread

EGGS = [{"type": "text", "text": "Three boxes of twelve are "}, {"type": "python", "text": "3*12"}, {"type": "python_output", "text": "36"}, {"type": "text", "text": "36 eggs."}]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["I am nanochat, a small model. Three boxes of twelve eggs are 36 eggs. What is your name? 🐱"] * 5, 300)


@pytest.fixture(scope="module")
def engine(tokenizer):
    model = GPT(GPTConfig(sequence_len=256, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"))
    model.init_weights(0)
    return Engine(model.eval(), tokenizer)


class Scripted:
    "A scheduler without a model: its answer to a question is what `script` makes of it; a token every `pause` seconds for all rows."
    def __init__(self, tokenizer, script=lambda question: question, max_rows=64, pause=0.001):
        self.tokenizer, self.script, self.max_rows, self.pause = tokenizer, script, max_rows, pause
        self.running, self.line, self.known, self.over = [], deque(), {}, False
        self.tokens = self.prompt_tokens = 0
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def busy(self): return len(self.running)
    @property
    def waiting(self): return len(self.line)

    def submit(self, prompt, on_event, *, sampling, **settings):
        text = self.tokenizer.decode(prompt)
        question = text.rsplit("<|user_start|>", 1)[-1].split("<|user_end|>")[0]
        answer = self.script(question)
        if str(answer) not in self.known: self.known[str(answer)] = self._tokens(answer)
        row = SimpleNamespace(tokens=deque(self.known[str(answer)]), on_event=on_event, room=sampling.max_new_tokens, cancelled=False, decoder=StreamDecoder(self.tokenizer))
        self.line.append(row)
        return row

    def _tokens(self, answer):
        "An answer's tokens, and which of them a model would choose."
        ids, mask = self.tokenizer.render_conversation({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": answer}]})
        start = len(self.tokenizer.render_for_completion({"messages": [{"role": "user", "content": ""}]}))
        return list(zip(ids[start:], mask[start:]))

    def cancel(self, row): row.cancelled = True

    def close(self): self.over = True

    def _run(self):
        "All rows take a step, as in a real scheduler."
        end = self.tokenizer.special("<|assistant_end|>")
        while not self.over or self.running or self.line:
            while self.line and len(self.running) < self.max_rows: self.running.append(self.line.popleft())
            for row in list(self.running):
                if row.cancelled or self.over: event = TokenEvent(-1, "", 1.0, [], False, "interrupted")
                else:
                    token, chosen = row.tokens.popleft()
                    row.room -= 1
                    self.tokens += 1
                    finish = "stop" if token == end else "length" if row.room == 0 else None
                    text = "" if token == end else row.decoder.add(token)
                    event = TokenEvent(token, text, 0.5 if chosen else 1.0, [(text, 0.5), ("?", 0.25)], not chosen, finish)
                if event.finish: self.running.remove(row)
                row.on_event(event)
            time.sleep(self.pause)


def scripted(tokenizer, script=lambda question: question, limits=None, **kw):
    "A service whose model follows a script."
    limits = limits or ServerLimits(rows=64, queue=256)
    return Service(limits).open(Scripted(tokenizer, script, limits.rows, **kw), tokenizer, 100_000, "script", "sft")


@pytest.fixture(scope="module")
def real(engine, tokenizer):
    "A server with a tiny real model."
    service = Service(ServerLimits(rows=16, queue=256, grace=1)).open(Scheduler(engine, 16), tokenizer, engine.context, "tiny", "sft")
    with in_thread(service, key="correct horse", hosts={"127.0.0.1"}) as address:
        yield SimpleNamespace(service=service, address=address, client=openai.OpenAI(base_url=f"{address}/v1", api_key="correct horse", max_retries=0, timeout=60),
                              http=httpx.Client(base_url=address, headers={"Authorization": "Bearer correct horse"}, timeout=60))


def settled(service, seconds=10):
    "Wait until no row is let in, decoded or waiting."
    until = time.monotonic() + seconds
    while service.active or service.backend.busy or service.backend.waiting:
        assert time.monotonic() < until, (service.active, service.backend.busy, service.backend.waiting)
        time.sleep(0.01)
    return True


def visible(tokenizer, completion):
    "What a person should see of a completion: as the chat cell keeps it, calculator calls in brackets."
    kinds = {tokenizer.special(f"<|{name}|>"): kind for name, kind in (("python_start", "python"), ("output_start", "python_output"), ("python_end", "text"), ("output_end", "text"))}
    pieces, kind, decoder = [], "text", StreamDecoder(tokenizer)
    for t in completion.tokens[:-1] if completion.finish == "stop" else completion.tokens:
        text = decoder.add(t)
        if t in kinds: kind = kinds[t]
        else: pieces.append(Piece(text, kind))
    return readable(content_of([*pieces, Piece(decoder.flush(), kind)]))


def ask(text, **kw): return {"messages": [{"role": "user", "content": text}], **kw}


# The API, through OpenAI's own client

def test_client_chat(real, engine, tokenizer):
    prompt = tokenizer.render_for_completion(ask("What is your name?"))
    alone = engine.generate([prompt], Sampling(20), seed=[7])[0]
    answer = real.client.chat.completions.create(model="tiny", **ask("What is your name?"), seed=7, max_tokens=20, logprobs=True, top_logprobs=3)
    choice = answer.choices[0]
    assert choice.message.content == visible(tokenizer, alone) and choice.finish_reason == alone.finish
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(alone.tokens))
    said = alone.logprobs[:-1] if alone.finish == "stop" else alone.logprobs
    assert [e.logprob for e in choice.logprobs.content] == pytest.approx(said, abs=1e-3)
    assert all(len(e.top_logprobs) == 3 and max(t.logprob for t in e.top_logprobs) == e.top_logprobs[0].logprob for e in choice.logprobs.content)
    stream = list(real.client.chat.completions.create(model="tiny", **ask("What is your name?"), seed=7, max_completion_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in stream if c.choices) == visible(tokenizer, alone)
    assert stream[0].choices[0].delta.role == "assistant" and len({c.id for c in stream}) == 1
    assert [c.choices[0].finish_reason for c in stream if c.choices and c.choices[0].finish_reason] == [alone.finish]
    assert stream[-1].usage == answer.usage and stream[-1].choices == []


def test_client_completions(real, engine, tokenizer):
    prompt = [tokenizer.bos_id, *tokenizer.encode("I am")]
    alone = engine.generate([prompt], Sampling(16), seed=[5], tools=False)[0]
    answers = [real.client.completions.create(model="tiny", prompt=p, seed=5, max_tokens=16, logprobs=2) for p in ("I am", prompt)]
    for answer in answers:
        assert answer.choices[0].text == visible(tokenizer, alone) and answer.object == "text_completion"
        assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.text_offset) == len(alone.tokens) - (alone.finish == "stop")
    assert "".join(c.choices[0].text for c in real.client.completions.create(model="tiny", prompt="I am", seed=5, max_tokens=16, stream=True)) == visible(tokenizer, alone)


def test_client_lists_of_prompts(real, tokenizer):
    "Each prompt of a list is answered as it would be alone: texts or tokens, whole or as a stream."
    def create(prompt, **kw): return real.client.completions.create(model="tiny", prompt=prompt, seed=5, max_tokens=8, **kw)
    texts = ["I am", "Three boxes", ""]
    alone = [choice.text for text in texts for choice in create(text, n=2).choices]
    together = create(texts, n=2)
    assert [choice.text for choice in together.choices] == alone and [choice.index for choice in together.choices] == [*range(6)]
    assert together.usage.prompt_tokens == sum(1 + len(tokenizer.encode(text)) for text in texts)
    as_tokens = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    assert [choice.text for choice in create(as_tokens, n=2).choices] == alone
    streamed = [""] * 6
    for chunk in create(texts, n=2, stream=True): streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone
    refused(real.http.post("/v1/completions", json={"prompt": ["x"] * 300}), 400, "300 answers", "send fewer prompts")
    assert refused(real.http.post("/v1/completions", json={"prompt": [[5], [10**6]]}), 400, "vocabulary")["param"] == "prompt[1]"
    assert settled(real.service)


def test_seeds_choices_and_sampling(real):
    def texts(**kw): return [c.message.content for c in real.client.chat.completions.create(model="nanochat", **ask("Hi"), max_tokens=16, **kw).choices]
    assert texts(seed=1, n=3) == texts(seed=1, n=3) and len(set(texts(seed=1, n=3))) == 3
    assert texts(seed=1)[0] == texts(seed=1, n=3)[0] != texts(seed=2)[0]
    assert texts()[0] != texts()[0] # without a seed, another one every time
    greedy = texts(temperature=0)[0]
    assert greedy == texts(temperature=0, seed=9)[0] == texts(extra_body={"top_k": 1})[0] == texts(top_p=1e-6)[0]


def test_models(real):
    assert [m.id for m in real.client.models.list()] == ["tiny"] and real.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"): real.client.models.retrieve("gpt/9")
    with pytest.raises(openai.NotFoundError): real.client.chat.completions.create(model="gpt-9", **ask("Hi"))


def test_calculator_and_stop(tokenizer):
    service = scripted(tokenizer, lambda question: EGGS)
    with in_thread(service) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        def both(**kw):
            whole = client.chat.completions.create(model="nanochat", **ask("Eggs?"), **kw).choices[0]
            stream = [c.choices[0] for c in client.chat.completions.create(model="nanochat", **ask("Eggs?"), stream=True, **kw)]
            assert "".join(c.delta.content or "" for c in stream) == whole.message.content
            assert [c.finish_reason for c in stream if c.finish_reason] == [whole.finish_reason]
            return whole.message.content, whole.finish_reason
        text = readable(EGGS)
        assert both() == (text, "stop") and "[3*12 = 36] " in text
        assert both(stop="= 3") == (text[:text.index("= 3")], "stop")
        assert both(stop=["nowhere", "gs.", "36 eggs!"]) == (text[:-3], "stop")
        assert both(stop=["36 eggs!", "eggs.."]) == (text, "stop") # held back to the end, and then sent
        assert both(max_tokens=3)[1] == "length"
        parts = client.chat.completions.create(model="nanochat", **ask("Eggs?"), extra_body={"parts": True}).choices[0].parts
        assert [(p["type"], p["text"]) for p in parts if p["type"] != "mark"] == [(p["type"], p["text"]) for p in EGGS]
        assert settled(service)


def test_long_conversations_are_trimmed(real):
    long = [{"role": ("user", "assistant")[i % 2], "content": f"This is message number {i} of many."} for i in range(41)]
    answer = real.http.post("/v1/chat/completions", json={"messages": long, "max_tokens": 8}).json()
    assert answer["nanochat"]["left_out"] > 0 and "older messages were left out" in answer["nanochat"]["note"]
    assert answer["usage"]["total_tokens"] <= 256
    first = real.http.post("/v1/chat/completions", json={"messages": long, "max_tokens": 8, "stream": True}).text.split("\n\n")[0]
    assert json.loads(first.removeprefix("data: "))["nanochat"] == answer["nanochat"]


# What is refused

def refused(response, status, *words):
    "An error in OpenAI's shape, of one sentence."
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"].endswith(".") and "\n" not in error["message"]
    for word in words: assert word in error["message"], error["message"]
    return error


@pytest.mark.parametrize("changes, words", [
    ({"messages": []}, ["messages"]), ({"messages": None}, ["messages"]), ({"messages": [{"role": "tool", "content": "x"}]}, ["role", "'tool'"]),
    ({"messages": [{"role": "assistant", "content": "x"}]}, ["last message is the assistant's"]), ({"messages": [{"role": "user", "content": "x"}] * 2}, ["alternate"]), ({"messages": [{"role": "user", "content": "x"}] * 201}, ["the limit is 200"]),
    ({"messages": [{"role": "user", "content": "x" * 200_001}]}, ["the limit is 200000"]), ({"messages": [{"role": "user", "content": "word " * 300}]}, ["shorten it"]),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, ["text only"]), ({"messages": [{"role": "user", "content": [{"type": "python", "text": "1"}]}]}, ["not text"]),
    ({"temperature": -1}, ["temperature", "-1"]), ({"temperature": "1"}, ["temperature", "'1'"]), ({"top_p": 0}, ["top_p"]), ({"n": 9}, ["n is 9"]), ({"seed": 1 << 64}, ["seed"]), ({"max_tokens": 0}, ["max_tokens"]),
    ({"max_tokens": 5000}, ["the limit is 4096"]), ({"stop": ["a"] * 5}, ["stop"]), ({"stop": ""}, ["stop"]), ({"top_logprobs": 2}, ["logprobs"]), ({"logprobs": True, "top_logprobs": 21}, ["top_logprobs"]),
    ({"tools": [{"type": "function"}]}, ["tools is not supported"]), ({"response_format": {"type": "json_object"}}, ["response_format is not supported"]), ({"logit_bias": {"5": 1}}, ["logit_bias"]), ({"presence_penalty": 1}, ["presence_penalty"]),
    ({"temprature": 1}, ["no parameter 'temprature'"]), ({"stream_options": {"x": 1}}, ["stream_options.x"]),
])
def test_bad_requests(real, changes, words): refused(real.http.post("/v1/chat/completions", json=ask("Hi") | changes), 400, *words)


@pytest.mark.parametrize("changes, param, reason", [
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": 5}]}, "messages[1].content", "should be a text or a list of parts"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "should be a text or a list of parts"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}, "messages[0].content[0].text", "should be a valid string"), ({"messages": [5]}, "messages[0]", "should be an object"),
    ({"stop": ["a"] * 5}, "stop", "at most 4 items"), ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"), ({"stop": 5}, "stop", "a text or a list of texts"), ({"stop": "x" * 201}, "stop", "at most 200 characters"),
    ({"str": 1}, "str", "no parameter"), ({"a[b": 1}, "a[b", "no parameter"), ({"body": 1}, "body", "no parameter"), ({"messages": [1] * 300_000}, "messages[0]", "should be an object"),
])
def test_errors_name_the_field_and_its_own_mistake(real, changes, param, reason):
    assert refused(real.http.post("/v1/chat/completions", json=ask("Hi") | changes), 400, param, reason)["param"] == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"\\ud800": 1, "messages": []}', b"[" * 100_000,
                                  b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
                                  b'{"messages": [{"role": "user", "content": "x"}], "metadata": ' + b'{"a":' * 5000 + b"1" + b"}" * 5000 + b"}"])
def test_bodies_that_are_no_request(real, body): refused(real.http.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}), 400)


def test_keys_hosts_origins_and_addresses(real):
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "correct horse"}, {"Authorization": b"Bearer correct horse\xe9"}):
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/chat/completions", "/nowhere"): refused(httpx.get(real.address + path, headers=headers), 401, "Authorization: Bearer KEY")
    assert httpx.get(f"{real.address}/health").json()["status"] == "ready" and httpx.get(real.address).status_code == 200
    refused(real.http.get("/v1/models", headers={"Host": "evil.example"}), 403, "evil.example")
    refused(real.http.get("/v1/models", headers={"Host": "[::1"}), 400)
    refused(real.http.post("/v1/chat/completions", json=ask("Hi"), headers={"Origin": "http://evil.example"}), 403, "--allow-origin")
    assert "access-control-allow-origin" not in real.http.get("/v1/models").headers
    refused(real.http.get("/nowhere"), 404)
    assert "POST" in refused(real.http.get("/v1/completions"), 405)["message"]
    refused(real.http.post("/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": "text/plain"}), 415)
    refused(real.http.post("/v1/completions", json={"prompt": [10**6]}), 400, "vocabulary")
    refused(real.http.post("/v1/completions", json={"prompt": [1] * 256}), 400, "255 at most")


def test_one_other_origin(tokenizer):
    with in_thread(scripted(tokenizer), key="correct horse", origins=["http://good.example"]) as address:
        ask_first = {"Origin": "http://good.example", "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
        assert httpx.options(f"{address}/v1/chat/completions", headers=ask_first).headers["access-control-allow-origin"] == "http://good.example"
        assert "access-control-allow-origin" not in httpx.options(f"{address}/v1/chat/completions", headers=ask_first | {"Origin": "http://evil.example"}).headers
        stainless = ("lang", "package-version", "os", "arch", "runtime", "runtime-version", "retry-count", "timeout", "helper-method")
        of_openai = ",".join(["authorization", "content-type", "openai-organization", "idempotency-key", *(f"x-stainless-{name}" for name in stainless)])
        assert httpx.options(f"{address}/v1/chat/completions", headers=ask_first | {"Access-Control-Request-Headers": of_openai}).status_code == 200
        answer = httpx.post(f"{address}/v1/chat/completions", json=ask("Hi"), headers={"Origin": "http://good.example", "Authorization": "Bearer correct horse"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "http://good.example"
        without_key = httpx.post(f"{address}/v1/chat/completions", json=ask("Hi"), headers={"Origin": "http://good.example"})
        assert refused(without_key, 401) and without_key.headers["access-control-allow-origin"] == "http://good.example" and without_key.headers["access-control-expose-headers"] == "Retry-After"


def test_what_proxies_and_monitors_ask(tokenizer):
    with in_thread(scripted(tokenizer), hosts={"127.0.0.1"}, origins=["https://hub.example"]) as address:
        for path in ("/", "/health", "/metrics", "/v1/models", "/openapi.json"):
            got, head = httpx.get(address + path), httpx.head(address + path)
            assert (head.status_code, head.headers["content-type"], head.content) == (got.status_code, got.headers["content-type"], b"") and got.content, path
        assert (httpx.head(f"{address}/v1/completions").status_code, httpx.head(f"{address}/nowhere").status_code) == (405, 404)
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=ask("Hi", stream=True)) as stream: assert stream.headers["x-accel-buffering"] == "no"
        assert httpx.get(f"{address}/health", headers={"Host": "hub.example"}).status_code == 200 # as JupyterHub's proxy does
        refused(httpx.get(f"{address}/health", headers={"Host": "other.example"}), 403, "--allow-origin https://other.example")
        replaced = {"Origin": "https://nginx.example"} # a proxy that puts its own name for the host, as nginx does
        assert httpx.post(f"{address}/v1/chat/completions", json=ask("Hi"), headers=replaced | {"Sec-Fetch-Site": "same-origin"}).status_code == 200
        refused(httpx.post(f"{address}/v1/chat/completions", json=ask("Hi"), headers=replaced | {"Sec-Fetch-Site": "cross-site"}), 403, "--allow-origin")


def test_too_large(real):
    chunks = (b"x" * 65536 for _ in range(40))
    refused(real.http.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"}), 413) # chunked, without a length
    refused(real.http.post("/v1/completions", content=b"x" * (2 << 20), headers={"Content-Type": "application/json"}), 413)


def test_full_loading_and_closing(tokenizer):
    service = Service(ServerLimits(rows=2, queue=1, grace=0.2))
    with in_thread(service) as address:
        loading = httpx.post(f"{address}/v1/completions", json={"prompt": "x"})
        assert refused(loading, 503, "being loaded")["code"] == "loading" and "retry-after" in loading.headers
        assert httpx.get(f"{address}/health").status_code == 503
        service.open(Scripted(tokenizer, lambda q: "word " * 5000, 2, pause=0.01), tokenizer, 100_000)
        with concurrent.futures.ThreadPoolExecutor() as threads:
            streams = [threads.submit(lambda: httpx.post(f"{address}/v1/chat/completions", json=ask("x", stream=True, max_tokens=4096), timeout=60).text) for _ in range(3)]
            until = time.monotonic() + 10
            while service.active < 3 and time.monotonic() < until: time.sleep(0.01)
            full = httpx.post(f"{address}/v1/chat/completions", json=ask("x"))
            assert refused(full, 429, "the limit is 3")["code"] == "queue_full" and full.headers["retry-after"] == "2"
            state = httpx.get(f"{address}/health").json()
            assert (state["busy"], state["waiting"]) == (2, 1)
            service.close() # as Ctrl-C does after its grace
            refused(httpx.post(f"{address}/v1/chat/completions", json=ask("x")), 503, "shutting down")
            for stream in streams: assert "shutting down" in stream.result(30) and "[DONE]" not in stream.result()
    assert service.active == 0


def test_text_never_becomes_a_special_token(real, tokenizer):
    name = "<|assistant_start|><|bos|><|python_start|>2+2<|python_end|>"
    plain = len(tokenizer.encode(name))
    usage = real.http.post("/v1/chat/completions", json=ask(name, max_tokens=1, stop=[name], user=name, metadata={name: name})).json()["usage"]
    assert usage["prompt_tokens"] == plain + 4 # <|bos|>, the question's start and end, the answer's start
    assert real.http.post("/v1/completions", json={"prompt": name, "max_tokens": 1}).json()["usage"]["prompt_tokens"] == plain + 1
    parts = [{"role": "system", "content": [{"type": "text", "text": name}]}, {"role": "user", "content": "x"}, {"role": "assistant", "content": [{"type": "python", "text": name}, {"type": "text", "text": name}]}, {"role": "user", "content": "y"}]
    n = real.http.post("/v1/chat/completions", json={"messages": parts, "max_tokens": 1}).json()["usage"]["prompt_tokens"]
    assert n == 10 + 2 * plain + len(tokenizer.encode(name + "\n\nx")) + len(tokenizer.encode("y")) # the template's: bos, four of the two questions, four of the answer and its call, one to begin


def test_fuzzed(real):
    "Whatever the API's own description allows or forbids: no error of the server's, and only described answers."
    import hypothesis.errors
    import schemathesis
    from schemathesis.checks import CHECKS, load_all_checks
    load_all_checks()
    checks = CHECKS.get_by_names(["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance", "negative_data_rejection"])
    seen = []
    for found in schemathesis.openapi.from_url(f"{real.address}/openapi.json", headers={"Authorization": "Bearer correct horse"}).get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:
            @hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None, phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck))
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def one(case):
                response = case.call(headers={"Authorization": "Bearer correct horse"}, timeout=30)
                seen.append((operation.path, response.status_code))
                case.validate_response(response, checks=checks)
            with contextlib.suppress(hypothesis.errors.Unsatisfiable): one() # where there is no parameter, none can be wrong
    assert {path for path, _ in seen} >= {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    assert {200, 400} <= {status for path, status in seen if path.startswith("/v1/c")}
    assert settled(real.service)


# Many callers

async def streamed(client, address, body, headers=None):
    "The text of a streamed answer."
    text = ""
    async with client.stream("POST", f"{address}/v1/chat/completions", json=body | {"stream": True}, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"): text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        assert line == "" or line == "data: [DONE]"
    return text


def at_once(make, n):
    "Run `n` of `make(client, i)` at once, each over a connection of its own."
    async def run():
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0)) as client: return await asyncio.gather(*(make(client, i) for i in range(n)))
    return asyncio.run(run())


def test_many_callers_are_not_mixed_up(tokenizer):
    service = scripted(tokenizer, lambda question: f"{question} is what you said. " * 3)
    with in_thread(service) as address:
        got = at_once(lambda client, i: streamed(client, address, ask(f"Caller {i}")), 200)
        assert got == [f"Caller {i} is what you said. " * 3 for i in range(200)]
        counted = httpx.get(f"{address}/metrics").text
        assert 'nanochat_requests_total{endpoint="/v1/chat/completions",status="200"} 200' in counted and "nanochat_first_token_seconds_count 200" in counted
        assert settled(service)


def test_many_callers_of_a_real_model(real, engine, tokenizer):
    questions = [f"What is {i}?" for i in range(24)]
    got = at_once(lambda client, i: streamed(client, real.address, ask(questions[i], seed=i, max_tokens=12), {"Authorization": "Bearer correct horse"}), 24)
    prompts = [tokenizer.render_for_completion(ask(q)) for q in questions]
    assert got == [visible(tokenizer, c) for c in engine.generate(prompts, Sampling(12), seed=list(range(24)))]


@pytest.mark.parametrize("stream", [True, False], ids=["streaming", "whole"])
def test_whoever_vanishes_leaves_no_row(tokenizer, stream):
    service = scripted(tokenizer, lambda question: "word " * 20_000, ServerLimits(rows=16, queue=256))
    with in_thread(service) as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(ask("x", stream=stream, max_tokens=4096)).encode()
        sockets = [socket.create_connection((host, int(port))) for _ in range(50)]
        for s in sockets: s.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        until = time.monotonic() + 20
        while (service.backend.busy, service.backend.waiting) != (16, 34) and time.monotonic() < until: time.sleep(0.01)
        if stream: assert sockets[0].recv(200).startswith(b"HTTP/1.1 200")
        assert (service.active, service.backend.busy, service.backend.waiting) == (50, 16, 34)
        for i, s in enumerate(sockets):
            if i % 2: s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0") # resets the connection rather than closing it
            s.close()
        assert settled(service)
        assert "nanochat_disconnects_total 50" in httpx.get(f"{address}/metrics").text


def test_whoever_reads_slowly_is_ended(tokenizer):
    "A reader that takes nothing costs a bounded number of tokens, and its row is freed."
    service = scripted(tokenizer, lambda question: "word " * 100_000, ServerLimits(rows=4, tokens=10**6, backlog=200), pause=0)
    with in_thread(service) as address:
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(ask("x", stream=True, max_tokens=10**5, logprobs=True, top_logprobs=2)).encode()
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            until = time.monotonic() + 30
            while not service.metrics.slow: assert time.monotonic() < until; time.sleep(0.01)
            until = time.monotonic() + 5
            while service.backend.busy: assert time.monotonic() < until; time.sleep(0.01)
            assert service.backend.tokens < 50_000
        assert settled(service)


# Slow strangers

def strangers(address, n, say, seconds):
    "Open connections that say something at first, and then a byte now and then. Returns after how long each was ended, or None."
    host, port = address.removeprefix("http://").split(":")
    sockets, start, ended = [socket.create_connection((host, int(port))) for _ in range(n)], time.monotonic(), [None] * n
    for s in sockets: s.sendall(say)
    while None in ended and time.monotonic() - start < seconds:
        for i, s in enumerate(sockets):
            if ended[i] is not None: continue
            try:
                s.setblocking(False)
                if say: s.send(b"a")
                while s.recv(65536): pass
                ended[i] = time.monotonic() - start
            except BlockingIOError: pass
            except OSError: ended[i] = time.monotonic() - start
        time.sleep(0.1)
    for s in sockets: s.close()
    return ended


POST = b"POST %s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"

@pytest.mark.parametrize("say", [b"", b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-", POST % b"/v1/chat/completions", POST % b"/health"], ids=["silent", "headers", "body without the key", "body where none belongs"])
def test_slow_strangers_are_ended(tokenizer, say):
    with in_thread(scripted(tokenizer, limits=ServerLimits(headers=1.0)), key="correct horse", hosts={"127.0.0.1"}) as address:
        ended = strangers(address, 30, say, 20)
        assert None not in ended and min(ended) > 0.8 and max(ended) < 6, ended


def test_a_connection_with_many_short_answers_stays(tokenizer):
    with in_thread(scripted(tokenizer, limits=ServerLimits(headers=1.0)), hosts={"127.0.0.1"}) as address:
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as s, s.makefile("rb") as answer:
            until = time.monotonic() + 5
            while time.monotonic() < until:
                s.sendall(b"HEAD /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                assert b" 200 " in answer.readline()
                while answer.readline() != b"\r\n": pass
                time.sleep(0.1)


def test_a_slow_body_is_ended_with_a_sentence(tokenizer):
    with in_thread(scripted(tokenizer, limits=ServerLimits(headers=1.0, stall=2.0)), hosts={"127.0.0.1"}) as address:
        with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1]))) as s:
            s.sendall(POST % b"/v1/chat/completions")
            with s.makefile("rb") as answer: assert b" 408 " in answer.readline() and any(b"did not come in time" in line for line in answer)


def test_who_never_reads_is_ended(tokenizer):
    service = scripted(tokenizer, limits=ServerLimits(headers=0.5, stall=1.0))
    with in_thread(service, hosts={"127.0.0.1"}) as address, socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        s.connect(("127.0.0.1", int(address.rsplit(":", 1)[1])))
        s.settimeout(20)
        with pytest.raises(OSError): # the connection is reset while it still asks, and reads nothing
            while True: s.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 1000)


def test_a_crowd_of_strangers_keeps_nobody_out(tokenizer):
    with in_thread(scripted(tokenizer, lambda question: "word " * 200, ServerLimits(connections=20), pause=0.01), hosts={"127.0.0.1"}) as address, concurrent.futures.ThreadPoolExecutor() as threads:
        long = threads.submit(lambda: httpx.post(f"{address}/v1/chat/completions", json=ask("x", stream=True, max_tokens=4096), timeout=60).text)
        crowds = [threads.submit(strangers, address, 60, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-", 3), threads.submit(strangers, address, 60, POST % b"/v1/completions", 3)]
        until, n = time.monotonic() + 3, 0
        while time.monotonic() < until:
            assert httpx.get(f"{address}/health", timeout=2).status_code == 200
            n += 1
        assert n > 5 and sum(e is None for crowd in crowds for e in crowd.result()) <= 20
        assert long.result().endswith("data: [DONE]\n\n") # those that are answered stay


# Several processes

@pytest.fixture(scope="module")
def base(tmp_path_factory, engine, tokenizer):
    "A base folder with a run whose model is the tiny one."
    folder = tmp_path_factory.mktemp("base")
    before, os.environ["NANOCHAT_BASE_DIR"] = os.environ.get("NANOCHAT_BASE_DIR"), str(folder)
    run = Run.create("demo", {"seed": 1})
    tokenizer.save(run.stage_dir("tokenizer"))
    save_checkpoint(run.stage_dir("sft")/"checkpoints", 1, engine.model.state_dict(), None, {"stage": "sft", "model": vars(engine.model.config), "tokenizer": tokenizer.hash})
    run.finish("sft")
    if before is None: del os.environ["NANOCHAT_BASE_DIR"]
    else: os.environ["NANOCHAT_BASE_DIR"] = before
    return folder


@contextlib.contextmanager
def two_workers(base):
    "The command with two workers: its process, its address and its workers."
    process = subprocess.Popen([sys.executable, "-m", "nanochat", "serve", "--run", "demo", "--devices", "2", "--port", "0"], env=environment(base) | {"NANOCHAT_API_KEY": "correct horse"},
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = ""
        while "is ready" not in said:
            line = process.stdout.readline()
            assert line, said
            said += line
        workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]
        assert len(workers) == 2
        yield process, re.search(r"http://127\.0\.0\.1:\d+", said)[0], workers
    finally:
        if process.poll() is None: process.kill()
        process.stdout.close()


def test_the_command_with_two_workers_one_of_which_is_killed(base, engine, tokenizer, tmp_path):
    with two_workers(base) as (process, address, workers):
        key = {"Authorization": "Bearer correct horse"}
        def states(): return [(w["state"], w["restarts"]) for w in httpx.get(f"{address}/health").json()["workers"]]
        assert states() == [("ready", 0)] * 2
        prompts = [tokenizer.render_for_completion(ask(f"What is {i}?")) for i in range(12)]
        alone = [visible(tokenizer, c) for c in engine.generate(prompts, Sampling(12), seed=list(range(12)))]
        def all_right(): return at_once(lambda client, i: streamed(client, address, ask(f"What is {i}?", seed=i, max_tokens=12), key), 12) == alone
        assert all_right()
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            def long(i): return httpx.post(f"{address}/v1/chat/completions", json=ask(f"What is {i}?", seed=i, max_tokens=200), headers=key, timeout=60)
            answers = [threads.submit(long, i) for i in range(8)]
            time.sleep(0.05)
            workers[0].kill()
            answers = [a.result(60) for a in answers]
        assert {a.status_code for a in answers} <= {200, 503}
        for answer in answers:
            if answer.status_code == 503: refused(answer, 503, "has died")
        assert all_right() # by the other one
        until = time.monotonic() + 60
        while (now := states()) != [("ready", 1), ("ready", 0)] and now != [("ready", 0), ("ready", 1)]:
            assert time.monotonic() < until, now
            time.sleep(0.1)
        assert all_right() and "nanochat_worker_restarts_total 1" in httpx.get(f"{address}/metrics", headers=key).text
        family = psutil.Process(process.pid).children(recursive=True)
        workers[1].suspend() # a worker that hangs does not hold up the end
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert not psutil.wait_procs(family, 10)[1]


def test_a_worker_that_hangs_blocks_nobody(base):
    "Nor does it outlive the server, even if that is killed."
    key = {"Authorization": "Bearer correct horse"}
    with two_workers(base) as (process, address, workers):
        workers[0].suspend()
        body = ask("x" * 200, max_tokens=1) # 300 of them fill any pipe
        with concurrent.futures.ThreadPoolExecutor(100) as threads:
            answers = [threads.submit(httpx.post, f"{address}/v1/chat/completions", json=body, headers=key, timeout=90) for _ in range(300)]
            while not all(a.done() for a in answers):
                assert httpx.get(f"{address}/health", timeout=10).status_code == 200
                time.sleep(0.5)
            statuses = [a.result().status_code for a in answers]
        assert set(statuses) <= {200, 503} and statuses.count(200) >= 150, statuses
        until = time.monotonic() + 90
        while sorted((w["restarts"], w["state"]) for w in httpx.get(f"{address}/health").json()["workers"]) != [(0, "ready"), (1, "ready")]: assert time.monotonic() < until; time.sleep(0.2)
        family = psutil.Process(process.pid).children(recursive=True)
        workers[1].suspend()
        process.kill()
        if sys.platform == "linux": assert not psutil.wait_procs(family, 10)[1]


def test_the_command_refuses(base):
    assert_user_error(nanochat(base, "serve", "--run", "demo", "--host", "0.0.0.0"), "0.0.0.0", "NANOCHAT_API_KEY")
    assert_user_error(nanochat(base, "serve", "--run", "demo", "--allow-origin", "https://hub.example/"), "'https://hub.example/'", "--allow-origin")
    with socket.create_server(("127.0.0.1", 0)) as taken: assert_user_error(nanochat(base, "serve", "--port", taken.getsockname()[1]), str(taken.getsockname()[1]), "--port")


# The page, in a browser

NASTY = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'> **bold** `code` 🐱𝔘 & \"quoted\" "

@pytest.fixture
def visit(browser, tokenizer):
    "Opens the page of a scripted server; fails if anything was asked of another place, or the console complained."
    with contextlib.ExitStack() as stack:
        pages = []
        def open_page(script, pause=0.001, key=None, **view):
            service = scripted(tokenizer, script, pause=pause)
            address = stack.enter_context(in_thread(service, key=key, hosts={"127.0.0.1"}))
            page = browser.new_context(**view).new_page()
            page.said, page.asked, page.address, page.service = [], [], address, service
            page.on("console", lambda m: page.said.append(m.text) if m.type in ("error", "warning") else None)
            page.on("pageerror", lambda e: page.said.append(str(e)))
            page.on("request", lambda r: page.asked.append(r.url))
            page.goto(address)
            pages.append(page)
            return page
        yield open_page
        for page in pages:
            assert [line for line in page.said if "Failed to load resource" not in line] == []
            assert all(url.startswith((page.address, "data:", "blob:")) for url in page.asked)
            page.context.close()


def say(page, text):
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def ready(page): page.locator("#send").wait_for(state="visible")


def test_page_talks(visit):
    answers = iter([EGGS, "A second answer.", "A third answer."])
    page = visit(lambda question: next(answers))
    assert page.evaluate("document.activeElement.id") == "text"
    say(page, "How many eggs?")
    ready(page)
    answer = page.locator(".assistant")
    assert answer.locator(".python").inner_text() == "3*12" and answer.locator(".python_output").inner_text() == "36"
    assert "[" not in answer.inner_text() and answer.inner_text().endswith("36 eggs.")
    assert answer.locator(".text .token").first.get_attribute("title").startswith("50.0%; instead: \u201c?\u201d 25.0%")
    assert "calculator" in answer.locator(".python_output .token").first.get_attribute("title")
    page.get_by_role("button", name="Regenerate").click()
    ready(page)
    assert page.locator(".assistant").all_inner_texts() == ["A second answer."]
    page.get_by_role("button", name="Edit").click()
    assert page.get_by_label("Message").input_value() == "How many eggs?" and page.locator(".turn").count() == 0
    page.get_by_label("Message").fill("first")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    ready(page)
    assert page.locator(".user").inner_text() == "first\nsecond" and page.locator(".assistant").inner_text() == "A third answer."
    assert page.evaluate("document.activeElement.id") == "text"
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".turn").count() == 0 and page.locator("#empty").is_visible()


def test_page_streams_and_stops(visit):
    page = visit(lambda question: "word " * 2000, pause=0.02)
    say(page, "Count")
    page.locator(".assistant .token").nth(5).wait_for()
    assert page.locator("#log").get_attribute("aria-busy") == "true" and page.get_by_role("button", name="Clear").is_disabled()
    started = time.monotonic()
    page.keyboard.press("Escape")
    ready(page)
    assert time.monotonic() - started < 0.3
    assert settled(page.service, 2)
    n = page.locator(".assistant .token").count()
    assert page.locator(".note").inner_text() == "Stopped." and page.locator("#log").get_attribute("aria-busy") == "false"
    say(page, "Again")
    page.locator(".assistant .token").nth(n + 3).wait_for()
    page.get_by_role("button", name="Stop").click()
    ready(page)
    assert page.locator(".user").all_inner_texts() == ["Count", "Again"]


def test_page_shows_text_as_text(visit):
    page = visit(lambda question: question)
    say(page, NASTY)
    ready(page)
    assert page.locator(".assistant").inner_text() == NASTY.strip() == page.locator(".user").inner_text()
    long = "0123456789 " * 909 + "."
    say(page, long)
    ready(page)
    page.locator(".assistant").nth(1).wait_for()
    assert len(long) == 10_000 and page.locator(".user").last.inner_text() == long
    assert page.evaluate("window.hacked") is None and page.locator("main script, main img, main b").count() == 0


def test_page_saves_and_loads(visit, tmp_path):
    page = visit(lambda question: EGGS)
    say(page, "How many eggs?")
    ready(page)
    with page.expect_download() as download: page.get_by_role("button", name="Save").click()
    download.value.save_as(tmp_path/"talk.json")
    saved = json.loads((tmp_path/"talk.json").read_text())
    assert saved == {"messages": [{"role": "user", "content": "How many eggs?"}, {"role": "assistant", "content": EGGS}]}
    page.get_by_role("button", name="Clear").click()
    page.locator("#file").set_input_files(tmp_path/"talk.json")
    page.locator(".assistant .python_output").wait_for()
    say(page, "And now?") # the calculator's parts go back as they came
    ready(page)
    assert page.locator(".error").count() == 0 and page.locator(".assistant").count() == 2
    (tmp_path/"talk.json").write_text('{"messages": 3}')
    page.locator("#file").set_input_files(tmp_path/"talk.json")
    assert page.locator(".error").inner_text() == "This file is no conversation: choose one that Save wrote."


def test_page_asks_for_the_key_and_tells_errors(visit):
    page = visit(lambda question: "Yes.", key="correct horse")
    say(page, "Hello?")
    page.get_by_label("API key").fill("wrong key")
    with page.expect_response(lambda response: response.status == 401): page.keyboard.press("Enter")
    page.locator("#keys").wait_for(state="visible")
    page.get_by_label("API key").fill("correct horse")
    page.keyboard.press("Enter")
    page.locator(".assistant .token").first.wait_for()
    assert page.locator(".error").count() == 0 and page.locator(".user").all_inner_texts() == ["Hello?"]
    say(page, "x" * 200_001)
    assert page.locator(".error").inner_text().startswith("The conversation has 200011 characters")


@contextlib.contextmanager
def proxy(address, below, host=None, broken=None):
    "A proxy that serves a server below a path; it passes the host on, or puts `host`. `broken(path, answer)` may change an answer."
    class Handler(http.server.BaseHTTPRequestHandler):
        def forward(self):
            if not self.path.startswith(below): return self.answer(404, "text/html", b"<html>Not here</html>")
            path = "/" + self.path.removeprefix(below).lstrip("/")
            headers = dict(self.headers) | ({"Host": host} if host else {})
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            got = httpx.request(self.command, address + path, headers=headers, content=body, timeout=60)
            answer = got.status_code, got.headers["content-type"], got.content
            self.answer(*(broken and broken(path, answer) or answer))
        do_GET = do_POST = forward
        def answer(self, status, kind, body):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body)
        def log_message(self, *args): pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://localhost:{server.server_port}{below}"
    finally: server.shutdown()


@pytest.mark.parametrize("slash", ["/", ""])
@pytest.mark.parametrize("host", [None, "127.0.0.1"], ids=["host passed on", "host replaced"])
def test_page_behind_a_proxy(browser, tokenizer, host, slash):
    with in_thread(scripted(tokenizer, lambda question: "Yes."), hosts={"127.0.0.1", "localhost"}) as address, proxy(address, "/user/me/proxy/8000", host) as outside:
        page = browser.new_page()
        page.goto(outside + slash)
        page.locator("#model", has_text="script").wait_for()
        say(page, "Hello?")
        ready(page)
        assert page.locator(".assistant").inner_text() == "Yes." and page.locator(".error").count() == 0
        page.close()


def login(path, answer): return (200, "text/html", b"<html>Log in</html>") if path.startswith("/v1") else None
def bad_gateway(path, answer): return (502, "text/html", b"<html>Bad gateway</html>") if path.startswith("/v1") else None
def half(path, answer): return (*answer[:2], answer[2][:len(answer[2]) // 2].rpartition(b"data: ")[0]) if path.startswith("/v1") else None
def garbled(path, answer): return (*answer[:2], answer[2].replace(b'{"id"', b'<"id"')) if path.startswith("/v1") else None
def foreign_json(path, answer): return (403, "application/json", b'{"message": "no"}') if path.startswith("/v1") else None

@pytest.mark.parametrize("broken, sentence", [(login, "not from this server, but perhaps from a proxy"), (bad_gateway, "perhaps from a proxy before it (status 502)"), (half, "The connection ended before the answer did"),
                                              (garbled, "perhaps from a proxy"), (foreign_json, "perhaps from a proxy before it (status 403)")])
def test_page_says_what_a_proxy_did(browser, tokenizer, broken, sentence):
    with in_thread(scripted(tokenizer, lambda question: "Yes, certainly."), hosts={"localhost"}) as address, proxy(address, "", broken=broken) as outside:
        page = browser.new_page()
        page.goto(outside)
        say(page, "Hello?")
        ready(page)
        error = page.locator(".error").inner_text()
        assert sentence in error and error[0].isupper() and "token" not in error, error
        page.close()


def test_page_goes_on_after_a_hundred_turns(visit, tmp_path):
    from playwright.sync_api import expect
    page = visit(lambda question: "Yes.")
    page.locator("#model", has_text="script").wait_for()
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"Message {i}."} for i in range(200)]
    def load(messages):
        (tmp_path/"talk.json").write_text(json.dumps({"messages": messages}))
        page.locator("#file").set_input_files(tmp_path/"talk.json")
        expect(page.locator(".turn")).to_have_count(len(messages)) # the policy forbids the page what `wait_for_function` does
    system = {"role": "system", "content": "Be kind."}
    for messages, left in ((turns, (2, 4)), ([system, *turns], (2, 4)), ([{**turn, "content": "word " * 400} for turn in turns[:120]], (22, 22))):
        load(messages)
        for n in left:
            with page.expect_request("**/v1/chat/completions") as asked: say(page, "And now?")
            ready(page)
            assert page.locator(".error").count() == 0 and page.locator(".note").inner_text() == f"The conversation is long: its {n} oldest messages are no longer sent."
            sent = asked.value.post_data_json["messages"]
            assert sent[-1]["content"] == "And now?" and (sent[0] == system) == (messages[0] == system) and [m["role"] for m in sent[-2:]] == ["assistant", "user"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits(visit, scheme, width):
    "Nothing sticks out, at either width, and the text has contrast in either scheme."
    page = visit(lambda question: EGGS, viewport={"width": width, "height": 800}, color_scheme=scheme)
    say(page, "W" * 300)
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth && document.documentElement.scrollHeight <= innerHeight")
    for name in ("Send", "Regenerate", "Edit", "Clear", "Save", "Load"):
        box = page.get_by_role("button", name=name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 800
    def brightness(colour): return sum(w * ((v / 255) ** 2.2) for w, v in zip((0.2126, 0.7152, 0.0722), map(float, re.findall(r"[\d.]+", colour)[:3])))
    for selector in (".user", ".assistant", "#model", ".tools button", ".main"):
        ink, ground = page.evaluate("""s => { let e = document.querySelector(s), c = getComputedStyle(e).color; while (e && getComputedStyle(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement; return [c, getComputedStyle(e).backgroundColor] }""", selector)
        high, low = sorted([brightness(ink), brightness(ground)], reverse=True)
        assert (high + 0.05) / (low + 0.05) >= 4.5, (selector, ink, ground)
