"""Sample text from a trained GPT.

python sample.py --prompt "def main("         the newest run under out/
python sample.py --init out/NAME              another run, from the start
python sample.py --prompt @my.txt             a prompt from a file
python sample.py --temperature 0              always the likeliest token
python sample.py --init DIR --chat "Hi!"      a Hugging Face chat model
python sample.py --init DIR --export NEW      a Hugging Face folder of it

The text goes to stdout as it is generated, all else to stderr. With the KV
cache a token costs one position; --no-cache reads the whole context for each
token, to the same text. On a GPU a model with softmax attention decodes by
replaying a CUDA graph of one step.
"""

from support import cli

if __name__ == "__main__":
    cli.exit_on_signals()  # Ctrl-C during the imports

import codecs
import itertools
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial

import torch

import train
from support import data, distributed, files, plugins, run_folder
from support.cli import option
from support.distributed import AsyncScalar, print0
from support.kv_cache import KVCache, StaticKVCache

try:
    from kernels import decode as kernels
except ModuleNotFoundError as missing:
    if missing.name != "triton":
        raise
    kernels = None

GREEDY_BELOW = 1e-20  # at a lower temperature, logits / temperature would overflow float32

# --------------------------------------------------------------------------------------------------
# Decoding


def is_softmax(config):
    """Return whether every layer has plain softmax attention."""
    return all(plugins.parse_spec(spec)[0] == "softmax" for spec in config.attn.split(","))


def can_fuse(model):
    """Return whether kernels/decode.py can compute this model's steps.

    They need a GPU, matrices in the dtype of the activations and a supported head dimension. If
    the user called .compile(), skip them.
    """
    weight = model.embed_tokens.weight
    if not weight.is_cuda or weight.dtype != model.dtype or model.is_compiled:
        return False
    if kernels is None:
        warnings.warn("decoding is slower without Triton: pip install triton")
        return False
    return model.config.head_dim in kernels.HEAD_DIMS


def last_logits(model, ids, caches=None):
    """Return the logits (V,) after ids, a list that continues what is cached."""
    ids = torch.tensor([ids], device=model.embed_tokens.weight.device)
    with torch.compiler.set_stance("force_eager"):  # or every length would be compiled
        logits = model(ids, cache=caches)[0, -1]
    if not logits.isfinite().all():
        raise FloatingPointError("the model's logits are not finite; its weights are damaged")
    return logits


class CUDAGraphDecoder:
    """Decode one text with a softmax GPT: prefill a prompt, then replay a CUDA graph per token.

    A replay costs one launch instead of hundreds. Token and position stay on the device, so the
    next step can be in flight before the host knows the token. On a CPU the step runs uncaptured.

    size: the most positions. pick: logits (V,) -> token id, on the device, with random numbers from
    `generator`. use_kernels: kernels/decode.py instead of the model's own layers; None: if it can.
    """

    def __init__(self, model, size, pick=torch.argmax, generator=None, use_kernels=None):
        config = model.config
        if not is_softmax(config):
            raise ValueError(f"a static KV cache needs softmax attention, not {config.attn}")
        device = model.embed_tokens.weight.device
        self.model = model
        self.pick = pick
        self.generator = generator
        self.use_kernels = can_fuse(model) if use_kernels is None else use_kernels
        self.angles = train.rope_angles(0, size, config.head_dim, config.rope_theta, device)
        self.token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self.length = torch.zeros(1, dtype=torch.int64, device=device)  # position of `token`
        self.caches = []
        for _ in model.layers:
            self.caches.append(StaticKVCache(config, size, self.length, model.dtype))
        self.graph = None
        self.in_flight = None

    def prefill(self, ids):
        """Read a prompt from the start of the text, and return the token after it."""
        self.in_flight = None
        self.length.zero_()
        self.token.fill_(self.pick(last_logits(self.model, ids, self.caches)))
        self.length.fill_(len(ids))
        return int(self.token)

    def logits(self):
        """Return the logits (V,) after `token`, which enters the cache."""
        if self.use_kernels:
            kv = [(cache.k[0], cache.v[0]) for cache in self.caches]
            return kernels.fused_logits(self.model, self.token, self.length, self.angles, kv)
        return self.model(self.token, cache=self.caches)[0, -1]

    def step(self):
        self.token.copy_(self.pick(self.logits()))
        self.length += 1

    def capture(self):
        """Capture a step as a CUDA graph; token, position and generator stay as they are."""
        token = self.token.clone()
        length = self.length.clone()
        state = self.generator.get_state() if self.generator else None

        # warm up: what is compiled or tuned must be so before the capture
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            for _ in range(3):
                self.step()
                self.token.copy_(token)
                self.length.copy_(length)
        torch.cuda.current_stream().wait_stream(side_stream)

        # capture
        self.graph = torch.cuda.CUDAGraph()
        if self.generator:
            self.generator.set_state(state)
            self.graph.register_generator_state(self.generator)
        with torch.cuda.graph(self.graph, stream=side_stream):
            self.step()
        # the capture resets the generator's offset on its stream: no replay may overtake that
        torch.cuda.current_stream().wait_stream(side_stream)

    def launch(self):
        """Start a step, and return its token, to be read later."""
        if not self.token.is_cuda:
            self.step()
        else:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        return AsyncScalar(self.token)

    def next(self, more=False):
        """Return the next token. more: start the step after it, too, to keep the GPU busy."""
        current = self.in_flight or self.launch()
        self.in_flight = self.launch() if more else None
        return current.read()[0][0]


def check_sampling(temperature, top_k, top_p):
    """Raise ValueError if a setting is out of range, or NaN."""
    if not 0 <= temperature <= 2**32:
        raise ValueError(f"the temperature is {temperature}; it must be from 0 to 2**32")
    if top_k < 0:
        raise ValueError(f"top-k is {top_k}; it must be at least 1, or 0 for all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p is {top_p}; it must be above 0 and at most 1")


def pick_token(logits, limit, temperature, top_k, top_p, generator):
    """Sample a token id from logits (V,). Never waits for the device, so it can be captured."""
    logits = logits[:limit]
    if temperature < GREEDY_BELOW:
        return logits.argmax()
    logits = logits / temperature
    if 0 < top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -torch.inf)
    if top_p < 1:
        p, order = logits.softmax(-1).sort(descending=True)
        is_dropped = p.cumsum(-1) - p >= top_p  # the likelier ones hold that much already
        is_dropped[:1].zero_()  # also where top_p is 0 in float32
        is_dropped = torch.empty_like(is_dropped).scatter_(0, order, is_dropped)
        logits = logits.masked_fill(is_dropped, -torch.inf)
    p = logits.softmax(-1)
    # argmax of p / Exp(1) is a sample of p, as in torch.multinomial
    return (p / torch.empty_like(p).exponential_(generator=generator)).argmax()


@torch.no_grad()
def generate(
    model, ids, n, temperature=1.0, top_k=0, top_p=1.0, seed=0, limit=None, cached=True, graph=False
):
    """Yield n token ids that continue ids.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest (0: all), top_p the fewest
    that hold this much probability. limit: ids from here on are padding of the vocabulary, never
    sampled. When the context is full its older half is dropped and the rest read again, so that
    cached=False, which recomputes everything for each token, gives the same tokens. graph: decode
    with a CUDAGraphDecoder; needs softmax attention.
    """
    check_sampling(temperature, top_k, top_p)
    vocab_size = model.config.vocab_size
    size = model.config.block_size
    window = [int(i) for i in ids][-size:]
    if not window:
        raise ValueError("there is no token to continue; give at least one")
    if min(window) < 0 or max(window) >= vocab_size:
        raise ValueError(f"a token id is not in the model's vocabulary of {vocab_size}")
    room = min(size, len(window) + n - 1)  # a short text need not allocate the whole context

    weight = model.embed_tokens.weight
    generator = None
    if temperature >= GREEDY_BELOW:
        generator = torch.Generator(weight.device).manual_seed(seed)
    settings = {"limit": limit, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    pick = partial(pick_token, generator=generator, **settings)

    decoder = CUDAGraphDecoder(model, room, pick, generator) if graph else None
    caches = None
    n_cached = 0  # tokens of the window whose keys and values are in the cache
    for i in range(n):
        if len(window) > size:
            window = window[-max(1, size // 2) :]
            n_cached = 0
        with torch.cuda.device_of(weight):  # events and Triton use the current device
            if graph and n_cached:
                token = decoder.next(more=i + 1 < n and len(window) < size)
            elif graph:
                token = decoder.prefill(window)
            else:
                if cached and not n_cached:
                    caches = [KVCache(room) for _ in model.layers]
                token = int(pick(last_logits(model, window[n_cached:], caches)))
        if cached or graph:
            n_cached = len(window)
        window.append(token)
        yield token


# --------------------------------------------------------------------------------------------------
# Text


def first_ids(tokenizer):
    """Return the ids before a document: the tokenizer's own, else its end-of-text token."""
    if getattr(tokenizer, "start", None):
        return list(tokenizer.start)
    return [] if tokenizer.eot_token is None else [tokenizer.eot_token]


def decode_stream(tokens, tokenizer):
    """Yield the text of each token id, up to one that ends the text, and then what is left.

    Bytes that are not a whole character yet are held back; what is not UTF-8 becomes U+FFFD.
    """
    last_ids = {tokenizer.eot_token, *getattr(tokenizer, "stops", ())}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if token in last_ids:
            break
        yield decoder.decode(tokenizer.decode_bytes([token]))
    yield decoder.decode(b"", final=True)


# --------------------------------------------------------------------------------------------------
# The command


@dataclass
class SampleConfig:
    """Sampling"""

    init: str = option("newest", "run or Hugging Face folder; newest: the newest run under out/")
    prompt: str = option("", "text to continue, or @FILE; default: a new document")
    chat: str = option("", "message to answer, or @FILE, in the model's chat template")
    max_tokens: int = option(300, "tokens to generate; an end-of-text token ends earlier")
    temperature: float = option(0.8, "the higher, the more surprising; 0: the likeliest", least=0)
    top_k: int = option(50, "sample from the k likeliest tokens; 0: from all", least=0)
    top_p: float = option(1.0, "sample from the fewest tokens that hold this much probability")
    seed: int = option(1337, "equal seeds give equal texts", least=0)
    attn: str = option("", "use this attention instead of the checkpoint's")
    device: str = option("", "cpu, cuda, cuda:1 or mps; default: the best there is")
    dtype: str = option("", "default: bf16 on a GPU that has it", choices=list(train.DTYPES))
    cache: bool = option(True, "keep keys and values")
    export: str = option("", "write the weights as a Hugging Face folder, and end")

    def __post_init__(self):
        cli.check_fields(self)
        check_sampling(self.temperature, self.top_k, self.top_p)
        if self.chat and self.prompt:
            raise ValueError("--chat answers a message, --prompt continues a text; give one")


def read_prompt(text):
    """Return the text of --prompt or --chat; @FILE stands for the content of that file."""
    if not text.startswith("@"):
        return text
    path = text[1:]
    try:
        text = files.read_user_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise ValueError(f"the prompt file {path!r} is not UTF-8 text")
    return text


def encode_prompt(config, tokenizer, prompt):
    """Return the ids to continue: of a document that begins with the prompt, or of a chat."""
    if not config.chat:
        return [*first_ids(tokenizer), *tokenizer.encode_ordinary(prompt)]
    if not hasattr(tokenizer, "chat"):
        raise ValueError(f"{config.init} has no chat template; continue a text with --prompt")
    return tokenizer.chat([{"role": "user", "content": prompt}])


def export(folder, run, attn=None, dtype=None, is_trusted=False):
    """Write the weights of a run, adapters merged, as a Hugging Face folder."""
    from support import huggingface

    model, tokenizer = train.load_model(run, attn=attn, is_trusted=is_trusted)
    state = data.tokenizer_state(tokenizer)
    huggingface.export(folder, model.state_dict(), asdict(model.config), state, dtype)


def show_sample(model, tokenizer, n, seed, stop):
    """Print text of up to n tokens that the model writes at the start of a document."""
    start = first_ids(tokenizer) or [0]
    limit = tokenizer.n_vocab
    settings = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "seed": seed, "limit": limit}
    ids = []
    with torch.compiler.set_stance("force_eager"):  # it would compile each length
        for token in generate(model.eval(), start, n, **settings):
            if token == tokenizer.eot_token or stop.now:
                break
            ids.append(token)
    print0(f"sample   {tokenizer.decode_bytes(ids).decode(errors='replace')}")


def main(argv=None):
    """Generate as the flags say; return the text, tokens_per_s, and the signal that ended it."""
    plugins = {"attn": train.PLUGINS["attn"]}
    config = cli.parse_configs(argv, __doc__, [SampleConfig], plugins, lambda given: {})[0]
    if config.export:
        dtype = train.DTYPES.get(config.dtype)
        export(config.export, run_folder.find_run(config.init), config.attn or None, dtype)
        return {}

    # model and prompt
    prompt = read_prompt(config.chat or config.prompt)
    device = distributed.pick_device(config.device)
    dtype = train.DTYPES[distributed.pick_dtype(config.dtype, device)]
    run = run_folder.find_run(config.init)
    model, tokenizer = train.load_model(run, device, dtype, config.attn or None)
    ids = encode_prompt(config, tokenizer, prompt)
    size = model.config.block_size
    print(f"{run} on {device}", file=sys.stderr)
    if len(ids) > size:
        print(f"the prompt has {len(ids)} tokens; the last {size} count", file=sys.stderr)

    # stream the text; a signal ends it after the current token
    graph = config.cache and device.type == "cuda" and is_softmax(model.config)
    settings = (config.temperature, config.top_k, config.top_p, config.seed, tokenizer.n_vocab)
    tokens = generate(model, ids, config.max_tokens, *settings, config.cache, graph)
    text = "" if config.chat else prompt
    n_pieces = 0
    start_time = time.perf_counter()
    with distributed.StopSignal() as stop:
        tokens = itertools.takewhile(lambda token: not stop.now, tokens)
        print(text, end="", flush=True)
        for piece in decode_stream(tokens, tokenizer):
            print(piece, end="", flush=True)
            text += piece
            n_pieces += 1
    print(flush=True)

    n_tokens = n_pieces - 1  # the last piece is what is left of the text
    tokens_per_s = n_tokens / (time.perf_counter() - start_time)
    print(f"{n_tokens} tokens, {tokens_per_s:,.0f} per second", file=sys.stderr)
    return {"text": text, "tokens_per_s": tokens_per_s, "signal": stop.now}


if __name__ == "__main__":
    cli.run_main(main)
