"""The folder of a run: find it by name or age, and lock it, so that only one run uses it."""

import os
import re
import socket
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from support import hub
from support.distributed import broadcast_object, rank
from support.files import (
    get_stat,
    is_file,
    parse_json,
    read_user_file,
    remove_stale_temp_files,
    shown,
)

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where two runs with the same --out are not prevented
    fcntl = None

RUN_FILES = ("ckpt.pt", "config.json", "log.csv", "loss.png")
LOCK = ".ckpt.pt.lock"


def find_run(name, resume=False):
    """Return the folder called `name`, or for "newest" the run under out/ with the newest ckpt.pt.

    The folder must hold a run. Unless resume is true, it may hold a Hugging Face model instead, and
    name may be ORG/NAME on huggingface.co. Returns None for "" or None.
    """
    if not name:
        return None
    if name == "newest":
        return find_newest_run()
    if is_file(Path(name, "ckpt.pt")) or (not resume and is_file(Path(name, "config.json"))):
        return Path(name)
    if not resume and hub.is_model_name(name):
        return hub.fetch(name)
    model = "" if resume else ", and no model of Hugging Face: there is no config.json"
    raise ValueError(f"{shown(name)} holds no run: there is no ckpt.pt{model}")


def find_newest_run():
    saved_at = {}
    with suppress(OSError):
        for folder in sorted(Path("out").iterdir()):
            with suppress(OSError):  # no checkpoint yet, or just deleted
                saved_at[folder] = (folder / "ckpt.pt").stat().st_mtime_ns
    if not saved_at:
        raise ValueError("there is no run under out/ yet; python train.py makes one")
    return max(saved_at, key=saved_at.get)


@contextmanager
def claim_folder(out, name, origin=None):
    """Lock the folder of a run and yield its path. Unlock it when the block ends.

    origin: the folder of the run to resume. Otherwise, a new run gets the folder `out`, or if that
    is "", the first free one of out/NAME, out/NAME-2, ... Rank 0 locks it for all ranks. The files
    of a new run that has saved no checkpoint are removed at the end, and its folder, if it is new.
    Raises ValueError if another process has locked the folder, or if it contains files that the run
    would overwrite.
    """
    # find and lock it on rank 0, and tell the other ranks the folder or the error
    folder = None
    error = None
    is_new = False
    lock = None
    if rank() == 0:
        try:
            if origin:
                folder = origin
            else:
                folder, is_new = make_folder(out, name)
            lock = lock_folder(folder)
            if origin:
                check_config(folder)
            else:
                check_free(folder)
            remove_stale_temp_files(folder, RUN_FILES)
        except ValueError as caught:
            error = str(caught)
            unlock_folder(folder, lock, is_new)
    folder, error = broadcast_object((folder, error))
    if error:
        raise ValueError(error)

    # run the block
    try:
        yield folder
    finally:
        if rank() == 0:
            if not origin and not os.path.lexists(folder / "ckpt.pt"):
                remove_run_files(folder)
            unlock_folder(folder, lock, is_new)


def make_folder(out, name):
    """Return the folder of a new run, which is made if necessary, and whether it is new."""
    root = Path(out or "out")
    try:
        is_new = not root.exists()
        root.mkdir(parents=True, exist_ok=True)
        if out:
            return root, is_new
        name = re.sub(r"[^\w.]+", "-", name)[:60].strip("-.")  # without : and , of specs
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


def check_config(folder):
    """Raise ValueError if a resumed run would overwrite a config.json that is not its own.

    That of a run has the command; that of a Hugging Face folder, for example, has not.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        return
    try:
        config = parse_json(read_user_file(path), shown(path))
    except ValueError:
        config = None
    if not isinstance(config, dict) or "command" not in config:
        raise ValueError(f"{shown(path)} is not of a run and would be overwritten; move it away")


def remove_run_files(folder):
    """Remove the files of a run that has saved nothing; they would be in the way of another."""
    for name in RUN_FILES:
        with suppress(OSError):
            (folder / name).unlink()


def lock_folder(folder):
    """Lock the folder for this process and return the open lock file.

    The system removes the lock when the process ends, even after kill -9. Raises ValueError if
    another process has locked the folder.
    """
    path = folder / LOCK
    while True:
        try:
            lock = open(path, "r+", opener=open_no_link, errors="replace")
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

        # start over if another run ended and deleted this file between our open and flock
        info = get_stat(path)
        if info is not None and os.path.samestat(info, os.fstat(lock.fileno())):
            break
        lock.close()
    lock.seek(0)
    holder = lock.read(200)
    if holder and not holder.startswith("process "):
        lock.close()
        raise ValueError(f"{shown(path)} is not of a run and would be overwritten; move it away")
    with suppress(OSError):  # on a full disk the lock holds without a name
        lock.seek(0)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
    return lock


def open_no_link(path, flags):
    """Open a file for `open`. Create it if necessary, but do not follow a link."""
    return os.open(path, flags | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def unlock_folder(folder, lock, is_new):
    """Unlock a folder, and remove it if it is new and still empty."""
    if lock is not None:
        with suppress(OSError):
            (folder / LOCK).unlink()  # before unlocking: later, it may be another process's file
        lock.close()
    if is_new:
        with suppress(OSError):
            folder.rmdir()


def get_cache_folder(folder):
    """Return the folder in which the tokens of a run are cached.

    Runs under out/ share the folder out/.tokens. Runs elsewhere share a folder .tokens next to
    theirs, if there is one. Other runs use their own folder, which is certain to be writable.
    """
    shared = folder.parent / ".tokens"
    with suppress(OSError):
        if folder.parent == Path("out"):
            shared.mkdir(parents=True, exist_ok=True)
        if shared.is_dir() and os.access(shared, os.W_OK | os.X_OK):
            return shared
    return folder / ".tokens"
