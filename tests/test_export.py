"""Models in other programs: transformers, onnxruntime and llama.cpp compute what ours computes, and a folder comes back as it left."""
import base64
import json
import random
import sys
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml

from nanochat.core.files import UserError
from nanochat.core.run import Run
from nanochat.core.tokenizer import Tokenizer
from nanochat.lab.hub import export_run, import_folder, push
from nanochat.model.engine import Engine, Sampling
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.talk.export import from_transformers, to_transformers
from nanochat.talk.gguf_file import to_gguf
from nanochat.talk.onnx_file import to_onnx
from nanochat.train.checkpoint import load_model, save_checkpoint

SWITCHES = ("value_embeds", "resid_lambdas", "smear", "key_offset", "backout")
WORDS = "The baker sold bread to the people of the town, and 6 * 7 is 42. Who are you? I am Pico, a small model. ".split()
ALL = dict.fromkeys(SWITCHES, True)


@pytest.fixture(scope="module")
def tokenizer(): return Tokenizer.train([" ".join(WORDS * 9)], 330)


def random_model(tokenizer, seed=3, **config):
    "A model with random weights, none of them zero, so that every part counts."
    model, g = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **config)).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters(): p.normal_(0, 1 if p.ndim == 1 or "wte" in name else 0.1, generator=g)
    return model


def drawn(n):
    "So many drawn configurations; each switch is on in some and off in some."
    rng = random.Random(20)
    for i in range(n):
        head_dim, n_kv_head = rng.choice([8, 16, 30]), rng.choice([1, 2])
        n_head = n_kv_head * rng.choice([1, 2, 3])
        yield dict(n_layer=rng.randint(1, 5), n_head=n_head, n_kv_head=n_kv_head, n_embd=n_head * head_dim, sequence_len=rng.choice([64, 600]),
                   window_pattern=rng.choice(["L", "SL", "SSSL"]), rope_base=rng.choice([1e4, 1e5]), qk_scale=rng.choice([1.0, 1.2]),
                   softcap=rng.choice([15.0, 30.0]), **{name: rng.random() < 0.5 for name in SWITCHES})


def conversations(n):
    "Drawn conversations, some with a system message, some with calls of the calculator."
    rng = random.Random(21)
    def text(): return " ".join(rng.choices([*WORDS, "\n", "é😀", "<b>", "  two", "{{ x }}", "'s"], k=rng.randint(1, 12)))
    for _ in range(n):
        messages = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            tool = [{"type": "python", "text": "6*7"}, {"type": "python_output", "text": "42"}, {"type": "text", "text": text()}]
            answer = [{"type": "text", "text": text()}, *tool] if rng.random() < 0.5 else text()
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": answer}]
        yield messages


def load(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()


@pytest.fixture(scope="module", autouse=True)
def hub_folder(tmp_path_factory):
    "transformers copies a folder's code into a cache: here, not at home."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf")))
        try: patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        except ImportError: pass
        yield


def test_twelve_drawn_configurations_in_transformers(tokenizer, tmp_path):
    assert {tuple(c[name] for c in drawn(12)) for name in SWITCHES}.isdisjoint({(True,) * 12, (False,) * 12})
    for i, config in enumerate(drawn(12)):
        model = random_model(tokenizer, **config)
        folder = to_transformers(model, tokenizer, tmp_path/f"m{i}")
        idx = torch.randint(0, tokenizer.vocab_size, (2, min(200, config["sequence_len"])))
        with torch.inference_mode(): error = (load(folder)(idx).logits - model(idx)).abs().max()
        assert error < 1e-4, config
        back, _ = from_transformers(folder)
        assert vars(back.config) == vars(model.config)
        for name, p in model.state_dict().items(): assert torch.equal(back.state_dict()[name], p), name


@pytest.fixture(scope="module")
def pico(tokenizer, tmp_path_factory):
    "A model with all switches, and its folder."
    model = random_model(tokenizer, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, sequence_len=256, window_pattern="SL", **ALL)
    return model, to_transformers(model, tokenizer, tmp_path_factory.mktemp("pico")/"pico")


def test_generate_gives_the_greedy_ids_of_the_engine(tokenizer, pico):
    "100 prompts of different lengths, in batches that are padded on the left."
    model, folder = pico
    theirs, pad = load(folder), 0
    prompts = [tokenizer.render_for_completion({"messages": m}) for m in conversations(100)]
    want = Engine(model, tokenizer).generate(prompts, Sampling(max_new_tokens=12, temperature=0), tools=False)
    longest = max(map(len, prompts))
    rows = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    found = theirs.generate(rows, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, longest:].tolist()
    assert len({tuple(answer.tokens) for answer in want}) > 20 # not one answer to all
    for got, answer in zip(found, want): assert got[:len(answer.tokens)] == answer.tokens


def test_the_chat_template_gives_our_ids(tokenizer, pico):
    transformers = pytest.importorskip("transformers")
    theirs, tools = transformers.AutoTokenizer.from_pretrained(pico[1], trust_remote_code=True), 0
    for messages in conversations(500):
        ids, _ = tokenizer.render_conversation({"messages": messages})
        assert theirs.apply_chat_template(messages, return_dict=False) == ids
        asked = messages[:-1]
        assert theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=False) == tokenizer.render_for_completion({"messages": asked})
        tools += any(isinstance(message["content"], list) for message in messages)
    assert tools > 200


def test_a_pipeline_answers(pico):
    transformers = pytest.importorskip("transformers")
    pipe = transformers.pipeline("text-generation", model=str(pico[1]), trust_remote_code=True)
    answer = pipe([{"role": "user", "content": "Who are you?"}], max_new_tokens=5)[0]["generated_text"][-1]
    assert answer["role"] == "assistant" and isinstance(answer["content"], str)
    assert transformers.GenerationConfig.from_pretrained(pico[1]).temperature == 0.3


def test_a_save_of_transformers_comes_back(pico, tmp_path):
    load(pico[1]).save_pretrained(tmp_path/"saved")
    back, _ = from_transformers(tmp_path/"saved")
    for name, p in pico[0].state_dict().items(): assert torch.equal(back.state_dict()[name], p), name


def test_without_consent_no_other_architecture_is_loaded(pico):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="nanochat_2026|trust_remote_code"): transformers.AutoModelForCausalLM.from_pretrained(pico[1], trust_remote_code=False)


def test_twelve_drawn_configurations_in_onnxruntime(tokenizer, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    for i, config in enumerate(drawn(12)):
        model = random_model(tokenizer, **config)
        session = onnxruntime.InferenceSession(to_onnx(model, tokenizer, tmp_path/f"m{i}"))
        for shape in ((1, 1), (3, 7), (2, min(200, config["sequence_len"]))):
            idx = torch.randint(0, tokenizer.vocab_size, shape)
            found, = session.run(None, {"input_ids": idx.numpy()})
            with torch.inference_mode(): assert (torch.from_numpy(found) - model(idx)).abs().max() < 1e-3, config


def test_onnx_that_is_not_installed_is_named(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = random_model(tokenizer, n_layer=1, n_head=1, n_kv_head=1, n_embd=16, sequence_len=32)
    with pytest.raises(UserError, match="uv pip install onnx"): to_onnx(model, tokenizer, tmp_path/"m")
    assert not (tmp_path/"m").exists()


def post(url, **body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))


def test_llama_cpp_gives_the_greedy_ids_of_the_engine(tokenizer, tmp_path):
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp for Python is not installed: uv pip install xllamacpp")
    config = GPTConfig.plain2025(n_layer=3, n_head=4, n_kv_head=2, n_embd=128, sequence_len=256, resid_lambdas=True, qk_scale=1.2)
    model = random_model(tokenizer, **{name: value for name, value in vars(config).items() if name != "vocab_size"})
    params = llama.CommonParams()
    params.model.path = str(to_gguf(model, tokenizer, tmp_path/"m.gguf"))
    params.n_ctx, params.n_parallel, params.warmup = 256, 1, False
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32 # half precision would change near ties
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    url = (server := llama.Server(params)).listening_address
    prompts = [tokenizer.render_for_completion({"messages": m}) for m in conversations(20)]
    want = Engine(model, tokenizer).generate(prompts, Sampling(max_new_tokens=12, temperature=0), tools=False)
    for prompt, answer in zip(prompts, want):
        found = post(f"{url}/completion", prompt=prompt, n_predict=12, temperature=0, return_tokens=True, cache_prompt=False)["tokens"]
        end = answer.finish == "stop" # llama.cpp does not report the token that ends an answer
        assert found == answer.tokens[:len(answer.tokens) - end]
    assert post(f"{url}/tokenize", content="The baker is 42. Who?")["tokens"] == tokenizer.encode("The baker is 42. Who?")
    del server


def test_what_llama_cpp_lacks_is_refused(tokenizer, tmp_path):
    plain = vars(GPTConfig.plain2025(n_layer=2, n_head=1, n_embd=16, sequence_len=32, vocab_size=tokenizer.vocab_size))
    for name in ("value_embeds", "smear", "key_offset", "backout"):
        model = GPT(GPTConfig(**plain | {name: True}))
        with pytest.raises(UserError, match=f"not possible, because .* {name}; .*--set model.{name}=false"): to_gguf(model, tokenizer, tmp_path/"m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(tokenizer, tmp_path, monkeypatch):
    "A run with a model after SFT, and its scores."
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path/"base"))
    model = random_model(tokenizer, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, sequence_len=64, **ALL)
    run = Run.create("pico", {"seed": 1, "data": {"source": "/home/ann/letters"}, "tokenizer": {}, "model": vars(model.config)})
    tokenizer.save(run.stage_dir("tokenizer"))
    save_checkpoint(run.stage_dir("sft")/"checkpoints", 7, model.state_dict(), None, {"model": vars(model.config), "tokenizer": tokenizer.hash})
    task = {"n": 100, "accuracy": 0.9, "ci95": [0.83, 0.94], "chance": 0.25}
    (run.dir/"sft"/"eval.json").write_text(json.dumps({"tasks": {"facts": task}}))
    run.finish("sft", step=7, bits_per_byte=1.25)
    return run


@pytest.mark.parametrize("kind", ["transformers", "onnx"])
def test_the_card(run, tmp_path, kind):
    if kind == "onnx": pytest.importorskip("onnx")
    folder = export_run(run, "latest", kind, tmp_path/"out")
    _, head, body = (folder/"README.md").read_text().split("---\n", 2)
    head = yaml.safe_load(head)
    assert head["license"] == "other" and head["library_name"] == kind and head["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.9
    assert "| facts | 100 | 25 % | 90 % (83–94) |" in body and "1.25" in body
    for file in folder.rglob("*.*"):
        if file.suffix in (".md", ".json", ".py"): assert "/home/ann" not in file.read_text(), file


def test_there_and_back(run, tmp_path):
    folder = export_run(run, "latest", "transformers", tmp_path/"out")
    back = import_folder(folder, "again")
    (ours, _, _), (theirs, _, meta) = load_model(run, "sft"), load_model(back, back.latest())
    assert meta["step"] == 7 and vars(ours.config) == vars(theirs.config)
    for name, p in ours.state_dict().items(): assert torch.equal(theirs.state_dict()[name], p), name
    (folder/"nanochat.json").unlink() # as from elsewhere
    other = import_folder(folder, "elsewhere")
    assert other.latest() == "sft" and torch.equal(load_model(other, "sft")[0].lm_head.weight, ours.lm_head.weight)


class ModelHub:
    "As much of a hub as an upload needs; keeps what was uploaded."
    def __init__(self, refuse=False):
        self.files, hub = {}, self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args): pass
            def reply(self, value, status=200):
                data = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            def do_GET(self): self.reply({"id": "me/pico", "siblings": [], "sha": "0" * 40})
            def do_PUT(self):
                hub.files[self.path.removeprefix("/store/")] = self.rfile.read(int(self.headers["Content-Length"]))
                self.reply({})
            def do_POST(self):
                size = int(self.headers.get("Content-Length") or 0)
                body, path = self.rfile.read(size), self.path.partition("?")[0]
                if refuse: return self.reply({"error": "Invalid username or password."}, 401)
                self.reply(hub.answer(path, body))

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path, body):
        if path == "/api/repos/create": return {"url": f"{self.url}/me/pico", "id": "me/pico", "name": "me/pico"}
        if path == "/api/validate-yaml": return {"errors": [], "warnings": []} # of the card's head
        if path.endswith("/preupload/main"):
            return {"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            def place(oid): return {"upload": {"href": f"{self.url}/store/{oid}", "header": {}}}
            objects = json.loads(body)["objects"]
            return {"transfer": "basic", "objects": [o | {"actions": place(o["oid"])} for o in objects]}
        assert path.endswith("/commit/main"), path
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "file": self.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile": self.files[value["path"]] = self.files.pop(value["oid"])
        return {"commitUrl": f"{self.url}/me/pico/commit/1", "commitOid": "1" * 40, "success": True}


@pytest.mark.parametrize("refuse", [False, True])
def test_push(run, tmp_path, monkeypatch, refuse):
    folder = export_run(run, "latest", "transformers", tmp_path/"out")
    hub = ModelHub(refuse)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.HF_TOKEN_PATH", str(tmp_path/"token"))
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    try:
        if refuse:
            with pytest.raises(UserError, match="me/pico was not uploaded .*hf auth login"): push(folder, "me/pico")
            return
        assert push(folder, "me/pico").endswith("me/pico")
        kept = {name: data for name, data in hub.files.items() if name != ".gitattributes"}
        assert kept == {path.name: path.read_bytes() for path in folder.iterdir()}
    finally:
        hub.server.shutdown()
        hub.server.server_close()
