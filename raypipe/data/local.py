"""Files on a local or mounted disk, put whole or not at all.

Through `os`, not pyarrow: that is measurably cheaper for a million small files.
"""

import contextlib
import errno
import fcntl
import os
import threading
import uuid
from pathlib import Path


def write(root: str, relative: str, data: bytes | memoryview, tmp: str) -> None:
    """Put `data` at `relative` below `root`, over what was there.

    A temporary file in `root/tmp` is renamed. It is not flushed to the disk: a killed process never
    leaves a partial file, but a power failure may.
    """
    temporary = os.path.join(root, tmp, _temporary_name())
    target = os.path.join(root, relative)
    try:
        descriptor = _open_new(temporary)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        try:
            os.replace(temporary, target)
        except FileNotFoundError:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def create(target: str, data: bytes) -> bool:
    """Put `data` at `target` unless something is there: then False. One process gets True."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = f"{target}.{_temporary_name()}"
    Path(temporary).write_bytes(data)
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK):
            raise
        return _create_alone(target, data)  # a file system without hard links
    finally:
        os.unlink(temporary)
    return True


def _create_alone(target: str, data: bytes) -> bool:
    try:
        with open(target, "xb") as file:
            file.write(data)
    except FileExistsError:
        return False
    return True


def replace_same(target: str, before: bytes, data: bytes) -> bool:
    """Put `data` in the place of `before`; False if the file has other content, or is gone."""
    with contextlib.suppress(FileNotFoundError), open(target, "r+b") as file:
        _lock(file.fileno())
        # Another process may have replaced the file before this one got the old file's lock.
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(target)) or file.read() != before:
            return False
        temporary = f"{target}.{_temporary_name()}"
        Path(temporary).write_bytes(data)
        os.replace(temporary, target)
        return True
    return False


def _lock(descriptor: int) -> None:
    """Wait for the lock of an open file. A killed process frees it with its descriptor."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        # Without locks in the file system, a race between reading and replacing remains.
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


def _open_new(path: str) -> int:
    # Folders are made when they are missing: no stat a file, and deleted folders come back.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, flags, 0o666)


_PROCESS = uuid.uuid4().hex[:12]


def _temporary_name() -> str:
    # Unique over nodes that share the folder (uuid), forks (pid) and threads. A thread reuses it.
    return f"{_PROCESS}-{os.getpid()}-{threading.get_ident()}"
