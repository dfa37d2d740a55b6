"""Time whole training steps of all variants side by side, on random tokens.

python experiments/bench_train.py     small and gpt2 on a GPU, tiny on a CPU
python experiments/bench_train.py --shapes gpt2 --steps 40

Writes bench_train.json: milliseconds per step (median), tokens per second and
peak memory of each variant, and its ratio to softmax + AdamW. The variants
alternate in rounds, so that whatever else the machine does meets all of them.
"""

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
from support import cli, distributed, plugins

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

    def __init__(self, shape, attn, optim, device):
        preset = train.PRESETS[shape]
        fields = {name: v for name, v in preset.items() if name in train.GPTConfig.__annotations__}
        config = train.GPTConfig(vocab_size=VOCABULARY, attn=attn, **fields)
        dtype = train.DTYPES[distributed.pick_dtype("", device)]
        self.model = train.GPT(config, dtype).to(device)
        train.init_weights(self.model, seed=0)
        if device.type == "cuda":
            self.model.compile()
        make_optimizer, options = plugins.resolve(optim, *train.PLUGINS["optim"])
        groups = train.param_groups(self.model, weight_decay=0.1)
        self.optimizer = make_optimizer(groups, preset["lr"], **options)
        self.tokens_per_step = preset["batch_size"] * config.block_size
        size = (2, preset["batch_size"], config.block_size)
        x, y = torch.randint(config.vocab_size, size, device=device)
        self.batch = [(x, y)], y.numel()

    def step(self):
        """Take one step and return its seconds."""
        start_time = time.perf_counter()
        _, grad_norm, _ = train.train_step(self.model, self.optimizer, self.batch, clip=1.0)
        grad_norm.read()
        if self.batch[0][0][0].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start_time


def bench_shape(shape, names, steps, device):
    """Return {variant: row}: each variant takes `steps` steps in each of ROUNDS rounds."""
    variants = {}
    memory = {}
    for name in names:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        variants[name] = Variant(shape, *VARIANTS[name], device)
        for _ in range(3):  # compile, warm up
            variants[name].step()
        if device.type == "cuda":
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 1e9

    seconds = {name: [] for name in names}
    for _ in tqdm(range(ROUNDS), desc=shape, unit="round", leave=False):
        for name in names:
            variants[name].step()  # the caches are another variant's
            seconds[name] += [variants[name].step() for _ in range(steps)]

    rows = {}
    for name in names:
        median = statistics.median(seconds[name])
        rows[name] = {
            "ms_per_step": 1e3 * median,
            "tokens_per_s": variants[name].tokens_per_step / median,
            "peak_memory_gb": memory.get(name),
        }
        if BASELINE in rows:
            rows[name]["ratio"] = median / statistics.median(seconds[BASELINE])
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
    args = parser.parse_args(argv)
    if args.steps < 1:
        raise ValueError(f"--steps is {args.steps}; it must be at least 1")
    out = check_writable(args.out)
    device = distributed.pick_device()
    shapes = args.shapes or (["small", "gpt2"] if device.type == "cuda" else ["tiny"])

    start_time = time.perf_counter()
    record = {"shapes": {}}
    for shape in shapes:
        rows = bench_shape(shape, args.variants, args.steps, device)
        record["shapes"][shape] = rows
        for name, row in rows.items():
            ratio = f"{row['ratio']:6.3f} of {BASELINE}" if "ratio" in row else ""
            print(f"{shape:8} {name:18} {row['ms_per_step']:9.2f} ms {ratio}")
    record["seconds"] = time.perf_counter() - start_time
    save_json(out / "bench_train.json", record)
    return record


if __name__ == "__main__":
    cli.run_main(main)
