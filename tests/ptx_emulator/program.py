"""PTX as Triton writes it: one kernel's statements, their operands and what they branch to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

_GUARD = re.compile(r"@(!?)(%?[\w$]+)\s+")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ctaid", "nctaid") for axis in "xyz"} | {
    "%laneid"
}
_WIDTHS = {"p": 0, "rs": 2, "h": 2, "r": 4, "f": 4, "rd": 8, "fd": 8}


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; the base is a register, a parameter or shared memory's beginning."""

    base: str
    offset: int


Operand = str | Address | tuple[str, ...]


@dataclass(frozen=True)
class Statement:
    """One instruction. guard: the predicate it runs under, and whether that is negated."""

    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass(frozen=True)
class Program:
    """A kernel. labels: the statement each names. widths: bytes of registers, 0 of predicates."""

    statements: tuple[Statement, ...]
    labels: dict[str, int]
    widths: dict[str, int]
    parameters: tuple[str, ...]
    threads: int

    @property
    def names(self) -> tuple[frozenset[str], ...]:
        """What each statement reads or writes, addresses' bases and guards among it."""
        return tuple(frozenset(_names(statement)) for statement in self.statements)

    def width(self, register: str) -> int:
        """Bytes of a register; 0 for a predicate."""
        if register in self.widths:
            return self.widths[register]
        if register in _SPECIAL:
            return 4
        kind = re.fullmatch(r"%([a-z]+)\d+", register)
        if kind is None:
            raise ValueError(f"{register} is no register")
        return _WIDTHS[kind[1]]


def _names(statement: Statement) -> Iterator[str]:
    for operand in statement.operands:
        if isinstance(operand, Address):
            yield operand.base
        elif isinstance(operand, tuple):
            yield from operand
        else:
            yield from operand.split("|")
    if statement.guard is not None:
        yield statement.guard[0]


def parse(ptx: str, without: str = "") -> Program:
    """The only kernel in ``ptx``; instructions that begin with ``without`` are left out.

    without: or "bar.sync before atom", the barrier between what a block stores and its count.
    """
    head, body = re.split(r"\.reqntid\s+\d+[^{]*\{", ptx, maxsplit=1)
    threads = re.search(r"\.reqntid\s+(\d+)", ptx)
    assert threads is not None
    if without == "bar.sync before atom":
        between = r"(?:(?!bar\.sync).)*?"
        body = re.sub(
            rf"(st\.global{between})bar\.sync\s+0;({between}\batom\.)", r"\1\2", body, flags=re.S
        )
    parameters = tuple(re.findall(r"\.param\s+\.[^\n]*?(\w+_param_\d+)", head))
    return program(body, without, parameters, int(threads[1]))


def program(
    body: str, without: str = "", parameters: tuple[str, ...] = (), threads: int = 1
) -> Program:
    """What lies between a kernel's braces."""
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    widths: dict[str, int] = {}
    scope = 0
    for line in body.splitlines():
        line = line.split("//")[0].strip()
        scope += line.startswith("{")
        line = line.lstrip("{").strip()
        if line.startswith(".section"):
            break  # what debuggers read
        label = re.match(r"([\w$]+):$", line)
        if label:
            labels[_label(label[1], scope)] = len(statements)
            continue
        for text in filter(None, map(_without_scope, line.split(";"))):
            if declared := re.match(r"\.reg\s+\.[a-z](\d+)\s+([\w\s,<>]+)$", text):
                for name in re.split(r"[\s,]+", declared[2].strip()):
                    several = re.fullmatch(r"(\w+)<(\d+)>", name)  # f<4> is f0 … f3
                    names = (
                        [f"{several[1]}{i}" for i in range(int(several[2]))] if several else [name]
                    )
                    widths |= dict.fromkeys(names, int(declared[1]) // 8)
            elif not text.startswith("."):
                statement = _statement(text)
                if statement.opcode.startswith("bra"):
                    target = _label(str(statement.operands[0]), scope)
                    statement = replace(statement, operands=(target,))
                if not (without and statement.opcode.startswith(without)):
                    statements.append(statement)
    return Program(tuple(statements), labels, widths, parameters, threads)


def _label(name: str, scope: int) -> str:
    """Labels of inline PTX are known between its braces alone, and there may be many of a name."""
    return name if name.startswith("$") else f"{name} in scope {scope}"


def _without_scope(text: str) -> str:
    """A statement without a brace that closes something else than its own vectors."""
    text = text.strip()
    return text[:-1].strip() if text.count("}") > text.count("{") else text


def _statement(text: str) -> Statement:
    guard = _GUARD.match(text)
    rest = text[guard.end() :] if guard else text
    opcode, _, operands = rest.replace("\t", " ").partition(" ")
    found = tuple(_operand(each) for each in _OPERAND.findall(operands))
    return Statement(opcode, found, (guard[2], guard[1] == "!") if guard else None, text)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(re.split(r"[\s,]+", text[1:-1].strip()))
    if text.startswith("["):
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(base, int(offset or "0", 0))
    return text
