"""Let a trained GPT go on with a text.

python sample.py --prompt "def main("       the newest run under out/
python sample.py --init out/NAME            another run
python sample.py --prompt @my.txt           a prompt from a file
python sample.py --temperature 0            always the likeliest token

The text streams to stdout, all else goes to stderr. Kept keys and values make a
token cost one position; --no-cache reads the whole context for each, to the same
tokens.
"""
import argparse, codecs, os, sys, time
from pathlib import Path

from train import DTYPES, Interrupt, Parser, fail, find_run, generate, load_model, pick_device, pick_dtype


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
    """Write token ids as text, as soon as their bytes make whole characters, up to the end-of-text token. -> their number."""
    decoder, n = codecs.getincrementaldecoder("utf-8")("replace"), 0
    for n, token in enumerate(tokens, 1):
        if token == tokenizer.eot_token:
            break
        write(decoder.decode(tokenizer.decode_bytes([token])))
    write(decoder.decode(b"", final=True))
    return n


def main(argv=None):
    """Generate as the flags say; -> dict(text, tokens_per_s, signal)."""
    parser = Parser(description=__doc__)
    flag = parser.add_argument
    flag("--prompt", default="", help="text to go on with, or @file; empty: a new document")
    flag("--init", metavar="DIR", help="the run to use (default: the newest under out/)")
    flag("--max-tokens", type=int, default=300, help="tokens to generate; an end of text ends earlier (default: 300)")
    flag("--temperature", type=float, default=0.8, help="the higher the more surprising; 0: the likeliest only (default: 0.8)")
    flag("--top-k", type=int, default=50, help="choose among the k likeliest tokens, 0: among all (default: 50)")
    flag("--top-p", type=float, default=1.0, help="choose among the fewest that hold this much probability (default: 1)")
    flag("--seed", type=int, default=1337, help="equal seeds give equal texts (default: 1337)")
    flag("--attn", help="the checkpoint's attention by name, if that is a module of yours elsewhere on the path")
    flag("--device", help="cpu, cuda, mps (default: a GPU if there is one)")
    flag("--dtype", default="", choices=DTYPES, help="of the activations (default: bf16 on a GPU that has it, else fp32)")
    flag("--cache", action=argparse.BooleanOptionalAction, default=True, help="keep keys and values (default: yes)")
    args = parser.parse_args(argv)
    for name, good in (("max-tokens", args.max_tokens > 0), ("temperature", args.temperature >= 0), ("top-k", args.top_k >= 0),
                       ("top-p", 0 < args.top_p <= 1), ("seed", args.seed >= 0)):
        if not good:
            fail(f"--{name} is {getattr(args, name.replace('-', '_'))}, out of range (--help says what is right)")

    prompt, run, device = read_prompt(args.prompt), find_run(args.init), pick_device(args.device)
    model, tokenizer = load_model(run, device, DTYPES[pick_dtype(device, args.dtype)[0]], args.attn)
    ids = [tokenizer.eot_token, *map(int, tokenizer.encode_ordinary(prompt))]
    size = model.cfg.block_size
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
        write(prompt)
        n = stream(until_stopped(generate(model, ids, args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed,
                                          tokenizer.n_vocab, args.cache)), tokenizer, write)
    speed = n / (time.perf_counter() - began)
    print(flush=True)
    print(f"{n} tokens, {speed:,.0f} a second", file=sys.stderr)
    return {"text": "".join(text), "tokens_per_s": speed, "signal": stop.signal}


if __name__ == "__main__":
    try:
        signum = main()["signal"]
    except BrokenPipeError:                                          # the reader, head for one, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        signum = 0
    sys.exit(128 + signum if signum else 0)
