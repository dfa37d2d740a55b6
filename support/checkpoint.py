"""Runs on disk: a file is there as a whole or not at all, and nothing is unpickled."""

import csv
import itertools
import json
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import torch
from torch.utils._pytree import tree_map

from support.cli import resolve
from support.distributed import broadcast_object, full_tensor, print0, rank, shard_like

REQUIRED = {"model", "optimizer", "step", "config", "tokenizer", "data"}


# -- files and folders -----------------------------------------------------------------------------


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
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps it
        if isinstance(cause, OSError):
            raise ValueError(
                f"cannot write {path} ({cause.strerror}); the previous file is untouched"
            ) from error
        raise


def write_json(path, data):
    with atomic_write(path) as file:
        file.write(json.dumps(data, indent=1).encode())


def read_user_file(path, limit=2**30):
    """Stand-in: return the bytes of a file that a user named."""
    path = Path(path)
    try:
        if not path.is_file():
            kind = "not a regular file" if path.exists() else "No such file or directory"
            raise ValueError(f"cannot read {path} ({kind})")
        if path.stat().st_size > limit:
            raise ValueError(f"{path} is larger than {limit} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None


def claim_folder(out, name):
    """Create the folder of a new run and return it: `out`, or the first free out/NAME, NAME-2, ...

    mkdir is atomic, so two runs that start together get different folders.
    """
    folder = None
    if rank() == 0:
        if out:
            folder = Path(out)
            if (folder / "ckpt.pt").exists():
                raise ValueError(f"{out} already holds a run; --resume {out} continues it")
            folder.mkdir(parents=True, exist_ok=True)
        else:
            Path("out").mkdir(exist_ok=True)
            for n in itertools.count(1):
                folder = Path("out", name if n == 1 else f"{name}-{n}")
                with suppress(FileExistsError):
                    folder.mkdir()
                    break
        for draft in folder.glob(".*.[0-9]*"):  # left by a process that was killed mid-write
            draft.unlink()
    return broadcast_object(folder)


def find_run(name):
    """Return the folder of the run called `name`, or for "newest" the newest under out/."""
    if not name:
        return None
    if name != "newest":
        if not (Path(name) / "ckpt.pt").is_file():
            raise ValueError(f"{name} holds no run: there is no {Path(name) / 'ckpt.pt'}")
        return Path(name)
    runs = sorted(Path("out").glob("*/ckpt.pt"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise ValueError("there is no run under out/ yet; python train.py makes one")
    return runs[-1].parent


# -- checkpoints -----------------------------------------------------------------------------------


def save(folder, model, optimizer, **more):
    """Write ckpt.pt. Every rank calls this, to gather what is sharded; rank 0 writes."""

    def gather(value):
        if not torch.is_tensor(value):
            return value
        whole = full_tensor(value)
        return whole.cpu() if whole is not value and rank() == 0 else whole

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state = tree_map(gather, state)
    if rank() == 0:
        with atomic_write(folder / "ckpt.pt") as file:
            torch.save({**state, **more}, file)


def load(folder):
    """Read ckpt.pt: tensors, numbers, strings and containers, never code."""
    path = Path(folder) / "ckpt.pt"
    if not path.is_file():
        from support import huggingface

        return huggingface.load_checkpoint(folder)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = REQUIRED - set(saved)
    except Exception:  # truncated, not a checkpoint, or one that carries code
        raise ValueError(
            f"{path} cannot be read: it is damaged, or holds more than tensors and plain values"
        ) from None
    if missing:
        raise ValueError(f"{path} is no checkpoint of train.py: it lacks {sorted(missing)}")
    return saved


@torch.no_grad()
def load_weights(model, state):
    """Copy the tensors of `state` into the model, one at a time; a sharded model takes its part."""
    for name, parameter in model.named_parameters():
        if name not in state:
            raise ValueError(f"the checkpoint lacks the tensor {name}")
        tensor = state[name]
        if tensor.shape != parameter.shape:
            expected = tuple(parameter.shape)
            raise ValueError(f"the checkpoint's {name} is {tuple(tensor.shape)}, not {expected}")
        parameter.copy_(shard_like(parameter, tensor))


def merge_adapters(model, saved):
    """Merge the adapters of a checkpoint into the weights, which are loaded already."""
    spec = saved["config"]["run"].get("adapter")
    if spec:
        adapt, options = resolve(spec, "adapt")
        merge, _ = resolve(spec.partition(":")[0], "merge")
        adapt(model, **options)
        load_weights(model, saved["model"])
        merge(model)
        model.requires_grad_(True)


def load_optimizer(optimizer, state):
    """Restore the optimizer; its state may have been sharded differently, or not at all."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, entry in state["state"].items():
        for name, value in entry.items():
            if torch.is_tensor(value) and value.shape == parameters[i].shape:
                entry[name] = shard_like(parameters[i], value)
    optimizer.load_state_dict(state)


def check_unchanged(saved, configs, fingerprint, origin):
    """Raise ValueError if the text, or a setting that is not adjustable, is not that of the run."""
    before = {**saved["config"]["model"], **saved["config"]["run"]}
    for config in configs:
        for f in fields(config):
            value = getattr(config, f.name)
            if value != before.get(f.name, value) and not f.metadata.get("adjustable"):
                flag = "--" + f.name.replace("_", "-")
                raise ValueError(
                    f"{flag} is {value} here but {before[f.name]} in {origin}; leave it out"
                )
    if fingerprint != saved["data"]:
        raise ValueError(f"the text has changed since the run in {origin} began")


# -- a run's files ---------------------------------------------------------------------------------


class RunLog:
    """The files of a run: ckpt.pt, config.json, log.csv with a row per step, loss.png.

    Opened at step n > 0 it drops the rows after n, which an interrupted run wrote past its
    last checkpoint. Only rank 0 writes.
    """

    columns = ["step", "lr", "loss", "grad_norm", "val_loss", "val_bpb"]

    def __init__(self, folder, step, settings, text, machine):
        self.folder = folder
        self.settings = settings
        self.text = text
        self.start_time = time.perf_counter()
        self.record = {"command": " ".join(sys.argv), **settings, "machine": machine}
        self.rows = []
        if rank() > 0:
            return

        path = folder / "log.csv"
        if step and path.exists():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    if None not in row.values() and int(row["step"]) <= step:
                        self.rows.append(row)
        with atomic_write(path) as file:
            file.write((",".join(self.columns) + "\n").encode())
            for row in self.rows:
                file.write((",".join(row.values()) + "\n").encode())
        self.file = open(path, "a", buffering=1)  # a line at a time
        write_json(folder / "config.json", self.record)

    def append(self, row):
        if rank() == 0:
            row = {name: str(row.get(name, "")) for name in self.columns}
            self.rows.append(row)
            self.file.write(",".join(row.values()) + "\n")

    def save(self, model, optimizer, step):
        state = {"step": step, "config": self.settings, "tokenizer": self.text.tokenizer_state}
        save(self.folder, model, optimizer, data=self.text.fingerprint, **state)

    def finish(self, result):
        """Write the result and the plot, and say how to go on."""
        if rank() > 0:
            return
        seconds = time.perf_counter() - self.start_time
        record = {**self.record, "result": {**result, "seconds": seconds}}
        write_json(self.folder / "config.json", record)
        self.plot()
        if result["step"] < self.settings["run"]["steps"]:
            print0(f"stopped; continue with: python train.py --resume {self.folder}")
        else:
            print0(f"done; see what it writes with: python sample.py --init {self.folder}")

    def plot(self):
        """Draw the training loss and the held-out loss in bits per byte."""
        from matplotlib.figure import Figure

        figure = Figure((7, 4), layout="constrained")
        axes = figure.subplots()
        steps = [int(row["step"]) for row in self.rows]
        losses = [float(row["loss"]) * self.text.bits_per_byte for row in self.rows]
        axes.plot(steps, losses, lw=0.5, label="training batch")
        evaluated = [row for row in self.rows if row["val_bpb"]]
        val_steps = [int(row["step"]) for row in evaluated]
        val_bpb = [float(row["val_bpb"]) for row in evaluated]
        axes.plot(val_steps, val_bpb, "o-", ms=4, label="held out")
        axes.set(xlabel="step", ylabel="bits per byte", title=self.folder.name)
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_write(self.folder / "loss.png") as file:
            figure.savefig(file, format="png", dpi=120)
