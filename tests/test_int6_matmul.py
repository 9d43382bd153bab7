"""6-bit weights: the layout, the three ways to multiply, refusals, and what the kernels compile to.

Accuracy on odd shapes, memory fences and reruns of every case in its SPEC are the business of test_kernels.py.
"""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from slotfast.kernels import (
    dequantize_int6,
    dequantize_int6_ref,
    int6_matmul,
    int6_matmul_ref,
    int6_product,
    pack_int6,
    unpack_int6,
)
from slotfast.kernels.int6_product import SPEC, _config

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def draw(n, k, group=0, scale_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-32, 32, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand((n, -(-k // group)) if group else (n,), generator=generator) * 0.1 + 1e-3
    return codes.to(DEVICE), scale.to(scale_dtype).to(DEVICE)


def draw_x(*shape, dtype, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


# Layout


@pytest.mark.parametrize("n, k", [(1, 1), (3, 64), (2, 127), (2, 128), (5, 129), (64, 131), (7, 0), (0, 5), (1, 1536)])
def test_unpack_undoes_pack(n, k):
    codes, scale = draw(n, k)
    weight = pack_int6(codes, scale)
    assert weight.shape == (n, k)
    assert torch.equal(unpack_int6(weight), codes)


def test_every_code_at_every_place():
    """All 64 codes at each of the 128 places of a block, each packed alone among zeros and among others."""
    alone = torch.zeros(64, 128, 128, dtype=torch.int8)
    alone[:, torch.arange(128), torch.arange(128)] = torch.arange(-32, 32, dtype=torch.int8)[:, None]
    crowd = (torch.arange(64)[:, None] + torch.arange(128)) % 64 - 32
    for codes in (alone.view(-1, 128), crowd.to(torch.int8)):
        assert torch.equal(unpack_int6(pack_int6(codes, torch.ones(len(codes)))), codes)


def test_layout_is_the_documented_one():
    codes, scale = draw(3, 300)
    weight = pack_int6(codes, scale)
    low, high = weight.low.tolist(), weight.high.tolist()
    for n in range(3):
        for k in range(384):
            block, run, i, r = k // 128, k % 128 // 16, k % 16 // 4, k % 4
            byte = {0: 0, 1: 2, 2: 1, 3: 3}[r]
            word = run if i < 2 else 8 + run
            nibble = low[n][64 * block + 4 * word + byte] >> (4 if i % 2 else 0) & 15
            pair = high[n][32 * block + 4 * run + byte] >> 2 * i & 3
            assert (nibble | pair << 4) - 32 == (codes[n, k].item() if k < 300 else 0), (n, k)


def test_six_bits_a_weight():
    weight = pack_int6(*draw(16, 512))
    assert weight.low.nbytes + weight.high.nbytes == 16 * 512 * 6 // 8


def test_pack_takes_any_strides():
    codes, scale = draw(70, 33)
    assert torch.equal(unpack_int6(pack_int6(codes.t(), scale[:33])), codes.t())


# Dequantisation


@pytest.mark.parametrize("n, k, group", [(5, 131, 0), (33, 256, 0), (3, 101, 32), (17, 200, 64), (2, 300, 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_is_the_reference(dtype, n, k, group):
    weight = pack_int6(*draw(n, k, group))
    got, expected = dequantize_int6(weight, dtype), dequantize_int6_ref(weight, dtype)
    assert got.dtype == dtype and got.is_contiguous()
    if dtype == torch.bfloat16 and not ON_GPU:  # the interpreter truncates to bf16 where hardware rounds
        exact = dequantize_int6_ref(weight, torch.float32)
        truncated = (exact.view(torch.int32) & -65536).view(torch.float32)
        assert torch.equal(got.float(), truncated)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("group", [0, 64])
def test_reference_against_a_loop(group):
    codes, scale = draw(4, 150, group)
    dense = dequantize_int6_ref(pack_int6(codes, scale), torch.float64)
    for n in range(4):
        for k in range(150):
            factor = scale[n, k // group] if group else scale[n]
            assert dense[n, k].item() == codes[n, k].item() * factor.double().item()


# Product


def check_product(x, weight, dense=None):
    got, plain, exact = (
        int6_matmul(x, weight, dense),
        int6_matmul_ref(x, weight),
        int6_matmul_ref(x.double(), weight._replace(scale=weight.scale.double())),
    )
    assert (got.shape, got.dtype) == (plain.shape, plain.dtype)
    if got.numel():
        error, allowed = ((y.double() - exact).abs().max().item() for y in (got, plain))
        # One rounding of the result on top: on few numbers, torch is sometimes exact by luck.
        allowed = 2 * allowed + torch.finfo(x.dtype).eps * exact.abs().max().item()
        assert error <= allowed
    return got


@pytest.mark.parametrize("m", [0, 1, 2, 16, 17, 64, 200])
@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_product(m, group):
    dtype = {0: torch.bfloat16, 32: torch.float16, 64: torch.bfloat16, 128: torch.float32}[group]
    weight = pack_int6(*draw(71, 331, group, torch.float16))
    check_product(draw_x(m, 331, dtype=dtype), weight)


@pytest.mark.parametrize("n, k", [(1, 1), (1, 300), (0, 40), (13, 0), (131, 37), (64, 128), (65, 129), (63, 255)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes(dtype, n, k):
    weight = pack_int6(*draw(n, k))
    for m in (1, 3):
        got = check_product(draw_x(m, k, dtype=dtype), weight)
        assert k or torch.equal(got, torch.zeros_like(got))


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_survive_exactly(dtype):
    """x = identity reads the codes out of the kernel: integers below 2^7, exact in every dtype."""
    codes = ((torch.arange(64)[:, None] + torch.arange(128)) % 64 - 32).to(torch.int8).to(DEVICE)
    got = int6_matmul(torch.eye(128, dtype=dtype, device=DEVICE), pack_int6(codes, torch.ones(64, device=DEVICE)))
    assert torch.equal(got, codes.t().to(dtype))


def layouts(dtype):
    base = draw_x(12, 2 * 150, dtype=dtype)
    return {
        "transposed": base[:, :12].t().contiguous().t()[:, :12].repeat(1, 13)[:, :150].t().contiguous().t(),
        "every second column": base[:, ::2],
        "every third row": base[::3, :150],
        "expanded": base[:1, :150].expand(5, 150),
        "offset": base[3:, 7:157],
        "three dimensions": base.view(3, 4, 300)[..., :150],
        "one dimension": base[0, :150],
    }


@pytest.mark.parametrize("layout", layouts(torch.float32))
def test_strides(layout):
    weight = pack_int6(*draw(30, 150))
    for dtype in (torch.float16, torch.float32):
        x = layouts(dtype)[layout]
        before = x.clone()
        assert torch.equal(check_product(x, weight), int6_matmul(x.contiguous(), weight))
        assert torch.equal(x, before)


def test_scales_of_every_kind_agree():
    codes, scale = draw(20, 256)
    x = draw_x(4, 256, dtype=torch.float32)
    expected = int6_matmul(x, pack_int6(codes, scale))
    assert torch.equal(int6_matmul(x, pack_int6(codes, scale[:, None])), expected)
    for groups in (2, 4, 8):
        grouped = pack_int6(codes, scale[:, None].expand(20, groups))
        torch.testing.assert_close(int6_matmul(x, grouped), expected, rtol=1e-5, atol=1e-5)


def test_the_three_ways(monkeypatch):
    """Split, fused and library product, forced on the same inputs, agree; and the split one sums what it says."""
    weight = pack_int6(*draw(40, 700))
    x = draw_x(20, 700, dtype=torch.float32)
    launch = _config(20, 40, 700, 700, torch.float32)
    ways = [launch._replace(SPLIT_K=split) for split in (1, 2, 3, 8, 32)] + [None]
    results = []
    for way in ways:
        monkeypatch.setattr(int6_product, "_config", lambda *args, way=way, **kwargs: way)
        results.append(check_product(x, weight))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-4)


def test_dispatch():
    """Few rows split K, many take the library; a kept dense matrix moves that border down, and is what gets used."""
    bf16 = torch.bfloat16
    assert _config(1, 512, 1536, 1536, bf16).SPLIT_K > 1
    assert _config(256, 8192, 512, 512, bf16).SPLIT_K == 1
    assert _config(65536, 512, 512, 512, bf16) is None
    assert _config(100, 512, 512, 512, bf16) is not None and _config(100, 512, 512, 512, bf16, 64) is None
    weight = pack_int6(*draw(12, 100))
    dense = dequantize_int6(weight, torch.float32) * 2
    for m, factor in ((65, 2), (1, 1)):
        x = draw_x(m, 100, dtype=torch.float32)
        torch.testing.assert_close(int6_matmul(x, weight, dense), factor * int6_matmul(x, weight))


def test_a_dense_matrix_that_stays_in_the_cache_is_used_for_every_row_count(monkeypatch):
    monkeypatch.setattr(int6_product, "_stays_in_l2", lambda n_bytes, device: n_bytes <= 12 * 100 * 4)
    for n, factor in ((12, 2), (13, 1)):
        weight, x = pack_int6(*draw(n, 100)), draw_x(1, 100, dtype=torch.float32)
        dense = dequantize_int6(weight, torch.float32) * 2
        torch.testing.assert_close(int6_matmul(x, weight, dense), factor * int6_matmul(x, weight))


def test_what_stays_in_the_cache_is_half_of_it(monkeypatch):
    sizes = {"cuda:0": {"L2_cache_size": 50 << 20}, "cuda:1": {}}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**sizes[str(device)]))
    gpu, unknown = torch.device("cuda", 0), torch.device("cuda", 1)
    assert int6_product._stays_in_l2(25 << 20, gpu) and not int6_product._stays_in_l2((25 << 20) + 1, gpu)
    assert not int6_product._stays_in_l2(1, unknown) and not int6_product._stays_in_l2(1, torch.device("cpu"))
    small, large = (SimpleNamespace(nbytes=size << 20, device=gpu) for size in (25, 26))
    assert [int6_product._most_rows(dense) for dense in (small, large, None)] == [0, 64, 256]


def test_counters_of_arrivals_are_back_at_zero(monkeypatch):
    """Of several tiles, on counters that launches of other sizes have used; and with more tiles than there were."""
    monkeypatch.setattr(int6_product, "_arrivals_of", {})
    monkeypatch.setattr(int6_product, "_LEAST_COUNTERS", 3)
    kept = []
    for m, n, k in [(1, 90, 170), (3, 40, 300), (2, 130, 100)]:
        weight, x = pack_int6(*draw(n, k)), draw_x(m, k, dtype=torch.float32)
        launch = _config(m, n, k, k, torch.float32)._replace(SPLIT_K=2)  # `_config` is this module's, not the patched
        monkeypatch.setattr(int6_product, "_config", lambda *args, launch=launch, **kwargs: launch)
        check_product(x, weight)
        (counters,) = int6_product._arrivals_of.values()
        assert len(counters) >= -(-n // launch.BLOCK_N) and not counters.any()
        kept.append(counters)
    assert kept[0] is kept[1] and len(kept[2]) > len(kept[1])


def test_streams_have_their_own_counters_and_recordings_new_ones(monkeypatch):
    """Launches on two streams may overlap; what a graph records is replayed when other launches run."""
    stream, capturing = SimpleNamespace(cuda_stream=1), False
    monkeypatch.setattr(int6_product, "_arrivals_of", {})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device, **options: zeros(*size, **options))
    gpu = torch.device("cuda", 0)
    first = int6_product._arrivals(gpu, 5)
    assert int6_product._arrivals(gpu, 7) is first
    stream = SimpleNamespace(cuda_stream=2)
    second = int6_product._arrivals(gpu, 5)
    assert second is not first
    capturing = True
    recorded = int6_product._arrivals(gpu, 5)
    assert all(recorded is not known for known in (first, second)) and not recorded.any()
    capturing = False
    assert int6_product._arrivals(gpu, 5) is second


@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_tile_has_one_scale_a_row(group):
    for m in (1, 16, 64, 256):
        for dtype in DTYPES:
            assert group % _config(m, 4096, 4096, group, dtype).BLOCK_K == 0


@pytest.mark.parametrize("m", [1, 17, 300])
def test_reruns_are_bit_equal(m):
    weight = pack_int6(*draw(50, 600))
    x = draw_x(m, 600, dtype=torch.float16)
    assert torch.equal(int6_matmul(x, weight), int6_matmul(x, weight))


def test_bad_rows_stay_alone():
    weight = pack_int6(*draw(20, 200))
    x = draw_x(4, 200, dtype=torch.float32)
    clean = int6_matmul(x, weight)
    x[1, 3], x[2, 199] = float("nan"), float("inf")
    got = int6_matmul(x, weight)
    assert torch.equal(got[[0, 3]], clean[[0, 3]])
    assert got[1].isnan().all() and not got[2].isfinite().any()


# Gradient


@pytest.mark.parametrize("m, cached", [(3, False), (3, True), (300, False)])
def test_gradient_reaches_x_only(m, cached):
    weight = pack_int6(*draw(21, 130))
    dense = dequantize_int6(weight, torch.float32) if cached else None
    x = draw_x(m, 130, dtype=torch.float32).requires_grad_()
    y = int6_matmul(x, weight, dense)
    dy = draw_x(m, 21, dtype=torch.float32, seed=2)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(dx, dy @ dequantize_int6_ref(weight, torch.float32))
    assert torch.equal(y, int6_matmul(x.detach(), weight, dense))


# Refusals


def refusals():
    codes, scale = draw(6, 200)
    weight = pack_int6(codes, scale)
    x = draw_x(2, 200, dtype=torch.float32)
    swapped = weight._replace(low=weight.high, high=weight.low)
    return {
        "codes as floats": ("codes: expected int8 [N, K], got torch.float32 [6, 200]", pack_int6, codes.float(), scale),
        "codes in one dimension": ("codes: expected int8 [N, K], got", pack_int6, codes[0], scale),
        "codes as a list": ("codes: expected int8 [N, K], got list", pack_int6, [[1]], scale),
        "scale too short": ("scale: expected shape [6] or [6, G] with G in", pack_int6, codes, scale[:5]),
        "no such group": ("with G in [1, 2, 4, 7], got torch.float32 [6, 3]", pack_int6, codes, torch.ones(6, 3)),
        "scale of integers": ("scale: expected a floating-point tensor", pack_int6, codes, codes[:, 0]),
        "planes swapped": ("weight.low: expected contiguous uint8 [6, 128], got", int6_matmul, x, swapped),
        "weight as codes": ("weight: expected a PackedInt6, got Tensor", int6_matmul, x, codes),
        "short rows": ("x: expected shape [..., 200], got torch.float32 [2, 199]", int6_matmul, x[:, 1:], weight),
        "a number": ("x: expected shape [..., 200], got torch.float32 []", int6_matmul, x[0, 0], weight),
        "integers": ("x: expected float16, bfloat16, float32", int6_matmul, x.int(), weight),
        "float64": ("x: expected float16, bfloat16, float32", int6_matmul, x.double(), weight),
        "other device": ("x: expected float16, bfloat16, float32 on", int6_matmul, x.to("meta"), weight),
        "dense in another dtype": ("dense: expected torch.float32 [6, 200]", int6_matmul, x, weight, codes.half()),
        "dense transposed": ("dense: expected torch.float32 [6, 200]", int6_matmul, x, weight, codes.float().t()),
        "dequantised to integers": ("dtype: expected float16, bfloat16 or", dequantize_int6, weight, torch.int8),
    }


@pytest.mark.parametrize("name", refusals())
def test_refusals_name_the_argument(name):
    message, function, *arguments = refusals()[name]
    arguments = [a.to(DEVICE) if isinstance(a, torch.Tensor) and a.device.type != "meta" else a for a in arguments]
    with pytest.raises(ValueError, match=re.escape(message)):
        function(*arguments)


@pytest.mark.parametrize("value", [-33, 32, -128, 127])
def test_values_out_of_range_are_refused_on_the_cpu(value):
    codes = torch.zeros(2, 3, dtype=torch.int8)
    codes[1, 1] = value
    with pytest.raises(ValueError, match=re.escape(f"codes: expected values in [-32, 31], got {min(value, 0)} to")):
        pack_int6(codes, torch.ones(2))


# Tracing


def test_reference_traces_whole():
    torch._dynamo.reset()
    weight = pack_int6(*draw(9, 140))
    x = draw_x(3, 140, dtype=torch.float32)
    traced = torch.compile(int6_matmul_ref, fullgraph=True, backend="eager")
    assert torch.equal(traced(x, weight), int6_matmul_ref(x, weight))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: torch.compile cannot trace Triton's interpreter")
@pytest.mark.parametrize("m", [1, 64, 300])
def test_kernels_compile_whole(m):
    torch._dynamo.reset()
    weight = pack_int6(*draw(96, 256))
    x = draw_x(m, 256, dtype=torch.bfloat16)
    torch.testing.assert_close(torch.compile(int6_matmul, fullgraph=True)(x, weight), int6_matmul(x, weight))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: streams and graphs")
def test_launches_that_overlap_do_not_count_for_each_other():
    """On two streams, and in a graph that is replayed beside them."""
    weight = pack_int6(*draw(512, 4096))
    x = draw_x(3, 4096, dtype=torch.bfloat16)
    expected = int6_matmul(x, weight)
    assert _config(3, 512, 4096, 4096, torch.bfloat16).SPLIT_K > 1
    torch.cuda.synchronize()
    streams, graph = [torch.cuda.Stream() for _ in range(3)], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = [int6_matmul(x, weight) for _ in range(50)]
    found = []
    for _ in range(50):
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                found.append(int6_matmul(x, weight))
    for _ in range(4):
        with torch.cuda.stream(streams[2]):
            graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(each, expected) for each in (*found, *replayed))


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU: the tensor is 8 GiB")
def test_offsets_beyond_32_bits():
    weight = pack_int6(*draw(8, 256))
    far = torch.zeros(2**32 + 256, dtype=torch.bfloat16, device=DEVICE).as_strided((3, 256), (2**31, 1))
    far.copy_(draw_x(3, 256, dtype=torch.bfloat16))
    assert torch.equal(int6_matmul(far, weight), int6_matmul(far.contiguous(), weight))


# Ahead-of-time compilation of what no production case launches. Triton is interpreted or compiles, per process: hence a
# subprocess. What production launches take is in the table that test_static_report.py holds them to.

EXTRA_SHAPES = [  # masks, integers that are 1, other dtypes
    {"m": 1, "n": 1, "k": 300},
    {"m": 7, "n": 41, "k": 157, "dtype": torch.float16},
    {"m": 33, "n": 41, "k": 157, "group": 32},
    {"m": 5, "n": 512, "k": 512, "dtype": torch.float32, "scale_dtype": torch.float32},
    {"m": 300, "n": 512, "k": 512, "group": 128, "dtype": torch.float32},
]
LONG_AND_SHORT_TILES = [{"m": 1, "n": 4096, "k": 4096}, {"m": 16, "n": 512, "k": 512}]


def compile_everything():
    """Prints a JSON line for each launch: sm_90 for all shapes, the other targets for the extra ones."""
    from bench.compile import SHARED_LIMIT, TARGETS, compile_for, figures

    for shape in LONG_AND_SHORT_TILES + EXTRA_SHAPES:
        for compilation in SPEC.compilations(**shape):
            found = figures(compilation, compile_for(compilation))
            opcodes = found.pop("opcodes")
            row = {"shape": str(shape), "kernel": compilation.kernel.__name__, **found}
            row["weights"] = compilation.elements // (32 * compilation.num_warps)
            for opcode in ("I2F", "HADD2.BF16_V2", "LOP3.LUT"):
                row[opcode] = sum(found.startswith(opcode) for found in opcodes)
            print(json.dumps(row), flush=True)
    for target in TARGETS.keys() - {"sm_90"}:
        for shape in EXTRA_SHAPES:
            for compilation in SPEC.compilations(**shape):
                shared = compile_for(compilation, target).metadata.shared
                print(json.dumps({"target": target, "shared": shared, "limit": SHARED_LIMIT[target]}), flush=True)


@pytest.fixture(scope="module")
def compiled_rows(compiling):
    import triton

    return triton.__version__, [json.loads(line) for line in compiling(__file__).splitlines()]


def test_compiles_for_every_target(compiled_rows):
    assert {row["target"] for row in compiled_rows[1] if "target" in row} == {"sm_80", "sm_100", "gfx942"}
    assert not [row for row in compiled_rows[1] if "target" in row and row["shared"] > row["limit"]]


def test_fits_sm_90(compiled_rows):
    """Nothing spills, and at least two programs fit into a multiprocessor at a time."""
    rows = [row for row in compiled_rows[1] if "shape" in row]
    assert {row["kernel"] for row in rows} == {"_int6_matmul_kernel", "_dequantize_int6_kernel"}
    bad = [row for row in rows if row["stack"] or row["local"] or row["programs"] < 2]
    assert not bad, "\n".join(map(str, bad))


def test_unpacking_stays_cheap(compiled_rows):
    """The layout's promise in machine code: no integer is converted, and two weights share a subtraction."""
    version, rows = compiled_rows
    if version != "3.9.0":
        pytest.skip(f"the figures are those of Triton 3.9.0, this is {version}")
    rows = [row for row in rows if row.get("weights") and "dtype" not in row["shape"]]
    assert {64, 128} <= {row["weights"] for row in rows}
    for row in rows:
        assert row["I2F"] == 0, row
        assert 0 < row["HADD2.BF16_V2"] <= row["weights"] / 2 + 4, row
        if "'k': 157" not in row["shape"]:  # masks take more
            assert row["LOP3.LUT"] < row["weights"] + 60 and row["matrix"] > 0, row
        if row["shape"] in map(str, LONG_AND_SHORT_TILES):  # what `_config` says of them
            assert row["per_element"] < {128: 4.85, 64: 5.2}[row["weights"]], row


if __name__ == "__main__":
    compile_everything()
