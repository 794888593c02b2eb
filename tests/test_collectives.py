"""What a compiled program sends, read from its text: each number against the closed formula."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec as P

import ef21_jax as ef21
from ef21_jax.ledger import collective_bytes


N = 4
ROWS = 8  # of the shard of one device


def mesh_of(*sizes):
    names = ("workers", "fsdp")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * len(sizes))


def program(body, shape=(N * ROWS, 3), dtype="float32", mesh=None):
    """`body` of one device's shard of rows, compiled."""
    mesh = mesh or mesh_of(N)
    specs = P(mesh.axis_names)
    mapped = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return jax.jit(mapped).lower(jax.ShapeDtypeStruct(shape, dtype)).compile()


def gather(x):
    return lax.all_gather(x, "workers")


def add_up(x):
    return lax.psum(x, "workers")


# name: the collective, and the bytes a device sends for an operand of b, in a group of g.
BODIES = {
    "all-gather": (gather, lambda b, g: (g - 1) * b),
    "all-reduce": (add_up, lambda b, g: 2 * (g - 1) * b // g),
    "all-to-all": (
        lambda x: lax.all_to_all(x, "workers", 0, 0, tiled=True),
        lambda b, g: (g - 1) * b // g,
    ),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, "workers", tiled=True),
        lambda b, g: (g - 1) * b // g,
    ),
    "collective-permute": (
        lambda x: lax.ppermute(x, "workers", [(i, (i + 1) % N) for i in range(N)]),
        lambda b, g: b,
    ),
}
TYPES = {"uint8": "u8", "uint16": "u16", "int32": "s32", "uint32": "u32", "float32": "f32"}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", BODIES)
def test_every_collective_sends_what_its_formula_says(kind, dtype, optimized):
    body, formula = BODIES[kind]
    book = collective_bytes(program(body, dtype=dtype))
    (row,) = book.rows
    size = 3 * ROWS * jnp.dtype(dtype).itemsize
    assert (row.kind, set(row.dtypes)) == (kind, {TYPES[dtype]})
    assert row.executions == 1 and not row.conditional
    assert (row.operand_bytes, sum(map(np.prod, row.shapes))) == (size, 3 * ROWS)
    assert row.group_size == (2 if kind == "collective-permute" else N)
    assert row.sent == book.sent == book.sent_per_worker == formula(size, N)
    assert book.by_kind == {kind: formula(size, N)}


@pytest.mark.parametrize(("dtype", "wide"), [("bfloat16", "f32"), ("float8_e5m2", "f16")])
def test_a_float_that_the_compiler_widens_counts_as_wide(dtype, wide, optimized):
    (row,) = collective_bytes(program(gather, dtype=dtype)).rows
    assert row.dtypes == (wide,)
    assert row.sent == (N - 1) * 3 * ROWS * {"f32": 4, "f16": 2}[wide]


def test_all_reduces_that_are_combined_count_all_their_operands(optimized):
    def body(x):
        return add_up(x) + add_up(x[0] * 2)[None]

    (row,) = collective_bytes(program(body)).rows
    assert sorted(row.shapes) == [(3,), (ROWS, 3)]
    assert row.sent == 2 * 3 * (4 * 3 * ROWS + 4 * 3) // 4


def test_bytes_are_rounded_up():
    mesh = Mesh(jax.devices()[:3], "workers", axis_types=(AxisType.Auto,))
    assert collective_bytes(program(add_up, (3,), mesh=mesh)).sent == 6  # 16/3


def test_a_program_that_sends_nothing_has_an_empty_ledger():
    book = collective_bytes(jax.jit(jnp.sin).lower(1.0).compile(), mesh_of(1), "workers")
    assert (book.rows, book.sent, book.sent_per_worker, book.by_kind) == ((), 0, 0, {})
    assert "total" in str(book)


def test_a_row_says_where_it_was_written():
    (row,) = collective_bytes(program(gather)).rows
    assert row.source == f"{__file__}:{gather.__code__.co_firstlineno + 1}"
    assert row.op_name.endswith("all_gather")


# --- Loops and branches ---


def repeat(times, body):
    return lambda x: lax.scan(lambda c, _: (body(c) * 0.5, None), x, None, length=times)[0]


SIZE = 4 * 3 * ROWS
ONCE = 2 * (N - 1) * SIZE // N


def test_a_collective_in_a_loop_is_sent_as_often_as_the_loop_runs(optimized):
    book = collective_bytes(program(lambda x: repeat(5, repeat(7, add_up))(x) + 2 * add_up(x)))
    assert sorted((row.executions, row.sent) for row in book.rows) == [(1, ONCE), (35, 35 * ONCE)]
    assert book.sent == 36 * ONCE


def until(x, condition):
    return lax.while_loop(condition, lambda c: add_up(c) * 0.5, x)


def test_a_loop_of_unknown_length_is_never_taken_for_one(optimized):
    book = collective_bytes(program(lambda x: until(gather(x)[0], lambda c: jnp.sum(c) < 9)))
    loop, once = sorted(book.rows, key=lambda row: row.executions is not None)
    assert (loop.kind, loop.executions, loop.sent, loop.crossing) == ("all-reduce", *3 * [None])
    assert (once.executions, once.sent) == (1, (N - 1) * SIZE)
    problem = rf"not known.*all-reduce at {re.escape(__file__)}.*{SIZE} bytes"
    for total in ("sent", "crossing", "sent_per_worker", "by_kind"):
        with pytest.raises(ValueError, match=problem):
            getattr(book, total)
    assert str(book).splitlines()[-1].split() == ["total", "?", "?", "?"]


def test_a_collective_in_the_condition_of_a_loop_is_found(optimized):
    book = collective_bytes(program(lambda x: until(x, lambda c: add_up(jnp.sum(c)) < 9)))
    assert [(row.operand_bytes, row.executions) for row in book.rows] == [
        (SIZE, None),
        (4, None),
    ]


def test_what_stands_under_a_branch_is_marked_and_counted_whole(optimized):
    def body(x):
        def branch(c):
            return repeat(3, add_up)(c)

        x = repeat(2, lambda c: lax.cond(jnp.sum(c) > 0, branch, lambda c: c, c))(x)
        return x + gather(x)[0]

    book = collective_bytes(program(body))
    assert {(row.kind, row.conditional, row.executions) for row in book.rows} == {
        ("all-reduce", True, 6),
        ("all-gather", False, 1),
    }
    assert book.sent == 6 * ONCE + (N - 1) * SIZE
    (line,) = (line for line in str(book).splitlines() if "all-reduce" in line)
    assert "≤ 6" in line


# --- Workers of several devices ---


def test_only_what_leaves_the_worker_crosses(optimized):
    def body(x):
        inner = lax.all_gather(x, "fsdp")
        both = lax.psum(inner[0] * 2, ("workers", "fsdp"))
        return lax.all_to_all(both, "workers", 0, 0, tiled=True)

    mesh = mesh_of(2, 2)
    book = collective_bytes(program(body, mesh=mesh), mesh, "workers")
    found = {row.kind: (row.sent, row.crossing, row.sent_per_worker) for row in book.rows}
    assert found == {
        "all-gather": (SIZE, 0, 0),
        # Of the three others in its group, each device has two in the other worker.
        "all-reduce": (2 * 3 * SIZE // 4, 2 * 2 * SIZE // 4, 2 * 2 * 2 * SIZE // 4),
        "all-to-all": (SIZE // 2, SIZE // 2, 2 * SIZE // 2),
    }
    assert book.crossing == SIZE + SIZE // 2
    assert book.sent_per_worker == 2 * book.crossing
    every = collective_bytes(program(body, mesh=mesh), mesh, ("workers", "fsdp"))
    assert every.crossing == every.sent == every.sent_per_worker == book.sent
    abstract = AbstractMesh((2, 2), ("workers", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    assert collective_bytes(program(body, mesh=mesh), abstract, "workers") == book


def test_a_permutation_crosses_where_its_pairs_do(optimized):
    def body(x):
        return lax.ppermute(x, ("workers", "fsdp"), [(0, 1), (1, 2), (2, 3), (3, 0)])

    mesh = mesh_of(2, 2)
    (row,) = collective_bytes(program(body, mesh=mesh), mesh, "workers").rows
    # Devices 0 and 1 are one worker: only 1 sends to another, and 3 of the other worker.
    assert (row.sent, row.crossing, row.sent_per_worker) == (SIZE, SIZE, SIZE)
    inside = program(lambda x: lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]), mesh=mesh)
    (row,) = collective_bytes(inside, mesh, "workers").rows
    assert (row.sent, row.crossing, row.sent_per_worker) == (SIZE, 0, 0)


def test_groups_are_places_in_the_mesh_not_numbers_of_devices(optimized):
    devices = np.asarray(jax.devices()[:4])[[3, 0, 2, 1]].reshape(2, 2)
    mesh = Mesh(devices, ("workers", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    book = collective_bytes(program(gather, mesh=mesh), mesh, "workers")
    assert book.sent == book.crossing == SIZE
    assert collective_bytes(program(gather, mesh=mesh), mesh, "fsdp").crossing == 0


def in_workers(body):
    """`body` of a worker's message, whose columns lie on its two devices; the axis is automatic."""
    mesh = mesh_of(2, 2)
    columns = NamedSharding(mesh, P("workers", "fsdp"))
    message = jax.ShapeDtypeStruct((4, 64), jnp.uint8, sharding=columns)
    specs = {"in_specs": P("workers"), "out_specs": P(), "check_vma": False}
    mapped = jax.shard_map(body, mesh=mesh, axis_names={"workers"}, **specs)
    return collective_bytes(jax.jit(mapped).lower(message).compile(), mesh, "workers")


def test_a_gather_in_a_region_that_is_partly_automatic_is_repeated_by_every_inner_device(optimized):
    message = 2 * 64  # bytes, of a worker

    def on_every_axis(x):
        columns = {"in_specs": P(None, "fsdp"), "out_specs": P(None, None, "fsdp")}
        manual = jax.shard_map(gather, axis_names={"fsdp"}, check_vma=False, **columns)
        return manual(x)

    assert in_workers(gather).sent_per_worker == 2 * message
    assert in_workers(on_every_axis).sent_per_worker == message


def test_a_mesh_that_is_not_the_programs_is_refused():
    compiled = program(gather)
    for mesh, axis_name in [(None, "workers"), (mesh_of(N), None), (mesh_of(N), "fsdp")]:
        with pytest.raises(ValueError, match="come together"):
            collective_bytes(compiled, mesh, axis_name)
    with pytest.raises(ValueError, match="4 devices, the mesh 2"):
        collective_bytes(compiled, mesh_of(2), "workers")


# --- Texts that this machine's compiler does not write. XLA's own printer wrote them. ---

ASYNCHRONOUS = """
HloModule m, entry_computation_layout={(f32[8,3]{1,0}, u8[5]{0}, s32[4]{0})->f32[2,3]{1,0}}, num_partitions=4

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %s = f32[] add(%x, %y)
}

%wrapped (q: f32[8,3]) -> f32[8,3] {
  %q = f32[8,3]{1,0} parameter(0)
  %n = f32[8,3]{1,0} negate(%q)
  ROOT %aa = f32[8,3]{1,0} all-to-all(%n), channel_id=5, replica_groups={{0,1},{2,3}}, dimensions={0}
}

ENTRY %main (p.1: f32[8,3], u: u8[5], i: s32[4]) -> f32[2,3] {
  %u = u8[5]{0} parameter(1)
  %ag = (u8[5]{0}, u8[20]{0}) all-gather-start(%u), channel_id=1, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
  %agd = u8[20]{0} all-gather-done(%ag)
  %p.1 = f32[8,3]{1,0} parameter(0)
  %ag2 = ((u8[5]{0}, f32[8,3]{1,0}), (u8[20]{0}, f32[32,3]{1,0})) all-gather-start(%u, %p.1), channel_id=11, replica_groups=[1,4]<=[4], dimensions={0}, use_global_device_ids=true
  %ag2d = (u8[20]{0}, f32[32,3]{1,0}) all-gather-done(%ag2)
  %ar = (f32[8,3]{1,0}, f32[8,3]{1,0}) all-reduce-start(%p.1, %p.1), channel_id=2, replica_groups=[2,2]<=[2,2]T(1,0), use_global_device_ids=true, to_apply=%add
  %ard = (f32[8,3]{1,0}, f32[8,3]{1,0}) all-reduce-done(%ar)
  %cp = (u8[5]{0}, u8[5]{0}, u32[], u32[]) collective-permute-start(%u), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %cpd = u8[5]{0} collective-permute-done(%cp)
  %as = ((f32[8,3]{1,0}), f32[8,3]{1,0}, u32[]) async-start(%p.1), calls=%wrapped
  %asu = ((f32[8,3]{1,0}), f32[8,3]{1,0}, u32[]) async-update(%as)
  %asd = f32[8,3]{1,0} async-done(%asu)
  %aas = ((f32[8,3]{1,0}, f32[8,3]{1,0}), (f32[8,3]{1,0}, f32[8,3]{1,0}), u32[]) all-to-all-start(%p.1, %p.1), channel_id=7, replica_groups={{0,1},{2,3}}
  %aad = (f32[8,3]{1,0}, f32[8,3]{1,0}) all-to-all-done(%aas)
  %cbs = ((f32[8,3]{1,0}), f32[8,3]{1,0}, u32[]) collective-broadcast-start(%p.1), channel_id=8, replica_groups={{1,0},{2,3}}, has_dynamic_root=false
  %cbd = f32[8,3]{1,0} collective-broadcast-done(%cbs)
  %i = s32[4]{0} parameter(2)
  %ras = ((f32[8,3]{1,0}, f32[8,3]{1,0}, s32[4]{0}, s32[4]{0}, s32[4]{0}, /*index=5*/s32[4]{0}), f32[8,3]{1,0}, u32[]) ragged-all-to-all-start(%p.1, %p.1, %i, %i, %i, /*index=5*/%i), channel_id=9, replica_groups={{0,1,2,3}}
  %rad = f32[8,3]{1,0} ragged-all-to-all-done(%ras)
  %rs.1 = ((f32[8,3]{1,0}), f32[2,3]{1,0}) reduce-scatter-start(%p.1), channel_id=4, replica_groups={{0,1,2,3}}, use_global_device_ids=true, dimensions={0}, to_apply=%add
  ROOT %rsd = f32[2,3]{1,0} reduce-scatter-done(%rs.1)
}
"""  # noqa: E501


def test_what_is_started_and_awaited_later_counts_once_and_by_its_operands():
    book = collective_bytes(ASYNCHRONOUS.lstrip())
    found = [(row.kind, row.operand_bytes, row.group_size, row.sent) for row in book.rows]
    assert found == [
        ("all-to-all", 96, 2, 48),  # in a computation of its own
        ("all-gather", 5, 4, 15),
        ("all-gather", 5 + 96, 4, 3 * 101),
        ("all-reduce", 2 * 96, 2, 2 * 96),
        ("collective-permute", 5, 2, 5),
        ("all-to-all", 2 * 96, 2, 96),
        ("collective-broadcast", 96, 2, 96),
        ("ragged-all-to-all", 96, 4, 96),
        ("reduce-scatter", 96, 4, 72),
    ]
    assert all(row.executions == 1 and not row.conditional for row in book.rows)


def test_a_broadcast_is_sent_by_its_root_alone():
    # Devices 0 and 2 are one worker, 1 and 3 the other; 1 sends to 0, and 2 to 3.
    mesh = AbstractMesh((2, 2), ("workers", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rows = collective_bytes(ASYNCHRONOUS.lstrip(), mesh, "fsdp").rows
    (row,) = (row for row in rows if row.kind == "collective-broadcast")
    assert row.sent == row.crossing == row.sent_per_worker == 96


def hlo(line, *, head="num_partitions=8", before="", operand="u8[6]{0}"):
    """A program whose entry is an operand and one line more."""
    entry = f"ENTRY %main (x: {operand}) -> {operand} {{\n  %x = {operand} parameter(0)"
    return f"HloModule m, {head}\n\n{before}\n{entry}\n  {line}\n}}\n"


def collective(attributes, kind="all-gather", operand="%x", result="u8[12]{0} "):
    return f"ROOT %g = {result}{kind}({operand}), channel_id=1, {attributes}"


FLAT = "use_global_device_ids=true"


@pytest.mark.parametrize(
    ("groups", "members", "axes"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2, "c"),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2, "a"),
        ("{}", 8, "abc"),
        ("[4,2]<=[8]", 2, "c"),
        ("[2,4]<=[8]", 4, "bc"),
        ("[4,2]<=[4,2]T(1,0)", 2, "b"),
        ("[4,2]<=[2,4]T(1,0)", 2, "a"),
        ("[2,4]<=[2,2,2]T(1,0,2)", 4, "ac"),
        ("mesh['a'=2,'b'=2,'c'=2] {'b'}", 2, "b"),
        ("mesh['a'=2,'b'=2,'c'=2] {'c','a'}", 4, "ac"),
        ("mesh['workers'=2,'fsdp'=4] {'workers'}", 2, "a"),
        ("mesh['workers'=2,'fsdp'=4] {'fsdp':(1)2}", 2, "b"),
        ("mesh['workers'=2,'fsdp'=4] {'workers','fsdp':(2)2}", 4, "ac"),
        ("mesh['x'=2,'y'=4], device_ids=([4,2]T(1,0)) {'x'}", 2, "c"),
        ("mesh['x'=4,'y'=2], device_ids=(0,2,1,3,4,6,5,7) {'y'}", 2, "b"),
        ("mesh[x=2,y=4] {x}", 2, "a"),
    ],
)
def test_every_way_to_write_groups_is_read(groups, members, axes):
    text = hlo(collective(f"replica_groups={groups}, dimensions={{0}}, {FLAT}"))
    mesh = AbstractMesh((2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)
    (row,) = collective_bytes(text).rows
    assert (row.group_size, row.sent) == (members, (members - 1) * 6)
    crossing = {axis: collective_bytes(text, mesh, axis).crossing for axis in "abc"}
    assert crossing == {axis: members // 2 * 6 if axis in axes else 0 for axis in "abc"}


@pytest.mark.parametrize(
    ("operand", "size"),
    [
        ("u4[5]{0:E(4)}", 3),
        ("u4[5]{0}", 5),
        ("f4e2m1fn[2,3]{1,0:T(8,128)(2,1)E(4)}", 3),
        ("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}", 12),
        ("f8e4m3fn[7]", 7),
        ("pred[]", 1),
        ("c128[2]", 32),
    ],
)
def test_narrow_types_have_a_byte_each_unless_they_are_packed(operand, size):
    line = collective("source_target_pairs={{0,1}}", "collective-permute")
    assert collective_bytes(hlo(line, operand=operand)).sent == size


def test_who_sends_to_itself_sends_nothing():
    line = collective("source_target_pairs={{0,0},{1,1}}", "collective-permute")
    assert collective_bytes(hlo(line)).sent == 0


CALLED = """
%step (s: u8[6]) -> u8[6] {
  %s = u8[6]{0} parameter(0)
  ROOT %p = u8[6]{0} collective-permute(%s), channel_id=1, source_target_pairs={{0,1},{1,0}}
}
"""


SEVEN_TIMES = 'backend_config={"known_trip_count":{"n":"7"}}'


@pytest.mark.parametrize(
    ("line", "executions", "conditional"),
    [
        ("call(%x), to_apply=%step", 1, False),
        ("fusion(%x), kind=kCustom, calls=%step", 1, False),
        ('call(%x), to_apply=%step, metadata={op_name="calls=%step"}', 1, False),
        ("async-start(%x), calls=%step\n  %d = u8[6]{0} async-done(%r), calls=%step", 1, False),
        ("call(%x), to_apply=%step\n  %again = u8[6]{0} call(%x), to_apply=%step", 2, False),
        ("conditional(%x, %x, %x), branch_computations={%step, %other}", 1, True),
        ("conditional(%x, %x, %x), true_computation=%other, false_computation=%step", 1, True),
        (f"while(%x), condition=%other, body=%step, {SEVEN_TIMES}", 7, False),
        (f"while(%x), condition=%step, body=%other, {SEVEN_TIMES}", 8, False),
        ("while(%x), condition=%other, body=%step", None, False),
    ],
)
def test_a_computation_runs_as_often_as_it_is_called(line, executions, conditional):
    (row,) = collective_bytes(hlo(f"ROOT %r = u8[6]{{0}} {line}", before=CALLED)).rows
    assert (row.executions, row.conditional) == (executions, conditional)
    assert row.sent == (None if executions is None else 6 * executions)


PAIR = f"replica_groups={{{{0,1}}}}, {FLAT}"
ELSEWHERE = "u8[6]{0} custom-call(%x), called_computations={%step}"


@pytest.mark.parametrize(
    ("problem", "line", "changes"),
    [
        ("type that is not known, x9", collective(PAIR), {"operand": "x9[6]{0}"}),
        ("type that is not known, u8", collective(PAIR), {"operand": "u8[<=6]{0}"}),
        ("type that is not known, .u8", collective(PAIR), {"operand": "(u8[6]{0}, u32[])"}),
        ("Operands", collective(PAIR, operand="%y"), {}),
        ("Operands", collective(PAIR, operand=""), {}),
        ("Operands", collective(PAIR, operand="u8[6]{0:T(8)} %x"), {}),
        ("Operands", collective(PAIR + ", has_dynamic_root=true", "collective-broadcast"), {}),
        ("Operands", collective("slice_sizes={{2}}", "collective-permute"), {}),
        ("Groups that", collective(FLAT), {}),
        ("Groups that", collective("replica_groups=ring(8), " + FLAT), {}),
        ("Groups that", collective("replica_groups={{0,1}}", "collective-permute"), {}),
        ("Groups across", collective("replica_groups=mesh['a'=8] {'b'}, " + FLAT), {}),
        ("Groups across", collective("replica_groups=mesh['a'=8] {'a','a'}, " + FLAT), {}),
        ("replicas by", collective("replica_groups={{0}}"), {}),
        (
            "replicas by",
            collective("replica_groups={{0}}", "all-to-all"),
            {"head": "replica_count=2"},
        ),
        ("the program's 1 devices", collective(PAIR), {"head": "is_scheduled=true"}),
        ("collective that is not", collective(PAIR, "all-scatter"), {}),
        ("collective that is not", collective("is_host_transfer=false", "send"), {}),
        ("instruction that is not", collective(PAIR, result=""), {}),
        ("what runs the computation 'step'", "ROOT %r = u8[6]{0} copy(%x)", {"before": CALLED}),
        ("what runs the computation 'step'", f"ROOT %r = {ELSEWHERE}", {"before": CALLED}),
    ],
)
def test_a_line_that_is_not_understood_is_an_error_that_quotes_it(problem, line, changes):
    with pytest.raises(ValueError, match=problem) as error:
        collective_bytes(hlo(line, **changes))
    quoted = str(error.value).partition("line of HLO: ")[2]
    assert quoted == (CALLED.splitlines()[3].strip() if "before" in changes else line)


def test_what_only_waits_or_talks_to_the_host_sends_nothing():
    done = "%d = u8[6]{0} all-gather-done(%x)\n  %u = u8[6]{0} async-update(%x)\n  "
    host = "ROOT %s = (u8[6]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true"
    named = 'ROOT %n = u8[6]{0} negate(%x), metadata={op_name="a = u8[6] all-gather(%x)"}'
    assert [collective_bytes(hlo(line)).rows for line in (done + host, named)] == [(), ()]


@pytest.mark.parametrize("text", ["", "module @jit_f {}", "HloModule m, num_partitions=4\n"])
def test_only_the_text_of_a_compiled_program_is_read(text):
    with pytest.raises(ValueError, match="HLO text"):
        collective_bytes(text)
    with pytest.raises(ValueError, match="Not the HLO text"):
        collective_bytes(jax.jit(jnp.sin).lower(1.0))


def test_the_ledger_prints_as_a_table():
    mesh = AbstractMesh((2, 2), ("workers", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    text = ASYNCHRONOUS.replace("s32[4]", "s32[9]").lstrip()
    lines = str(ef21.ledger.collective_bytes(text, mesh, "workers")).splitlines()
    assert lines[0].split() == [
        *("kind", "operands", "source", "bytes", "group", "times", "sent", "crossing"),
        *("per", "worker"),
    ]
    assert lines[4].split() == [
        *("all-gather", "u8", "5,", "f32", "8×3", "101", "4", "1", "303", "202", "404"),
    ]
    assert lines[-1].split() == ["total", "923", "553", "1,101"]
