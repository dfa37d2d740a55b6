"""Files: write them atomically, and safely read those that a user names."""

import glob
import json
import os
import re
import shutil
import stat
import zipfile
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path

LARGEST_PID = 2**22  # Linux's limit: a larger number in a file name is not a process id


# -- writing ---------------------------------------------------------------------------------------


@contextmanager
def atomic_write(path):
    """Open a temporary file. It replaces `path` if the block ends without an error.

    After an error, the previous file is as it was. An error of the disk becomes a ValueError.
    """
    path = Path(path)
    temp_path = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp_path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp_path, path)
    except BaseException as error:
        with suppress(OSError):
            temp_path.unlink()
        cause = find_os_error(error)
        if cause is None:
            raise
        raise ValueError(
            f"cannot write {shown(path)} ({cause.strerror}); the previous file is untouched"
        ) from error


def find_os_error(error):
    """Return the OSError inside an exception, or None. Those of torch.save wrap one."""
    while isinstance(error, Exception) and not isinstance(error, OSError):
        error = error.__context__
    return error if isinstance(error, OSError) else None


@contextmanager
def name_write_errors(path):
    """Turn an OSError into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"cannot write {shown(path)} ({error.strerror})") from None


def write_json(path, data):
    with atomic_write(path) as file:
        file.write(json.dumps(data, indent=1).encode())


@contextmanager
def atomic_folder(folder, patterns):
    """Yield a temporary folder. It becomes `folder` if the block ends without an error.

    patterns: match the names of all files that may be written. Temporary folders that killed
    processes have left are deleted, unless they hold anything else.
    """
    temp_folder = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # one of them may have had the same process id
        for stale in (*stale_temp_paths(folder.parent, [glob.escape(folder.name)]), temp_folder):
            with suppress(OSError):  # also if it is no folder, or a link to one
                if all(is_plain_file(path, patterns) for path in stale.iterdir()):
                    shutil.rmtree(stale)
        temp_folder.mkdir()
        try:
            yield temp_folder
            for path in temp_folder.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            os.replace(temp_folder, folder)
        finally:
            shutil.rmtree(temp_folder, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"cannot write {folder} ({reason}); nothing is left of it") from None


def is_plain_file(path, patterns):
    """Return whether a path is a regular file, no link, whose name matches one of the patterns."""
    is_match = any(fnmatchcase(path.name, pattern) for pattern in patterns)
    return is_match and path.is_file() and not path.is_symlink()


def check_zip(path):
    """Raise ValueError if a file in a zip archive is compressed, or does not match its checksum."""
    with zipfile.ZipFile(path) as archive:
        if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
            raise ValueError("it describes more than it holds")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"it is damaged: {damaged} does not match its checksum")


def remove_stale_temp_files(folder, patterns):
    """Delete temporary files, `.NAME.PID`, that killed processes have left from atomic_write.

    patterns: patterns for NAME, as in fnmatch. Files of running processes stay.
    """
    for path in stale_temp_paths(folder, patterns):
        with suppress(OSError):
            path.unlink()


def stale_temp_paths(folder, patterns):
    """Yield the files and folders `.NAME.PID` in a folder whose process has ended."""
    for path in Path(folder).glob(".*"):
        name, _, pid = path.name[1:].rpartition(".")
        is_pid = re.fullmatch("[1-9][0-9]*", pid) and int(pid) <= LARGEST_PID
        is_ours = any(fnmatchcase(name, pattern) for pattern in patterns)
        if is_pid and is_ours and not is_alive(int(pid)):
            yield path


def is_alive(pid):
    """Return whether a process has this id. Always True on Windows, where os.kill would end it."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        pass
    return True


# -- reading ---------------------------------------------------------------------------------------


def shown(path):
    """Return a path as printable text, with control characters and invalid bytes escaped."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def get_stat(path):
    """Return os.stat of a path that a user gave, or None if there is no such file.

    Raises ValueError if the name is not valid or access is denied.
    """
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: NUL or a lone surrogate in the name
        reason = getattr(error, "strerror", None) or "no file can have that name"
        raise ValueError(f"cannot read {shown(path)} ({reason})") from None


def is_file(path):
    info = get_stat(path)
    return info is not None and stat.S_ISREG(info.st_mode)


def read_user_file(path, limit=2**30):
    """Return the bytes of a file that a user named.

    Raises ValueError if it does not exist, cannot be read, is larger than `limit` bytes, or is not
    a regular file: a pipe might wait forever, and a device might never end.
    """
    info = get_stat(path)
    if info is None:
        raise ValueError(f"there is no file {shown(path)}")
    check_regular(path, info)
    try:
        with open(path, "rb", opener=open_nonblocking) as file:
            info = os.fstat(file.fileno())
            check_regular(path, info)  # again, because it may have been replaced since
            if info.st_size > limit:
                raise ValueError(f"cannot read {shown(path)}: it is larger than {limit:,} bytes")
            return file.read()
    except OSError as error:
        raise ValueError(f"cannot read {shown(path)} ({error.strerror})") from None


def check_regular(path, info):
    if not stat.S_ISREG(info.st_mode):
        kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe or device"
        raise ValueError(f"cannot read {shown(path)}: it is {kind}, not a file")


def open_nonblocking(path, flags):
    """Open a file; if it is a pipe, do not wait for a writer. Windows has no such flag."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def parse_json(data, what):
    """Return the value of JSON, given as text or as UTF-8 bytes.

    Raises ValueError if it is malformed, nested too deeply, or contains NaN or Infinity, which are
    not JSON. what: the subject of the error's sentence, such as the file's name.
    """

    def reject(constant):
        raise ValueError(constant)

    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        return json.loads(text, parse_constant=reject)
    except UnicodeDecodeError:
        raise ValueError(f"{what} is not UTF-8 text") from None
    except ValueError:
        raise ValueError(f"{what} is cut off or is not JSON") from None
    except RecursionError:
        raise ValueError(f"{what} is nested too deeply") from None
