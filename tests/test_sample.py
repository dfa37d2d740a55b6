"""sample.py: KV caches, sampling, decoding. The command is in test_sample_command.py."""

import math

import pytest
import torch

import sample
import train
from tests.common import gpu, small_gpt


def windowed_softmax(q, k, v, window):
    """Compute softmax attention to the last `window` positions, each query's own included."""
    Tq = q.shape[2]
    Tk = k.shape[2]
    i = torch.arange(Tk - Tq, Tk)[:, None]
    j = torch.arange(Tk)
    is_seen = (j <= i) & (j > i - window)
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * q.shape[3] ** -0.5
    return scores.masked_fill(~is_seen, -torch.inf).softmax(-1) @ v


def two_windows(q, k, v, k2, v2, *, w1=5, w2=3, scale=1.0):
    """A plug-in with five inputs and two windows."""
    return windowed_softmax(q, k, v, w1) + scale * windowed_softmax(q, k2, v2, w2)


two_windows.windows = {"k": "w1", "v": "w1", "k2": "w2", "v2": "w2"}


def five_inputs(q, k, v, k2, v2, *, power=1):
    """A plug-in with five inputs and no window."""
    return train.softmax_attention(q, k + k2**power, v * v2)


@pytest.fixture(autouse=True)
def plugins(monkeypatch):
    monkeypatch.setitem(train.PLUGINS["attn"][1], "two_windows", two_windows)
    monkeypatch.setitem(train.PLUGINS["attn"][1], "five_inputs", five_inputs)


def generate(model, ids, n, **settings):
    return list(sample.generate(model, ids, n, **settings))


def greedy_by_hand(model, ids, n):
    """Return the likeliest tokens, each from a forward pass over the whole context."""
    size = model.config.block_size
    window = list(ids)[-size:]
    tokens = []
    for _ in range(n):
        if len(window) > size:
            window = window[-max(1, size // 2) :]
        token = int(model(torch.tensor([window]))[0, -1].argmax())
        tokens.append(token)
        window.append(token)
    return tokens


# -- KV caches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attn", ["softmax", "five_inputs", "two_windows", "two_windows:w1=1:w2=99"]
)
@torch.no_grad()
def test_kv_cache_gives_the_logits_of_a_whole_pass(attn):
    model = small_gpt(torch.float64, attn=f"softmax,{attn}", n_kv_head=2, block_size=64)
    ids = torch.randint(64, (1, 40), generator=torch.Generator().manual_seed(1))
    caches = [sample.KVCache(64) for _ in model.layers]
    start = 0
    for end in [9, 12, 13, 14, 21, 23, *range(24, 41)]:
        logits = model(ids[:, start:end], cache=caches)
        assert logits.shape == (1, 1, 64)
        whole = model(ids[:, :end])[0, -1]
        assert torch.allclose(logits[0, -1], whole, atol=1e-9), f"positions {start} to {end}"
        for cache in caches:
            assert cache.length == end
        start = end


@torch.no_grad()
def test_ring_tensors_do_not_grow():
    model = small_gpt(attn="softmax,two_windows", block_size=64)
    caches = [sample.KVCache(20) for _ in model.layers]
    softmax_cache, windowed_cache = caches
    for start, end in [(0, 9), (9, 10), (10, 20)]:
        model(torch.zeros(1, end - start, dtype=torch.int64), cache=caches)
        assert [t.shape[2] for t in softmax_cache.tensors] == [20, 20]  # k, v
        assert [t.shape[2] for t in windowed_cache.tensors] == [5, 5, 3, 3]  # k, v, k2, v2
    with pytest.raises(ValueError, match="room for 20 positions, not for 21"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=caches)

    # a window that is larger than the cache
    caches = [sample.KVCache(4) for _ in model.layers]
    model(torch.zeros(1, 1, dtype=torch.int64), cache=caches)
    assert [t.shape[2] for t in caches[1].tensors] == [4, 4, 3, 3]


@pytest.mark.parametrize("T", [1, 2])
def test_ring_buffer_slots(T):
    """Position t lives in slot t % w, whether T = 1 or 2 positions come at once."""
    w = 5
    cache = sample.KVCache(12)
    for start in range(0, 12, T):
        end = start + T
        positions = torch.arange(start, end, dtype=torch.float32).view(1, 1, T, 1)
        visible, visible_without_window = cache.extend([w, None], [positions, -positions])

        # the ring holds the last w positions, each in its slot
        ring = cache.tensors[0].flatten().tolist()
        for t in range(max(0, end - w), end):
            assert ring[t % w] == t

        # a single query gets the ring, in any order; several queries also get the w positions
        # before the first of them
        first_visible = max(0, end - w) if T == 1 else max(0, start - w)
        assert sorted(visible.flatten().tolist()) == list(range(first_visible, end))
        assert visible_without_window.flatten().tolist() == [-t for t in range(end)]


@pytest.mark.parametrize(
    "shape", [{}, {"n_kv_head": 2, "qk_norm": True}, {"n_kv_head": 1, "qkv_bias": True}], ids=str
)
@torch.no_grad()
def test_static_cache_gives_the_logits_of_a_whole_pass(shape):
    model = small_gpt(torch.float64, **shape)
    for prompt in ([5], [5, 6, 7, 8, 9]):
        decoder = sample.CUDAGraphDecoder(model, 16)
        token = decoder.prefill(prompt)
        assert token == int(model(torch.tensor([prompt]))[0, -1].argmax())
        ids = [*prompt, token]
        while len(ids) < 16:
            whole = model(torch.tensor([ids]))[0, -1]
            assert torch.allclose(decoder.logits(), whole, atol=1e-9), f"position {len(ids) - 1}"
            token = decoder.next()
            assert token == int(whole.argmax())
            ids.append(token)
        assert int(decoder.length) == 15
        assert int(decoder.token) == token


@torch.no_grad()
def test_decoder_runs_a_step_ahead_and_starts_over():
    model = small_gpt()
    expected = greedy_by_hand(model, [5, 6, 7], 13)
    decoder = sample.CUDAGraphDecoder(model, 16)
    for _ in range(2):
        tokens = [decoder.prefill([5, 6, 7])]
        for _ in range(5):
            tokens.append(decoder.next(start_following=True))
        assert tokens == expected[:6]
        assert int(decoder.length) == 3 + 6, "5 tokens are read, so step 6 should be in flight"
    for _ in range(6):
        tokens.append(decoder.next(start_following=True))
    tokens.append(decoder.next())
    assert tokens == expected
    assert decoder.in_flight is None
    with pytest.raises(ValueError, match="softmax attention, not softmax,two_windows"):
        sample.CUDAGraphDecoder(small_gpt(attn="softmax,two_windows"), 16)


def test_decoder_does_not_compile_a_prompt_and_compiles_one_step():
    model = small_gpt(n_kv_head=2, qkv_bias=True)
    plain = generate(model, [5, 6, 7], 40, temperature=0)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for module in (*model.layers, model.norm):
        module.compile(backend="eager", fullgraph=True)
    assert generate(model, [5, 6, 7], 40, temperature=0) == plain
    assert not counters["stats"], "without a CUDA graph nothing should be compiled"
    assert generate(model, [5, 6, 7], 40, temperature=0, graph=True) == plain
    unique_graphs = counters["stats"]["unique_graphs"]
    assert unique_graphs == 2, "layers share one compiled graph; the final norm has the other"


def test_which_models_decode_with_a_graph_and_with_kernels(monkeypatch):
    assert sample.is_softmax(train.GPTConfig(attn="softmax,softmax"))
    for attn in ("laser", "softmax,laser", "two_windows:w1=4,softmax"):
        assert not sample.is_softmax(train.GPTConfig(attn=attn))

    # without a GPU, let the model's embedding claim to be on one
    class WeightOnCUDA:
        is_cuda = True
        dtype = torch.float32

    class EmbeddingOnCUDA(torch.nn.Embedding):
        weight = WeightOnCUDA

    model = small_gpt(head_dim=16)
    assert not sample.can_fuse(model), "the kernels cannot run on a CPU"
    model.embed_tokens.__class__ = EmbeddingOnCUDA
    if sample.kernels is not None:
        assert sample.can_fuse(model)
        model.config.head_dim = 48
        assert not sample.can_fuse(model), "there is no kernel for heads of 48 channels"
        model.config.head_dim = 16

    model.dtype = torch.bfloat16
    assert not sample.can_fuse(model), "weights in float32 do not fit a model in bfloat16"
    model.dtype = torch.float32

    model.compile()
    assert not sample.can_fuse(model), "a compiled model should run as the user compiled it"
    model.is_compiled = False

    monkeypatch.setattr(sample, "kernels", None)
    with pytest.warns(UserWarning, match="pip install triton"):
        assert not sample.can_fuse(model)


# -- sampling a token ------------------------------------------------------------------------------


def sample_counts(logits, n, **settings):
    """Return how often each token comes in n samples."""
    generator = torch.Generator().manual_seed(0)
    settings = {"limit": None, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    logits = torch.tensor(logits, dtype=torch.float32)
    counts = [0] * len(logits)
    for _ in range(n):
        token = int(sample.pick_token(logits, generator=generator, **settings))
        counts[token] += 1
    return counts


def sampled_tokens(logits, **settings):
    """Return the set of tokens that come in 200 samples."""
    counts = sample_counts(logits, 200, **settings)
    return {token for token, count in enumerate(counts) if count}


LOGITS = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0, 1e9])
def test_temperature_divides_the_logits(temperature):
    n = 4000
    expected = (torch.tensor(LOGITS) / temperature).softmax(0)
    counts = torch.tensor(sample_counts(LOGITS, n, temperature=temperature))
    standard_error = (0.25 / n) ** 0.5  # at most, reached at probability 1/2
    assert (counts / n - expected).abs().max() < 4 * standard_error


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-300, 1e-40, 1e-38, 1e-20, 1e-6])
def test_cold_means_the_likeliest(temperature):
    assert sampled_tokens(LOGITS, temperature=temperature) == {1}
    assert sampled_tokens([1e4, 1e4 - 1, -1e4], temperature=temperature) == {0}
    model = small_gpt()
    cold = generate(model, [5], 30, temperature=temperature)
    assert cold == generate(model, [5], 30, temperature=0)


def test_hot_means_uniform_among_what_top_k_and_top_p_leave():
    hot = 2.0**32
    assert min(sample_counts([5.0, -5.0, 0.0, 3.0], 400, temperature=hot)) > 50
    assert sampled_tokens([5.0, -5.0, 0.0, 3.0], temperature=hot, top_k=2) == {0, 3}


def test_top_k():
    assert sampled_tokens(LOGITS, top_k=1) == {1}
    assert sampled_tokens(LOGITS, top_k=2) == {1, 3}
    assert sampled_tokens(LOGITS, top_k=3) == {1, 2, 3}
    for top_k in (0, 4, 5, 10**9):
        assert sampled_tokens(LOGITS, top_k=top_k) == {0, 1, 2, 3}


def test_top_p():
    # four tokens of probability 1/4 each, which is exact
    for top_p, n in ((0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (0.75, 3), (0.76, 4), (1.0, 4)):
        assert len(sampled_tokens([0.0] * 4, top_p=top_p)) == n

    assert sampled_tokens(LOGITS, top_p=0.39) == {1}
    assert sampled_tokens(LOGITS, top_p=0.41) == {1, 3}
    assert sampled_tokens(LOGITS, top_p=0.85) == {1, 2, 3}
    for top_p in (1e-6, 1e-40, 1e-300):
        assert sampled_tokens(LOGITS, top_p=top_p) == {1}
        assert sampled_tokens([3.0] * 5, top_p=top_p).issubset(range(5))

    # top-k comes before top-p: among three tokens, the likeliest has probability 4/9
    assert sampled_tokens(LOGITS, top_k=3, top_p=0.42) == {1}

    # the temperature comes first: at 0.5, the likeliest has probability 16/30
    assert sampled_tokens(LOGITS, temperature=0.5, top_p=0.5) == {1}


def test_padding_of_the_vocabulary_is_never_sampled():
    assert sampled_tokens([0.0, 1.0, 50.0, 60.0], limit=2) == {0, 1}
    assert sampled_tokens([0.0, 1.0, 50.0, 60.0], limit=2, temperature=0) == {1}
    assert sampled_tokens([0.0, 1.0, 50.0, 60.0], limit=9, temperature=0) == {3}


@torch.no_grad()
def test_tokens_are_those_of_multinomial():
    """One generator, seeded once, draws all tokens of a text."""
    model = small_gpt()
    generator = torch.Generator().manual_seed(9)
    prompt = [5, 6, 7]
    expected = []
    for _ in range(12):
        ids = torch.tensor([[*prompt, *expected]])
        p = model(ids)[0, -1].softmax(-1)
        expected.append(int(torch.multinomial(p, 1, generator=generator)))
    for graph in (False, True):
        assert generate(model, prompt, 12, seed=9, graph=graph) == expected
    assert generate(model, prompt, 12, seed=8) != expected


# -- generate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_kv_head": 2, "qk_norm": True, "tied": False},
        {"attn": "five_inputs"},
        {"attn": "softmax,two_windows:w1=7"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "how", [{"temperature": 0}, {"temperature": 1.3, "top_k": 9, "top_p": 0.8}], ids=str
)
def test_cached_equals_uncached(shape, how):
    model = small_gpt(**shape)
    how = {**how, "seed": 3, "limit": 60}
    cached = generate(model, [5, 6, 7], 40, **how)
    assert cached == generate(model, [5, 6, 7], 40, cached=False, **how)
    assert len(cached) == 40
    assert max(cached) < 60
    assert len(set(cached)) > 3
    if "attn" not in shape:
        assert cached == generate(model, [5, 6, 7], 40, graph=True, **how)
    else:
        with pytest.raises(ValueError, match="softmax attention"):
            next(sample.generate(model, [5], 1, graph=True))


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@torch.no_grad()
def test_a_full_context_drops_its_older_half(size):
    model = small_gpt(block_size=size)
    for ids in ([5], [5, 6, 7], list(range(20, 30))):
        expected = greedy_by_hand(model, ids, 20)
        for way in ({}, {"cached": False}, {"graph": True}):
            assert generate(model, ids, 20, temperature=0, **way) == expected, way
        # fewer tokens get smaller caches, but the same tokens
        for n in (0, 1, 2, 5):
            for way in ({}, {"graph": True}):
                assert generate(model, ids, n, temperature=0, **way) == expected[:n]


def test_no_more_room_than_needed(monkeypatch):
    sizes = []
    original = sample.KVCache

    def recording_cache(size):
        sizes.append(size)
        return original(size)

    monkeypatch.setattr(sample, "KVCache", recording_cache)
    generate(small_gpt(block_size=40), [5, 6, 7], 10)
    assert sizes == [12, 12], "3 + 10 tokens in two layers, less the last, which is never read"
    generate(small_gpt(), [5, 6, 7], 20)
    assert sizes[2:] == [16] * 4, "a full context of 16 should be read again into new caches"


@pytest.mark.parametrize(
    "change, part",
    [
        ({"ids": []}, "no token to continue"),
        ({"ids": [64]}, "vocabulary of 64"),
        ({"ids": [3, -1]}, "vocabulary of 64"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 4.3e9}, "temperature is 4300000000.0"),
        ({"top_k": -1}, "top-k is -1"),
        ({"top_p": 0.0}, "top-p is 0.0"),
        ({"top_p": -0.5}, "top-p is -0.5"),
        ({"top_p": 1.5}, "top-p is 1.5"),
        ({"top_p": math.nan}, "top-p is nan"),
    ],
    ids=str,
)
def test_generate_refuses(change, part):
    arguments = {"model": small_gpt(), "ids": [5], "n": 1}
    with pytest.raises(ValueError) as caught:
        generate(**{**arguments, **change})
    assert part in str(caught.value)


@pytest.mark.parametrize("way", [{}, {"cached": False}, {"graph": True}], ids=str)
def test_damaged_weights_are_not_sampled_from(way):
    model = small_gpt()
    model.norm.weight.data[3] = math.nan
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        next(sample.generate(model, [5], 1, **way))


# -- on a GPU --------------------------------------------------------------------------------------


@gpu
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"n_kv_head": 2, "qkv_bias": True},
        {"n_kv_head": 1, "qk_norm": True, "tied": False},
        {"head_dim": 16},
        {"head_dim": 64, "n_head": 3, "n_kv_head": 1, "n_embd": 48, "qkv_bias": True},
    ],
    ids=str,
)
def test_graph_replays_on_the_gpu(shape):
    model = small_gpt(**shape)
    greedy = {"temperature": 0}
    plain = generate(model, [5, 6, 7], 40, **greedy)  # on the CPU
    model.cuda()
    assert generate(model, [5, 6, 7], 40, **greedy) == plain
    has_wide_heads = model.config.head_dim >= 16  # without a head_dim in `shape` it is 8
    assert sample.can_fuse(model) == has_wide_heads, "the decode kernels need heads of 16 or more"
    for _ in range(2):
        assert generate(model, [5, 6, 7], 40, graph=True, **greedy) == plain

    # the random generator advances inside the graph as it does outside
    for how in ({"temperature": 1.3, "top_k": 9, "top_p": 0.8}, {"top_p": 0.9}, {}):
        how = {**how, "seed": 3}
        expected = generate(model, [5, 6, 7], 40, **how)
        assert generate(model, [5, 6, 7], 40, graph=True, **how) == expected
        assert len(set(expected)) > 3
    cold = generate(model, [5, 6, 7], 40, temperature=1e-40, top_p=1e-40, graph=True)
    assert cold == plain

    model.compile()
    assert not sample.can_fuse(model)
    assert generate(model, [5, 6, 7], 40, graph=True, **greedy) == plain
