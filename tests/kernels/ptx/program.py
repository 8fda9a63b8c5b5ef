"""PTX text as a program: registers, parameters, basic blocks and where divergent paths meet again.

Only the subset that Triton emits is read: one `.entry`, no `.func`, no indirect branches.
"""

import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "b128": 128}
WIDTHS |= {f"{kind}{bits}": bits for kind in "suf" for bits in (8, 16, 32, 64) if kind + str(bits) != "f8"}
WIDTHS |= {"bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64, "tf32": 32, "e4m3x2": 16, "e5m2x2": 16}


class PtxError(RuntimeError):
    """The kernel did something that a GPU would not define, or the emulator does not know an instruction."""


@dataclass(frozen=True)
class Register:
    name: str
    width: int  # bits; 1 for a predicate


@dataclass(frozen=True)
class Immediate:
    text: str

    def bits(self, width: int) -> int:
        """The value as an unsigned integer of `width` bits."""
        text = self.text
        if text[:2].lower() == "0f":
            value = int(text[2:], 16)
        elif text[:2].lower() == "0d":
            value = int(text[2:], 16)
        elif "." in text:
            raise PtxError(f"decimal float immediate {text}: not supported")
        else:
            value = int(text.rstrip("U"), 0)
        return value % (1 << width) if width > 1 else int(value != 0)


@dataclass(frozen=True)
class Symbol:
    """A special register, a parameter, a label or an array in shared memory."""

    name: str


@dataclass(frozen=True)
class Vector:
    items: tuple["Operand", ...]


@dataclass(frozen=True)
class Address:
    base: "Operand"
    offset: int


@dataclass(frozen=True)
class Sink:
    """`_`: the result is dropped."""


Operand = Register | Immediate | Symbol | Vector | Address | Sink


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: tuple[Register, bool] | None  # (p, True) runs where p holds, (p, False) where it does not
    second: Register | None  # the q of `p|q`
    text: str

    @property
    def parts(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Block:
    instructions: list[Instruction] = field(default_factory=list)
    branch: Instruction | None = None  # the bra or ret at the end
    target: int | None = None  # where the branch leads; None for ret
    next: int | None = None  # where control falls through to
    meet: int | None = None  # the immediate post-dominator, None for the exit


@dataclass
class Program:
    name: str
    params: dict[str, tuple[int, int]]  # name: (index, bytes)
    threads: int
    shared: dict[str, int]  # name: offset in bytes; the last one may be dynamic
    static_shared: int
    registers: list[Register]
    blocks: list[Block]


def parse(text: str) -> Program:
    """Read the one entry of a PTX module."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    text = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*$", "", text, flags=re.M)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{", text, flags=re.S)
    if entry is None:
        raise PtxError("no .entry in the PTX")
    if ".func" in text:
        raise PtxError("device functions are not supported: everything must be inlined")
    params = {}
    for index, param in enumerate(p for p in entry[2].split(",") if p.strip()):
        kind = re.search(r"\.param\s+\.(\w+)", param)
        if kind is None or kind[1] not in WIDTHS:
            raise PtxError(f"parameter not supported: {param.strip()}")
        params[param.split()[-1]] = (index, WIDTHS[kind[1]] // 8)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", entry[3])
    if threads is None:
        raise PtxError("the entry does not say how many threads it has")
    reader = _Reader()
    reader.read_module_shared(text[: entry.start()])
    reader.read_body(_body(text, entry.end()))
    return Program(
        name=entry[1],
        params=params,
        threads=int(threads[1]) * int(threads[2] or 1) * int(threads[3] or 1),
        shared=reader.shared,
        static_shared=reader.static_shared,
        registers=list(reader.used.values()),
        blocks=_blocks(reader.items),
    )


def _body(text: str, start: int) -> str:
    depth = 1
    for brace in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return text[start : brace.start()]
    raise PtxError("the entry has no end")


class _Reader:
    """Reads declarations, labels and instructions, with the scopes that inline assembly opens."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Register]] = [{}]
        self.ranges: list[list[tuple[str, int, int]]] = [[]]  # (prefix, count, bits) of `%r<8>`
        self.used: dict[str, Register] = {}
        self.items: list[str | Instruction] = []  # labels and instructions
        self.shared: dict[str, int] = {}
        self.static_shared = 0
        self.opened = 0

    def read_module_shared(self, text: str) -> None:
        for align, bits, name, size in re.findall(
            r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.b(\d+)\s+([\w$]+)\[(\d*)\]", text
        ):
            start = -(-self.static_shared // int(align or 1)) * int(align or 1)
            self.shared[name] = start
            self.static_shared = start + int(size or 0) * int(bits) // 8

    def read_body(self, text: str) -> None:
        i, n = 0, len(text)
        while i < n:
            c = text[i]
            if c.isspace() or c == ";":
                i += 1
            elif c == "{":
                self.opened += 1
                self.scopes.append({})
                self.ranges.append([])
                i += 1
            elif c == "}":
                self.scopes.pop()
                self.ranges.pop()
                i += 1
            elif label := re.compile(r"([\w$%]+)\s*:(?!:)").match(text, i):
                self.items.append(label[1])
                i = label.end()
            else:
                end = text.index(";", i)
                self.read_statement(" ".join(text[i:end].split()))
                i = end + 1

    def read_statement(self, text: str) -> None:
        if text.startswith(".reg"):
            _, kind, names = text.split(maxsplit=2)
            bits = WIDTHS[kind[1:]]
            for name in names.split(","):
                name = name.strip()
                if many := re.fullmatch(r"([\w$%]+)<(\d+)>", name):
                    self.ranges[-1].append((many[1], int(many[2]), bits))
                else:
                    unique = name if len(self.scopes) == 1 else f"{name}@{self.opened}"
                    self.scopes[-1][name] = Register(unique, bits)
        elif text.startswith(".shared"):
            self.read_module_shared(text)
        elif text.startswith("."):
            raise PtxError(f"directive not supported: {text}")
        else:
            self.items.append(self.instruction(text))

    def register(self, name: str) -> Register | None:
        if name in self.used:
            return self.used[name]
        for scope in reversed(self.scopes):
            if name in scope:
                return self.used.setdefault(scope[name].name, scope[name])
        if many := re.fullmatch(r"(\D+?)(\d+)", name):
            for ranges in reversed(self.ranges):
                for prefix, count, bits in ranges:
                    if prefix == many[1] and int(many[2]) < count:
                        return self.used.setdefault(name, Register(name, bits))
        return None

    def operand(self, text: str) -> Operand:
        text = text.strip()
        if text == "_":
            return Sink()
        if text[0] == "{":
            return Vector(tuple(self.operand(item) for item in text[1:-1].split(",")))
        if text[0] == "[":
            base, plus, offset = text[1:-1].partition("+")
            return Address(self.operand(base), int(offset.strip(), 0) if plus else 0)
        if re.fullmatch(r"-?(0[xXfFdD][0-9a-fA-F]+|\d+)U?|-?\d+\.\d+", text):
            return Immediate(text)
        return self.register(text) or Symbol(text)

    def instruction(self, text: str) -> Instruction:
        guard, body = None, text
        if text[0] == "@":
            name, body = text[1:].split(maxsplit=1)
            register = self.register(name.lstrip("!"))
            if register is None:
                raise PtxError(f"unknown predicate in: {text}")
            guard = (register, name[0] != "!")
        opcode, _, rest = body.partition(" ")
        operands, second = [], None
        for i, item in enumerate(_split(rest)):
            if i == 0 and "|" in item:
                item, other = item.split("|")
                second = self.register(other.strip())
            operands.append(self.operand(item))
        return Instruction(opcode, tuple(operands), guard, second, text)


def _split(text: str) -> list[str]:
    """Split at the commas outside braces and brackets."""
    items, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            items.append(text[start:i])
            start = i + 1
    return [item.strip() for item in [*items, text[start:]] if item.strip()]


def _blocks(items: list[str | Instruction]) -> list[Block]:
    targets = {
        i.operands[0].name
        for i in items
        if isinstance(i, Instruction) and i.parts[0] == "bra" and isinstance(i.operands[0], Symbol)
    }
    blocks, at = [Block()], {}
    for item in items:
        if isinstance(item, str):
            if item in targets:
                blocks.append(Block())
                at[item] = len(blocks) - 1
        elif item.parts[0] in ("bra", "ret", "exit"):
            blocks[-1].branch = item
            blocks.append(Block())
        elif item.parts[0] in ("brx", "call"):
            raise PtxError(f"not supported: {item.text}")
        else:
            blocks[-1].instructions.append(item)
    for i, block in enumerate(blocks):
        if block.branch is not None and block.branch.parts[0] == "bra":
            block.target = at[block.branch.operands[0].name]
        if (block.branch is None or block.branch.guard is not None) and i + 1 < len(blocks):
            block.next = i + 1
    _set_meeting_points(blocks)
    return blocks


def _set_meeting_points(blocks: list[Block]) -> None:
    """Immediate post-dominators, by sets: kernels have a few dozen blocks."""
    exit_ = len(blocks)
    everything = set(range(exit_ + 1))

    def successors(block: Block) -> list[int]:
        leaves = block.branch is not None and block.branch.parts[0] != "bra"
        after = [s for s in (block.target, block.next) if s is not None]
        return after + [exit_] if leaves or not after else after

    post = [set(everything) for _ in blocks] + [{exit_}]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(exit_)):
            new = set.intersection(*(post[s] for s in successors(blocks[i]))) | {i}
            changed |= new != post[i]
            post[i] = new
    for i, block in enumerate(blocks):
        later = post[i] - {i, exit_}
        block.meet = next((m for m in later if later <= post[m]), None)  # the one that all the others post-dominate
