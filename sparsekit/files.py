"""Files and folders that appear under their final name whole, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place if the body succeeds, delete it if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replace_dir(path: Path, bytes_needed: int, stale: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; make it `path` if the body succeeds, delete it if not.

    Files that `path` holds already are carried over, but for those that the body wrote and those that match a glob
    of `stale`. A link to a folder stays one.

    Raises:
        OSError: the disk has less than `bytes_needed` free. Nothing was written.
        NotADirectoryError: `path` is a file.
        ValueError: `path` is or holds the working directory, which cannot be replaced under a running program.
    """
    path = path.resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: pass a folder")
    if Path.cwd().is_relative_to(path):
        raise ValueError(f"{path} is the working directory or holds it: pass a folder of its own, as './model'")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < bytes_needed:
        raise OSError(
            f"saving to {path} needs {bytes_needed / 1e9:.2f} GB and {free / 1e9:.2f} GB are free: "
            "free some space or choose another disk"
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())
        yield temporary
        for file in temporary.rglob("*"):  # safetensors makes its files readable by their owner alone
            if file.is_file():
                os.chmod(file, 0o666 & ~_umask())
        if path.exists():
            _carry_over(path, temporary, stale)
        _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def why_not_writable(path: Path) -> str | None:
    """Return what would keep a file or folder from being put there, seen without leaving a trace."""
    try:
        beside = next(parent for parent in path.absolute().parents if parent.exists())
        with tempfile.TemporaryFile(dir=beside, prefix=f".{path.name}."):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"


def _carry_over(old: Path, new: Path, stale: tuple[str, ...]) -> None:
    for entry in old.iterdir():
        if (new / entry.name).exists() or any(entry.match(pattern) for pattern in stale):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link_or_copy)
        else:
            _link_or_copy(entry, new / entry.name)


def _link_or_copy(source: str | Path, target: str | Path) -> None:
    """Give a file a second name, which takes no space; copy it where the file system has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _swap(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`; the old folder survives until the new one stands."""
    if not path.exists():
        os.rename(new, path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name
    try:
        os.rename(path, aside)
        os.rename(new, path)
    except BaseException as error:
        if aside.exists() and not path.exists():
            try:
                os.rename(aside, path)
            except OSError:
                error.add_note(f"the folder that stood at {path} is now {aside}")
                raise error from None
        aside.parent.rmdir()
        raise
    shutil.rmtree(aside.parent, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
