"""Compiled programs as XLA prints them (HLO text): the operations and the bytes on the wire of one device.

XLA's own cost analysis counts the body of a loop once. Here every computation is weighed by how often it runs, as far
as the text tells: `known_trip_count`, or a condition `i < constant` of a counter that starts at a constant, as of
`lax.scan`. A body of a loop whose turns are unknown counts once, and the loop is named.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
}
_BYTES |= {"f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_OPCODE = re.compile(r" ([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"(calls|to_apply|body|condition|called_computations|branch_computations)=\{?((?:%[\w.\-]+(?:, )?)+)"
)
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation: `name = shape opcode(operands), rest`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool

    @property
    def dims(self) -> tuple[int, ...]:
        """Axes of the (first) array."""
        return arrays(self.shape)[0][1]

    def called(self) -> dict[str, list[str]]:
        """The computations it names, by the attribute that names them."""
        return {kind: re.findall(r"%([\w.\-]+)", names) for kind, names in _CALLED.findall(self.rest)}


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A program: its computations by name, the first that runs, and the number of devices that it is split over."""

    computations: Mapping[str, Computation]
    entry: str
    devices: int


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
      kind: one of `COLLECTIVES`.
      whole: bytes of the whole array, gathered or not yet scattered.
      wire: bytes that a device receives each time, by a ring.
      runs: how often it runs.
      in_loop: whether it stands in the body of a loop.
    """

    kind: str
    whole: float
    wire: float
    runs: float
    in_loop: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one device.

    Attributes:
      flops: of matrix products, convolutions and known kernels, a multiply-add being two.
      collectives: all transfers between devices.
      unknown_loops: loops whose turns are not in the text; their bodies count once.
      unknown_kernels: runs of kernels whose operations are unknown, by name; they count nothing.
    """

    flops: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]
    unknown_kernels: Mapping[str, float]

    @property
    def wire(self) -> dict[str, float]:
        """Bytes that a device receives, by kind of transfer."""
        total: dict[str, float] = {}
        for each in self.collectives:
            total[each.kind] = total.get(each.kind, 0) + each.wire * each.runs
        return total


def parse(text: str) -> Program:
    """The program that `compiled.as_text()` prints."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.endswith("{") and (header := re.match(r"(ENTRY )?%?([\w.\-]+) \(", line)):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif (instruction := _instruction(line)) is not None:
            current[instruction.name] = instruction
    devices = [int(count) for count in re.findall(r"num_(?:partitions|replicas)=(\d+)", text[: text.find("\n")])]
    return Program(computations, entry, math.prod(devices))


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    opcode = _OPCODE.search(line, found.end() - 1) if found else None
    if found is None or opcode is None:
        return None
    end = _closing(line, opcode.end() - 1)
    operands = tuple(re.findall(r"%([\w.\-]+)", line[opcode.end() : end]))
    if opcode[1] in ("constant", "parameter"):
        operands = (line[opcode.end() : end],)
    shape = line[found.end() : opcode.start()]
    return Instruction(found[2], shape, opcode[1], operands, line[end + 1 :], found[1] is not None)


def _closing(line: str, opening: int) -> int:
    """Where the bracket at `opening` is closed."""
    depth = 0
    for bracket in re.finditer(r"[()]", line[opening:]):
        depth += 1 if bracket[0] == "(" else -1
        if depth == 0:
            return opening + bracket.start()
    return len(line)


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and axes of the arrays in a shape."""
    return [(kind, tuple(map(int, dims.split(",") if dims else ()))) for kind, dims in _ARRAY.findall(shape)]


def size(shape: str) -> float:
    """Bytes of all arrays in a shape; 8-bit floats have many names, other types none in bytes."""
    per_item = lambda kind: 1 if kind.startswith("f8") else _BYTES.get(kind, 0)
    return sum(per_item(kind) * math.prod(dims) for kind, dims in arrays(shape))


def measure(program: Program) -> Work:
    """The work of one device of `program`."""
    collectives: list[Collective] = []
    loops: list[str] = []
    kernels: dict[str, float] = {}
    flops = 0.0
    for computation, instruction, runs, in_loop, is_unknown in _runs(program, program.entry, 1.0, False):
        if is_unknown:
            loops.append(instruction.name)
        kind = instruction.opcode.removesuffix("-start")
        if instruction.opcode in ("dot", "convolution"):
            flops += runs * _product_flops(computation, instruction)
        elif kind in COLLECTIVES:
            collectives.append(_collective(program, computation, instruction, kind, runs, in_loop))
        elif kind == "custom-call" and _CALCULATES.search(instruction.rest):
            known = _kernel_flops(computation, instruction)
            flops += runs * (known or 0.0)
            if known is None:
                kernels[instruction.name] = runs
    return Work(flops, tuple(collectives), tuple(loops), kernels)


def _runs(
    program: Program, name: str, runs: float, in_loop: bool
) -> Iterator[tuple[Computation, Instruction, float, bool, bool]]:
    """Every instruction that is reached from a computation, with how often it runs, whether in a loop, and whether it
    is a loop of unknown turns."""
    computation = program.computations[name]
    for instruction in computation.values():
        turns = _turns(program, computation, instruction) if instruction.opcode == "while" else 1
        yield computation, instruction, runs, in_loop, turns is None
        inside = in_loop or instruction.opcode == "while"
        for called in _entered(instruction):
            yield from _runs(program, called, runs * (1 if turns is None else turns), inside)


def _entered(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs; of a conditional all branches, so that none is missed."""
    called = instruction.called()
    if instruction.opcode == "while":
        return called["body"]
    if instruction.opcode == "conditional":
        named = re.findall(r"(?:true|false)_computation=%([\w.\-]+)", instruction.rest)
        return called.get("branch_computations", []) + named
    if instruction.opcode in ("fusion", "async-start", "custom-call"):
        return called.get("calls", []) + called.get("called_computations", [])
    return called["to_apply"] if instruction.opcode in ("call", "call-start") else []


def _turns(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often the body of a loop runs; None if the text does not tell."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = program.computations[loop.called()["condition"][0]]
    bounds = _upper_bound(program, condition)
    start = None if bounds is None else _start(computation, loop, bounds[0])
    return None if bounds is None or start is None else max(0, bounds[1] - start)


def _upper_bound(program: Program, condition: Computation) -> tuple[int, int] | None:
    """Of a condition `carry[index] < constant`: index and constant."""
    root = next(each for each in condition.values() if each.is_root)
    operands = [condition[name] for name in root.operands if name in condition]
    direction = root.rest
    if root.opcode == "fusion":  # the comparison alone, of the same operands or with a constant of its own
        inner = program.computations[root.called()["calls"][0]]
        compare = next(each for each in inner.values() if each.is_root)
        if compare.opcode != "compare":
            return None
        outer = lambda each: operands[int(each.operands[0])] if each.opcode == "parameter" else each
        operands, direction = [outer(inner[name]) for name in compare.operands], compare.rest
    elif root.opcode != "compare":
        return None
    counter, bound = operands
    if "direction=GT" in direction:
        counter, bound = bound, counter
    if "direction=LT" not in direction and "direction=GT" not in direction:
        return None
    if counter.opcode != "get-tuple-element" or bound.opcode != "constant":
        return None
    index = re.search(r"index=(\d+)", counter.rest)
    return None if index is None else (int(index[1]), int(bound.operands[0]))


def _start(computation: Computation, loop: Instruction, index: int) -> int | None:
    """The constant that a loop's carry has at `index` before the first turn."""
    carry = computation[loop.operands[0]]
    if carry.opcode != "tuple":
        return None
    first = computation[carry.operands[index]]
    while first.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        first = computation[first.operands[0]]
    return int(first.operands[0]) if first.opcode == "constant" else None


def _product_flops(computation: Computation, product: Instruction) -> float:
    """Operations of a matrix product or a convolution."""
    left, right = (computation[name].dims for name in product.operands[:2])
    if product.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.rest)
        axes = [int(axis) for axis in contracted[1].split(",")] if contracted and contracted[1] else []
        return 2.0 * math.prod(product.dims) * math.prod(left[axis] for axis in axes)
    return _convolution_flops(left, right, product)


def _convolution_flops(left: Sequence[int], right: Sequence[int], convolution: Instruction) -> float:
    """Operations of a convolution, without those on padding and on the zeros of a dilation: batched matrix products on
    TPUs are convolutions that are mostly these."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.rest)
    assert labels is not None, convolution.name
    of_left, of_right, of_output = labels.groups()
    number = lambda name: int(found[1]) if (found := re.search(rf"{name}=(\d+)", convolution.rest)) else 1
    batch = left[of_left.index("b")] // number("batch_group_count")
    total = 2.0 * batch * right[of_right.index("i")] * right[of_right.index("o")]
    for axis in filter(str.isdigit, of_output):
        sizes = left[of_left.index(axis)], right[of_right.index(axis)], convolution.dims[of_output.index(axis)]
        total *= _valid_pairs(*sizes, **_window(convolution.rest, int(axis)))
    return total


def _window(rest: str, axis: int) -> dict[str, int]:
    """Stride, padding before, and dilations of a spatial axis."""
    found = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(item.split("=") for item in found[1].split()) if found else {}
    of_axis = lambda name, default: fields[name].split("x")[axis] if name in fields else default
    return {
        "stride": int(of_axis("stride", "1")),
        "pad": int(of_axis("pad", "0_0").split("_")[0]),
        "left_dilation": int(of_axis("lhs_dilate", "1")),
        "right_dilation": int(of_axis("rhs_dilate", "1")),
    }


@functools.cache
def _valid_pairs(
    left: int, right: int, output: int, stride: int, pad: int, left_dilation: int, right_dilation: int
) -> int:
    """Pairs of an output and a kernel position along an axis that meet an element of the input."""
    if left_dilation == 1:  # the positions that one kernel element meets are a range of outputs
        count = 0
        for shift in (pad - position * right_dilation for position in range(right)):
            first, last = max(0, -(-shift // stride)), min(output - 1, (left - 1 + shift) // stride)
            count += max(0, last - first + 1)
        return count
    places = (out * stride - pad + position * right_dilation for out in range(output) for position in range(right))
    return sum(place % left_dilation == 0 and 0 <= place < left * left_dilation for place in places)


def _collective(
    program: Program, computation: Computation, transfer: Instruction, kind: str, runs: float, in_loop: bool
) -> Collective:
    members = _members(program, transfer.rest)
    operand = sum(size(computation[name].shape) for name in transfer.operands)
    share = (members - 1) / members
    if kind == "all-gather":
        whole, wire = operand * members, operand * (members - 1)
    elif kind == "all-reduce":
        whole, wire = operand, 2 * operand * share
    else:
        whole, wire = operand, operand * (1.0 if kind == "collective-permute" else share)
    return Collective(kind, whole, wire, runs, in_loop)


def _members(program: Program, rest: str) -> int:
    """Devices in a group of a transfer: `{{0,1},{2,3}}`, `[2,4]<=[8]` or `mesh['a'=2,'b'=4] {'b'}`; all by default."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(counted[1])
    if named := re.search(r"replica_groups=\S*mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return max(1, program.devices)


KERNELS = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
"""Products `[N, C] x [C, M]`, or of that size, in each kernel of JAX's splash attention, by the start of its name."""
_CALCULATES = re.compile(r'custom_call_target="(tpu_custom_call|[^"]*(?:cublas|cudnn|onednn|triton|gemm|conv)[^"]*)"')


def _kernel_flops(computation: Computation, kernel: Instruction) -> float | None:
    """Operations of a custom call, whose first two floating-point operands are queries and keys `[..., N, C]`."""
    products = next((count for name, count in KERNELS.items() if kernel.name.startswith(name)), None)
    if products is None:
        return None
    shapes = (arrays(computation[name].shape)[0] for name in kernel.operands)
    queries, keys, *_ = (dims for kind, dims in shapes if kind in ("bf16", "f32"))
    return 2.0 * products * math.prod(queries) * keys[-2]
