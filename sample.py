"""Sample text from a trained GPT.

python sample.py --prompt "def main("        continue a text with the newest run
python sample.py --init out/NAME             a new document from another run
python sample.py --init ORG/NAME --chat Hi   ask a chat model of huggingface.co
python sample.py --init DIR --export NEW     write it in Hugging Face's format

The text goes to stdout while it is generated, everything else to stderr. A KV
cache keeps the keys and values of earlier tokens. --no-cache recomputes them
for each new token; the text is the same, except for rounding. On a GPU, a model
with softmax attention replays a CUDA graph for each token.
"""

from support import cli

if __name__ == "__main__":
    cli.exit_on_signals()  # Ctrl-C during the imports

import codecs
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial

import torch

import train
from support import data, distributed, files, run_folder
from support.cli import option
from support.distributed import AsyncScalar, print0
from support.kv_cache import KVCache, StaticKVCache

try:
    from kernels import decode as kernels
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernels = None

GREEDY_BELOW = 1e-20  # dividing logits by a much lower temperature would overflow float32

# -- decoding --------------------------------------------------------------------------------------


def is_softmax(config):
    """Return whether every layer has plain softmax attention."""
    return set(config.attn.split(",")) == {"softmax"}


def can_fuse(model):
    """Return whether kernels/decode.py can run this model."""
    weight = model.embed_tokens.weight
    # a compiled model should run as the user compiled it
    if model.is_compiled or not weight.is_cuda or weight.dtype != model.dtype:
        return False
    if kernels is None:
        warnings.warn("decoding is slower without Triton: pip install triton")
        return False
    return model.config.head_dim in kernels.HEAD_DIMS


def last_logits(model, ids, caches=None):
    """Return the logits (V,) after a list of ids, which continue the tokens in the caches."""
    ids = torch.tensor([ids], device=model.embed_tokens.weight.device)
    with torch.compiler.set_stance("force_eager"):  # don't compile for every prompt length
        logits = model(ids, cache=caches)[0, -1]
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite; its weights are damaged")
    return logits


class CUDAGraphDecoder:
    """Decode one text with a softmax GPT: prefill a prompt, then replay a CUDA graph per token.

    A replay is one launch instead of hundreds. The token and its position stay on the device, so
    the next step can start before the host has read the token. On a CPU there is no graph: each
    step runs the model's layers.

    size: how many tokens the KV cache can hold.
    pick: a function that takes logits (V,) and returns a token id, drawn with `generator`.
    """

    def __init__(self, model, size, pick=torch.argmax, generator=None):
        config = model.config
        if not is_softmax(config):
            raise ValueError(f"a static KV cache needs softmax attention, not {config.attn}")
        device = model.embed_tokens.weight.device
        self.model = model
        self.pick = pick
        self.generator = generator
        self.use_kernels = can_fuse(model)  # kernels/decode.py; False: the model's own layers
        self.angles = train.rope_angles(0, size, config.head_dim, config.rope_theta, device)

        # tensors that a step changes in place, so a graph finds them at the same addresses: the
        # last token, the number of tokens before it (which is its position), the caches
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)
        self.caches = [StaticKVCache(config, size, self.length, model.dtype) for _ in model.layers]
        self.graph = None
        self.in_flight = None  # the token of a step that was started early, as an AsyncScalar

    def prefill(self, ids):
        """Run the model on the ids of a prompt, and return the token after it."""
        self.in_flight = None
        self.length.zero_()
        self.token.fill_(self.pick(last_logits(self.model, ids, self.caches)))
        self.length.fill_(len(ids))
        return int(self.token)

    def logits(self):
        """Return the logits (V,) after `token`, and append its keys and values to the caches."""
        if self.use_kernels:
            kv = [(cache.k[0], cache.v[0]) for cache in self.caches]
            return kernels.fused_logits(self.model, self.token, self.length, self.angles, kv)
        return self.model(self.token, cache=self.caches)[0, -1]

    def step(self):
        """Replace `token` with the token after it."""
        self.token.copy_(self.pick(self.logits()))
        self.length += 1

    def capture(self):
        """Capture a step as a CUDA graph. Token, position and generator stay as they are."""
        token = self.token.clone()
        length = self.length.clone()
        state = self.generator.get_state() if self.generator else None

        # Warm up on a side stream, since nothing may be compiled during the capture. Each step
        # changes token and length, so set them back.
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(3):
                self.step()
                self.token.copy_(token)
                self.length.copy_(length)
        torch.cuda.current_stream().wait_stream(side_stream)

        # capture; the warm-up has drawn random numbers, so set the generator back, too
        self.graph = torch.cuda.CUDAGraph()
        if self.generator:
            self.generator.set_state(state)
            self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph, stream=side_stream):
            self.step()

        # The capture queues a reset of the generator's offset (how far it is in its random numbers)
        # on the side stream. Wait for that, or it might undo the offset that a replay sets.
        torch.cuda.current_stream().wait_stream(side_stream)

    def start_step(self):
        """Start a step. Return its token as an AsyncScalar: .read() waits for it."""
        if self.token.is_cuda:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        else:
            self.step()
        return AsyncScalar(self.token)

    def next(self, start_following=False):
        """Return the next token.

        start_following: start the step after this one first, so that the device works on it while
        the host reads the token.
        """
        current = self.in_flight or self.start_step()
        self.in_flight = self.start_step() if start_following else None
        return current.read()[0][0]  # of a tensor (1, 1)


def check_sampling(temperature, top_k, top_p):
    """Raise ValueError if a setting is NaN or out of range."""
    if not 0 <= temperature <= 2**32:
        raise ValueError(f"the temperature is {temperature}; it must be from 0 to 2**32")
    if top_k < 0:
        raise ValueError(f"top-k is {top_k}; it must be at least 1, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p is {top_p}; it must be above 0 and at most 1")


def pick_token(logits, limit, temperature, top_k, top_p, generator):
    """Sample a token id from logits (V,), with the settings of `generate`.

    The host never waits for the device here, so a CUDA graph can capture it.
    """
    logits = logits[:limit]
    if temperature < GREEDY_BELOW:
        return logits.argmax()
    logits = logits / temperature

    # top-k: drop the tokens below the k-th largest logit
    if 0 < top_k < len(logits):
        kth_largest = logits.topk(top_k).values[-1]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)

    # top-p: drop a token if the likelier ones already have probability top_p together. With
    # p = 0.5, 0.3, 0.2, the likelier ones have 0, 0.5, 0.8, so top_p = 0.6 drops the third token.
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)  # order: token ids, likeliest first
        p_of_likelier = p.cumsum(-1) - p
        is_dropped = p_of_likelier >= top_p
        is_dropped[:1].zero_()  # keep the likeliest, even if top_p rounds to 0 in float32
        sorted_logits = logits[order].masked_fill(is_dropped, -torch.inf)
        logits = logits.scatter(0, order, sorted_logits)  # back in the order of token ids

    # Draw from p as torch.multinomial does: if the noise is exponentially distributed, the index of
    # the largest p / noise is i with probability p_i.
    p = logits.softmax(-1)
    noise = torch.empty_like(p).exponential_(generator=generator)
    return (p / noise).argmax()


@torch.no_grad()
def generate(
    model, ids, n, temperature=1.0, top_k=0, top_p=1.0, seed=0, limit=None, cached=True, graph=False
):
    """Yield n token ids that continue ids.

    temperature: divides the logits; 0: take the likeliest token.
    top_k: sample from the k likeliest tokens; 0: from all.
    top_p: sample from the fewest tokens that together have this probability.
    limit: the vocabulary size without padding; ids from here on are never sampled.
    cached: keep keys and values of earlier tokens; False: recompute them for each token.
    graph: decode with a CUDAGraphDecoder; needs softmax attention.

    When the context is full, its older half is dropped and the cache is filled again. So the tokens
    are the same with and without a cache, except for rounding.
    """
    check_sampling(temperature, top_k, top_p)
    vocab_size = model.config.vocab_size
    block_size = model.config.block_size
    context = [int(i) for i in ids][-block_size:]
    if not context:
        raise ValueError("there is no token to continue; give at least one")
    if min(context) < 0 or max(context) >= vocab_size:
        raise ValueError(f"a token id is not in the model's vocabulary of {vocab_size}")

    # sampling
    weight = model.embed_tokens.weight
    generator = None
    if temperature >= GREEDY_BELOW:
        generator = torch.Generator(weight.device).manual_seed(seed)
    settings = {"limit": limit, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    pick = partial(pick_token, generator=generator, **settings)

    # KV cache; it never holds the last of the n tokens, since nothing follows that one
    cache_size = min(block_size, len(context) + n - 1)
    decoder = CUDAGraphDecoder(model, cache_size, pick, generator) if graph else None
    caches = None
    n_cached = 0  # tokens of the context that are in the cache

    for i in range(n):
        if len(context) > block_size:  # drop the older half, and fill the cache again
            context = context[-max(1, block_size // 2) :]
            n_cached = 0
        with torch.cuda.device_of(weight):  # events and Triton use the current device
            if not graph:
                if cached and n_cached == 0:
                    caches = [KVCache(cache_size) for _ in model.layers]
                token = int(pick(last_logits(model, context[n_cached:], caches)))
            elif n_cached == 0:
                token = decoder.prefill(context)
            else:
                has_following = i + 1 < n and len(context) < block_size
                token = decoder.next(start_following=has_following)
        if cached or graph:
            n_cached = len(context)
        context.append(token)
        yield token


# -- text and command ------------------------------------------------------------------------------


def first_ids(tokenizer):
    """Return the ids that a document starts with.

    These are the tokenizer's `start` ids, or if it has none, its end-of-text token.
    """
    if getattr(tokenizer, "start", None):
        return list(tokenizer.start)
    return [] if tokenizer.eot_token is None else [tokenizer.eot_token]


def decode_stream(tokens, tokenizer, stop=None):
    """Yield the text of each token, up to an end-of-text token, and then that of leftover bytes.

    A token may end in the middle of a character. The bytes of this character then come with the
    next token. Invalid UTF-8 becomes U+FFFD. stop: a StopSignal, which ends the text early.
    """
    end_ids = {tokenizer.eot_token, *getattr(tokenizer, "stops", ())}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token in end_ids or (stop and stop.now):
            break
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


@dataclass
class SampleConfig:
    """Sampling"""

    init: str = option("newest", "a run, Hugging Face folder or ORG/NAME, or the newest run")
    prompt: str = option("", "text to continue, or @FILE; default: a new document")
    chat: str = option("", "message to answer, or @FILE, in the model's chat template")
    max_tokens: int = option(300, "tokens to generate; an end-of-text token ends earlier")
    temperature: float = option(0.8, "the higher, the more surprising; 0: the likeliest", least=0)
    top_k: int = option(50, "sample from the k likeliest tokens; 0: from all", least=0)
    top_p: float = option(1.0, "sample from the fewest tokens with this probability", least=0)
    seed: int = option(1337, "the same seed gives the same text", least=0)
    attn: str = option("", "use this attention instead of the checkpoint's")
    device: str = option("", "cpu, cuda, cuda:1 or mps; default: the best there is")
    dtype: str = option("", "default: bf16 on a GPU that has it", choices=list(train.DTYPES))
    cache: bool = option(True, "keep the keys and values of earlier tokens")
    export: str = option("", "write the weights as a Hugging Face folder, and end")

    def __post_init__(self):
        cli.check_fields(self)
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.chat and self.prompt:
            raise ValueError("--chat answers a message, --prompt continues a text; give one")


def read_prompt(text):
    """Return the text of --prompt or --chat. For @FILE return the content of the file."""
    if not text.startswith("@"):
        return text
    path = text[1:]
    content = files.read_user_file(path)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = None
    if text is None or "\0" in text:
        raise ValueError(f"the prompt file {path!r} is not UTF-8 text")
    return text


def encode_prompt(config, tokenizer, prompt):
    """Return the token ids of the start of a document, or with --chat of a user's message."""
    if not config.chat:
        return [*first_ids(tokenizer), *tokenizer.encode_ordinary(prompt)]
    if not hasattr(tokenizer, "chat"):
        raise ValueError(f"{config.init} has no chat template; continue a text with --prompt")
    return tokenizer.chat([{"role": "user", "content": prompt}])


def export(folder, run, attn=None, dtype=None, is_trusted=False):
    """Write the weights of a run as a Hugging Face folder, with adapters merged.

    attn, is_trusted: as in train.load_model. dtype: of the tensors; None: see huggingface.export.
    """
    from support import huggingface

    model, tokenizer = train.load_model(run, attn=attn, is_trusted=is_trusted)
    state = data.tokenizer_state(tokenizer)
    huggingface.export(folder, model.state_dict(), asdict(model.config), state, dtype)


def show_sample(model, tokenizer, n, seed, stop):
    """Print a new document of up to n tokens. stop: a StopSignal, which ends it early."""
    ids = first_ids(tokenizer) or [0]
    settings = {"temperature": 0.8, "top_k": 50, "seed": seed, "limit": tokenizer.n_vocab}
    tokens = generate(model.eval(), ids, n, **settings)
    text = "".join(decode_stream(tokens, tokenizer, stop))
    print0(f"sample   {text}")


def main(argv=None):
    """Generate a text from the command line; return {"text", "tokens_per_s", "signal"}.

    signal: the one that ended it, or 0.
    """
    plugin_flags = {"attn": train.PLUGINS["attn"]}
    # lambda: no flag changes the defaults of others, as a preset of train.py does
    (config,) = cli.parse_configs(argv, __doc__, [SampleConfig], plugin_flags, lambda given: {})
    prompt = read_prompt(config.chat or config.prompt)
    run = run_folder.find_run(config.init)
    if config.export:
        export(config.export, run, config.attn or None, train.DTYPES.get(config.dtype))
        return {}

    # model and prompt
    device = distributed.pick_device(config.device)
    dtype = train.DTYPES[distributed.pick_dtype(config.dtype, device)]
    model, tokenizer = train.load_model(run, device, dtype, config.attn or None)
    ids = encode_prompt(config, tokenizer, prompt)
    block_size = model.config.block_size
    print(f"{run} on {device}", file=sys.stderr)
    if len(ids) > block_size:
        message = f"the prompt has {len(ids)} tokens; the last {block_size} count as context"
        print(message, file=sys.stderr)

    # generate
    settings = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    settings |= {"seed": config.seed, "limit": tokenizer.n_vocab, "cached": config.cache}
    graph = config.cache and device.type == "cuda" and is_softmax(model.config)
    tokens = generate(model, ids, config.max_tokens, graph=graph, **settings)

    # print each piece of text as it comes; a signal ends the text after the current token
    start = "" if config.chat else prompt
    pieces = []
    start_time = time.perf_counter()
    with distributed.StopSignal() as stop:
        print(start, end="", flush=True)
        for piece in decode_stream(tokens, tokenizer, stop):
            print(piece, end="", flush=True)
            pieces.append(piece)
    print(flush=True)

    n_tokens = len(pieces) - 1  # the last piece is text of leftover bytes
    text = start + "".join(pieces)
    tokens_per_s = n_tokens / (time.perf_counter() - start_time)
    print(f"{n_tokens} tokens, {tokens_per_s:,.0f} per second", file=sys.stderr)
    return {"text": text, "tokens_per_s": tokens_per_s, "signal": stop.now}


if __name__ == "__main__":
    cli.run_main(main)
