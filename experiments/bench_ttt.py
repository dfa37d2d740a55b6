"""Time the steps of query-only training against tokens of thinking.

python experiments/bench_ttt.py                   Qwen3-4B, 32,768 tokens, GPU
python experiments/bench_ttt.py --model tiny --context 512 --span 32

With random weights it reads a prompt, takes 32 steps on spans of 128 tokens,
and generates tokens after it: as many as the paper sets against the steps
(2 N k), and as many as cost the same FLOPs by the exact count. A sample of
the tokens is timed, each a replay of a CUDA graph, with as many keys before
them as the paper's number has on average. Writes ttt_context-bench.json.
"""

import itertools
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # the repository, not experiments/

import torch

import sample
import train
from experiments.bench_decode import random_model, timed
from experiments.harness import check_writable, study_parser
from experiments.provenance import save_json
from experiments.ttt_cost import flops_of_spans, thinking_tokens
from support import cli, distributed
from ttt_context import prefill, split_spans, train_queries, trainable_queries

WARM_UP = 3  # steps that are not timed
TOKENS_TIMED = 64


def bench(preset, T, device, dtype, n_steps, n):
    """Return the seconds to read T tokens, for the steps, and for tokens of thinking."""
    n_rule = 2 * n_steps * n  # the paper's number of tokens
    model = random_model(preset, device, dtype)
    model.config.block_size = T + n_rule + TOKENS_TIMED
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (T + n_rule // 2,), generator=generator)
    context = ids[:T].to(device)

    # the prompt, and the steps on it
    prefill(model, context[:n])  # compiles and allocates
    caches, prefill_seconds = timed(device, lambda: prefill(model, context))
    starts = split_spans(T, n)[1]
    with trainable_queries(model) as weights:
        steps = train_queries(model, weights, caches, context, starts, steps=WARM_UP + n_steps, n=n)
        list(itertools.islice(steps, WARM_UP))
        _, steps_seconds = timed(device, lambda: list(steps))
    del caches

    # tokens of thinking, from half of them on
    options = {"temperature": 0, "graph": device.type == "cuda"}
    tokens = sample.generate(model, ids.tolist(), WARM_UP + TOKENS_TIMED, **options)
    list(itertools.islice(tokens, WARM_UP))
    _, token_seconds = timed(device, lambda: list(tokens))
    token_seconds /= TOKENS_TIMED

    flops = flops_of_spans(model, n_steps * n, T)
    thinking = {}
    for name, count in (("2 N k", n_rule), ("equal FLOPs", thinking_tokens(model, T, flops))):
        seconds = count * token_seconds
        thinking[name] = {
            "tokens": count,
            "seconds": seconds,
            "over_steps": seconds / steps_seconds,
        }
    return {
        "prefill_seconds": prefill_seconds,
        "steps_seconds": steps_seconds,
        "token_ms": 1e3 * token_seconds,
        "tokens_timed": TOKENS_TIMED,
        "flops": flops,
        "thinking": thinking,
    }


def main(argv=None):
    parser = study_parser(__doc__)
    shapes = f"one of {', '.join(train.PRESETS)} (default: qwen3-4b)"
    name = {"metavar": "NAME", "help": shapes}
    parser.add_argument("--model", choices=train.PRESETS, default="qwen3-4b", **name)
    number = {"type": int, "metavar": "N"}
    context = "tokens of the prompt (default: 32768)"
    parser.add_argument("--context", default=32768, help=context, **number)
    parser.add_argument("--steps", default=32, help="AdamW steps (default: 32)", **number)
    parser.add_argument("--span", default=128, help="tokens of a span (default: 128)", **number)
    parser.add_argument("--device", default="", help="cpu, cuda or mps; default: the best")
    args = parser.parse_args(argv)
    if args.steps < 1 or args.span < 1 or args.context <= args.span:
        raise ValueError("--steps and --span must be at least 1, and --context more than --span")
    out = check_writable(args.out)
    device = distributed.pick_device(args.device)
    dtype = distributed.pick_dtype("", device)

    start_time = time.perf_counter()
    record = {name: getattr(args, name) for name in ("model", "context", "span", "steps")}
    record["dtype"] = dtype
    record |= bench(args.model, args.context, device, train.DTYPES[dtype], args.steps, args.span)
    record["seconds"] = time.perf_counter() - start_time
    print(f"{args.steps} steps in {record['steps_seconds']:.2f} s")
    for name, row in record["thinking"].items():
        thinking = f"{row['tokens']:,} tokens of thinking ({name}) in {row['seconds']:.2f} s"
        print(f"{thinking}, {row['over_steps']:.1f} times as long")
    save_json(out / "ttt_context-bench.json", record, "experiments.bench_ttt")
    return record


if __name__ == "__main__":
    cli.run_main(main)
