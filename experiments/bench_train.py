"""Time whole training steps of all variants side by side, on random tokens.

python experiments/bench_train.py             small and gpt2 on a GPU, tiny on a CPU
python experiments/bench_train.py --shapes gpt2 --steps 40
python experiments/bench_train.py --no-graph  without CUDA graphs

Writes bench_train.json. For each variant: milliseconds per step (median), the
host's part of it (launching everything, without waiting), the device's part
(all kernels, with the host ahead), tokens per second, peak memory, and the
ratio to softmax + AdamW. The variants alternate in rounds, so that whatever
else the machine does meets all of them.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

import torch
from tqdm import tqdm

import train
from experiments.harness import check_writable, save_json, study_parser
from support import cli, cuda_graph, distributed

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

    def __init__(self, shape, attn, optim, device, graph, pool):
        preset = train.PRESETS[shape]
        fields = {name: v for name, v in preset.items() if name in train.GPTConfig.__annotations__}
        config = train.GPTConfig(vocab_size=VOCABULARY, attn=attn, **fields)
        dtype = train.DTYPES[distributed.pick_dtype("", device)]
        self.model = train.GPT(config, dtype).to(device)
        train.init_weights(self.model, seed=0)
        if device.type == "cuda":
            self.model.compile()
        make_optimizer, options = cli.resolve(optim, *train.PLUGINS["optim"])
        groups = train.param_groups(self.model, weight_decay=0.1)
        optimizer = make_optimizer(groups, preset["lr"], **options)

        self.tokens_per_step = preset["batch_size"] * config.block_size
        size = (2, preset["batch_size"], config.block_size)
        x, y = torch.randint(config.vocab_size, size, device=device)
        self.batch = [(x, y)], torch.full((), y.numel(), device=device)

        # as train.py does: some eager steps, then the capture
        use_graph = cuda_graph.prepare(graph, device, optimizer)
        train.set_lr(optimizer, preset["lr"])
        self.step = train.Step(self.model, optimizer, clip=1.0)
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


def bench_shape(shape, names, steps, device, graph):
    """Return {variant: row}: each variant takes `steps` steps in each of ROUNDS rounds."""
    is_cuda = device.type == "cuda"
    pool = torch.cuda.graph_pool_handle() if is_cuda else None
    variants = {}
    rows = {}
    for name in names:
        if is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        variants[name] = Variant(shape, *VARIANTS[name], device, graph, pool)
        rows[name] = {}
        if is_cuda:
            rows[name]["peak_memory_gb"] = (torch.cuda.max_memory_allocated() - before) / 1e9

    times = {name: {"step": [], "host": [], "device": []} for name in names}
    for _ in tqdm(range(ROUNDS), desc=shape, unit="round", leave=False):
        for name in names:
            variant = variants[name]
            variant.time_steps(1)  # the caches are another variant's
            times[name]["step"].append(variant.time_steps(steps))
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
        if BASELINE in rows:
            rows[name]["ratio"] = milliseconds / rows[BASELINE]["ms_per_step"]
    return rows


def main(argv=None):
    parser = study_parser(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", choices=train.PRESETS, metavar="NAME", help="presets to time"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        default=list(VARIANTS),
        help="variants to time",
    )
    parser.add_argument("--steps", type=int, default=10, help="timed steps per round, of 5 rounds")
    parser.add_argument(
        "--graph", action=argparse.BooleanOptionalAction, help="CUDA graphs (default: as train.py)"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; it must be at least 1")
    out = check_writable(args.out)
    device = distributed.pick_device()
    shapes = args.shapes or (["small", "gpt2"] if device.type == "cuda" else ["tiny"])

    start_time = time.perf_counter()
    record = {"shapes": {}}
    for shape in shapes:
        rows = bench_shape(shape, args.variants, args.steps, device, args.graph)
        record["shapes"][shape] = rows
        print(f"{shape}: milliseconds per step, on the host, on the device; ratio to {BASELINE}")
        for name, row in rows.items():
            numbers = [row.get(key, 0.0) for key in ("ms_per_step", "host_ms", "device_ms")]
            numbers = "".join(f"{number:9.2f}" for number in numbers)
            print(f"  {name:18} {numbers} {row.get('ratio', 0.0):9.3f}")
    record["seconds"] = time.perf_counter() - start_time
    save_json(out / "bench_train.json", record)
    return record


if __name__ == "__main__":
    cli.run_main(main)
