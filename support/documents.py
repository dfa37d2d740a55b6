"""Documents: find the files that --data names, and tokenize each of them."""

import codecs
import os
import stat
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support.files import get_stat, parse_json, read_user_file, shown
from support.run_folder import LOCK, RUN_FILES

REPOSITORY = Path(__file__).resolve().parent.parent


def find_documents(data):
    """Return the sorted paths of the files that --data names."""
    # Python's standard library, without its tests: over half of it, and not installed everywhere
    if data == "stdlib":
        root = Path(sysconfig.get_path("stdlib")).resolve()
        skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
        paths = sorted(list_files(root, ".py"))
        return [path for path in paths if not skipped & set(path.relative_to(root).parts)]

    # all Python source on this machine, without what is being worked on: a run whose text has
    # changed cannot be resumed, or compared with others. sys.path[0] is the folder of the script
    if data == "python":
        roots = {Path(p).resolve() for p in (*sys.path, sys.prefix, sys.base_prefix) if p}
        roots -= {REPOSITORY, Path.cwd(), Path(sys.path[0]).resolve()}
        return sorted({path for root in roots for path in list_files(root, ".py")})

    # a file or a folder
    hint = "give stdlib, python, a text file or a folder"
    if not data:
        raise ValueError(f"--data is empty; {hint}")
    info = get_stat(data)
    if info is None:
        raise ValueError(f"there is no data {data!r}; {hint}")
    root = Path(data).resolve()
    if stat.S_ISREG(info.st_mode):
        return [root]
    if not stat.S_ISDIR(info.st_mode):
        raise ValueError(f"--data {data} is neither a file nor a folder; {hint}")
    documents = []
    for path in sorted(list_files(root, is_strict=True)):
        is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not is_hidden:
            documents.append(path)
    return documents


def list_files(root, suffix="", is_strict=False):
    """Return the regular files below a folder whose names end with `suffix`.

    Links to folders are not followed. Files and folders that cannot be read are skipped, or if
    is_strict, raise ValueError. Files that are deleted meanwhile are skipped. So are those of runs:
    they change, and a run whose text has changed cannot be resumed.
    """

    def check(error):
        if is_strict and isinstance(error, PermissionError):
            raise ValueError(f"cannot read {shown(error.filename)} ({error.strerror})") from None

    paths = []
    for folder, _, names in os.walk(root, onerror=check):
        is_run = LOCK in names or "ckpt.pt" in names
        for name in names:
            if not name.endswith(suffix) or (is_run and name in (*RUN_FILES, LOCK)):
                continue
            path = Path(folder, name)
            try:
                is_regular = stat.S_ISREG(path.stat().st_mode)
            except OSError as error:
                check(error)
                continue
            if is_regular and (is_strict or os.access(path, os.R_OK)):
                paths.append(path)
    return paths


def read_file(path):
    """Return the bytes of a file, or b"" if it was deleted since it was listed."""
    try:
        return read_user_file(path, limit=2**50)
    except ValueError:
        if get_stat(path) is not None:  # raises ValueError if a folder above must not be searched
            raise
        return b""


def read_text(path):
    """Return the text of a file, or "" if it is binary: not in UTF-8, or with a NUL byte."""
    raw = read_file(path)
    try:
        return "" if b"\0" in raw else raw.decode()
    except UnicodeDecodeError:
        return ""


def read_documents(paths, tokenizer, dtype):
    """Return one array of tokens per file, which is empty if the file is binary."""

    def encode(path):
        return np.asarray(tokenizer.encode_ordinary(read_text(path)), dtype)

    with ThreadPoolExecutor() as pool:
        return list(tqdm(pool.map(encode, paths), total=len(paths), leave=False, delay=1))


def read_answers(path, tokenizer):
    """Return one int32 array of tokens per JSON line {"prompt": ..., "answer": ...}.

    The loss ignores tokens of the prompt. They are stored as ~id, which is negative.
    """
    documents = []
    raw = read_file(path).removeprefix(codecs.BOM_UTF8)
    for number, line in enumerate(raw.split(b"\n"), 1):  # splitlines() would also split at U+2028
        if not line.strip():
            continue
        try:
            row = parse_json(line, "the line")
            texts = [row["prompt"], row["answer"]]
            is_valid = all(isinstance(text, str) and text for text in texts)
        except (ValueError, KeyError, TypeError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                f'{path}, line {number}: need a JSON object in UTF-8 with two texts, "prompt" '
                f'and "answer", neither of them empty'
            )
        prompt, answer = (np.asarray(tokenizer.encode_ordinary(t), np.int32) for t in texts)
        documents.append(np.concatenate([~prompt, answer]))
    if not documents:
        raise ValueError(f"--data {path} is empty; give one JSON object per line")
    return documents
