"""Do an op's operands go together: number types, devices, sizes, numbers that are addresses? As statements.py says.

`check_op` stands before an op computes, whichever implementation runs; `check_call` before a pointer reaches C. A
statement becomes a function that only says yes or no, so that a call costs less than a microsecond an operand; what is
wrong is found when something is. The kinds of error are those of PyTorch's linear, embedding and index_select."""

import re
from collections.abc import Callable
from functools import cache
from types import CodeType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from sparsemix.ops.statements import KERNELS, OPS

DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
}
_assert_on_device = torch.ops.aten._assert_async.msg
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_WORD = re.compile(r"(\w+)(?::(\w+)(?:\[([^\]]*)\]|\((.*?)\)(?=[\s?]|$))(\S*))?(?:\s|$)")


class Operand(NamedTuple):
    """One operand of a statement; sizes are Python. Axes are None where only the number of elements counts."""

    name: str
    type: str
    dtype: torch.dtype | None
    axes: tuple[str, ...] | None
    text: str
    optional: bool
    rises: bool
    below: str | None
    total: str | None


@cache
def operands_of(statement: str) -> tuple[Operand | str, ...]:
    """The operands of a statement in order; a number is its name."""
    found: list[Operand | str] = []
    for name, kind, axes, elements, marks in _WORD.findall(statement):
        if not kind:
            found.append(name)
            continue
        sizes = None if elements else tuple(axes.split())
        below, total = (limit and limit[1] for limit in (re.search(mark + r"([\w+*]+)", marks) for mark in "<#"))
        text = elements or f"({', '.join(axes.split())})"
        found.append(Operand(name, kind, DTYPES.get(kind), sizes, text, "?" in marks, "^" in marks, below, total))
    return tuple(found)


def check_op(op: str, *tensors: Tensor | None) -> None:
    """Are these what the op takes? Raises RuntimeError for number types, devices and sizes that do not go together,
    IndexError for row numbers of no row, ValueError for rows of experts that are none. On a GPU, which would have to be
    waited for, wrong numbers are an assertion of the device, as in PyTorch."""
    sizes = _op_test(op)(*tensors)
    if sizes is None:
        _explain(op, tensors)
    for i, operand in _ranged(op):
        x = tensors[i]
        if x is not None and x.numel():
            _check_numbers(op, operand, x, sizes)


@cache
def _ranged(op: str) -> tuple[tuple[int, Operand], ...]:
    """The operands whose numbers are addresses."""
    found = [(i, operand) for i, operand in enumerate(operands_of(OPS[op])) if isinstance(operand, Operand)]
    return tuple((i, o) for i, o in found if o.below is not None or o.rises or o.total is not None)


@cache
def _op_test(op: str) -> Callable[..., dict[str, int] | None]:
    """(operands) -> the sizes, None if something does not fit."""
    statement, leaders, lines = operands_of(OPS[op]), {}, []
    for operand in statement:
        assert isinstance(operand, Operand)
        x, test = f"x_{operand.name}", "True"
        if operand.dtype is not None:
            test = f"{x}.dtype is {operand.type}"
        elif operand.type == "I":
            test = f"{x}.dtype in INTEGERS"
        elif operand.type in leaders:
            test = f"{x}.dtype is {leaders[operand.type]}.dtype"
        else:
            leaders[operand.type], test = x, f"{x}.dtype.is_floating_point and {x}.layout is STRIDED"
        lines.append((operand, f"{test} and {x}.device == device"))
    return _test(statement, lines, [f"device = x_{statement[0].name}.device"])  # pyright: ignore[reportAttributeAccessIssue]


@cache
def _call_test(folder: str, name: str) -> Callable[..., dict[str, int] | None]:
    """(arguments of a C kernel) -> the sizes, None if something does not fit."""
    statement = operands_of(KERNELS[f"{folder}.{_plain(name)}"])
    lines = []
    for operand in statement:
        if isinstance(operand, Operand):
            x = f"x_{operand.name}"
            lines.append((operand, f"{x}.dtype is {operand.type} and {x}.is_cpu and {x}.is_contiguous()"))
    element = "bf16 if low else f32" if "low" in statement else "bf16" if name.endswith("_bf16") else "f32"
    return _test(statement, lines, [f"T = {element}"])


def _test(
    statement: tuple[Operand | str, ...], lines: list[tuple[Operand, str]], first: list[str]
) -> Callable[..., dict[str, int] | None]:
    names = [operand if isinstance(operand, str) else f"x_{operand.name}" for operand in statement]
    known, body = {name for name in names if not name.startswith("x_")}, [*first]
    # What may be None brings no size of its own.
    for operand, test in sorted(lines, key=lambda line: line[0].optional):
        x, inner = f"x_{operand.name}", [f"if not ({test}): return None"]
        if operand.axes is None:
            inner.append(f"if {x}.numel() != {operand.text}: return None")
        else:
            places = [f"_{i}" for i in range(len(operand.axes))]
            inner.append(f"({''.join(place + ', ' for place in places)}) = {x}.shape")
            for place, axis in zip(places, operand.axes, strict=True):
                if axis in known or not axis.isidentifier():
                    inner += [f"if {place} != {axis}: return None"] if axis != "*" else []
                else:
                    inner.append(f"{axis} = {place}")
                    known.add(axis)
        body += [f"if {x} is not None:", *(f"    {line}" for line in inner)] if operand.optional else inner
    sizes = ", ".join(f"{name!r}: {name}" for name in sorted(known))
    lines_of = "\n        ".join([*body, f"return {{{sizes}}}"])
    # An operand of another rank does not unpack, one that is None or a number has no dtype.
    text = f"def test({', '.join(names)}):\n    try:\n        {lines_of}\n    except (ValueError, AttributeError):\n"
    space = DTYPES | {"INTEGERS": INTEGERS, "STRIDED": torch.strided}
    exec(text + "        return None", space)
    return space["test"]  # pyright: ignore[reportReturnType]


def _explain(op: str, tensors: tuple[Tensor | None, ...]) -> NoReturn:
    """Raises what is wrong with the operands of an op."""
    sizes: dict[str, int] = {}
    leaders: dict[str, tuple[str, torch.dtype]] = {}
    device = next((x.device for x in tensors if x is not None), None)
    for operand, x in zip(operands_of(OPS[op]), tensors, strict=True):
        assert isinstance(operand, Operand)
        if x is None and operand.optional:
            continue
        if not isinstance(x, Tensor):
            raise RuntimeError(f"{op}: {operand.name} must be a tensor, not {type(x).__name__}")
        if x.device != device:
            raise RuntimeError(f"{op}: {operand.name} is on {x.device}, the others on {device}; move it with .to()")
        _check_type(op, operand, x, leaders)
        if not _fits(operand, x, sizes):
            raise _misfit(op, operand, x, sizes)
    raise AssertionError(f"{op}: refused for no reason; please report it")


def _check_type(op: str, operand: Operand, x: Tensor, leaders: dict[str, tuple[str, torch.dtype]]) -> None:
    """One floating type for all of a letter, the first one's; any integer; or the type that is said."""
    if operand.dtype is not None:
        if x.dtype is operand.dtype:
            return
        raise RuntimeError(f"{op}: expected scalar type {_said(operand.dtype)} for {operand.name} but found {_said(x)}")
    if operand.type == "I":
        if x.dtype not in INTEGERS:
            raise RuntimeError(f"{op}: {operand.name} must be integers, not {_said(x)}; cast them with .long()")
        return
    if not x.dtype.is_floating_point or x.layout is not torch.strided:
        raise RuntimeError(f"{op}: {operand.name} must be dense floating numbers, not {_said(x)}; cast it with .to()")
    name, dtype = leaders.setdefault(operand.type, (operand.name, x.dtype))
    if dtype is not x.dtype:
        raise RuntimeError(
            f"{op}: {name} and {operand.name} must have the same dtype, but got {_said(dtype)} and {_said(x)}; "
            "cast one with .to(), or run under torch.autocast"
        )


def _said(x: Tensor | torch.dtype) -> str:
    """A number type as PyTorch's own errors name it."""
    dtype = x.dtype if isinstance(x, Tensor) else x
    names = {"float32": "Float", "float64": "Double", "float16": "Half", "int64": "Long", "int32": "Int"}
    names |= {"bfloat16": "BFloat16", "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool"}
    plain = str(dtype).removeprefix("torch.")
    return names.get(plain, plain)


def _fits(operand: Operand, x: Tensor, sizes: dict[str, int]) -> bool:
    if operand.axes is None:
        return x.numel() == _size(operand.text, sizes)
    if x.ndim != len(operand.axes):
        return False
    for axis, size in zip(operand.axes, x.shape, strict=True):
        if axis.isidentifier():
            sizes.setdefault(axis, size)
        if axis != "*" and _size(axis, sizes) != size:
            return False
    return True


def _size(text: str, sizes: dict[str, int]) -> int:
    return eval(_compiled(text), {"__builtins__": {}}, sizes)


@cache
def _compiled(text: str) -> CodeType:
    return compile(text, "<statement>", "eval")


def _misfit(op: str, operand: Operand, x: Tensor, sizes: dict[str, int]) -> RuntimeError:
    known = ", ".join(f"{name}={size}" for name, size in sizes.items())
    return RuntimeError(f"{op}: {operand.name} of shape {tuple(x.shape)} must be {operand.text} with {known}")


def vouch(x: Tensor, num_rows: int) -> None:
    """Its numbers are 0 to num_rows - 1, and rise if they must, by construction: as long as nobody writes to it, an op
    need not look again."""
    if not (torch.compiler.is_compiling() or x.is_inference()):
        x._vouched = (x._version, num_rows)  # pyright: ignore[reportAttributeAccessIssue]


def _vouched(x: Tensor, operand: Operand, sizes: dict[str, int]) -> bool:
    version, num_rows = getattr(x, "_vouched", (None, 0))
    if version is None or x.is_inference() or version != x._version:
        return False
    return operand.below is None or num_rows <= _size(operand.below, sizes)


def _check_numbers(op: str, operand: Operand, x: Tensor, sizes: dict[str, int]) -> None:
    """The passes over numbers that a kernel takes for addresses."""
    if _vouched(x, operand, sizes):
        return
    rule = f"{op}: {operand.name}"
    if operand.total is not None:
        _check_counts(rule, x, sizes[operand.total])
    if operand.rises and x.numel() > 1:
        _demand((x[1:] > x[:-1]).all(), f"{rule} must rise; take them from sort_rows", ValueError)
    if operand.below is not None:
        check_ids(rule, x, _size(operand.below, sizes))


def check_ids(rule: str, ids: Tensor, num_rows: int) -> None:
    """Raises IndexError for a number of no row."""
    if not ids.numel():
        return
    low, high = ids.aminmax()
    if not ids.is_cpu:
        _assert_on_device((low >= 0) & (high < num_rows), f"{rule} reach out of a table of {num_rows} rows")
    elif int(low) < 0 or int(high) >= num_rows:
        raise IndexError(f"{rule} {int(low)} to {int(high)} reach out of a table of {num_rows} rows")


def _check_counts(rule: str, counts: Tensor, num_rows: int) -> None:
    low, high = counts.aminmax()
    # Each of them first: the sum of larger ones may wrap.
    if not counts.is_cpu:
        good = (low >= 0) & (high <= num_rows) & (counts.sum() <= num_rows)
        _assert_on_device(good, f"{rule} must be at least 0 and add up to at most {num_rows} rows")
    elif int(low) < 0 or int(high) > num_rows or int(counts.sum()) > num_rows:
        raise ValueError(
            f"{rule} of {int(low)} to {int(high)} rows an expert must be at least 0 and add up to at most "
            f"{num_rows} rows"
        )


def _demand(holds: Tensor, message: str, kind: type[Exception]) -> None:
    if not holds.is_cpu:
        _assert_on_device(holds, message)
    elif not bool(holds):
        raise kind(message)


def check_call(folder: str, name: str, args: tuple[Tensor | int | float | None, ...]) -> None:
    """May these reach the C kernel? Raises RuntimeError, which is our fault: the op's own check let them pass."""
    if _call_test(folder, name)(*args) is not None:
        return
    statement = operands_of(KERNELS[f"{folder}.{_plain(name)}"])
    sizes: dict[str, Any] = {word: arg for word, arg in zip(statement, args, strict=True) if isinstance(word, str)}
    element = torch.bfloat16 if sizes.get("low") or name.endswith("_bf16") else torch.float32
    for operand, x in zip(statement, args, strict=True):
        if isinstance(operand, str) or (x is None and operand.optional):
            continue
        if not isinstance(x, Tensor):
            raise RuntimeError(f"{folder}.{name}: {operand.name} must be a tensor, not {type(x).__name__}")
        wanted = operand.dtype or element
        if x.dtype is not wanted or not x.is_cpu or not x.is_contiguous():
            raise RuntimeError(
                f"{folder}.{name}: {operand.name} must be {_said(wanted)}, contiguous and on the CPU, not {_said(x)} "
                f"of strides {x.stride()} on {x.device}; please report it"
            )
        if not _fits(operand, x, sizes):
            raise _misfit(f"{folder}.{name}", operand, x, sizes)
    raise AssertionError(f"{folder}.{name}: refused for no reason; please report it")


def _plain(name: str) -> str:
    return re.sub("_(f32|bf16|float)$", "", name)
