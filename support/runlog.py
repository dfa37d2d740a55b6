"""Write the files of a run: checkpoint, settings and result, log, and a plot of the losses."""

import math
import os
import shlex
import sys
import time

from support import checkpoint
from support.distributed import full_tensor, print0, rank
from support.files import atomic_write, name_write_errors, read_user_file, shown, write_json


class RunLog:
    """Write ckpt.pt, config.json, log.csv with a row per step, and loss.png. Only rank 0 writes.

    settings: of model and run. text: a data.Dataset. machine: what distributed.describe returns.
    A run resumes at the step of its last checkpoint. Rows of log.csv that were written after that,
    and damaged rows, are dropped.
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

        # rewrite the log up to this step, and open it to append
        lines = [self.columns, *(row.values() for row in self.read_rows(step))]
        with atomic_write(self.path) as file:
            file.writelines((",".join(line) + "\n").encode() for line in lines)
        with name_write_errors(self.path):  # unbuffered, so that each row is written at once
            self.file = open(self.path, "ab", buffering=0)
        write_json(folder / "config.json", self.record)

    def read_rows(self, last_step):
        """Return the undamaged rows up to last_step, each as {column: text}."""
        try:
            data = read_user_file(self.path)
        except ValueError:
            return []
        rows = []
        previous_step = 0
        for line in data.splitlines():
            values = line.decode(errors="replace").split(",")
            if len(values) != len(self.columns):
                continue
            is_evaluated = values[4:] != ["", ""]  # then val_loss and val_bpb are there
            try:
                step = int(values[0])
                numbers = [float(value) for value in (values[1:] if is_evaluated else values[1:4])]
            except ValueError:
                continue
            if not all(abs(number) < 1e30 for number in numbers):  # the plot would overflow
                continue
            if previous_step < step <= last_step:
                rows.append(dict(zip(self.columns, values)))
                previous_step = step
        return rows

    def append(self, row):
        """Write a row. Raises FloatingPointError if one of its numbers is infinite or NaN."""
        for name, value in row.items():
            if not math.isfinite(value):
                self.stop_diverged(row["step"], f"the {name} is {value}")
        if rank() > 0:
            return
        line = ",".join(str(row.get(name, "")) for name in self.columns) + "\n"
        with name_write_errors(self.path):
            self.file.write(line.encode())

    def stop_diverged(self, step, what):
        """Raise FloatingPointError. what: a clause that says what is infinite or NaN."""
        is_saved = (self.folder / "ckpt.pt").exists()
        kept = f"{self.folder}/ckpt.pt is the last good checkpoint"
        raise FloatingPointError(
            f"step {step}: {what}, so the run stops; {kept if is_saved else 'nothing is saved'}. "
            f"A smaller --lr is the usual cure"
        )

    def save(self, model, optimizer, step):
        """Write the checkpoint, after making sure that the log up to here is on the disk.

        Raises FloatingPointError if a weight is infinite or NaN: the last checkpoint is better.
        """
        for name, weight in model.state_dict().items():
            if not full_tensor(weight).isfinite().all():
                self.stop_diverged(step, f"{name} has values that are infinite or NaN")
        if rank() == 0:
            with name_write_errors(self.path):
                os.fsync(self.file.fileno())
        state = {"step": step, "config": self.settings, "tokenizer": self.text.tokenizer_state}
        checkpoint.save(self.folder, model, optimizer, data=self.text.fingerprint, **state)

    def finish(self, result):
        """Write the result and the plot, and print the command that comes next."""
        if rank() > 0:
            return
        self.file.close()
        seconds = time.perf_counter() - self.start_time
        record = {**self.record, "result": {**result, "seconds": seconds}}
        write_json(self.folder / "config.json", record)
        self.plot()
        folder = shown(shlex.quote(str(self.folder)))
        if result["step"] < self.settings["run"]["steps"]:
            print0(f"stopped; continue with: python train.py --resume {folder}")
        else:
            print0(f"done; see what it writes with: python sample.py --init {folder}")

    def plot(self):
        """Plot training loss and held-out loss, in bits per byte."""
        from matplotlib.figure import Figure

        rows = self.read_rows(self.settings["run"]["steps"])
        evaluated = [row for row in rows if row["val_bpb"]]
        steps = [int(row["step"]) for row in rows]
        losses = [float(row["loss"]) * self.text.bits_per_byte for row in rows]
        val_steps = [int(row["step"]) for row in evaluated]
        val_losses = [float(row["val_bpb"]) for row in evaluated]

        figure = Figure((7, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, lw=0.5, label="training batch")
        axes.plot(val_steps, val_losses, "o-", ms=4, label="held out")
        axes.set(xlabel="step", ylabel="bits per byte")
        axes.set_title(shown(self.folder.name), parse_math=False)  # the name may contain "$"
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_write(self.folder / "loss.png") as file:
            figure.savefig(file, format="png", dpi=120)
