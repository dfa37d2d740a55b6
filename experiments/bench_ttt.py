"""Time the steps of query-only training against tokens of thinking.

python experiments/bench_ttt.py                   Qwen3-4B, 32,768 tokens, GPU
python experiments/bench_ttt.py --model tiny --context 512 --span 32

A model with random weights reads a prompt, takes N = 32 steps on spans of
k = 128 tokens, and generates tokens after the prompt. The paper counts 2 N k
tokens for the price of the steps; the exact count of FLOPs gives another
number. 64 tokens are timed, each a replay of a CUDA graph, after half of the
2 N k tokens: an average number of keys. Writes ttt_context-bench.json.
"""

import itertools
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
from experiments.bench_decode import random_model, timed
from experiments.harness import check_writable, study_parser
from experiments.provenance import save_json
from experiments.ttt_cost import flops_of_spans, thinking_tokens
from support import cli, distributed
from ttt_context import prefill, split_spans, train_queries, trainable_queries

WARM_UP = 3  # steps that are not timed
TOKENS_TIMED = 64


def bench(preset, T, device, dtype, n_steps, n):
    """Return the seconds to read T tokens, to take the steps, and to generate tokens of thinking.

    n: tokens of a span.
    """
    # a model, a prompt, and tokens of thinking after it
    n_rule = 2 * n_steps * n  # the paper's number of tokens
    model = random_model(preset, device, dtype)
    model.config.block_size = T + n_rule + TOKENS_TIMED
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (T + n_rule // 2,), generator=generator)
    context = ids[:T].to(device)

    # time the prompt, and the steps on it
    prefill(model, context[:n])  # compile and allocate
    caches, prefill_seconds = timed(device, lambda: prefill(model, context))
    starts = split_spans(T, n)[1]
    with trainable_queries(model) as weights:
        steps = train_queries(model, weights, caches, context, starts, steps=WARM_UP + n_steps, n=n)
        list(itertools.islice(steps, WARM_UP))
        _, steps_seconds = timed(device, lambda: list(steps))
    del caches

    # time tokens of thinking, after half of the paper's number
    options = {"temperature": 0, "graph": device.type == "cuda"}
    tokens = sample.generate(model, ids.tolist(), WARM_UP + TOKENS_TIMED, **options)
    list(itertools.islice(tokens, WARM_UP))
    _, token_seconds = timed(device, lambda: list(tokens))
    token_seconds /= TOKENS_TIMED

    # extrapolate to both numbers of tokens
    flops = flops_of_spans(model, n_steps * n, T)
    counts = {"2 N k": n_rule, "equal FLOPs": thinking_tokens(model, T, flops)}
    thinking = {}
    for name, count in counts.items():
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
    model = {"choices": train.PRESETS, "default": "qwen3-4b", "metavar": "NAME"}
    model["help"] = f"one of {', '.join(train.PRESETS)} (default: qwen3-4b)"
    parser.add_argument("--model", **model)
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
