"""An H100 for the compiler, on a machine without a GPU: torch traces for it, and Inductor and Triton generate its code, but nothing runs.

`process(folder)` starts a Python process in which torch finds the libraries of CUDA answered by a few lines of C (`DRIVER`). These say
that there is one H100, and nothing else: memory cannot be allocated, so everything is a fake tensor (a shape, a dtype and a device).
Autograd runs on fake tensors as well, so backward passes are traced and compiled like forward passes.
The process has to be a new one, because the C library must be loaded before torch; so it also leaves other tests alone.
"""
import concurrent.futures
import ctypes
import functools
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

# what torch asks about a GPU while it compiles for one; any other function of CUDA answers, as on a machine without a GPU, with an error
DRIVER = r"""
#include <driver_types.h>
#include <string.h>
int cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H100 80GB HBM3");
    p->major = 9; p->minor = 0;
    p->multiProcessorCount = 132; p->warpSize = 32;
    p->totalGlobalMem = 85899345920; p->l2CacheSize = 50 << 20;
    p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 232448; p->sharedMemPerMultiprocessor = 233472;
    p->regsPerBlock = 65536; p->regsPerMultiprocessor = 65536;
    p->maxThreadsPerBlock = 1024; p->maxThreadsPerMultiProcessor = 2048;
    return 0;
}
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaGetDevice(int *device) { *device = 0; return 0; }
int cudaSetDevice(int device) { return 0; }
int cudaGetLastError(void) { return 0; }
int cudaPeekAtLastError(void) { return 0; }
int cudaDriverGetVersion(int *version) { *version = CUDART; return 0; }
int cudaRuntimeGetVersion(int *version) { *version = CUDART; return 0; }
int cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned v, unsigned long long flags, int *found) {
    *f = 0; if (found) *found = 1; return 0;
}
int cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return 0; }
int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaStreamSynchronize(void *stream) { return 0; }
int cudaStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cudaStreamGetCaptureInfo(void *stream, int *status, ...) { *status = 0; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
"""
# what else torch's own library (libcaffe2_nvrtc) links to, and nobody calls
UNUSED = """cuCtxGetCurrent cuCtxSetCurrent cuDeviceGet cuDeviceGetAttribute cuDevicePrimaryCtxRetain cuFuncGetAttribute cuFuncSetAttribute
            cuFuncSetCacheConfig cuGetErrorString cuLaunchCooperativeKernel cuLaunchKernel cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2
            cuModuleGetFunction cuModuleLoad cuModuleLoadData cuModuleLoadDataEx cuModuleUnload cuOccupancyMaxActiveBlocksPerMultiprocessor
            cuPointerGetAttribute cuTensorMapEncodeTiled""".split()
SHARED_MEMORY = 232448 # bytes that one block of an H100 can have (227 KB)


def missing():
    "Why there is no fake GPU on this machine; None if there is one."
    import torch
    if sys.platform != "linux": return "the fake CUDA library is made for Linux"
    if torch.version.cuda is None: return "this torch is built without CUDA"
    if importlib.util.find_spec("triton") is None: return "Triton is not installed"
    if shutil.which("gcc") is None: return "gcc is not installed"
    if torch.cuda.is_available(): return "there is a real GPU: the tests marked cuda use it"


def library(folder):
    "Compile `DRIVER` into a folder, and return its path."
    import torch
    include = Path(importlib.util.find_spec("triton").origin).parent/"backends"/"nvidia"/"include"
    major, minor = map(int, torch.version.cuda.split("."))
    source, target = Path(folder)/"driver.c", Path(folder)/"libcuda.so.1"
    source.write_text(DRIVER + "".join(f"int {name}() {{ return 1; }}\n" for name in UNUSED))
    subprocess.run(["gcc", "-shared", "-fPIC", f"-I{include}", f"-DCUDART={1000 * major + 10 * minor}", "-Wl,-soname,libcuda.so.1",
                    "-o", target, source], check=True)
    return target


def pretend(driver):
    "Make this process, which has not imported torch yet, one that compiles for an H100."
    assert "torch" not in sys.modules
    folder = str(Path(driver).parent)
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"}
    ctypes.CDLL(str(driver), ctypes.RTLD_GLOBAL) # its functions come before those of the same name in torch's libraries
    import torch
    import torch._inductor.config as inductor
    import torch._subclasses.fake_tensor as fake
    from torch._inductor.runtime import triton_helpers
    torch.cuda.init()
    fake.FakeTensorMode.avoid_device_init = property(lambda mode: True) # do not allocate, not even a number
    triton_helpers.set_driver_to_gpu = lambda: None # it would replace ours
    # `shape_padding` times products; the others only cost time here
    inductor.shape_padding, inductor.compile_threads = False, 1
    inductor.fx_graph_cache = inductor.joint_graph_constant_folding = False
    inductor.use_static_cuda_launcher = False # keep Triton's own result, which says how much memory a kernel shares
    target_chip(90)


def target_chip(capability):
    "Let Triton compile for this compute capability, such as 90."
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    class Driver:
        def get_current_target(self): return GPUTarget("cuda", capability, 32)
        def get_active_torch_device(self): return torch.device("cuda", 0)
        def get_current_device(self): return capability # kernels are cached by device
        def get_current_stream(self, device=None): return 0
        def get_device_properties(self, device): return {"max_shared_mem": SHARED_MEMORY, "multiprocessor_count": 132}
        def get_device_capability(self, device=None): return divmod(capability, 10)
        def get_device_interface(self): return torch.cuda
    triton.runtime.driver.set_active(Driver())


def process(folder):
    "A pool of one process that compiles for an H100; its functions are those below, and others that can be pickled."
    spawn = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(1, spawn, pretend, (library(folder),))


# what runs inside of the process

def attention_functions():
    "Which function each candidate for attention on CUDA is: {kind: {name: the function's code}}."
    from nanochat.model import attention
    def code(f): return f.__name__, [str(cell.cell_contents) for cell in f.__closure__ or ()]
    return {kind: {name: str(code(f)) for name, f in kernels.items()} for kind, kernels in attention._candidates("cuda").items()}


def fake_model(mode, depth, layers, fp8=False, kernels=None):
    "A model of `nanochat speedrun`'s shape for this depth, but with so many layers, on the fake GPU, that attends by `kernels`."
    import torch
    from nanochat.model import attention
    from nanochat.model.gpt import GPT, GPTConfig
    from nanochat.model.precision import use_fp8
    from nanochat.model.shape import model_shape
    config = GPTConfig(**model_shape(depth, 64, 128) | {"n_layer": layers})
    names = kernels or {"full": "cuDNN", "window": "FlexAttention"}
    found = attention._candidates("cuda")
    attention._chosen["cuda", torch.bfloat16, 128] = {kind: found[kind][name] for kind, name in names.items()}
    with mode:
        with torch.device("cuda"): model = GPT(config)
        for name, buffer in model.named_buffers(): setattr(model, name, buffer.to("cuda"))
        model.train()
        attention._flex_masks.clear()
        if "FlexAttention" in names.values(): attention._flex_mask(2048, min(config.windows), torch.device("cuda", 0))
        if fp8: use_fp8(model)
    return model


def steps(backend, depth=24, layers=4, fp8=False, kernels=None, n=1):
    "Compile the trunk's pieces by a backend and take `n` training steps at the speedrun's shapes. Returns dynamo's counters after each."
    from functools import partial
    import torch
    import torch._dynamo
    from nanochat.model.precision import quantize_weights
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    mode, seen = torch._subclasses.FakeTensorMode(), []
    model = fake_model(mode, depth, layers, fp8, kernels)
    model.for_training(partial(torch.compile, backend=backend, fullgraph=True, dynamic=False))
    for _ in range(n):
        with mode, quantize_weights(model):
            tokens = torch.zeros((16, 2048), device="cuda", dtype=torch.int64)
            with torch.autocast("cuda", dtype=torch.bfloat16): out = model.trunk(tokens)
            out.backward(torch.ones_like(out))
        seen.append({name: dict(values) for name, values in counters.items()})
    for name, p in model.named_parameters():
        if name != "lm_head.weight": assert p.grad is not None and p.grad.shape == p.shape, name
    return seen


def traced(**shape):
    "Take two steps with a backend that only traces, forward and backward. Returns graphs and graph breaks after each step."
    return [(seen["stats"]["unique_graphs"], seen.get("graph_break", {})) for seen in steps("aot_eager", n=2, **shape)]


def traced_with_untraceable_attention():
    "The name of the error that `traced` raises if the compiler may not look into the attention function."
    import torch
    from nanochat.model import attention
    original = attention._varlen_attention
    attention._varlen_attention = torch.compiler.disable(original)
    try: traced(layers=2, kernels={"full": "SDPA", "window": "FlashAttention-2"})
    except torch._dynamo.exc.TorchDynamoException as e: return type(e).__name__
    finally: attention._varlen_attention = original


def saved(layers, fp8=False, depth=24):
    "Bytes that the forward pass of 16 rows keeps for its backward pass, by Inductor's partitioner: of activations, and of copies of weights."
    from functorch.compile import make_boxed_func
    from torch._inductor.compile_fx import compile_fx
    found, seen = [0, 0], {} # seen: inputs that are kept, by their storage
    def measure(graph, inputs, is_backward=False, **kw):
        if is_backward: return make_boxed_func(graph.forward)
        made, of_tokens = _kept(graph)
        def counted(*args): # layers of a kind share a graph, and each call keeps as much
            for i, n in enumerate(made): found[i] += n
            seen.update((args[i].untyped_storage()._cdata, args[i]) for i in of_tokens)
            return graph.forward(*args)
        return make_boxed_func(counted)
    steps(lambda graph, inputs: compile_fx(graph, inputs, inner_compile=measure), depth, layers, fp8)
    return found[0] + sum(t.nbytes for t in seen.values()), found[1]


def _kept(graph):
    "What a forward graph keeps besides its result: bytes of activations and of everything else that it makes; numbers of its inputs that are activations."
    result, *kept = graph.graph.output_node().args[0]
    def of_tokens(node): return node.meta["val"].shape[:1].numel() in (16, 16 * 2048)
    kept = [node for node in dict.fromkeys(kept) if hasattr(node.meta.get("val"), "numel")]
    made = [node for node in kept if node.op != "placeholder"]
    sizes = [(node.meta["val"].nbytes, of_tokens(node)) for node in made]
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    return [sum(n for n, tokens in sizes if tokens is kind) for kind in (True, False)], [inputs.index(node) for node in kept if node not in made and of_tokens(node)]


def kernels(**shape):
    "Compile everything that Inductor writes in Triton for a training step. Returns [kernel, bytes of shared memory]."
    import torch
    from functorch.compile import make_boxed_func
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    sources = {} # source code: name of the kernel in it; kinds of layers have kernels that differ in nothing but a number in the name
    def keep(self, name, source, *a, **kw): sources[source.replace(name, "triton_kernel")] = name
    def generate(graph, inputs, **kw):
        copy = torch.fx.Graph() # Inductor changes the graph that it gets
        copy.output(copy.graph_copy(graph.graph, {}))
        compile_fx_inner(graph, inputs, **kw)
        return make_boxed_func(torch.fx.GraphModule(graph, copy).forward)
    original, AsyncCompile.triton = AsyncCompile.triton, keep
    try: steps(lambda graph, inputs: compile_fx(graph, inputs, inner_compile=generate), **shape)
    finally: AsyncCompile.triton = original
    return [(name, _compiled(source)) for source, name in sources.items()]


@functools.cache
def _compiled(source):
    "Compile one of Inductor's kernels with ptxas, in all the configurations that it would time. Returns bytes of shared memory, the most."
    from torch._inductor.codecache import PyCodeCache
    kernel = PyCodeCache.load(source).triton_kernel
    kernel.precompile(warm_cache_only=True)
    results = kernel.compile_results
    assert all(result.kernel.asm["cubin"] for result in results)
    return max(result.kernel.metadata.shared for result in results)
