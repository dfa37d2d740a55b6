"""Let a trained GPT go on with a text.

python sample.py --prompt "def main("       the newest run under out/
python sample.py --init out/NAME            another run
python sample.py --prompt @my.txt           a prompt from a file
python sample.py --temperature 0            always the likeliest token
python sample.py --init DIR --chat "Hi!"    a question to a Hugging Face folder
python sample.py --init DIR --score my.txt  how well it foresees a text
python sample.py --init DIR --export NEW    any run or folder as a Hugging Face folder
python sample.py --bench --model qwen3-4b   time prompt and tokens, random weights

The text streams to stdout, all else goes to stderr. Kept keys and values make a
token cost one position; --no-cache reads the whole context for each, to the same
tokens. On a GPU the step of softmax attention takes kernels of its own, is recorded
once and replayed.
"""
import argparse, codecs, json, math, os, shlex, statistics, sys, time
from pathlib import Path

import torch

from train import (DTYPES, PRESETS, Interrupt, Parser, atomic, beginning, export, fail, find_run, generate, leave, load_checkpoint, load_model,
                   pick_device, pick_dtype, random_model, refusing, timed)

PLAIN = 32               # tokens that --bench times without a recording, each some 50 ms


def read_prompt(text):
    """--prompt -> text; @file is that file's content."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_bytes().decode()
    except OSError as e:
        fail(f"cannot read the prompt {text[1:]} ({e.strerror}); a prompt that begins with @ names a text file")
    except UnicodeDecodeError:
        fail(f"the prompt {text[1:]} is not UTF-8 text")


def stream(tokens, tokenizer, write):
    """Write token ids as text, as soon as their bytes make whole characters, up to one that ends it. -> their number."""
    decoder, n = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for n, token in enumerate(tokens, 1):
        if token == tokenizer.eot_token or token in getattr(tokenizer, "stops", ()):
            break
        write(decoder.decode(tokenizer.decode_bytes([token])))
    write(decoder.decode(b"", final=True))
    return n


@torch.no_grad()
def score(model, tokenizer, text, most=1024):
    """-> the mean loss of a text, read as one document, in windows of up to `most` tokens that know nothing of each other."""
    ids = torch.tensor([*beginning(tokenizer), *tokenizer.encode_ordinary(text)], device=model.embed_tokens.weight.device)
    if len(ids) < 2:
        fail("--score needs a text of at least one token")
    size, nats = min(most, model.cfg.block_size), 0.0
    for i in range(0, len(ids) - 1, size):
        x, y = ids[:-1][None, i:i + size], ids[1:][None, i:i + size]                         # (1, T) each
        nats += float(model(x, y)) * x.shape[1]
    n, length = len(ids) - 1, len(text.encode())
    return {"nats_per_token": nats / n, "bits_per_byte": nats / math.log(2) / length, "tokens": n, "bytes": length}


def bandwidth(device, size=2 ** 28):
    """-> bytes a second that a copy reads and writes, the best of ten."""
    a, b = (torch.zeros(size if device.type == "cpu" else 8 * size, dtype=torch.uint8, device=device) for _ in range(2))
    return max(2 * len(a) / timed(device, lambda: a.copy_(b))[1] for _ in range(10))


def bench(model, name, compiled, prompt, n, warm_up=5):
    """Time a prompt of random tokens and n tokens after it, one sequence, the likeliest token each; -> dict of figures. plain: operator
    by operator, at most PLAIN tokens; recorded: as main does it; compiled: the same, the kernels those of torch.compile. The floor of a
    token is the time to read every weight it needs and the keys and values before it, at the speed of a copy."""
    c, device = model.cfg, model.embed_tokens.weight.device
    if prompt + warm_up + n > c.block_size:
        fail(f"--prompt-tokens {prompt} and --max-tokens {n}, with {warm_up} to warm up, are more than the context of {c.block_size}")
    ids = torch.randint(c.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0)).tolist()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= 0 if c.tied else model.embed_tokens.weight.nbytes
    kept = 2 * c.n_layer * c.n_kv_head * c.head_dim * model.dtype.itemsize * (prompt + n // 2)
    speed = bandwidth(device)
    floor = (weights + kept) / speed
    ways = ["plain", *(["recorded"] if c.attn == "softmax" else []), *(["compiled"] if compiled and c.attn == "softmax" else [])]
    figures = {"model": name, "dtype": str(model.dtype).removeprefix("torch."), "parameters": sum(p.numel() for p in model.parameters()),
               "prompt": prompt, "tokens": n, "bytes_per_token": weights + kept, "copy_gb_per_s": speed / 1e9, "floor_ms": 1e3 * floor}
    for way in ways:
        many = warm_up + (min(n, PLAIN) if way == "plain" else n)
        if way == "compiled":
            torch._inductor.config.coordinate_descent_tuning = True  # products with one row as reductions, tuned: near the floor
            model.compile()
        first = [timed(device, lambda: next(generate(model, ids, 1, 0, recorded=way != "plain")))[1] for _ in range(warm_up)]
        tokens, times = generate(model, ids, many, 0, recorded=way != "plain"), []
        for _ in range(many):
            began = time.perf_counter()
            next(tokens)
            times.append(time.perf_counter() - began)
        token = statistics.median(times[warm_up:])
        figures[way] = {"prompt_ms": 1e3 * min(first), "prompt_tokens_per_s": prompt / min(first), "token_ms": 1e3 * token,
                        "tokens_per_s": 1 / token, "of_floor": floor / token}
    if device.type == "cuda":
        figures["peak_memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def note(path, device, result):
    """Write what came out, by which command and on what, as JSON, if a path is given; -> result."""
    if path:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}, {torch.get_num_threads()} threads"
        command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
        with atomic(Path(path)) as f:
            record = {"command": command, **result, "device": name, "torch": torch.__version__}
            f.write(json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n")
    return result


def main(argv=None):
    """Generate as the flags say; -> dict(text, tokens_per_s, signal), or the figures of --bench or --score."""
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--prompt", default="", help="text to go on with, or @file; empty: a new document")
    flag("--chat", metavar="TEXT", help="a message to answer, or @file, in the chat template of the Hugging Face folder")
    flag("--init", metavar="DIR", help="the run or Hugging Face folder to use (default: the newest run under out/)")
    flag("--max-tokens", type=int, default=300, help="tokens to generate; an end of text ends earlier (default: 300)")
    flag("--temperature", type=float, default=0.8, help="the higher the more surprising; 0: the likeliest only (default: 0.8)")
    flag("--top-k", type=int, default=50, help="choose among the k likeliest tokens, 0: among all (default: 50)")
    flag("--top-p", type=float, default=1.0, help="choose among the fewest that hold this much probability (default: 1)")
    flag("--seed", type=int, default=1337, help="equal seeds give equal texts (default: 1337)")
    flag("--attn", help="the checkpoint's attention by name, if that is a module of yours elsewhere on the path")
    flag("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    flag("--dtype", default="", choices=DTYPES, help="of the activations (default: bf16 on a GPU that has it, else fp32)")
    flag("--cache", action=argparse.BooleanOptionalAction, default=True, help="keep keys and values (default: yes)")
    flag("--export", metavar="DIR", help="write the weights as a Hugging Face folder and end; --dtype converts them")
    flag("--score", metavar="FILE", help="say how well the model foresees this text, and end")
    flag("--bench", action="store_true", help="time a prompt of random tokens and --max-tokens more, and end")
    flag("--model", choices=PRESETS, metavar="NAME", help="for --bench: this shape, as in train.py, with random weights, in place of --init")
    flag("--prompt-tokens", type=int, default=512, help="for --bench: length of the prompt (default: 512)")
    flag("--compile", action=argparse.BooleanOptionalAction, default=False, help="for --bench: time torch.compile, too (default: no)")
    flag("--out", metavar="FILE", help="write the text, the score or the figures there, as JSON")
    args = parser.parse_args(argv)
    for name, good in (("max-tokens", args.max_tokens > 0), ("temperature", args.temperature >= 0), ("top-k", args.top_k >= 0),
                       ("top-p", 0 < args.top_p <= 1), ("seed", args.seed >= 0), ("prompt-tokens", args.prompt_tokens > 0)):
        if not good:
            fail(f"--{name} is {getattr(args, name.replace('-', '_'))}, out of range (--help says what is right)")

    chat = args.chat is not None
    if chat and args.prompt:
        fail("--chat is a message to answer and --prompt a text to go on with; give one of them")
    prompt, device = read_prompt(args.chat if chat else args.prompt), pick_device(args.device)
    run = None if args.bench and args.model else find_run(args.init)
    if args.export:
        export(Path(args.export), load_checkpoint(run), run, DTYPES.get(args.dtype))
        return {}
    dtype = DTYPES[pick_dtype(device, args.dtype)[0]]
    model, tokenizer = load_model(run, device, dtype, args.attn) if run else (random_model(args.model, device, dtype), None)
    size, recorded = model.cfg.block_size, device.type == "cuda" and args.cache and (args.attn or model.cfg.attn) == "softmax"
    if args.bench:
        figures = bench(model, run.name if run else args.model, args.compile, args.prompt_tokens, args.max_tokens)
        print(json.dumps(figures, indent=1))
        return note(args.out, device, figures)
    if args.score:
        result = score(model, tokenizer, read_prompt(f"@{args.score}"))
        print(f"{result['nats_per_token']:.4f} nats/token, {result['bits_per_byte']:.4f} bits/byte over {result['tokens']} tokens")
        return note(args.out, device, result)
    if chat:
        if not hasattr(tokenizer, "chat"):
            fail(f"{run} has no chat template: it is a model of plain text, to be used with --prompt")
        with refusing():
            ids = tokenizer.chat([{"role": "user", "content": prompt}])
    else:
        ids = [*beginning(tokenizer), *map(int, tokenizer.encode_ordinary(prompt))]
    print(f"{run} on {device}", file=sys.stderr)
    if len(ids) > size:
        print(f"the prompt has {len(ids)} tokens, the context {size}: only the last {size} count", file=sys.stderr)

    text, began = [], time.perf_counter()
    with Interrupt() as stop:
        def until_stopped(tokens):
            for token in tokens:
                if stop.signal:
                    return
                yield token

        def write(piece):
            text.append(piece)
            sys.stdout.write(piece)
            sys.stdout.flush()
        write("" if chat else prompt)
        n = stream(until_stopped(generate(model, ids, args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed,
                                          tokenizer.n_vocab, args.cache, recorded)), tokenizer, write)
    speed = n / (time.perf_counter() - began)
    print(flush=True)
    print(f"{n} tokens, {speed:,.0f} a second", file=sys.stderr)
    return note(args.out, device, {"text": "".join(text), "tokens_per_s": speed, "signal": stop.signal})


if __name__ == "__main__":
    leave(main)
