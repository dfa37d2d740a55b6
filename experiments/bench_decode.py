"""Time prefill and decoding at batch 1, against the floor set by memory bandwidth.

python experiments/bench_decode.py              SmolLM2-135M; on a GPU Qwen3-4B
python experiments/bench_decode.py --shapes qwen3-4b --compile
python experiments/bench_decode.py --init DIR   a run or Hugging Face folder

Presets get random weights. Decoding is greedy. Each model is timed in up to
three variants, and the times are written to bench_decode.json:

    eager      operator by operator, with a KVCache
    graph      a CUDA graph per token, with kernels/decode.py; on a CPU the
               same step without a graph
    compiled   a CUDA graph per token, with compiled layers (--compile)

The floor is the least time for a token: it has to read the weights, and the
keys and values of earlier tokens, at the speed of a copy.
"""

import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

    from support import cli

    cli.exit_on_signals()  # Ctrl-C during the imports

import torch

import sample
import train
from experiments.harness import check_writable, study_parser
from experiments.provenance import save_json
from support import cli, distributed, run_folder

WARMUP = 5  # prompts and tokens that are not timed
VARIANTS = ("eager", "graph", "compiled")
EAGER_TOKENS = 32  # at most so many are timed, since each takes about 50 ms
VOCABULARY = 50304  # of presets without a vocabulary size


def timed(device, function):
    """Call a function. Return its result, and the seconds until the device was done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_time = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start_time


def copy_bandwidth(device):
    """Return the bytes per second that a large copy reads and writes, the best of ten."""
    size = 2**28 if device.type == "cpu" else 2**31
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    seconds = []
    for _ in range(10):
        seconds.append(timed(device, lambda: target.copy_(source))[1])
    return 2 * size / min(seconds)


@torch.no_grad()
def random_model(preset, device, dtype):
    """Return a softmax GPT with random weights, in the shape of a preset."""
    settings = {"vocab_size": VOCABULARY, **train.PRESETS[preset]}
    config = cli.make_config(train.GPTConfig, settings)
    model = train.empty_model(config, device, dtype)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def bytes_per_token(model, n_before):
    """Return the bytes that a token reads: weights, and keys and values of n_before tokens."""
    config = model.config
    weight_bytes = sum(p.nbytes for p in model.parameters())
    if not config.tied:
        weight_bytes -= model.embed_tokens.weight.nbytes  # only one row of it is read
    kv_per_token = 2 * config.n_layer * config.n_kv_head * config.head_dim
    return weight_bytes + n_before * kv_per_token * model.dtype.itemsize


def time_decoding(model, ids, n, floor, graph):
    """Return the times of one variant: the best for the prompt, and the median for a token.

    n: tokens to time after the prompt `ids`. floor: least seconds per token. graph: as in generate.
    """
    # prompt
    device = model.embed_tokens.weight.device

    def first_token():
        return next(sample.generate(model, ids, 1, temperature=0, graph=graph))

    prompt_seconds = min(timed(device, first_token)[1] for _ in range(WARMUP))

    # tokens after it
    tokens = sample.generate(model, ids, WARMUP + n, temperature=0, graph=graph)
    seconds = []
    for _ in range(WARMUP + n):
        start_time = time.perf_counter()
        next(tokens)
        seconds.append(time.perf_counter() - start_time)
    token_seconds = statistics.median(seconds[WARMUP:])
    return {
        "prompt_ms": 1e3 * prompt_seconds,
        "prompt_tokens_per_s": len(ids) / prompt_seconds,
        "token_ms": 1e3 * token_seconds,
        "tokens_per_s": 1 / token_seconds,
        "share_of_floor": floor / token_seconds,
    }


def bench_model(model, n_prompt, n, with_compiled, bandwidth):
    """Return the size, the floor and the times of one model.

    n_prompt, n: tokens of the prompt, and after it. with_compiled: time compiled layers, too.
    """
    config = model.config
    if n_prompt + WARMUP + n > config.block_size:
        raise ValueError(
            f"--prompt-tokens {n_prompt} and --tokens {n}, with {WARMUP} to warm up, are more "
            f"than the context of {config.block_size}"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (n_prompt,), generator=generator).tolist()
    n_bytes = bytes_per_token(model, n_prompt + n // 2)  # of the token in the middle
    floor = n_bytes / bandwidth
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_per_token": n_bytes,
        "floor_ms": 1e3 * floor,
    }

    # variants; a graph needs softmax attention
    figures["eager"] = time_decoding(model, ids, min(n, EAGER_TOKENS), floor, graph=False)
    if not sample.is_softmax(config):
        return figures
    figures["graph"] = time_decoding(model, ids, n, floor, graph=True)
    if with_compiled:
        # Inductor's tuned kernels for products with one row come near the floor
        with torch._inductor.config.patch(coordinate_descent_tuning=True):
            model.compile()
            figures["compiled"] = time_decoding(model, ids, n, floor, graph=True)
    return figures


def print_figures(name, figures):
    print(f"{name}: floor {figures['floor_ms']:.3f} ms per token")
    for variant in VARIANTS:
        if variant in figures:
            row = figures[variant]
            print(
                f"  {variant:8} prompt {row['prompt_ms']:8.2f} ms, "
                f"token {row['token_ms']:7.3f} ms, {row['share_of_floor']:4.0%} of the floor"
            )


def parse_args(argv):
    parser = study_parser(__doc__)
    add = parser.add_argument
    presets = ", ".join(train.PRESETS)
    dtypes = list(train.DTYPES)
    add("--shapes", nargs="+", choices=train.PRESETS, metavar="NAME", help=f"presets: {presets}")
    add("--init", metavar="DIR", help="time a run or model folder, or ORG/NAME")
    add("--prompt-tokens", type=int, default=512, metavar="N", help="prompt length (default: 512)")
    add("--tokens", type=int, default=256, metavar="N", help="to generate (default: 256)")
    add("--compile", action="store_true", help="time torch.compile, too")
    add("--device", default="", help="cpu, cuda or mps; default: the best")
    add("--dtype", default="", choices=dtypes, help="default: bf16 on a GPU that has it")
    args = parser.parse_args(argv)
    if args.prompt_tokens < 1 or args.tokens < 1:
        raise ValueError("--prompt-tokens and --tokens must be at least 1")
    return args


def main(argv=None):
    """Time every model, print a table and write bench_decode.json; return the record."""
    args = parse_args(argv)
    out = check_writable(args.out)
    device = distributed.pick_device(args.device)
    dtype_name = distributed.pick_dtype(args.dtype, device)
    dtype = train.DTYPES[dtype_name]
    names = ["smollm2-135m"] if device.type == "cpu" else ["smollm2-135m", "qwen3-4b"]
    if args.init:
        names = [args.init]
    elif args.shapes:
        names = args.shapes

    start_time = time.perf_counter()
    bandwidth = copy_bandwidth(device)
    models = {}
    for name in names:
        if args.init:
            model = train.load_model(run_folder.find_run(name), device, dtype)[0]
        else:
            model = random_model(name, device, dtype)
        models[name] = bench_model(model, args.prompt_tokens, args.tokens, args.compile, bandwidth)
        print_figures(name, models[name])
    record = {
        "dtype": dtype_name,
        "prompt_tokens": args.prompt_tokens,
        "tokens": args.tokens,
        "copy_gb_per_s": bandwidth / 1e9,
        "models": models,
        "seconds": time.perf_counter() - start_time,
    }
    save_json(out / "bench_decode.json", record, "experiments.bench_decode")
    return record


if __name__ == "__main__":
    cli.run_main(main)
