"""The files that a run leaves: checkpoint, settings and result, log, and a plot of the log."""

import math
import os
import sys
import time

from support import checkpoint
from support.distributed import print0, rank
from support.files import atomic_write, name_write_errors, read_user_file, shown, write_json


class RunLog:
    """The files of a run: ckpt.pt, config.json, log.csv with a row per step, loss.png.

    Opened at step n > 0 it drops the rows after n, which an interrupted run wrote past its
    last checkpoint, and damaged ones. Only rank 0 writes.
    """

    columns = ["step", "lr", "loss", "grad_norm", "val_loss", "val_bpb"]

    def __init__(self, folder, step, settings, text, machine):
        self.folder = folder
        self.path = folder / "log.csv"
        self.settings = settings
        self.text = text
        self.start_time = time.perf_counter()
        self.record = {"command": " ".join(sys.argv), **settings, "machine": machine}
        if rank() > 0:
            return
        with atomic_write(self.path) as file:
            for row in (self.columns, *self.read_rows(step)):
                file.write((",".join(row) + "\n").encode())
        with name_write_errors(self.path):  # unbuffered: close() has nothing left to write
            self.file = open(self.path, "ab", buffering=0)
        write_json(folder / "config.json", self.record)

    def read_rows(self, last_step):
        """Return the rows up to last_step, each a list of texts, without those that are damaged."""
        try:
            data = read_user_file(self.path)
        except ValueError:
            return []
        rows = []
        previous_step = 0
        for line in data.splitlines():
            row = line.decode(errors="replace").split(",")
            try:
                step = int(row[0])
                for value in row[1:4] + [value for value in row[4:] if value]:
                    float(value)
            except ValueError:
                continue
            is_whole = len(row) == len(self.columns) and (row[4] == "") == (row[5] == "")
            if is_whole and previous_step < step <= last_step:
                rows.append(row)
                previous_step = step
        return rows

    def append(self, row):
        """Write a row. Raises FloatingPointError if one of its numbers is infinite or NaN."""
        for name, value in row.items():
            if not math.isfinite(value):
                is_saved = (self.folder / "ckpt.pt").exists()
                kept = f"{self.folder}/ckpt.pt is the last good checkpoint"
                raise FloatingPointError(
                    f"step {row['step']}: the {name} is {value}, so the run stops; "
                    f"{kept if is_saved else 'nothing is saved'}. A smaller --lr is the usual cure"
                )
        if rank() > 0:
            return
        line = ",".join(str(row.get(name, "")) for name in self.columns) + "\n"
        with name_write_errors(self.path):
            self.file.write(line.encode())

    def save(self, model, optimizer, step):
        """Write the checkpoint, after the log up to this step."""
        if rank() == 0:
            with name_write_errors(self.path):
                os.fsync(self.file.fileno())
        state = {"step": step, "config": self.settings, "tokenizer": self.text.tokenizer_state}
        checkpoint.save(self.folder, model, optimizer, data=self.text.fingerprint, **state)

    def finish(self, result):
        """Write the result and the plot, and say how to go on."""
        if rank() > 0:
            return
        self.file.close()
        seconds = time.perf_counter() - self.start_time
        record = {**self.record, "result": {**result, "seconds": seconds}}
        write_json(self.folder / "config.json", record)
        self.plot()
        if result["step"] < self.settings["run"]["steps"]:
            print0(f"stopped; continue with: python train.py --resume {shown(self.folder)}")
        else:
            print0(f"done; see what it writes with: python sample.py --init {shown(self.folder)}")

    def plot(self):
        """Draw the training loss and the held-out loss in bits per byte."""
        from matplotlib.figure import Figure

        rows = self.read_rows(self.settings["run"]["steps"])
        evaluated = [row for row in rows if row[5]]
        steps = [int(row[0]) for row in rows]
        losses = [float(row[2]) * self.text.bits_per_byte for row in rows]
        val_steps = [int(row[0]) for row in evaluated]
        val_bpb = [float(row[5]) for row in evaluated]

        figure = Figure((7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, lw=0.5, label="training batch")
        axes.plot(val_steps, val_bpb, "o-", ms=4, label="held out")
        axes.set(xlabel="step", ylabel="bits per byte")
        axes.set_title(shown(self.folder.name), parse_math=False)  # a "$" is no formula
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_write(self.folder / "loss.png") as file:
            figure.savefig(file, format="png", dpi=120)
