"""The executor of PTX in tests/ptx: what it computes, what it finds, and the kernels under it.

Kernels run in a subprocess: Triton interprets or compiles, per process. The rest is PTX written here.
"""

import pytest
import torch

from tests.ptx.launch import execute
from tests.ptx.memory import Report
from tests.ptx.run import USUAL, Conditions

HEAD = """
.version 8.4
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u64 .ptr .global .align 1 kernel_param_1,
	.param .u32 kernel_param_2
)
.reqntid %d
{
	.reg .pred 	%%p<20>;
	.reg .b16 	%%rs<20>;
	.reg .b32 	%%r<40>;
	.reg .b64 	%%rd<20>;
	ld.param.b64 	%%rd1, [kernel_param_0];
	ld.param.b64 	%%rd2, [kernel_param_1];
	ld.param.b32 	%%r1, [kernel_param_2];
	mov.u32 	%%r2, %%tid.x;
	mov.u32 	%%r3, %%ctaid.x;
	mad.wide.u32 	%%rd3, %%r2, 4, %%rd1;
	mad.wide.u32 	%%rd4, %%r2, 4, %%rd2;
	shl.b32 	%%r4, %%r2, 2;
%s
	ret;
}
"""


def run(body, threads=64, programs=1, number=0, shared=1024, x=None, y=None, under=USUAL):
    """Runs a body: %r2 is the thread, %r3 the program, %r4 4 times the thread, %rd3 and %rd4 its places in x and y."""
    x = torch.arange(threads, dtype=torch.float32) if x is None else x
    y = torch.full_like(x, -1.0) if y is None else y
    report = Report()
    lines = [f"\t.loc\t1 {i} 0 // body:{i}:0\n\t{line};" for i, line in enumerate(body.strip().splitlines(), 1)]
    lines = [line.split("\n\t")[1][:-1] if line.endswith(":;") else line for line in lines]
    execute(HEAD % (threads, "\n".join(lines)), [programs], [x, y, number], shared, report, under)
    return y, report


def kinds(report):
    return {kind for kind, _ in report.found}


EXCHANGE = """
ld.global.b32 %r5, [%rd3]
st.shared.b32 [%r4], %r5
bar.sync 0
xor.b32 %r6, %r4, 128
ld.shared.b32 %r7, [%r6]
st.global.b32 [%rd4], %r7
"""


def test_an_exchange_through_shared_memory():
    y, report = run(EXCHANGE)
    assert torch.equal(y, torch.arange(64.0).roll(32)) and not report.found


def test_a_missing_barrier_is_a_race():
    _, report = run(EXCHANGE.replace("bar.sync 0", "mov.b32 %r20, 0"))
    assert report.hard == ["shared race: read body:5 after body:2"]


def test_within_a_warp_it_is_a_softer_class():
    _, report = run(EXCHANGE.replace("bar.sync 0", "mov.b32 %r20, 0").replace("128", "4"))
    assert not report.hard and report.soft == ["within a warp: read body:5 after body:2"]


def test_a_write_after_a_read_is_a_race():
    _, report = run(EXCHANGE + "st.shared.b32 [%r4], %r7")
    assert report.hard == ["shared race: write body:7 after body:5"]


def test_a_write_of_what_is_there_is_still_a_race():
    _, report = run(
        "st.shared.b32 [0], 7\nbar.sync 0\nld.shared.b32 %r5, [0]\nst.shared.b32 [0], 7".replace("[0]", "[%r1]")
    )
    assert report.hard == ["shared race: write body:4 after body:3"]


def test_lanes_of_one_store_may_agree_but_not_differ():
    assert not run("st.shared.b32 [%r1], 7")[1].found
    _, report = run("st.shared.b32 [%r1], %r2")
    assert kinds(report) == {"conflicting values in one store"}


def test_programs_that_meet_race():
    assert "race between programs" in kinds(run("st.global.b32 [%rd4], %r3", programs=2)[1])
    body = "ld.global.b32 %r5, [%rd3]\nsetp.eq.b32 %p1, %r3, 1\n@%p1 st.global.b32 [%rd3], %r5"
    assert "race between programs" in kinds(run(body, programs=2)[1])
    assert not run(body, programs=1)[1].found


ARRIVAL = """
shl.b32 %r5, %r3, 8
cvt.u64.u32 %rd5, %r5
add.s64 %rd6, %rd4, %rd5
st.global.b32 [%rd6], %r2
bar.sync 0
setp.eq.u32 %p1, %r2, 0
mov.b32 %r7, 0
@%p1 atom.global.gpu.acq_rel.add.u32 %r7, [%rd1], 1
@%p1 st.shared.b32 [%r1], %r7
bar.sync 0
ld.shared.b32 %r8, [%r1]
setp.ne.u32 %p2, %r8, 2
@%p2 bra $L__1
ld.global.b32 %r9, [%rd4]
ld.global.b32 %r10, [%rd4+256]
add.u32 %r11, %r9, %r10
st.global.b32 [%rd4+768], %r11
st.global.b32 [%rd4+1024], %r3
@%p1 st.global.b32 [%rd1], 0
$L__1:
mov.b32 %r12, 0
"""  # the last of three programs to arrive adds up what the first two have stored, and says who it is


def arrive(body=ARRIVAL, arrivals=0):
    counter, y = torch.zeros(64, dtype=torch.int32), torch.zeros(64 * 5, dtype=torch.int32)
    _, report = run(body, programs=3, x=counter, y=y, under=Conditions(arrivals=arrivals))
    return counter, y.view(5, 64), report


def test_the_last_to_arrive_reads_what_all_have_stored():
    last = set()
    for arrivals in range(6):
        counter, y, report = arrive(arrivals=arrivals)
        assert not report.found and not counter.any() and torch.equal(y[3], 2 * torch.arange(64, dtype=torch.int32))
        last |= set(y[4].tolist())
    assert last == {0, 1, 2}


_ATOM = "@%p1 atom.global.gpu.acq_rel.add.u32 %r7, [%rd1], 1\n"
_RELAXED, _FENCE = _ATOM.replace("acq_rel", "relaxed"), "fence.acq_rel.gpu\n"


@pytest.mark.parametrize(
    "old, new, found",
    [
        (_ATOM, _RELAXED, True),
        ("acq_rel", "acquire", True),
        ("acq_rel", "release", True),
        (".gpu.acq_rel", ".cta.acq_rel", True),
        (".gpu.acq_rel", ".acq_rel", False),
        ("bar.sync 0\nsetp", "setp", True),
        ("bar.sync 0\nld.shared", "ld.shared", True),
        (_ATOM, _FENCE + _RELAXED + _FENCE, False),
        (_ATOM, _FENCE + _RELAXED, True),
        (_ATOM, _RELAXED + _FENCE, True),
        ("bar.sync 0\nsetp", _FENCE + "bar.sync 0\nsetp", False),
        ("bar.sync 0\nsetp", _FENCE + "setp", True),
        ("$L__1:\n", "$L__1:\nld.global.b32 %r13, [%rd1]\n", True),
        ("$L__1:\n", "$L__1:\nst.global.b32 [%rd6], %r3\n", True),
    ],
)
def test_what_atomics_and_fences_order(old, new, found):
    for arrivals in range(3):
        *_, report = arrive(ARRIVAL.replace(old, new, 1), arrivals)
        assert bool(report.hard) == found, report.found


@pytest.mark.parametrize(
    "instruction, expected",
    [
        ("atom.global.add.u32 %r5, [%rd1], %r3", 6 + 5),
        ("red.global.gpu.relaxed.add.u32 [%rd1], %r3", 6 + 5),
        ("atom.global.max.s32 %r5, [%rd1], %r3", 5),
        ("atom.global.min.u32 %r5, [%rd1], %r3", 0),
        ("atom.global.or.b32 %r5, [%rd1], %r3", 7),
        ("atom.relaxed.gpu.global.exch.b32 %r5, [%rd1], 9", 9),
        ("atom.global.cas.b32 %r5, [%rd1], 5, 4", 4),
    ],
)
def test_what_atomics_compute(instruction, expected):
    x = torch.full((64,), 5, dtype=torch.int32)
    _, report = run(f"setp.eq.u32 %p1, %r2, 0\n@%p1 {instruction}", programs=4, x=x, under=Conditions(arrivals=1))
    assert not report.found and x[0] == expected


def test_programs_have_shared_memory_of_their_own():
    _, report = run("st.shared.b32 [%r4], %r3\nbar.sync 0\nld.shared.b32 %r5, [%r4]", programs=3)
    assert not report.found


@pytest.mark.parametrize(
    "body, kind",
    [
        ("ld.global.b32 %r5, [%rd3+4]", "outside global"),
        ("ld.global.b32 %r5, [%rd3+-4]", "outside global"),
        ("ld.global.b32 %r5, [%rd3+1073741824]", "outside global"),
        ("st.shared.b32 [%r4+1024], %r5", "outside shared"),
        ("ld.global.v2.b32 {%r5, %r6}, [%rd3]", "misaligned global"),
        ("st.shared.b16 [%r4+1], %rs5", "misaligned shared"),
    ],
)
def test_bad_addresses(body, kind):
    assert kind in kinds(run(body)[1])


def test_guarded_accesses_do_not_happen():
    y, report = run(
        "setp.lt.u32 %p1, %r2, 63\nmov.b32 %r5, 0f40E00000\n@%p1 ld.global.b32 %r5, [%rd3+4]\nst.global.b32 [%rd4], %r5"
    )
    assert not report.found and torch.equal(y, torch.cat((torch.arange(1.0, 64), torch.tensor([7.0]))))


def test_a_barrier_that_some_never_reach_is_a_deadlock():
    body = "setp.lt.u32 %p1, %r2, 32\n@%p1 bra $L__1\nbar.sync 0\n$L__1:\nmov.b32 %r5, 0"
    assert kinds(run(body)[1]) == {"deadlock"}
    assert not run(body.replace("mov.b32 %r5, 0", "bar.sync 0").replace("\nbar.sync 0\n", "\n", 1))[1].found


def test_a_shuffle_wants_whole_warps():
    body = "setp.lt.u32 %p1, %r2, 16\n@%p1 bra $L__1\nshfl.sync.bfly.b32 %r5, %r2, 1, 31, -1\n$L__1:\nmov.b32 %r5, 0"
    assert kinds(run(body)[1]) == {"a part of a warp"}


def test_parted_threads_meet_again():
    """A loop of a length that depends on the thread, then a sum over the warp."""
    y, report = run(
        """
mov.b32 %r5, 0
$L__1:
add.s32 %r5, %r5, 1
setp.lt.u32 %p1, %r5, %r2
@%p1 bra $L__1
shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1
add.s32 %r7, %r5, %r6
cvt.rn.f32.s32 %r8, %r7
st.global.b32 [%rd4], %r8
"""
    )
    trips = torch.arange(64.0).clamp(min=1)
    assert not report.found and torch.equal(y, trips + trips.view(-1, 2).flip(1).flatten())


def test_what_is_not_written_is_poison():
    y, _ = run("ld.shared.b32 %r5, [%r4]\nst.global.b32 [%rd4], %r5")
    assert y.isnan().all()


COPY = """
cp.async.ca.shared.global [%r4], [%rd3], 0x4, %r5
cp.async.commit_group
cp.async.wait_group 0
bar.sync 0
xor.b32 %r6, %r4, 128
ld.shared.b32 %r7, [%r6]
st.global.b32 [%rd4], %r7
"""


def test_asynchronous_copies():
    y, report = run("mov.b32 %r5, 4" + COPY)
    assert not report.found and torch.equal(y, torch.arange(64.0).roll(32))
    y, report = run("mov.b32 %r5, 0" + COPY)
    assert not report.found and not y.any()
    _, report = run("mov.b32 %r5, 4" + COPY.replace("cp.async.wait_group 0", "cp.async.wait_group 1"))
    assert kinds(report) == {"shared race"}
    _, report = run("mov.b32 %r5, 4" + COPY.replace("bar.sync 0", "mov.b32 %r20, 0"))
    assert kinds(report) == {"shared race"}


@pytest.mark.parametrize(
    "body, expected",
    [
        ("cvt.s64.s32 %rd5, %r6\nshr.s64 %rd6, %rd5, 40\ncvt.u32.u64 %r7, %rd6", -1),
        ("shr.s32 %r7, %r6, 1", -3),
        ("shr.u32 %r7, %r6, 31", 1),
        ("mov.b32 %r8, 40\nshl.b32 %r7, %r6, %r8", 0),
        ("mul.hi.s32 %r7, %r6, 3", -1),
        ("mul.hi.u32 %r7, %r6, 3", 2),
        ("div.s32 %r7, %r6, 2", -2),
        ("rem.s32 %r7, %r6, 3", -2),
        ("bfe.s32 %r7, %r6, 0, 2", -1),
        ("bfe.u32 %r7, %r6, 0, 2", 3),
        ("prmt.b32 %r7, %r6, %r1, 0x5410U", (3 << 16) | 0xFFFB),
        ("max.u32 %r7, %r6, 1", -5),
        ("max.s32 %r7, %r6, 1", 1),
        ("mov.b32 {%rs1, %rs2}, %r6\nmov.b32 %r7, {%rs2, %rs1}", (0xFFFB << 16 | 0xFFFF) - (1 << 32)),
        ("mov.b32 %r8, 0f7FC00000\nsetp.neu.f32 %p1, %r8, %r8\nselp.b32 %r7, 1, 0, %p1", 1),
        ("mov.b32 %r8, 0f7FC00000\nsetp.lt.f32 %p1, %r8, %r8\nselp.b32 %r7, 1, 0, %p1", 0),
        ("mov.b32 %r8, 0f7FC00000\nsetp.geu.f32 %p1, %r8, %r8\nselp.b32 %r7, 1, 0, %p1", 1),
        ("mov.b32 %r8, 0f7FC00000\nmax.f32 %r9, %r8, 0f40A00000\ncvt.rzi.s32.f32 %r7, %r9", 5),
        ("mov.b32 %r8, 0f4F800000\ncvt.rzi.s32.f32 %r7, %r8", 2**31 - 1),
        ("mov.b32 %r8, 0f3F808000\ncvt.rn.bf16x2.f32 %r7, %r8, %r8", 0x3F803F80),
        ("mov.b32 %r8, 0f3F818000\ncvt.rn.bf16x2.f32 %r7, %r8, %r8", 0x3F823F82),
        ("mov.b32 %r8, 0f3F800001\nmov.b32 %r9, 0fBF800002\nfma.rn.f32 %r7, %r8, %r8, %r9", 0x28800000),
        ("mov.b64 %rd5, 0d4008000000000000\nrcp.approx.ftz.f64 %rd6, %rd5\ncvt.u32.u64 %r7, %rd6", 0),
        ("mov.b32 %r8, 0f00000001\nmul.ftz.f32 %r7, %r8, 0f3F800000", 0),
    ],
)
def test_arithmetic(body, expected):
    """From %r6 = -5 and %r1 = 3 to %r7."""
    y = torch.zeros(32, dtype=torch.int32)
    found, report = run(f"mov.b32 %r6, -5\n{body}\nst.global.b32 [%rd4], %r7", 32, number=3, x=y.clone(), y=y)
    assert not report.found and found.tolist() == [expected] * 32


def test_a_parameter_extends_as_its_type_says():
    y = torch.zeros(32, dtype=torch.int64)
    body = "ld.param.s32 %rd5, [kernel_param_2]\nmad.wide.u32 %rd6, %r2, 8, %rd2\nst.global.b64 [%rd6], %rd5"
    assert run(body, 32, number=-100, x=y.clone(), y=y)[0].tolist() == [-100] * 32


MATRICES = """
mad.wide.u32 %rd5, %r2, 16, %rd1
shl.b32 %r5, %r2, 4
ld.global.v4.b32 {%r6, %r7, %r8, %r9}, [%rd5]
st.shared.v4.b32 [%r5], {%r6, %r7, %r8, %r9}
bar.sync 0
and.b32 %r10, %r2, 7
bfe.u32 %r11, %r2, 3, 1
bfe.u32 %r12, %r2, 4, 1
mad.lo.s32 %r13, %r11, 8, %r10
shl.b32 %r13, %r13, 5
mad.lo.s32 %r13, %r12, 16, %r13
shl.b32 %r14, %r10, 5
mad.lo.s32 %r14, %r11, 16, %r14
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r20, %r21, %r22, %r23}, [%r13]
ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r24, %r25}, [%r14]
mov.b32 %r30, 0
mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r26, %r27, %r28, %r29}, {%r20, %r21, %r22, %r23}, {%r24, %r25}, {%r30, %r30, %r30, %r30}
mad.wide.u32 %rd6, %r2, 8, %rd2
st.global.v2.b32 [%rd6], {%r26, %r27}
st.global.v2.b32 [%rd6+256], {%r28, %r29}
"""  # noqa: E501


def test_matrices_of_a_warp():
    """A of 16 x 16 times the first 8 of its own rows."""
    a = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).half()
    y, report = run(MATRICES, 32, x=a, y=torch.zeros(16, 8))
    assert not report.found and torch.allclose(y, a.float() @ a[:8].float().T, atol=1e-6)
    stored = MATRICES.replace("ldmatrix", "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r14], {%r2}\nldmatrix", 1)
    assert kinds(run(stored, 32, x=a, y=torch.zeros(16, 8))[1]) == {"within a warp"}
    ordered = stored.replace("\nldmatrix", "\nbar.warp.sync -1\nldmatrix", 1)
    assert not run(ordered, 32, x=a, y=torch.zeros(16, 8))[1].found


ACCUMULATORS = ", ".join(f"%r{20 + i}" for i in range(8))
PRODUCT = "\n".join(
    [
        *(f"ld.global.b32 %r5, [%rd3+{512 * i}]\nst.shared.b32 [%r4+{512 * i}], %r5" for i in range(5)),
        "bar.sync 0",
        "fence.proxy.async.shared::cta",
        f"mov.b64 %rd5, {3 << 62 | 16 << 32}",
        f"mov.b64 %rd6, {3 << 62 | 16 << 32 | 2048 >> 4}",
        "wgmma.fence.sync.aligned",
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {{{ACCUMULATORS}}}, %rd5, %rd6, 0, 1, 1, 0, 0",
        "wgmma.commit_group.sync.aligned",
        "wgmma.wait_group.sync.aligned 0",
        "mad.wide.u32 %rd7, %r2, 32, %rd2",
        *(f"st.global.b32 [%rd7+{4 * i}], %r{20 + i}" for i in range(8)),
    ]
)


def test_matrices_of_a_warpgroup():
    """64 x 16 times 16 x 16, both with rows of 32 bytes whose halves are swapped in every other block of 128."""
    ab = torch.randn(80, 16, generator=torch.Generator().manual_seed(0)).half()
    image = ab.view(-1, 2, 4, 2, 8)
    image = torch.stack((image[:, 0], image[:, 1].flip(2)), 1).reshape(80, 16)
    y, report = run(PRODUCT, 128, shared=2560, x=image, y=torch.zeros(128, 8))
    lane, register = torch.arange(128)[:, None], torch.arange(8)[None, :]
    row = lane // 32 * 16 + lane % 32 // 4 + register % 4 // 2 * 8
    column = register // 4 * 8 + lane % 4 * 2 + register % 2
    expected = (ab[:64].float() @ ab[64:].float().T)[row, column]
    assert not report.found and torch.allclose(y, expected, atol=1e-5)

    def hazards(body):
        return kinds(run(body, 128, shared=2560, x=image, y=torch.zeros(128, 8))[1])

    assert hazards(PRODUCT.replace("bar.sync 0", "mov.b32 %r6, 0")) == {"shared race"}
    write = "st.shared.b32 [%r4], %r4"
    late = PRODUCT.replace("wgmma.wait_group.sync.aligned 0", f"bar.sync 0\n{write}\nwgmma.wait_group.sync.aligned 0")
    assert hazards(late) == {"shared race"}
    waited = PRODUCT.replace("wgmma.wait_group.sync.aligned 0", f"wgmma.wait_group.sync.aligned 0\n{write}")
    assert hazards(waited) == {"shared race"}  # the other warps may not have waited
    assert not hazards(waited.replace(write, f"bar.sync 0\n{write}"))


SUM = """
ld.global.b32 %r5, [%rd3]
ld.global.b32 %r6, [%rd4]
mul.f32 %r7, %r5, %r6
shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1
fma.rn.f32 %r9, %r5, %r6, %r8
"""


@pytest.mark.parametrize(
    "body, found",
    [
        (SUM, True),
        (SUM.replace("fma.rn.f32 %r9, %r5, %r6, %r8", "add.f32 %r9, %r7, %r8"), True),
        (SUM.replace("fma.rn.f32 %r9, %r5, %r6, %r8", "add.rn.f32 %r9, %r7, %r8"), False),
        (SUM.replace("mul", "mul.rn").replace("fma.rn.f32 %r9, %r5, %r6, %r8", "add.f32 %r9, %r7, %r8"), False),
        (SUM.replace("shfl", "fma.rn.f32 %r7, %r6, %r6, %r7\nshfl"), False),
        (SUM.replace("bfly.b32 %r8, %r7", "bfly.b32 %r8, %r5"), False),
    ],
)
def test_sums_of_products_whose_replicas_differ(body, found):
    assert ("replicas may differ" in kinds(run(body)[1])) == found


def test_the_suite_has_cases_of_every_kernel():
    from slotfast.kernels import specs
    from tests.ptx.cases import SUITE

    known = {spec.name: {case.reason for case in spec.cases if not case.production} for spec in specs()}
    assert SUITE.keys() == known.keys()
    assert all(set(reasons) <= known[name] and reasons for name, reasons in SUITE.items())


def test_the_kernels(compiling):
    """No hazard and no wrong number in the suite's cases; and what is made wrong on purpose is found."""
    pytest.importorskip("triton", minversion="3.6", reason="hooks into the stages of a compilation")
    from tests.ptx.cases import MUTANTS

    printed = compiling("-m", "tests.ptx", "--suite")
    assert printed.count("mutant ") == len(MUTANTS) + 1 and "NOT FOUND" not in printed
