"""Files and folders: written as a whole or not at all, read with care, claimed by one run."""

import json
import os
import re
import socket
import stat
import warnings
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

from support.distributed import broadcast_object, rank

try:
    import fcntl
except ModuleNotFoundError:  # Windows: two runs with the same --out are not told apart there
    fcntl = None

RUN_FILES = ("ckpt.pt", "config.json", "log.csv", "loss.png")
LOCK = ".ckpt.pt.lock"
LARGEST_PID = 2**22  # Linux's limit; a longer number at the end of a name is no process


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path):
    """Open a file that replaces `path` when the block ends well; otherwise the old file stays."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink()
        cause = find_os_error(error)
        if cause is None:
            raise
        raise ValueError(
            f"cannot write {shown(path)} ({cause.strerror}); the previous file is untouched"
        ) from error


def find_os_error(error):
    """Return the OSError behind an exception, or None: torch.save wraps what the disk said."""
    while isinstance(error, Exception) and not isinstance(error, OSError):
        error = error.__context__
    return error if isinstance(error, OSError) else None


@contextmanager
def name_write_errors(path):
    """Turn the system's errors into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {shown(path)} ({error.strerror})") from None


def write_json(path, data):
    with atomic_write(path) as file:
        file.write(json.dumps(data, indent=1).encode())


def remove_dead_drafts(folder, names):
    """Delete the drafts `.NAME.PID` that atomic_write left where a process was killed meanwhile.

    names: of the finished files, with the wildcards of fnmatch. A draft of a process that is
    alive stays, and so does every other file.
    """
    for draft in Path(folder).glob(".*"):
        name, _, pid = draft.name[1:].rpartition(".")
        is_draft = re.fullmatch("[1-9][0-9]*", pid) and any(fnmatchcase(name, n) for n in names)
        if is_draft and int(pid) <= LARGEST_PID and not is_alive(int(pid)):
            with suppress(OSError):
                draft.unlink()


def is_alive(pid):
    """Whether there is a process with this id. On Windows, where asking might end it: always."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


# -- reading ---------------------------------------------------------------------------------------


def shown(path):
    """Return a path as it can be printed: on one line, without bytes that are not text."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def get_stat(path):
    """Return os.stat of a path that a user named, or None if nothing is there.

    Raises ValueError if the name is impossible or the system does not let us look.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # no permission; NUL or half a character in the name
        reason = getattr(error, "strerror", None) or "no file can have that name"
        raise ValueError(f"cannot read {shown(path)} ({reason})") from None


def is_file(path):
    info = get_stat(path)
    return info is not None and stat.S_ISREG(info.st_mode)


def read_user_file(path, limit=2**30):
    """Return the bytes of a file that a user named.

    Raises ValueError if it is missing, no regular file (a pipe would hang, a device never end),
    unreadable, or larger than `limit` bytes.
    """
    info = get_stat(path)
    if info is None:
        raise ValueError(f"there is no file {shown(path)}")
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or device"
        raise ValueError(f"cannot read {shown(path)}: it is {kind}, not a file")
    try:
        # should a pipe take its place meanwhile, O_NONBLOCK keeps open() from waiting for a writer
        with open(path, "rb", opener=lambda p, flags: os.open(p, flags | NONBLOCK)) as file:
            data = b"".join(read_chunks(file, limit + 1))
    except OSError as error:
        raise ValueError(f"cannot read {shown(path)} ({error.strerror})") from None
    if len(data) > limit:
        raise ValueError(f"cannot read {shown(path)}: it is larger than {limit:,} bytes")
    return data


NONBLOCK = getattr(os, "O_NONBLOCK", 0)


def read_chunks(file, limit, size=2**20):
    """Yield up to `limit` bytes of a file, without allocating them all for a small one."""
    while limit > 0:
        chunk = file.read(min(size, limit))
        if not chunk:
            return
        limit -= len(chunk)
        yield chunk


def parse_json(data, what):
    """Return the value in JSON text or UTF-8 bytes.

    Raises ValueError, with `what` as the subject, if it is not JSON, says NaN or Infinity, which
    JSON does not have, or is nested too deeply.
    """

    def refuse(constant):
        raise ValueError(constant)

    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, parse_constant=refuse)
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8 text") from None
    except ValueError:
        raise ValueError(f"{what} is cut off or is not JSON") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None


# -- the folder of a run ---------------------------------------------------------------------------


def find_run(name, resume=False):
    """Return the folder called `name`, or for "newest" that of the newest run under out/.

    It is that of a run or, unless resume is true, a Hugging Face one. "" and None: return None.
    """
    if not name:
        return None
    if name != "newest":
        if is_file(Path(name, "ckpt.pt")) or (not resume and is_file(Path(name, "config.json"))):
            return Path(name)
        missing = shown(Path(name, "ckpt.pt"))
        raise ValueError(f"{shown(name)} holds no run: there is no {missing}")

    newest = None
    newest_time = -1
    with suppress(OSError):  # runs may be deleted meanwhile
        for folder in sorted(Path("out").iterdir()):
            with suppress(OSError):
                saved_at = (folder / "ckpt.pt").stat().st_mtime_ns
                if saved_at > newest_time:
                    newest_time = saved_at
                    newest = folder
    if newest is None:
        raise ValueError("there is no run under out/ yet; python train.py makes one")
    return newest


@contextmanager
def claim_folder(out, name, origin=None):
    """Hold the folder of a run, and yield it, while the block runs.

    origin: the folder of the run to resume. Otherwise it is a new one: `out`, or the first that is
    free of out/NAME, out/NAME-2, ... Rank 0 holds it for all. A folder that is still empty at the
    end is removed. Raises ValueError if another process holds it, or if it has files that this
    run would overwrite.
    """
    folder = None
    error = None
    is_new = False
    lock = None
    if rank() == 0:
        try:
            folder, is_new = (origin, False) if origin else make_folder(out, name)
            lock = lock_folder(folder)
            if not origin:
                check_free(folder)
            remove_dead_drafts(folder, RUN_FILES)
        except ValueError as refused:
            error = str(refused)
            unlock_folder(folder, lock, is_new)
    folder, error = broadcast_object((folder, error))
    if error:
        raise ValueError(error)
    try:
        yield folder
    finally:
        if rank() == 0:
            unlock_folder(folder, lock, is_new)


def make_folder(out, name):
    """Return a folder for a new run, and whether it was not there before."""
    root = Path(out or "out")
    try:
        is_new = not root.exists()
        root.mkdir(parents=True, exist_ok=True)
        if out:
            return root, is_new
        name = re.sub(r"[^\w.]+", "-", name)[:60].strip("-.")  # a plug-in spec is no file name
        number = 1
        while True:
            folder = root / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir()  # atomic: two runs that start together get different folders
                return folder, True
            except FileExistsError:
                number += 1
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no folder can have that name"
        raise ValueError(
            f"cannot write in {shown(root)} ({reason}); give --out another folder"
        ) from None


def check_free(folder):
    """Raise ValueError if a new run in this folder would overwrite a file."""
    if os.path.lexists(folder / "ckpt.pt"):
        path = shown(folder)
        raise ValueError(f"{path} already holds a run; continue it with --resume {path}")
    for name in RUN_FILES:
        if os.path.lexists(folder / name):
            raise ValueError(
                f"{shown(folder / name)} would be overwritten; give --out a new folder, or move "
                f"that file away"
            )


def lock_folder(folder):
    """Return an open file whose lock says that a run uses the folder.

    The system drops the lock when the process ends, by kill -9 as well.
    """
    path = folder / LOCK
    while True:
        try:
            lock = open(path, "a+")
        except OSError as error:
            raise ValueError(f"cannot write in {shown(folder)} ({error.strerror})") from None
        try:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read(200) or "another process"
            lock.close()
            raise ValueError(
                f"{shown(folder)} is in use by {shown(holder)}; wait for its end or stop it first"
            ) from None
        except OSError as error:
            warnings.warn(f"{shown(folder)} cannot be locked ({error.strerror}): use it only once")

        # a run that has just ended may have deleted the file between our open and flock
        info = get_stat(path)
        if info is not None and os.path.samestat(info, os.fstat(lock.fileno())):
            break
        lock.close()
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}")
    lock.flush()
    return lock


def unlock_folder(folder, lock, is_new):
    """End the claim on a folder, and remove it if it is a new one and still empty."""
    if lock is not None:
        with suppress(OSError):
            (folder / LOCK).unlink()  # while it is locked, so that nobody else's is deleted
        with suppress(OSError):
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_UN)  # a forked child may have the file open, too
        lock.close()
    if is_new:
        with suppress(OSError):
            folder.rmdir()


def get_cache_folder(folder):
    """Return where the tokens of a run are cached.

    Runs under out/ share out/.tokens; so do runs beside which there is a folder .tokens. Any
    other run keeps its tokens inside its own folder, the one place known to be writable.
    """
    shared = folder.parent / ".tokens"
    with suppress(OSError):
        if folder.parent == Path("out"):
            shared.mkdir(exist_ok=True)
        if shared.is_dir() and os.access(shared, os.W_OK | os.X_OK):
            return shared
    return folder / ".tokens"
