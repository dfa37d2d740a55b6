"""Time prefill and decoding at batch 1, against the floor set by memory bandwidth.

python experiments/bench_decode.py              SmolLM2-135M; on a GPU Qwen3-4B
python experiments/bench_decode.py --shapes qwen3-4b --compile
python experiments/bench_decode.py --init DIR   a run or Hugging Face folder

Presets get random weights; decoding is greedy. Writes bench_decode.json with,
per model:

    eager      operator by operator, with a KVCache
    graph      a CUDA graph per token, with kernels/decode.py; on a CPU the
               same step, uncaptured
    compiled   a CUDA graph per token, the layers compiled (--compile)

The floor of a token is the time to read every weight it needs and the keys and
values before it, at the speed of a copy.
"""

import statistics
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

import torch

import sample
import train
from experiments.harness import check_writable, study_parser
from experiments.provenance import save_json
from support import cli, distributed, run_folder

WARMUP = 5  # prompts and tokens that are not timed
VARIANTS = ("eager", "graph", "compiled")
EAGER_TOKENS = 32  # at most, about 50 ms each
VOCABULARY = 50304  # of presets that name none


def timed(device, function):
    """Return function() and the seconds until the device was done with it."""
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
    seconds = [timed(device, lambda: target.copy_(source))[1] for _ in range(10)]
    return 2 * size / min(seconds)


@torch.no_grad()
def random_model(preset, device, dtype):
    """Return a softmax GPT of the shape of a preset, with random weights."""
    config = cli.make_config(train.GPTConfig, {"vocab_size": VOCABULARY, **train.PRESETS[preset]})
    model = train.empty_model(config, device, dtype)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def bytes_per_token(model, n_before):
    """Return the bytes that a token has to read: weights, and n_before keys and values."""
    config = model.config
    weights = sum(p.nbytes for p in model.parameters())
    if not config.tied:
        weights -= model.embed_tokens.weight.nbytes  # only one row of it is read
    kv_per_position = 2 * config.n_layer * config.n_kv_head * config.head_dim
    return weights + kv_per_position * model.dtype.itemsize * n_before


def time_decoding(model, ids, n, floor, graph):
    """Return the times of one variant: of the prompt, the best of five, and of a token, the median.

    floor: seconds per token at the speed of a copy.
    """
    # prefill
    device = model.embed_tokens.weight.device

    def first_token():
        return next(sample.generate(model, ids, 1, temperature=0, graph=graph))

    prompt_seconds = min(timed(device, first_token)[1] for _ in range(WARMUP))

    # decode
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
    """Return the figures of one model, every variant included."""
    config = model.config
    if n_prompt + WARMUP + n > config.block_size:
        raise ValueError(
            f"--prompt-tokens {n_prompt} and --tokens {n}, with {WARMUP} to warm up, are more "
            f"than the context of {config.block_size}"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (n_prompt,), generator=generator).tolist()
    n_bytes = bytes_per_token(model, n_prompt + n // 2)
    floor = n_bytes / bandwidth
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_per_token": n_bytes,
        "floor_ms": 1e3 * floor,
        "eager": time_decoding(model, ids, min(n, EAGER_TOKENS), floor, graph=False),
    }
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
    presets = f"presets to time, of {', '.join(train.PRESETS)}"
    parser.add_argument("--shapes", nargs="+", choices=train.PRESETS, metavar="NAME", help=presets)
    parser.add_argument("--init", metavar="DIR", help="time a run or model folder, or ORG/NAME")
    number = {"type": int, "metavar": "N"}
    prompt = "length of the prompt (default: 512)"
    parser.add_argument("--prompt-tokens", default=512, help=prompt, **number)
    parser.add_argument("--tokens", default=256, help="to generate (default: 256)", **number)
    parser.add_argument("--compile", action="store_true", help="time torch.compile, too")
    parser.add_argument("--device", default="", help="cpu, cuda or mps; default: the best")
    dtype = "default: bf16 on a GPU that has it"
    parser.add_argument("--dtype", default="", choices=list(train.DTYPES), help=dtype)
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
    default = ["smollm2-135m"] if device.type == "cpu" else ["smollm2-135m", "qwen3-4b"]

    start_time = time.perf_counter()
    bandwidth = copy_bandwidth(device)
    models = {}
    for name in [args.init] if args.init else args.shapes or default:
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
