"""The memories of the emulated GPU: every access is checked for bounds, alignment, races and unwritten bytes."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from tests.kernels.ptx.program import PtxError

GLOBAL_BASE = 0x7F12_3000_0000  # like a real pointer: cut to 32 bits, it shows
GUARD = 4096  # bytes between two tensors
SHARED_BASE = 1024  # the first bytes belong to the system

UNWRITTEN = 255  # states of a byte of shared memory; 1 + w: written (or read) by warp w since the last barrier
PENDING = 254  # the target of an asynchronous copy that nobody has waited for
SEVERAL = 253  # read by more than one warp since the last barrier
WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def _aligned(nbytes: int) -> np.ndarray:
    return np.zeros(-(-nbytes // 64) * 8, np.uint64).view(np.uint8)


def _rows(memory: np.ndarray, size: int, vector: int) -> np.ndarray:
    """The bytes as [accesses, vector] words of `size` bytes."""
    whole = len(memory) // (size * vector) * (size * vector)
    return memory[:whole].view(WORDS[size]).reshape(-1, vector)


class GlobalMemory:
    """A copy of the tensors that a launch was given, at addresses of its own.

    A kernel may touch what lies between the first and the last element of a tensor, and nothing else.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        extents: dict[int, list[tuple[int, int]]] = {}
        self.storages: dict[int, torch.UntypedStorage] = {}
        for tensor in tensors:
            if tensor.device.type != "cpu":
                raise ValueError(f"the emulator takes CPU tensors, got one on {tensor.device}")
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage
            start = tensor.data_ptr() - storage.data_ptr()
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = (last + 1) * tensor.element_size() if tensor.numel() else 0
            extents.setdefault(storage.data_ptr(), []).append((start, start + size))
        self.starts: dict[int, int] = {}
        allowed: list[list[int]] = []
        at = GUARD
        for pointer, storage in self.storages.items():
            at += pointer % 16  # Triton compiles for the alignment that it finds
            self.starts[pointer] = at
            for first, end in sorted(extents[pointer]):
                if allowed and at + first <= allowed[-1][1] and allowed[-1][0] >= at:
                    allowed[-1][1] = max(allowed[-1][1], at + end)
                else:
                    allowed.append([at + first, at + end])
            at = -(-(at + storage.nbytes()) // 256) * 256 + GUARD
        self.bytes = _aligned(at)
        self.first, self.end = np.array(allowed or [[0, 0]], np.int64).T
        self.written: set[int] = set()  # indices into `first`
        for pointer, storage in self.storages.items():
            self._of(pointer)[:] = self._host(storage)

    def _of(self, pointer: int) -> np.ndarray:
        return self.bytes[self.starts[pointer] : self.starts[pointer] + self.storages[pointer].nbytes()]

    @staticmethod
    def _host(storage: torch.UntypedStorage) -> np.ndarray:
        return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()

    def address(self, tensor: Tensor) -> int:
        pointer = tensor.untyped_storage().data_ptr()
        return GLOBAL_BASE + self.starts[pointer] + tensor.data_ptr() - pointer

    def copy_back(self) -> None:
        """Write what the kernel changed into the tensors."""
        changed = {self.first[i] for i in self.written}
        for pointer, storage in self.storages.items():
            start = self.starts[pointer]
            if any(start <= first <= start + storage.nbytes() for first in changed):
                self._host(storage)[:] = self._of(pointer)

    def offsets(self, address: np.ndarray, nbytes: int, align: int, who: Callable[[int], str]) -> np.ndarray:
        """Check the accesses and return where they lie in `bytes`; who(i) names the i-th one."""
        at = address.astype(np.int64) - GLOBAL_BASE
        if (at & (align - 1)).any():
            i = int(np.argmax((at & (align - 1)) != 0))
            raise PtxError(f"misaligned: {address[i]:#x} is not a multiple of {align} bytes; {who(i)}")
        low, high = int(at.min()), int(at.max())
        region = int(np.searchsorted(self.first, low, "right")) - 1
        if region < 0 or high + nbytes > self.end[region]:
            regions = np.searchsorted(self.first, at, "right") - 1
            outside = (regions < 0) | (at + nbytes > self.end[regions])
            if outside.any():
                i = int(np.argmax(outside))
                near = [int(at[i] - first) for first in self.first]
                raise PtxError(
                    f"out of bounds: {nbytes} bytes at {address[i]:#x}, which is at {near} of tensors that hold "
                    f"{(self.end - self.first).tolist()} bytes; {who(i)}"
                )
        return at

    def mark_written(self, at: np.ndarray) -> None:
        low, high = (int(i) for i in np.searchsorted(self.first, [at.min(), at.max()], "right") - 1)
        if low == high:
            self.written.add(low)
        else:
            self.written.update((np.searchsorted(self.first, at, "right") - 1).tolist())

    def load(self, at: np.ndarray, size: int, vector: int) -> np.ndarray:
        return _rows(self.bytes, size, vector)[at // (size * vector)]

    def store(self, at: np.ndarray, words: np.ndarray, who: Callable[[int], str]) -> None:
        """Write words [accesses, vector]; two threads that write different values to one place are an error."""
        rows = _rows(self.bytes, words.itemsize, words.shape[1])
        index = at // (words.itemsize * words.shape[1])
        rows[index] = words
        self.mark_written(at)
        lost = (rows[index] != words).any(axis=1)
        if lost.any():
            raise PtxError(f"two threads store different values to one address; {who(int(np.argmax(lost)))}")


class SharedMemory:
    """The shared memory of several CTAs, [CTAs, size] bytes, and who touched which byte since the last barrier."""

    def __init__(self, ctas: int, size: int) -> None:
        self.size = max(-(-size // 64) * 64, 64)
        self.limit = size
        self.bytes = _aligned(ctas * self.size)
        self.bytes[:] = 0xFF
        self.writer = _aligned(ctas * self.size)
        self.writer[:] = UNWRITTEN
        self.reader = _aligned(ctas * self.size)

    def barrier(self, ctas: np.ndarray | None) -> None:
        """All threads of these CTAs (None: of all) have met."""
        writer, reader = self.writer.reshape(-1, self.size), self.reader.reshape(-1, self.size)
        if ctas is None:
            writer[writer < SEVERAL] = 0
            reader[:] = 0
        else:
            writer[ctas] = np.where(writer[ctas] < SEVERAL, 0, writer[ctas])
            reader[ctas] = 0

    def offsets(
        self, address: np.ndarray, cta: np.ndarray, nbytes: int, align: int, who: Callable[[int], str]
    ) -> np.ndarray:
        at = address.astype(np.int64) - SHARED_BASE
        wrong = (at < 0) | (at + nbytes > self.limit)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise PtxError(f"out of bounds: {nbytes} bytes at {at[i]} of {self.limit} in shared memory; {who(i)}")
        if (at & (align - 1)).any():
            i = int(np.argmax((at & (align - 1)) != 0))
            raise PtxError(f"misaligned: {at[i]} in shared memory is not a multiple of {align} bytes; {who(i)}")
        return at + cta * self.size

    def load(self, at: np.ndarray, size: int, vector: int, warp: np.ndarray, who: Callable[[int], str]) -> np.ndarray:
        """Read [accesses, vector] words; `warp` [accesses] is the reader's warp in its CTA."""
        nbytes, index = size * vector, at // (size * vector)
        own = (warp + 1).astype(np.uint8)[:, None]
        writer = self.writer.reshape(-1, nbytes)[index]
        foreign = (writer != 0) & (writer != own)
        if foreign.any():
            i = int(np.argmax(foreign.any(axis=1)))
            state = writer[i][foreign[i]][0]
            reason = {UNWRITTEN: "reads bytes that nobody wrote", PENDING: "reads before cp.async.wait_group"}
            raise PtxError(f"{reason.get(state, f'reads what warp {state - 1} wrote, no barrier between')}; {who(i)}")
        reader = self.reader.reshape(-1, nbytes)
        before = reader[index]
        mine = np.where((before == 0) | (before == own), own, np.uint8(SEVERAL))
        reader[index] = mine
        shared = reader[index] != mine
        if shared.any():
            several = shared.any(axis=1)
            reader[index[several]] = SEVERAL
        return _rows(self.bytes, size, vector)[index]

    def claim(self, at: np.ndarray, nbytes: int, warp: np.ndarray, who: Callable[[int], str]) -> None:
        """Check that `warp` may overwrite these bytes now."""
        index = at // nbytes
        own = (warp + 1).astype(np.uint8)[:, None]
        reader = self.reader.reshape(-1, nbytes)[index]
        foreign = ((reader != 0) & (reader != own)).any(axis=1)
        if foreign.any():
            raise PtxError(f"overwrites what another warp reads, no barrier between; {who(int(np.argmax(foreign)))}")
        pending = (self.writer.reshape(-1, nbytes)[index] == PENDING).any(axis=1)
        if pending.any():
            raise PtxError(f"overwrites the target of a pending cp.async; {who(int(np.argmax(pending)))}")

    def store(self, at: np.ndarray, words: np.ndarray, warp: np.ndarray, who: Callable[[int], str]) -> None:
        """Write words [accesses, vector]. Warps may store the same value to one place, but not different ones."""
        nbytes = words.itemsize * words.shape[1]
        index = at // nbytes
        own = (warp + 1).astype(np.uint8)[:, None]
        rows = _rows(self.bytes, words.itemsize, words.shape[1])
        writer = self.writer.reshape(-1, nbytes)
        changed = (rows[index] != words).any(axis=1)
        foreign = ((writer[index] != 0) & (writer[index] != own) & (writer[index] != UNWRITTEN)).any(axis=1) & changed
        if foreign.any():
            raise PtxError(f"overwrites another warp's store, no barrier between; {who(int(np.argmax(foreign)))}")
        if changed.any():
            self.claim(at[changed], nbytes, warp[changed], lambda i: who(int(np.flatnonzero(changed)[i])))
        rows[index] = words
        writer[index] = own
        lost = (rows[index] != words).any(axis=1)
        if lost.any():
            raise PtxError(f"two threads store different values to one address; {who(int(np.argmax(lost)))}")
