"""What the compiler of an H100 makes of the model at the speedrun's shapes: graphs, kernels and memory. No GPU is needed: see `fake_cuda`."""
import fake_cuda
import pytest

from nanochat.model.gpt import GPTConfig
from nanochat.model.shape import model_shape
from nanochat.train.derive import run_memory

pytestmark = pytest.mark.skipif(fake_cuda.missing() is not None, reason=str(fake_cuda.missing()))
FP8 = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
# every function that attends on CUDA, once; the versions of FlashAttention share theirs
KERNELS = [("FlashAttention-2", "FlashAttention-2"), ("cuDNN", "FlexAttention"), ("SDPA", "SDPA in chunks")]


@pytest.fixture(scope="module")
def h100(tmp_path_factory):
    "Calls a function of `fake_cuda` in the process that compiles for an H100."
    with fake_cuda.process(tmp_path_factory.mktemp("cuda")) as pool:
        yield lambda f, *a, **kw: pool.submit(f, *a, **kw).result()


@pytest.mark.parametrize("full, window, fp8", [(*pair, False) for pair in KERNELS] + [(*KERNELS[1], True)])
def test_each_kind_of_layer_is_one_graph_that_is_compiled_once(h100, full, window, fp8):
    """Forward and backward; the second step's weights are new, and in fp8 they are quantised again.

    Four layers are of three kinds, and the embedding and the last norm are two more graphs."""
    assert h100(fake_cuda.traced, fp8=fp8, kernels={"full": full, "window": window}) == [(5, {}), (5, {})]


def test_a_function_in_python_would_not_be_one_graph(h100):
    "As a package's own function is, which the compiler has to leave alone."
    assert h100(fake_cuda.traced_with_untraceable_attention) == "Unsupported"


def test_no_kernel_of_attention_goes_untraced(h100):
    functions = h100(fake_cuda.attention_functions)
    for kind, traced in zip(("full", "window"), zip(*KERNELS)):
        assert {functions[kind][name] for name in traced} == set(functions[kind].values())


def test_every_kernel_that_inductor_writes_compiles(h100):
    "In fp8, which has the kernels of bfloat16 and those that quantize."
    found = h100(fake_cuda.kernels, fp8=True, kernels={"full": "cuDNN", "window": "FlexAttention"})
    names = " ".join(name for name, _ in found)
    # attention in both passes, norms, ReLU²
    for part in ("flex_attention", "flex_attention_backward", "rsqrt", "relu"): assert part in names, (part, names)
    assert not [(name, shared) for name, shared in found if shared > fake_cuda.SHARED_MEMORY]


@pytest.fixture(scope="module")
def activations(h100):
    "Bytes that a depth keeps for its backward pass: each layer adds the same, and everything grows with the width."
    kept = {fp8: [h100(fake_cuda.saved, layers, fp8)[0] for layers in (2, 4)] for fp8 in (False, True)}
    def estimate(depth, fp8):
        two, four = kept[fp8]
        return (two + (depth - 2) * (four - two) / 2) * depth / 24
    assert h100(fake_cuda.saved, 2, depth=12)[0] == pytest.approx(kept[False][0] / 2, rel=0.01)
    return estimate


@pytest.mark.parametrize("depth", [12, 20, 24, 26, 32])
@FP8
def test_the_plan_knows_what_the_backward_pass_needs(activations, depth, fp8):
    model = vars(GPTConfig(**model_shape(depth, 64, 128)))
    settings = {f"model.{name}": value for name, value in model.items()}
    settings |= {"hardware.dtype": "bfloat16", "hardware.nproc": 8, "hardware.device": "cuda", "hardware.fp8": fp8, "hardware.compile": True, "hardware.recompute": False}
    assert run_memory(settings, 16)["activations"] == pytest.approx(activations(depth, fp8), rel=0.1)
