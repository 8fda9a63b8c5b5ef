"""Runs a program on all threads of many CTAs at once: a register is an array over threads, a branch splits a mask.

Threads of a warp and warps of a CTA go in lockstep, which hides missing barriers; the shared memory finds them instead.
Divergent paths run one after the other and meet again at the immediate post-dominator.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tests.kernels.ptx.memory import GlobalMemory, SharedMemory
from tests.kernels.ptx.program import Block, Immediate, Instruction, Program, PtxError, Register

DTYPES = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
STEPS = 5_000_000  # instructions after which a kernel counts as hung

Array = np.ndarray
Step = Callable[["Machine"], None]


@dataclass
class AsyncCopy:
    """A cp.async that was issued: who, from where, to where."""

    lanes: Array
    source: Array  # offsets in global memory
    target: Array  # offsets in shared memory
    nbytes: int
    taken: Array  # bytes that are read; the rest is zero
    text: str


class Code:
    """A program whose instructions have become functions of a machine; constants lie in registers of their own."""

    def __init__(self, program: Program) -> None:
        from tests.kernels.ptx.instructions import build

        self.program = program
        self.slots = {register.name: i for i, register in enumerate(program.registers)}
        self.widths = [register.width for register in program.registers]
        self.constants: dict[tuple[int, int], int] = {}  # (value, width): slot
        self.initial: list[Array | None] = [None] * len(program.registers)
        self.blocks: list[list[tuple[Step, Instruction]]] = [
            [(build(self, i), i) for i in block.instructions] for block in program.blocks
        ]

    def constant(self, value: int, width: int) -> int:
        """The slot that holds a constant."""
        key = (value, width)
        if key not in self.constants:
            self.constants[key] = len(self.initial)
            self.initial.append(np.array([value], DTYPES[width]))
            self.widths.append(width)
        return self.constants[key]

    def slot(self, operand: object, width: int) -> int:
        """The slot of a source operand that is read as `width` bits."""
        if isinstance(operand, Register):
            return self.slots[operand.name]
        if isinstance(operand, Immediate):
            return self.constant(operand.bits(width), width)
        raise PtxError(f"not a value: {operand}")


class Machine:
    """The state of a group of CTAs while they run."""

    def __init__(
        self, code: Code, grid: Sequence[int], ctas: Array, params: Sequence[int], memory: GlobalMemory, shared: int
    ) -> None:
        self.code, self.grid, self.memory = code, tuple(grid), memory
        self.per_cta = code.program.threads
        self.threads = len(ctas) * self.per_cta
        self.ctas = ctas  # linear indices in the grid
        self.params = params
        self.r: list[Array | None] = list(code.initial)
        self.mask: Array | None = None  # the active threads; None: all
        self.alive: Array | None = None
        self.shared = SharedMemory(len(ctas), shared)
        self.tid = np.tile(np.arange(self.per_cta, dtype=np.uint32), len(ctas))
        self.cta = np.repeat(np.arange(len(ctas)), self.per_cta)  # row of `ctas`
        self.warp = (self.tid // 32).astype(np.int64)  # in its CTA
        self.open: list[AsyncCopy] = []
        self.groups: list[tuple[Array | None, list[AsyncCopy]]] = []
        self.counts: Counter[str] = Counter()
        self.left = STEPS

    # Registers

    def put(self, slot: int, value: Array) -> None:
        """Write a register in the active threads; `value` has one entry per thread, or one for all."""
        if self.mask is not None and (old := self.r[slot]) is not None:
            value = np.where(self.mask, value, old)
        self.r[slot] = value

    def put_at(self, slot: int, value: Array, lanes: Array | None) -> None:
        """Write a register in the threads `lanes`; None: in all."""
        if lanes is None:
            self.r[slot] = np.ascontiguousarray(value)
            return
        old = self.r[slot]
        new = np.zeros(self.threads, value.dtype)
        if old is not None:
            new[:] = old
        new[lanes] = value
        self.r[slot] = new

    def full(self, slot: int) -> Array:
        """A register with one entry per thread."""
        value = self.r[slot]
        return value if len(value) == self.threads else np.repeat(value, self.threads)

    def lanes(self) -> Array | None:
        return None if self.mask is None else np.flatnonzero(self.mask)

    def thread(self, i: int) -> str:
        x, y, z = self.cta_index(int(self.ctas[self.cta[i]]))
        return f"thread {int(self.tid[i])} of CTA ({x}, {y}, {z})"

    def cta_index(self, cta: int) -> tuple[int, int, int]:
        x, y, _ = self.grid
        return cta % x, cta // x % y, cta // (x * y)

    def who(self, lanes: Array | None, text: str) -> Callable[[int], str]:
        return lambda i: f"{self.thread(i if lanes is None else int(lanes[i]))}: {text}"

    def whole_warps(self, text: str) -> Array | None:
        """The warps that are active, None for all; an instruction of a warp wants all of its threads."""
        if self.mask is None:
            return None
        warps = self.mask.reshape(-1, 32)
        if (warps.any(axis=1) != warps.all(axis=1)).any():
            raise PtxError(f"some threads of a warp do not take part: {text}")
        return np.flatnonzero(warps.all(axis=1))

    # Control

    def run(self) -> None:
        program = self.code.program
        stack: list[list] = [[0, None, None]]  # block, where to stop, mask
        while stack:
            top = stack[-1]
            at, stop, mask = top
            mask = self._living(mask)
            if at is None or at == stop or (mask is not None and not mask.any()):
                stack.pop()
                continue
            block = program.blocks[at]
            self.mask = mask
            self._steps(at)
            taken = self._taken(block)
            if block.branch is not None and block.branch.parts[0] != "bra":
                self._retire(taken)
                top[0] = block.next
            elif block.branch is None or not taken.any():
                top[0] = block.next
            elif taken.all() if mask is None else (taken == mask).all():
                top[0] = block.target
            else:
                rest = ~taken if mask is None else mask & ~taken
                top[0] = block.meet
                if block.meet == stop:
                    stack.pop()
                if block.next != block.meet:
                    stack.append([block.next, block.meet, rest])
                if block.target != block.meet:
                    stack.append([block.target, block.meet, taken])

    def _living(self, mask: Array | None) -> Array | None:
        if self.alive is None:
            return mask
        return self.alive if mask is None else mask & self.alive

    def _retire(self, threads: Array) -> None:
        alive = np.ones(self.threads, bool) if self.alive is None else self.alive
        self.alive = alive & ~threads

    def _taken(self, block: Block) -> Array:
        if block.branch is None:
            return np.zeros(1, bool)
        if block.branch.guard is None:
            taken = np.ones(1, bool)
        else:
            register, sense = block.branch.guard
            taken = self.r[self.code.slots[register.name]]
            if taken is None:
                raise PtxError(f"{register.name} is read before it is written: {block.branch.text}")
            taken = taken if sense else ~taken
        if len(taken) == 1:
            taken = np.repeat(taken, self.threads)
        return taken if self.mask is None else taken & self.mask

    def _steps(self, at: int) -> None:
        steps = self.code.blocks[at]
        self.left -= len(steps)
        if self.left < 0:
            raise PtxError(f"more than {STEPS} instructions: the kernel seems to hang")
        mask = self.mask
        for step, instruction in steps:
            self.counts[instruction.opcode] += 1
            try:
                if instruction.guard is None:
                    step(self)
                    continue
                register, sense = instruction.guard
                p = self.r[self.code.slots[register.name]]
                p = p if sense else ~p
                if mask is None and p.all():
                    step(self)
                    continue
                p = (np.repeat(p, self.threads) if len(p) == 1 else p) if mask is None else p & mask
                if p.any():
                    self.mask = p
                    step(self)
                self.mask = mask
            except PtxError:
                raise
            except Exception as error:
                unset = [name for name, slot in self.code.slots.items() if self.r[slot] is None]
                unset = [name for name in unset if any(name in str(o) for o in instruction.operands)]
                hint = f" ({', '.join(unset)} not written before)" if unset else ""
                raise PtxError(f"{instruction.text}: {type(error).__name__}: {error}{hint}") from error

    def barrier(self, text: str) -> None:
        """bar.sync: every living thread of a CTA must arrive."""
        if self.mask is None:
            self.shared.barrier(None)
            return
        arrived = self.mask.reshape(-1, self.per_cta)
        alive = np.ones_like(arrived) if self.alive is None else self.alive.reshape(-1, self.per_cta)
        some = arrived.any(axis=1)
        if (arrived[some] != alive[some]).any():
            raise PtxError(f"not all threads of a CTA reach the barrier: {text}")
        self.shared.barrier(np.flatnonzero(some))

    # Memory

    def access(
        self, space: str, address: Array, nbytes: int, align: int, text: str
    ) -> tuple[Array, Array | None, Callable[[int], str]]:
        """Check an access of the active threads; return offsets, the threads (None: all) and who is who.

        One address for all threads stays one where the memory is one for all.
        """
        lanes = self.lanes()
        who = self.who(lanes, text)
        if len(address) == 1 and (space == "shared" or lanes is not None):
            address = np.repeat(address, self.threads)
        if lanes is not None:
            address = address[lanes]
        if space == "global":
            return self.memory.offsets(address, nbytes, align, who), lanes, who
        cta = self.cta if lanes is None else self.cta[lanes]
        return self.shared.offsets(address, cta, nbytes, align, who), lanes, who

    def warps_of(self, lanes: Array | None) -> Array:
        return self.warp if lanes is None else self.warp[lanes]

    # Asynchronous copies

    def commit(self) -> None:
        self.groups.append((self.mask, self.open))
        self.open = []

    def wait(self, newest: int) -> None:
        """Complete all but the `newest` groups of each active thread."""
        active = np.ones(self.threads, bool) if self.mask is None else self.mask
        later = np.zeros(self.threads, np.int64)
        kept = []
        for mask, copies in reversed(self.groups):
            member = np.ones(self.threads, bool) if mask is None else mask
            done = active & member & (later >= newest)
            later += member
            rest = [left for copy in copies if (left := self._complete(copy, done)) is not None]
            if not (done | ~member).all():
                kept.append((mask, rest))
        self.groups = kept[::-1]

    def wait_all(self) -> None:
        self.commit()
        self.wait(0)

    def _complete(self, copy: AsyncCopy, done: Array) -> AsyncCopy | None:
        now = done[copy.lanes]
        if now.any():
            data = np.zeros((int(now.sum()), copy.nbytes), np.uint8)
            for nbytes in np.unique(copy.taken[now]):
                rows = copy.taken[now] == nbytes
                columns = np.arange(nbytes)
                data[rows, :nbytes] = self.memory.bytes[copy.source[now][rows][:, None] + columns]
            index = copy.target[now] // copy.nbytes
            self.shared.bytes.reshape(-1, copy.nbytes)[index] = data
            self.shared.writer.reshape(-1, copy.nbytes)[index] = (self.warp[copy.lanes[now]] + 1)[:, None]
        if now.all():
            return None
        return AsyncCopy(
            copy.lanes[~now], copy.source[~now], copy.target[~now], copy.nbytes, copy.taken[~now], copy.text
        )


def execute(
    program: Program | Code,
    grid: Sequence[int],
    params: Sequence[int],
    memory: GlobalMemory,
    dynamic_shared: int = 0,
    order: Array | None = None,
    threads_at_once: int = 1 << 14,
) -> Counter[str]:
    """Run every CTA of the grid, in `order`, and return how often each opcode was executed by a group of CTAs."""
    code = program if isinstance(program, Code) else Code(program)
    grid = (*grid, 1, 1)[:3]
    everyone = np.arange(int(np.prod(grid))) if order is None else order
    at_once = max(threads_at_once // code.program.threads, 1)
    counts: Counter[str] = Counter()
    with np.errstate(all="ignore"):
        for start in range(0, len(everyone), at_once):
            ctas = everyone[start : start + at_once]
            machine = Machine(code, grid, ctas, params, memory, code.program.static_shared + dynamic_shared)
            machine.run()
            counts += machine.counts
    return counts
