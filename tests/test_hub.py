"""The model against an implementation that others wrote: the same logits and gradients, and files that go there and back."""
import pytest
import torch
from safetensors.torch import load_file

from nanochat.core.tokenizer import Tokenizer
from nanochat.model.gpt import GPT, GPTConfig
from nanochat.talk.export import from_transformers, to_transformers, transformers_names

transformers = pytest.importorskip("transformers")

CONFIGS = [
    dict(n_layer=1, n_head=1, n_embd=16, sequence_len=32),
    dict(n_layer=2, n_head=4, n_embd=64, sequence_len=64),
    dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=128, sequence_len=48), # grouped heads
    dict(n_layer=4, n_head=6, n_kv_head=1, n_embd=96, sequence_len=128), # one head of keys and values for all
    dict(n_layer=6, n_head=3, n_embd=384, sequence_len=256, rope_base=50_000.0), # heads of 128
]


@pytest.fixture(scope="module")
def tokenizer(): return Tokenizer.train(["The baker sold bread to the people of the town. " * 9], 300)


def both(tokenizer, folder, config):
    "Our model and theirs, with the same weights: none of them zero, so that every part counts."
    ours = GPT(GPTConfig.plain2025(vocab_size=tokenizer.vocab_size, **config))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in ours.named_parameters(): p.normal_(0, 1 if "wte" in name else 0.5 / p.size(-1)**0.5, generator=generator)
    to_transformers(ours, tokenizer, folder)
    return ours, transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: f"d{config['n_layer']}h{config['n_head']}")
def test_the_same_logits_and_gradients(tokenizer, tmp_path, config):
    ours, theirs = both(tokenizer, tmp_path/"model", config)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    idx = torch.randint(0, tokenizer.vocab_size, (2, config["sequence_len"] + 1), generator=torch.Generator().manual_seed(4))
    x, y = idx[:, :-1], idx[:, 1:]
    logits = theirs(x).logits
    assert (logits - ours(x)).abs().max() < 1e-4
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()).backward()
    ours(x, y).backward()
    grads, names = dict(theirs.named_parameters()), transformers_names(config["n_layer"])
    for name, p in ours.named_parameters():
        want = grads[names[name]].grad
        got = p.grad[:len(want)]
        assert (got - want).norm() <= 1e-3 * want.norm(), name


def test_there_and_back(tokenizer, tmp_path):
    ours, theirs = both(tokenizer, tmp_path/"ours", CONFIGS[2])
    theirs.save_pretrained(tmp_path/"theirs")
    back, _ = from_transformers(tmp_path/"theirs")
    assert vars(back.config) == vars(ours.config)
    idx = torch.randint(0, tokenizer.vocab_size, (2, 9))
    assert torch.equal(back(idx), ours(idx))
    a, b = load_file(tmp_path/"ours"/"model.safetensors"), load_file(tmp_path/"theirs"/"model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_their_tokenizer_and_their_generation(tokenizer, tmp_path):
    "What transformers makes of the folder alone: the same ids for a text, and the same greedy continuation as ours."
    ours, theirs = both(tokenizer, tmp_path/"model", CONFIGS[1])
    theirs_tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path/"model"/"tokenizer.json"))
    text = "The baker sold bread."
    ids = tokenizer.encode(text)
    assert theirs_tokenizer(text, add_special_tokens=False)["input_ids"] == list(ids)
    prompt = [tokenizer.bos_id, *ids]
    with torch.no_grad(): want = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(prompt):].tolist()
    idx = torch.tensor([prompt])
    for _ in range(8): idx = torch.cat([idx, ours(idx)[:, -1:].argmax(-1)], 1)
    assert idx[0, len(prompt):].tolist() == want
