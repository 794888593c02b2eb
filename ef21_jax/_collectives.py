"""The collectives of a compiled program, read from its HLO text.

No interface of JAX says what a compiled program sends, and the jaxpr does not know what the
partitioner adds, so the text it is. Reading is strict: a line that may send something and is not
understood is an error, since a collective that is passed over would be bytes nobody counts. What
a custom call sends by itself cannot be seen.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a compiled program.

    What is sent is that of one run of the program, by the busiest device (or worker): None where
    a loop of unknown length has the instruction, and at most that much where a branch has it.
    """

    kind: str  # "all-gather", "all-reduce", ...
    dtypes: tuple[str, ...]  # of the operands, as XLA calls them: "u8", "f32"
    shapes: tuple[tuple[int, ...], ...]  # of the operands, on one device
    operand_bytes: int  # on one device, in one execution
    group_size: int  # devices that take part together; of a permutation 2
    executions: int | None  # in one run
    conditional: bool  # under a branch that the data choose
    op_name: str
    source: str  # file:line, or ""
    sent: int | None  # bytes, by a device
    crossing: int | None  # of these, those to devices of other workers
    sent_per_worker: int | None  # bytes that cross, from all devices of a worker


def device_count(text: str) -> int:
    """For how many devices a program is compiled.

    Raises:
      ValueError: for what is no HLO text.
    """
    return math.prod(_replicas_and_partitions(text))


def read(text: str, workers: Sequence[int]) -> tuple[Collective, ...]:
    """The collectives of a compiled program.

    Args:
      text: optimized HLO, as of `jax.jit(f).lower(...).compile().as_text()`.
      workers: to which worker each device belongs, in the program's order of devices.

    Raises:
      ValueError: for what is not understood. Quotes the line.
    """
    counts = _replicas_and_partitions(text)
    computations, entry = _computations(text)
    context, source = _contexts(computations, entry), _sources(text)

    def collective(kind, instruction, where):
        operands = _operands(kind, instruction, computations[where])
        groups = _groups(kind, instruction, *counts)
        executions, conditional = context(where, instruction)
        op_name = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', instruction.line)
        size = sum(size for *_, size in operands)
        sent, crossing, sent_per_worker = (
            0 if once == 0 else None if executions is None else once * executions
            for once in _bytes_once(kind, size, groups, workers)
        )
        return Collective(
            kind=kind,
            dtypes=tuple(dtype for dtype, *_ in operands),
            shapes=tuple(shape for _, shape, _ in operands),
            operand_bytes=size,
            group_size=max(map(len, groups), default=0),
            executions=executions,
            conditional=conditional,
            op_name=op_name[1] if op_name else "",
            source=source(instruction.line),
            sent=sent,
            crossing=crossing,
            sent_per_worker=sent_per_worker,
        )

    return tuple(
        collective(kind, instruction, where)
        for where, computation in computations.items()
        for instruction in computation.values()
        if (kind := _kind(instruction))
    )


def _bytes_once(kind, size, groups, workers):
    """Of the busiest device: sent, and of that to other workers. Of the busiest worker: the last.

    Operands have `size` bytes.
    """
    crossing = _sent(kind, size, groups, workers)
    by_worker = collections.Counter()
    for device, crosses in crossing.items():
        by_worker[workers[device]] += crosses
    sent = _sent(kind, size, groups, range(len(workers)))
    return [max(sizes.values(), default=0) for sizes in (sent, crossing, by_worker)]


def _sent(kind, size, groups, workers):
    """{device: bytes it sends to devices of other workers in one execution}.

    As if sent to each of them directly; summed over a whole group that is what a ring sends.
    """
    sent = collections.Counter()
    for group in groups:
        members = collections.Counter(workers[device] for device in group)
        for device in group[:1] if kind in _FROM_THE_FIRST else group:
            others = len(group) - members[workers[device]]
            sent[device] += _share(kind, size, len(group), others)
    return sent


def _share(kind, size, group, others):
    """Bytes from a member of a group, with an operand of `size` bytes, to `others` of the group."""
    if kind in ("all-to-all", "reduce-scatter"):
        return -(-others * size // group)
    if kind == "all-reduce":  # a reduce-scatter, and an all-gather of what that leaves
        return -(-2 * others * size // group)
    if kind == "ragged-all-to-all":  # at most: the data say how much
        return size if others else 0
    return others * size


_KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_FROM_THE_FIRST = {"collective-broadcast", "collective-permute"}  # of a group, to the others
_MAY_COUNT_REPLICAS = {"all-gather", "all-reduce", "reduce-scatter"}  # even with a channel


# --- Computations, and what runs them ---


@dataclasses.dataclass(frozen=True)
class _Instruction:
    line: str
    result: str = ""  # its shape
    opcode: str = ""
    rest: str = ""  # operands and attributes, without the contents of strings


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_SENDS = re.compile(rf"\b(?:{'|'.join(_KINDS)})(?:-start)?\(")
_RUNS = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation)"
    r"=(\{[^}]*\}|[%\w.\-]+)"
)


def _error(problem, instruction):
    return ValueError(f"{problem}, in the line of HLO: {instruction.line.strip()}")


def _replicas_and_partitions(text):
    head = text.partition("\n")[0]
    if not head.startswith("HloModule"):
        raise ValueError(f"Not the HLO text of a compiled program: {head[:80]!r}.")
    found = (re.search(rf"\b{count}=(\d+)", head) for count in ("replica_count", "num_partitions"))
    return [int(count[1]) if count else 1 for count in found]


def _computations(text):
    """{computation: {name: instruction}}, and the name of the entry."""
    computations, entry, current = {}, None, {}
    for line in text.splitlines():
        bare = re.sub(r'"(?:[^"\\]|\\.)*"', '""', line)
        if found := _INSTRUCTION.match(bare):
            current[found[1]] = _Instruction(line, *found.groups()[1:])
        elif _SENDS.search(bare):
            raise _error("An instruction that is not understood", _Instruction(line))
        elif found := _COMPUTATION.match(bare):
            current = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
    if entry is None:
        raise ValueError(f"HLO text without an entry computation: {text[:80]!r}.")
    return computations, entry


def _kind(instruction):
    """Which collective this is; None for what sends nothing, or only waits until it is sent."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in _KINDS:
        return kind
    if re.match(r"all-|collective-|ragged-|reduce-scatter|(send|recv)$", kind):
        waits = kind.endswith(("-done", "-update"))
        if not waits and "is_host_transfer=true" not in instruction.rest:
            raise _error("A collective that is not understood", instruction)
    return None


def _contexts(computations, entry):
    """A function: how often a run comes by a computation (None: not known), and if by a branch."""
    runs = collections.defaultdict(list)
    for caller, computation in computations.items():
        for instruction in computation.values():
            for callee, times in _callees(instruction):
                runs[callee].append((caller, times, instruction.opcode == "conditional"))

    @functools.cache
    def context(name, instruction):
        if name == entry:
            return 1, False
        if not runs[name]:
            raise _error(f"Not understood what runs the computation {name!r}", instruction)
        executions, conditional = 0, False
        for caller, times, branch in runs[name]:
            outer, outer_branch = context(caller, instruction)
            known = None not in (executions, outer, times)
            executions = executions + outer * times if known else None
            conditional = conditional or branch or outer_branch
        return executions, conditional

    return context


def _callees(instruction):
    """(computation, how often the instruction runs it)."""
    if instruction.opcode.endswith(("-done", "-update")):
        return
    trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', instruction.line)
    for key, callees in _RUNS.findall(instruction.rest):
        times = 1
        if key in ("body", "condition"):  # which is asked once more, at the end
            times = int(trips[1]) + (key == "condition") if trips else None
        for callee in re.findall(r"[\w.\-]+", callees):
            yield callee, times


def _sources(text):
    """A function: from a line to the file:line that it was traced from, or ""."""

    def section(title, pattern):
        found = re.search(rf"^{title}\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
        return {number: rest for number, *rest in re.findall(pattern, found[1] if found else "")}

    files = section("FileNames", r'(\d+) "(.*)"')
    locations = section("FileLocations", r"(\d+) \{file_name_id=(\d+) .*?\bline=(\d+)")
    frames = section("StackFrames", r"(\d+) \{file_location_id=(\d+)")

    def source(line):
        found = re.search(r"\bstack_frame_id=(\d+)", line)
        if not found or found[1] not in frames:
            return ""
        file, number = locations[frames[found[1]][0]]
        return f"{files[file][0]}:{number}"

    return source


# --- What is sent, and between whom ---


def _operands(kind, instruction, computation):
    """(dtype, shape, bytes) of each.

    Looked up by name, not read off the result, which has another form where it is asynchronous.
    """
    text = re.sub(r"/\*.*?\*/", "", instruction.rest.partition(")")[0])
    names = [name.strip().removeprefix("%") for name in text.split(",")]
    partly = re.search(r"\b(slice_sizes=|has_dynamic_root=true)", instruction.rest)
    if partly or not all(name in computation for name in names):
        raise _error("Operands that are not understood", instruction)
    if kind == "ragged-all-to-all":
        names = names[:1]  # then the output, offsets and sizes
    return [_array(computation[name].result, instruction) for name in names]


def _array(text, instruction):
    found = re.fullmatch(r"(\w+)\[([\d,]*)\](\{.*\})?", text)
    bits = found and re.fullmatch(r"pred|(?:[sufc]|bf)(\d+)(?:e\d+m\d+\w*)?", found[1])
    if not found or not bits:
        raise _error(f"An operand of a type that is not known, {text}", instruction)
    # Narrow types have a byte each, unless the layout says that they are packed.
    packed = re.search(r"E\((\d+)\)", found[3] or "")
    each = int(packed[1]) if packed else max(8, int(bits[1] or 8))
    shape = _numbers(found[2])
    return found[1], shape, -(-math.prod(shape) * each // 8)


_PAIRS = re.compile(r"\bsource_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")
_LIST = re.compile(r"\breplica_groups=\{((?:\{[\d,]+\},?)*)\}")
_IOTA = re.compile(r"\breplica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)")
_MESH = re.compile(
    r"\breplica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S*)\))? \{([^}]*)\}(?:,|$)"
)


def _groups(kind, instruction, replicas, partitions):
    """Tuples of devices, as places in the program's list of them. Of a permutation (from, to)."""
    rest, devices = instruction.rest, replicas * partitions
    if "use_global_device_ids=true" not in rest:
        of_partitions = "channel_id=" in rest and kind not in _MAY_COUNT_REPLICAS
        if (replicas if of_partitions else partitions) > 1:
            raise _error("Groups of replicas by partitions, not understood", instruction)
    if found := (_PAIRS if kind == "collective-permute" else _LIST).search(rest):
        groups = [_numbers(group) for group in re.findall(r"\{(.*?)\}", found[1])]
        if not groups and kind != "collective-permute":
            groups = [tuple(range(devices))]
    elif found := _IOTA.search(rest):
        groups = _iota(found[2]).reshape(_numbers(found[1])).tolist()
    elif found := _MESH.search(rest):
        groups = _mesh_groups(*found.groups(), instruction)
    else:
        raise _error("Groups that are not understood", instruction)
    if any(device >= devices for group in groups for device in group):
        raise _error(f"More than the program's {devices} devices", instruction)
    return [tuple(group) for group in groups]


def _mesh_groups(axes, device_ids, across, instruction):
    """The groups of `mesh['a'=2,'b'=8], device_ids=(...) {'a','b':(2)4}`.

    `'b':(2)4` is a part of length 4 of the axis, within one of length 2.
    """
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',]+?)'?=(\d+)", axes)}
    spans = re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", across)
    parts = {name: (int(before), int(length)) for name, before, length in spans if before}
    names = [name for name, *_ in spans]
    if len(set(names)) < len(names) or not set(names) <= set(sizes):
        raise _error("Groups across axes that are not understood", instruction)
    dims, place = [], {}
    for name, size in sizes.items():
        before, length = parts.get(name, (1, size))
        place[name] = len(dims) + 1
        dims += [before, length, size // (before * length)]
    last = [place[name] for name in names]
    first = [axis for axis in range(len(dims)) if axis not in last]
    members = math.prod(dims[axis] for axis in last)
    ids = np.arange(math.prod(dims)) if device_ids is None else _iota(device_ids)
    return ids.reshape(dims).transpose(first + last).reshape(-1, members).tolist()


def _iota(text):
    """`[2,4]T(1,0)` counts up in these dimensions, transposed; otherwise a list of numbers."""
    dims, _, order = text.partition("T")
    if not text.startswith("["):
        return np.asarray(_numbers(text))
    counted = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return counted.transpose(_numbers(order) or None).ravel()


def _numbers(text):
    return tuple(int(number) for number in re.findall(r"\d+", text))
