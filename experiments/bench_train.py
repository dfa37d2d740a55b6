"""Time whole training steps of all variants side by side, on random tokens.

python experiments/bench_train.py              small and gpt2 on a GPU, or tiny
python experiments/bench_train.py --shapes gpt2 --steps 40
python experiments/bench_train.py --no-graph   without CUDA graphs
torchrun --nproc-per-node 2 experiments/bench_train.py --shapes gpt2
                                               several GPUs, each with the batch
                                               of one; DDP, or --fsdp for FSDP2

Writes bench_train.json. For each variant: milliseconds per step (median), the
host's part of it (launching everything, without waiting), the device's part
(all kernels, with the host ahead), tokens per second, peak memory, and the
ratio to softmax + AdamW. The variants alternate in rounds, so that whatever
else the machine does meets all of them. Several processes add to the file of
one, with their weak scaling: its time over theirs.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

import torch
from tqdm import tqdm

import train
from experiments.harness import check_writable, study_parser
from experiments.provenance import save_json
from support import cli, cuda_graph, distributed, plugins
from support.distributed import print0, rank

BASELINE = "softmax+adamw"
VARIANTS = {  # name: attention, optimizer
    BASELINE: ("softmax", "adamw"),
    "laser+adamw": ("laser", "adamw"),
    "softmax+sonew": ("softmax", "sonew"),
    "simplicial+adamw": ("softmax,softmax,softmax,simplicial:w1=128:w2=16", "adamw"),
    "laser+sonew": ("laser", "sonew"),
    "all": ("laser,laser,laser,simplicial:w1=128:w2=16", "sonew"),
}
VOCABULARY = 50304  # GPT-2's, rounded up to a multiple of 64
ROUNDS = 5


class Variant:
    """A model with its optimizer and one batch of random tokens."""

    def __init__(self, shape, attn, optim, device, args, pool):
        preset = train.PRESETS[shape]
        attn = ",".join(attn.split(",")[-preset["n_layer"] :])  # tiny has two layers, not four
        fields = {name: v for name, v in preset.items() if name in train.GPTConfig.__annotations__}
        config = train.GPTConfig(vocab_size=VOCABULARY, attn=attn, **fields)
        dtype = train.DTYPES[distributed.pick_dtype("", device)]
        model = train.GPT(config, dtype).to(device)
        train.init_weights(model, seed=0)
        if device.type == "cuda":
            model.compile()
        if args.fsdp:
            distributed.shard(model, dtype, device)
        make_optimizer, options = plugins.resolve(optim, *train.PLUGINS["optim"])
        groups = train.param_groups(model, weight_decay=0.1)
        optimizer = make_optimizer(groups, preset["lr"], **options)

        sequences = preset["batch_size"] * distributed.world_size()
        self.tokens_per_step = sequences * config.block_size
        size = (2, preset["batch_size"], config.block_size)
        x, y = torch.randint(config.vocab_size, size, device=device)
        count = y.numel() * distributed.world_size()
        self.batch = [(x, y)], torch.full((), count, device=device)

        # as train.py does: some eager steps, then the capture
        use_graph = cuda_graph.prepare(args.graph, device, optimizer)
        train.set_lr(optimizer, preset["lr"])
        self.step = train.Step(distributed.data_parallel(model), optimizer, clip=1.0)
        self.time_steps(cuda_graph.WARM_UP)
        if use_graph:
            self.step = cuda_graph.CapturedStep(self.step, self.batch, pool)

    def time_steps(self, n):
        """Take n steps as train.py does and return the milliseconds of one."""
        start_time = time.perf_counter()
        for _ in range(n):
            _, grad_norm, _ = train.train_step(self.step, self.batch)
            grad_norm.read()
        if self.batch[1].is_cuda:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start_time) / n

    def launch_step(self):
        """Take one step without waiting for the device, and return the host's milliseconds."""
        start_time = time.perf_counter()
        self.step.forward(self.batch)
        self.step.backward()
        self.step.update()
        self.step.clear()
        return 1e3 * (time.perf_counter() - start_time)

    def time_on_device(self, host_ms):
        """Take one step and return the device's milliseconds; it sleeps until all is launched."""
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(2e6 * 1.5 * host_ms))
        start.record()
        self.launch_step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def bench_shape(shape, device, args):
    """Return {variant: row}: each variant takes args.steps steps in each of ROUNDS rounds."""
    names = list(dict.fromkeys([BASELINE, *args.variants]))
    is_cuda = device.type == "cuda"
    pool = torch.cuda.graph_pool_handle() if is_cuda else None
    variants = {}
    rows = {}
    for name in names:
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        variants[name] = Variant(shape, *VARIANTS[name], device, args, pool)
        rows[name] = {}
        if is_cuda:
            rows[name]["peak_memory_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9

    times = {name: {"step": [], "host": [], "device": []} for name in names}
    for _ in tqdm(range(ROUNDS), desc=shape, unit="round", leave=False, disable=rank() > 0):
        for name in names:
            variant = variants[name]
            variant.time_steps(1)  # the caches are another variant's
            times[name]["step"].append(variant.time_steps(args.steps))
            if is_cuda:
                host_ms = variant.launch_step()
                torch.cuda.synchronize()
                times[name]["host"].append(host_ms)
                times[name]["device"].append(variant.time_on_device(host_ms))

    for name in names:
        milliseconds = statistics.median(times[name]["step"])
        rows[name]["ms_per_step"] = milliseconds
        if is_cuda:
            rows[name]["host_ms"] = statistics.median(times[name]["host"])
            rows[name]["device_ms"] = statistics.median(times[name]["device"])
        rows[name]["tokens_per_s"] = 1e3 * variants[name].tokens_per_step / milliseconds
        rows[name]["ratio"] = milliseconds / rows[BASELINE]["ms_per_step"]
    return rows


def print_rows(shape, rows):
    print0(f"{shape}: milliseconds per step, on the host, on the device; ratio to {BASELINE}")
    for name, row in rows.items():
        numbers = [row.get(key, 0.0) for key in ("ms_per_step", "host_ms", "device_ms")]
        numbers = "".join(f"{number:9.2f}" for number in numbers)
        print0(f"  {name:18} {numbers} {row.get('ratio', 0.0):9.3f}")


def make_parser():
    parser = study_parser(__doc__)
    lists = {"nargs": "+", "metavar": "NAME"}
    presets = f"presets to time, of {', '.join(train.PRESETS)}"
    parser.add_argument("--shapes", choices=train.PRESETS, help=presets, **lists)
    variants = f"what to compare with {BASELINE}, of {', '.join(VARIANTS)} (default: each)"
    parser.add_argument("--variants", choices=VARIANTS, help=variants, **lists)
    steps = f"timed steps in each of {ROUNDS} rounds (default: 10)"
    parser.add_argument("--steps", type=int, default=10, metavar="N", help=steps)
    parser.add_argument("--fsdp", action="store_true", help="several processes: FSDP2, not DDP")
    parser.add_argument(
        "--graph", action=argparse.BooleanOptionalAction, help="CUDA graphs (default: as train.py)"
    )
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; it must be at least 1")
    path = check_writable(args.out) / "bench_train.json"
    device = distributed.setup()
    n = distributed.world_size()
    args.shapes = args.shapes or (["small", "gpt2"] if device.type == "cuda" else ["tiny"])
    args.variants = args.variants or (list(VARIANTS) if n == 1 else [BASELINE])

    start_time = time.perf_counter()
    record = json.loads(path.read_text()) if n > 1 and path.exists() else {"shapes": {}}
    seconds_before = record.get("seconds", 0.0)
    shapes = record["shapes"]
    kind = "fsdp" if args.fsdp else "ddp"
    for shape in args.shapes:
        rows = bench_shape(shape, device, args)
        print_rows(shape, rows)
        kept = shapes.setdefault(shape, {})
        for name, row in rows.items():
            if n > 1 and name in kept:
                row["weak_scaling"] = kept[name]["ms_per_step"] / row["ms_per_step"]
                print0(f"  weak scaling {row['weak_scaling']:.3f}")
            kept[name if n == 1 else f"{name}, {kind} on {n}"] = row
        record["seconds"] = seconds_before + time.perf_counter() - start_time
        if rank() == 0:
            save_json(path, record, "experiments.bench_train", "laser", "simplicial", "sonew")
    return record


if __name__ == "__main__":
    cli.run_main(main)
