"""--compile: one shape, one compilation, no graph break; the same numbers; and what fails runs as it is."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter, EagerAndRecordGraphs
from torch.utils._python_dispatch import TorchDispatchMode

from slotfast import compiled, flash, ops
from slotfast.audit.__main__ import main as audit
from slotfast.compiled import Compiled
from slotfast.config import EvalSettings
from slotfast.data import ByteTable, Text, TokenStream
from slotfast.errors import InputError
from slotfast.eval import SlidingPass, Streaming
from slotfast.eval.__main__ import main
from slotfast.eval.setup import choose_compile
from slotfast.model import GPT, GPTConfig
from slotfast.slot import Adapter, parse_preset
from slotfast.stream import CachedForward
from slotfast.windows import Plan
from slotfast.worker import Worker
from tests.models import randomised

V, L, STRIDE, BOS = 64, 32, 8, 1
BYTES = ByteTable(np.arange(V) % 5, np.arange(V) % 3 == 0, np.arange(V) < 4)
WAYS = {"windows": None, "stream": Streaming(block_tokens=24), "sinks, long blocks": Streaming(3, 40)}
COMPILER = shutil.which("g++") or shutil.which("clang++")


def run(model, compile, way=None, presets=("causal",), tokens=500):
    """A pass over a random stream, and the losses [rows, n]."""
    stream = TokenStream([np.random.default_rng(0).integers(4, V, tokens)])
    plan = Plan(len(stream) - 1, L, STRIDE)
    adapters = [Adapter(parse_preset(name), bos_id=BOS) for name in presets]
    options = {"batch_windows": 8, "streaming": way, "worker": Worker(compile=compile)}
    done, found = SlidingPass(model, Text(stream, BYTES, BOS), plan, adapters, **options), []
    done.run(on_scored=lambda scored: found.append(scored.nll))
    return done, np.concatenate(found, 1)


@pytest.fixture
def counter(monkeypatch):
    """Counts what would be compiled, and runs it as it is: no code is generated."""
    torch._dynamo.reset()
    counted = CompileCounter()
    torch_compile = torch.compile

    def without_code(function, options=None, **how):
        return torch_compile(function, backend=counted, **how)

    monkeypatch.setattr(torch, "compile", without_code)
    yield counted
    torch._dynamo.reset()


# One shape


@pytest.mark.parametrize("presets", [["causal"], []], ids=["causal", "no logits needed"])
@pytest.mark.parametrize("way", WAYS)
def test_a_whole_run_compiles_once_and_whole(tiny_model, counter, way, presets):
    """`fullgraph` forbids breaks, so one graph is the forward; a second one would be another shape."""
    _, plain = run(tiny_model, "off", WAYS[way], presets)
    done, found = run(tiny_model, "on", WAYS[way], presets)
    assert counter.frame_count == 1 and (done.compiled.mode, done.compiled.why) == ("on", None)
    assert np.abs(found - plain).max() < 1e-5 and done.compiled.seconds > 0
    run(tiny_model, "on", WAYS[way], presets, tokens=400)  # as an audit does
    assert counter.frame_count == 1


def test_only_whole_batches_and_blocks_are_compiled(tiny_model, monkeypatch):
    shapes = []
    monkeypatch.setattr(compiled, "_compiled", lambda function, _: lambda *x: shapes.append(x[0].shape) or function(*x))
    for way, shape in ((None, (8, L)), (Streaming(block_tokens=24), (1, 24))):
        shapes.clear()
        run(tiny_model, "on", way)
        assert len(shapes) > 3 and set(shapes) == {shape}


@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("sinks", [0, 3])
def test_steps_of_a_stream_are_its_blocks(tiny_model, window, sinks):
    """Both ways in turns read on from one another, and a saved state is worth what it was when it was saved."""
    tokens = torch.randint(4, V, (2, 60), generator=torch.Generator().manual_seed(0))
    plain, mixed = (CachedForward(tiny_model, window, sinks, batch=2) for _ in range(2))
    steps, saved = 0, None
    with torch.no_grad():
        for number, block in enumerate(tokens.split(6, 1)):
            expected = plain(block)
            if mixed.steady and number % 3:
                found, *kept = mixed.step(block, *mixed.kept())
                mixed.go_on(kept, 6)
                steps += 1
            else:
                found = mixed(block)
            assert (found - expected).abs().max() < 1e-5 and mixed.position == plain.position
            if number == 4:
                saved = mixed.state_dict()
            elif number == 5:
                sixth = found
        mixed.load_state_dict(saved)
        assert steps > 4 and (mixed(tokens[:, 30:36]) - sixth).abs().max() < 1e-5


# The numbers, by generated code


@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler on a CPU")
def test_generated_code_gives_the_same_losses():
    """One test: a compilation takes as long as the rest of this file."""
    torch._dynamo.reset()
    shape = {"vocab_size": V, "seq_len": L, "layers": 1, "width": 16, "heads": 2, "kv_heads": 1, "mlp_width": 24}
    model = randomised({**shape, "rope_dims": 4, "softcap": 3.0, "value_layers": (0,)})
    _, plain = run(model, "off", WAYS["sinks, long blocks"])
    done, found = run(model, "on", WAYS["sinks, long blocks"])
    assert done.compiled.mode == "on" and np.abs(found - plain).max() < 1e-5


# A GPU's forward, traced without one: on tensors that are shapes alone, which have no values to wait for


class _Moves(TorchDispatchMode):
    """Raises where a tensor of the host goes to the device, as it does without values too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        given = [x for x in args if isinstance(x, torch.Tensor) and x.dim()]
        if isinstance(found, torch.Tensor) and any(x.device != found.device for x in given):
            raise RuntimeError(f"{function}: moves a tensor")
        return found


@pytest.fixture
def forwards(monkeypatch):
    """The two functions that are compiled, of a bfloat16 model of fused blocks, with their inputs."""
    pytest.importorskip("triton", reason="fused blocks need triton")
    monkeypatch.setattr(ops, "uses_triton", lambda backend, device: torch.device(device).type == "meta")
    monkeypatch.setitem(flash._FOUND, "meta", None)
    torch._dynamo.reset()
    parts = dict(layers=4, xsa_layers=2, bigram_buckets=32, value_width=8, value_layers=(1, 3), bos_id=1)
    config = GPTConfig(vocab_size=V, seq_len=L, width=64, heads=4, kv_heads=2, mlp_width=96, rope_dims=8, **parts)
    model = GPT(config).eval().to("meta").cast_matrices(torch.bfloat16)
    tokens = torch.zeros(2, L, dtype=torch.int64, device="meta")
    cached = CachedForward(model, L, 2, dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            cached(tokens[:1])

    def windows(tokens):
        return (model.head(model.hidden(tokens, torch.bfloat16, 5, L)),)

    def stream(tokens, *kept):
        hidden, *kept = cached.step(tokens, *kept)
        return model.head(hidden), *kept

    yield {"windows": (windows, [tokens]), "stream": (stream, [tokens[:1], *cached.kept()])}
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("way", ["windows", "stream"])
def test_a_gpus_forward_never_waits(forwards, way):
    """So that a CUDA graph can hold it."""
    function, inputs = forwards[way]
    with _Moves():
        assert function(*inputs)[0].dtype == torch.float32


@pytest.mark.parametrize("wait", [lambda x: x.cpu(), lambda x: torch.ones(3).to("meta"), lambda x: bool(x.sum())])
def test_waiting_is_noticed(wait):
    with pytest.raises((RuntimeError, NotImplementedError), match="moves|[mM]eta"), _Moves():
        wait(torch.ones(3, device="meta"))


@torch.no_grad()
@pytest.mark.parametrize("way", ["windows", "stream"])
def test_fused_blocks_trace_whole(forwards, way):
    function, inputs = forwards[way]
    recorded = EagerAndRecordGraphs()
    torch.compile(function, backend=recorded, fullgraph=True, dynamic=False)(*inputs)
    (graph,) = recorded.graphs
    called = [str(node.target) for node in graph.graph.nodes]
    assert sum("linear_heads" in target for target in called) == 4


# What fails


def _failing(message):
    def fail(function, _):
        raise RuntimeError(f"\n{message}\nand so on")

    return fail


def test_what_cannot_be_compiled_runs_as_it_is(tiny_model, monkeypatch, capsys):
    plain = run(tiny_model, "off", WAYS["stream"])[1]
    monkeypatch.setattr(compiled, "_compiled", _failing("no Triton here"))
    done, found = run(tiny_model, "on", WAYS["stream"])
    assert np.array_equal(found, plain) and done.compiled.mode == "off"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith(
        "--compile: torch.compile fails here (RuntimeError: no Triton here)"
    )


@pytest.mark.skipif(COMPILER is None, reason="nothing to take away")
def test_no_compiler_costs_a_line(tiny_model, monkeypatch, capfd, tmp_path):
    """By inductor's own failure, in the first call of what it compiled lazily."""
    torch._dynamo.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "none")))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
    forward = Compiled(lambda x: (x.sin() + x.cos() * 3,), "on", "cpu")
    x = torch.arange(5.0)
    assert torch.equal(forward(x)[0], x.sin() + x.cos() * 3) and forward.mode == "off"
    assert capfd.readouterr().err.count("\n") == 1 and "C++" in forward.why
    torch._dynamo.reset()


def test_a_failure_later_on_loses_nothing(monkeypatch, capsys):
    calls = []

    def once(function, _):
        def call(x):
            calls.append(x)
            if len(calls) == 3:
                raise RuntimeError("recompile limit")
            return function(x)

        return call

    monkeypatch.setattr(compiled, "_compiled", once)
    forward = Compiled(lambda x: (2 * x,), "on", "cpu")
    assert [int(forward(torch.tensor(n))[0]) for n in range(5)] == [0, 2, 4, 6, 8] and len(calls) == 3
    assert "recompile limit" in capsys.readouterr().err and forward.mode == "off"


def test_faults_of_the_model_are_not_the_compilers(monkeypatch, capsys):
    def broken(x):
        raise InputError("a bad token")

    monkeypatch.setattr(compiled, "_compiled", lambda function, _: function)
    forward = Compiled(broken, "on", "cpu")
    with pytest.raises(InputError, match="a bad token"):
        forward(torch.zeros(1))
    assert forward.mode == "on" and not capsys.readouterr().err

    def full(x):
        raise torch.OutOfMemoryError("16 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        Compiled(full, "on", "cpu")(torch.zeros(1))


# CUDA graphs


@pytest.fixture
def cuda(monkeypatch):
    """As much of torch.cuda as a capture takes: a replay makes the captured calls again, on the same tensors."""

    class Stream:
        def wait_stream(self, other): ...

    class CUDAGraph:
        def replay(self):
            self.again()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())

    def capture(graph, function):
        def again():
            for own, new in zip(graph.results, function(*graph.inputs), strict=True):
                own.copy_(new)

        graph.graph.again = again

    return capture


def test_a_graph_copies_in_and_out(cuda):
    calls = []

    def function(x, y):
        calls.append(x)
        return x + y, x * y

    graph = compiled._Graph(function, [torch.ones(2), torch.ones(2)])
    cuda(graph, function)
    assert len(calls) == compiled._WARM_UPS + 1
    first = graph(torch.full((2,), 3.0), torch.full((2,), 4.0))
    second = graph(torch.full((2,), 5.0), torch.full((2,), 6.0))
    assert [x[0].item() for x in (*first, *second)] == [7, 12, 11, 30]  # the second replay left the first's results
    assert all(call is graph.inputs[0] for call in calls)  # what is captured reads the same memory each time


def test_a_capture_that_fails_leaves_the_compiled_forward(cuda, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "_compiled", lambda function, _: function)

    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    forward = Compiled(lambda x: (2 * x,), "graphs", "cpu")
    assert [int(forward(torch.tensor(n))[0]) for n in range(3)] == [0, 2, 4] and forward.mode == "on"
    assert capsys.readouterr().err.startswith("--compile: a CUDA graph fails here (RuntimeError: operation not")


# Settings, resuming, results


def test_who_compiles():
    def chosen(compile="auto", device="cuda", windows=100_000, streaming=None, batch=32, world=1, **settings):
        worker, plan = Worker(device, world=world), Plan(64 * windows, 128, 64)
        return choose_compile(EvalSettings(compile=compile, **settings), plan, batch, streaming, worker)

    assert chosen() == "on" and chosen(device="cpu") == "off" and chosen("on", "cpu") == "on"
    assert chosen(windows=5000) == chosen(world=8) == "off" and chosen("on", windows=10) == "on"
    assert chosen(streaming=Streaming(0, 16384)) == "off" and chosen(streaming=Streaming(0, 1024)) == "on"
    assert chosen("graphs") == "graphs" and chosen("off") == "off" and chosen(model="a:b") == "off"
    for refused, words in (
        ({"compile": "graphs", "device": "cpu"}, "--compile graphs: needs a GPU"),
        ({"compile": "on", "model": "a:b"}, "--compile on: is for an --artifact"),
    ):
        with pytest.raises(InputError, match=words):
            chosen(**refused)


@pytest.mark.parametrize("way", ["windows", "stream"])
def test_a_resumed_pass_runs_as_the_saved_one_did(tiny_model, monkeypatch, capsys, way):
    monkeypatch.setattr(compiled, "_compiled", lambda function, _: function)
    worked = run(tiny_model, "on", WAYS[way])[0].state_dict()
    monkeypatch.setattr(compiled, "_compiled", _failing("no compiler"))
    failed = run(tiny_model, "on", WAYS[way])[0].state_dict()

    fresh = Compiled(lambda x: (x,), "on", "cpu")
    fresh.load_state_dict(failed["forward"]["compiled"])
    assert fresh.mode == "off"
    fresh = Compiled(lambda x: (x,), "on", "cpu")
    fresh.load_state_dict(worked["forward"]["compiled"])
    with pytest.raises(InputError, match="--resume: torch.compile fails here .*no compiler.*--compile off"):
        fresh(torch.zeros(1))
    untried = Compiled(lambda x: (x,), "on", "cpu")
    untried.load_state_dict(Compiled(lambda x: (x,), "on", "cpu").state_dict())
    assert torch.equal(untried(torch.ones(1))[0], torch.ones(1)) and untried.mode == "off"


def test_the_result_says_how_it_ran(tmp_path, counter, capsys):
    def evaluate(*more):
        path = tmp_path / "result.json"
        main(["--max-tokens", "1500", "--preset", "none", "--json", str(path), *more])
        return json.loads(path.read_text())

    found = evaluate("--compile", "on", "--forward", "windows", "--seq-len", "128", "--batch-windows", "4")
    assert found["plan"]["compile"] == "on" == found["config"]["compile"] and found["seconds"]["compile"] > 0
    assert "windows, each recomputed; compiled in" in capsys.readouterr().out
    plain = evaluate("--seq-len", "128", "--forward", "windows", "--batch-windows", "4")
    assert plain["plan"]["compile"] == "off" and plain["config"]["compile"] == "auto"
    assert abs(plain["base"]["bpb"] - found["base"]["bpb"]) < 1e-6


def test_an_audit_with_it_on_finds_no_leak(counter, capsys):
    with contextlib.suppress(SystemExit):
        small = ["--seq-len", "32", "--batch-windows", "4", "--ranks", "1", "--reruns", "2"]
        audit(["--compile", "on", "--preset", "none", "causal", *small, "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "clean" and 1 <= counter.frame_count <= 2  # rows that need different parts of a window
