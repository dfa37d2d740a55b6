"""Query-only test-time training: spans, training, answers, cost."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import train
import ttt_context
from experiments import ttt_cost
from tests.common import is_equal, small_gpt

SHAPES = [
    {},
    {"n_kv_head": 2, "qk_norm": True, "tied": False},
    {"n_kv_head": 1, "qkv_bias": True, "n_layer": 3},
]


def long_read(dtype=torch.float64, T=60, room=8, **shape):
    """Return a GPT, T token ids, and the KV caches after reading them.

    room: how many more tokens the caches can hold.
    """
    model = small_gpt(dtype, **shape).requires_grad_(False)
    ids = torch.randint(64, (T,), generator=torch.Generator().manual_seed(3))
    return model, ids, ttt_context.prefill(model, ids, room)


class WholePrefix:
    """A cache with fixed keys and values of the whole text, to which all queries attend."""

    length = 0

    def __init__(self, k, v):
        self.k = k.detach()
        self.v = v.detach()

    def attend(self, module, heads):
        return train.softmax_attention(heads[0], self.k, self.v)


def dense_loss(model, caches, ids, starts, n):
    """Return the loss on spans by a forward pass over the whole text with the frozen k and v."""
    config = model.config
    cos, sin = train.rope_angles(0, len(ids), config.head_dim, config.rope_theta, ids.device)
    x = model.embed_tokens(ids[None]).to(model.dtype)  # (1, T, C)
    for layer, cache in zip(model.layers, caches):
        k, v = (t[:, :, : len(ids)] for t in cache.tensors)
        x = layer(x, cos, sin, WholePrefix(k, v))
    weight = model.embed_tokens.weight if model.lm_head is None else model.lm_head.weight
    logits = F.linear(model.norm(x), weight.to(x.dtype))[0]  # (T, V)
    positions = (starts[:, None] + torch.arange(n)).flatten()  # (S * n,)
    return F.cross_entropy(logits[positions], ids[positions + 1])


# -- spans over a frozen cache ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "S,n,starts", [(1, 1, [0]), (1, 7, [52]), (3, 5, [0, 54, 21]), (2, 59, [0, 0])], ids=str
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_those_of_a_dense_forward(shape, S, n, starts):
    model, ids, caches = long_read(**shape)
    starts = torch.tensor(starts)
    logits = model(ids[None])[0]
    positions = (starts[:, None] + torch.arange(n)).flatten()  # (S * n,)
    truth = F.cross_entropy(logits[positions], ids[positions + 1])
    loss = ttt_context.span_loss(model, caches, ids, starts, n)
    assert abs(loss - truth) < 1e-10, "before training, the loss should be that of the model"

    with ttt_context.trainable_queries(model) as weights:
        # first with the W_Q that read the text, then with another W_Q
        for _ in range(2):
            loss = ttt_context.span_loss(model, caches, ids, starts, n)
            grads = torch.autograd.grad(loss, weights)
            expected_loss = dense_loss(model, caches, ids, starts, n)
            expected_grads = torch.autograd.grad(expected_loss, weights)
            for grad, expected in zip(grads, expected_grads):
                assert (grad - expected).abs().max() < 1e-10
                if n > 1:  # the only query of n = 1 sees one key, so its gradient is 0
                    assert grad.abs().max() > 1e-6
            for w in weights:
                noise = torch.randn(w.shape, generator=torch.Generator().manual_seed(1))
                w.data.add_(noise, alpha=0.1)


@pytest.mark.parametrize("group", [1, 4])
def test_a_query_sees_the_keys_up_to_its_own_position(group):
    generator = torch.Generator().manual_seed(0)
    config = train.GPTConfig(n_head=4, n_kv_head=4 // group, n_embd=32)
    module = train.Attention(config, "softmax")
    q = torch.randn(3, 4, 5, 8, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 4 // group, 20, 8, generator=generator, dtype=torch.float64)
    starts = torch.tensor([0, 15, 6])

    def attend():
        return ttt_context.FrozenCache(k[None], v[None], starts, False).attend(module, [q])

    o = attend()
    assert torch.allclose(o, ttt_context.reference(q, k, v, starts), atol=1e-12)
    for span, head, row in ((0, 0, 0), (1, 3, 4), (2, 2, 1)):
        n_keys = starts[span] + row + 1
        seen_k = k[head // group, :n_keys]
        seen_v = v[head // group, :n_keys]
        p = (seen_k @ q[span, head, row] / 8**0.5).softmax(0)
        assert torch.allclose(o[span, head, row], p @ seen_v, atol=1e-12)

    # change position 9: span 0 ends before it, and query 3 of span 2 is the first to see it
    k[:, 9] = 50
    v[:, 9] = math.inf
    assert torch.equal(attend()[0], o[0])
    v[:, 9] = 50
    changed = attend()
    assert torch.equal(changed[2, :, :3], o[2, :, :3])
    assert not torch.allclose(changed[2, :, 3], o[2, :, 3])


def test_other_attention_functions_keep_their_options():
    def sharper(q, k, v, factor=1.0):
        return train.softmax_attention(q * factor, k, v)

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=generator)
    k, v = torch.randn(2, 4, 20, 8, generator=generator)
    starts = torch.tensor([3, 11])
    module = train.Attention(train.GPTConfig(n_head=4, n_embd=32), "softmax")
    module.function = sharper
    module.options = {"factor": 3.0}
    o = ttt_context.FrozenCache(k[None], v[None], starts, False).attend(module, [q])
    assert torch.allclose(o, ttt_context.reference(3 * q, k, v, starts), atol=1e-6)


@pytest.mark.parametrize("attn", ["laser", "softmax,laser"])
def test_works_with_attention_that_keeps_every_position(attn):
    pytest.importorskip("laser")
    model, ids, caches = long_read(attn=attn)
    starts = torch.tensor([20, 3])
    logits = model(ids[None])[0]
    rows = (starts[:, None] + torch.arange(9)).flatten()
    truth = F.cross_entropy(logits[rows], ids[rows + 1])
    assert abs(ttt_context.span_loss(model, caches, ids, starts, 9) - truth) < 1e-6


def test_refuses_attention_that_forgets():
    pytest.importorskip("simplicial")
    shape = {"vocab_size": 64, "n_layer": 1, "n_embd": 32, "n_head": 2}
    model = train.GPT(train.GPTConfig(attn="simplicial", **shape))
    with pytest.raises(ValueError, match="every position"):
        ttt_context.prefill(model, torch.arange(20))
    model = train.GPT(train.GPTConfig(**shape))
    attention = model.layers[0].self_attn
    # a third tensor besides k and v, then a window of 8 positions
    for inputs, windows in ((["q", "k", "v", "k2"], [None] * 3), (["q", "k", "v"], [None, 8])):
        attention.inputs = inputs
        attention.windows = windows
        with pytest.raises(ValueError, match="every position"):
            ttt_context.prefill(model, torch.arange(20))


@pytest.mark.parametrize(
    "starts,n", [([52], 8), ([-1], 8), ([3, 52], 8), ([], 8), ([0], 0), ([0], 60)]
)
def test_refuses_spans_that_do_not_fit(starts, n):
    model, ids, caches = long_read(torch.float32)
    with pytest.raises(ValueError, match="do not fit"):
        ttt_context.span_loss(model, caches, ids, torch.tensor(starts, dtype=torch.int64), n)
    last_start = torch.tensor([60 - 8 - 1])  # its last target is the last token
    assert ttt_context.span_loss(model, caches, ids, last_start, 8).isfinite()


def test_which_models_use_the_kernel(monkeypatch):
    # without a GPU, let the model's embedding claim to be on one
    class WeightOnCUDA:
        is_cuda = True

    class EmbeddingOnCUDA(torch.nn.Embedding):
        weight = WeightOnCUDA

    model = small_gpt(head_dim=16)
    assert not ttt_context.can_use_kernel(model), "the kernel cannot run on a CPU"
    if ttt_context.kernel is None:
        pytest.skip("needs Triton")
    model.embed_tokens.__class__ = EmbeddingOnCUDA
    assert ttt_context.can_use_kernel(model)
    for name, value in (("attn", "softmax,laser"), ("head_dim", 17)):
        with monkeypatch.context() as patch:
            patch.setattr(model.config, name, value)
            assert not ttt_context.can_use_kernel(model), name
    model.dtype = torch.float64
    assert not ttt_context.can_use_kernel(model), "it computes in float32 at most"
    model.dtype = torch.float32
    monkeypatch.setattr(ttt_context, "kernel", None)
    assert not ttt_context.can_use_kernel(model)


# -- training --------------------------------------------------------------------------------------


def test_trains_the_queries_alone_and_gives_the_model_back():
    model, ids, caches = long_read(torch.float32, n_kv_head=2, qkv_bias=True)
    model.requires_grad_(True)
    model.norm.weight.requires_grad_(False)
    names = [f"layers.{i}.self_attn.q_proj.weight" for i in range(2)]
    _, starts = ttt_context.split_spans(60, 8)

    def reply():
        return list(ttt_context.answer(model, caches, 60, [1, 2], 6))

    def state():
        return {name: t.clone() for name, t in model.state_dict().items()}

    def cached():
        return [t[:, :, :60].clone() for cache in caches for t in cache.tensors]

    state_before = state()
    cached_before = cached()
    reply_before = reply()
    logits_before = model(ids[None])
    pointers = [p.data_ptr() for p in model.parameters()]

    runs = []
    options = {"steps": 5, "n": 8, "batch": 2, "lr": 1e-2}
    for seed in (1, 1, 2):
        # inside the block only the query projections change
        with ttt_context.trainable_queries(model) as weights:
            arguments = (model, weights, caches, ids, starts)
            losses = list(ttt_context.train_queries(*arguments, seed=seed, **options))
            for name, tensor in state().items():
                has_changed = not torch.equal(tensor, state_before[name])
                assert has_changed == (name in names), name
            for name, p in model.named_parameters():
                has_gradient = p.grad is not None
                assert has_gradient == (name in names), name
            runs.append([losses, [w.detach().clone() for w in weights], reply()])

        # after it everything is as before
        assert is_equal(state(), state_before)
        assert is_equal(cached(), cached_before)
        assert reply() == reply_before
        assert torch.equal(model(ids[None]), logits_before)
        assert [p.data_ptr() for p in model.parameters()] == pointers
        for name, p in model.named_parameters():
            assert p.grad is None
            assert p.requires_grad == (name != "norm.weight")
    assert is_equal(runs[0], runs[1]), "two runs with one seed should be equal"
    assert runs[0][0] != runs[2][0], "another seed should have other losses"

    # an error inside the block
    with pytest.raises(KeyError), ttt_context.trainable_queries(model) as weights:
        weights[0].data.zero_()
        raise KeyError
    assert is_equal(state(), state_before), "the weights should come back after an error, too"


def test_adapt_is_training_and_a_model_given_back():
    model, ids, caches = long_read(torch.float32, T=200)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    options = {"n": 16, "lr": 1e-2, "seed": 5}

    def adapted(starts, **options):
        with ttt_context.adapt(model, caches, ids, starts, **options) as weights:
            return [w.detach().clone() for w in weights]

    anywhere = torch.arange(200 - 16)
    ours = adapted(anywhere, steps=3, **options)
    assert is_equal(dict(model.state_dict()), before)
    with ttt_context.trainable_queries(model) as weights:
        list(ttt_context.train_queries(model, weights, caches, ids, anywhere, steps=3, **options))
        assert is_equal(ours, [w.detach() for w in weights])
    elsewhere = adapted(torch.tensor([7]), steps=3, **options)
    assert not is_equal(ours, elsewhere), "training on other spans should give other weights"

    starts = torch.arange(200 - 128)
    defaults = {"steps": 32, "n": 128, "batch": 1, "lr": 3e-5, "seed": 0}
    assert is_equal(adapted(starts), adapted(starts, **defaults))


def test_steps_are_adamw_with_decay_and_clipping():
    """The weights after 5 steps equal those of AdamW written out, in float64."""
    model, ids, caches = long_read(tied=False)
    model.lm_head.weight.mul_(8)  # some gradients become large enough to be clipped
    starts = torch.tensor([0, 51])
    options = {"steps": 5, "n": 8, "lr": 3e-2, "seed": 4}
    with ttt_context.trainable_queries(model) as weights:
        losses = list(ttt_context.train_queries(model, weights, caches, ids, starts, **options))
        ours = [w.detach().clone() for w in weights]

    def by_hand(weight_decay, max_norm, beta1=0.9, beta2=0.999):
        with ttt_context.trainable_queries(model) as weights:
            first = [torch.zeros_like(w) for w in weights]  # moments
            second = [torch.zeros_like(w) for w in weights]
            norms = []
            for t in range(1, 6):
                # the span that was drawn is the one with the same loss
                candidates = [dense_loss(model, caches, ids, start[None], 8) for start in starts]
                loss = min(candidates, key=lambda x: abs(x.item() - losses[t - 1]))
                grads = torch.autograd.grad(loss, weights)

                norm = math.sqrt(sum(g.square().sum().item() for g in grads))
                norms.append(norm)
                scale = min(1.0, max_norm / (norm + 1e-6))
                for i, w in enumerate(weights):
                    g = scale * grads[i]
                    first[i] = beta1 * first[i] + (1 - beta1) * g
                    second[i] = beta2 * second[i] + (1 - beta2) * g**2
                    mean = first[i] / (1 - beta1**t)
                    variance = second[i] / (1 - beta2**t)
                    step = mean / (variance.sqrt() + 1e-8)
                    w.data = w.data * (1 - 3e-2 * weight_decay) - 3e-2 * step
            assert max(norms) > 1.5
            assert len({round(norm, 3) for norm in norms}) > 2
            return [w.detach().clone() for w in weights]

    def distance(a, b):  # lists of tensors
        return max((x - y).abs().max().item() for x, y in zip(a, b))

    assert distance(ours, by_hand(0.01, 1.0)) < 1e-9
    assert distance(ours, by_hand(0.0, 1.0)) > 1e-5, "this test cannot see weight decay"
    assert distance(ours, by_hand(0.01, math.inf)) > 1e-5, "this test cannot see clipping"


def test_every_span_is_drawn_and_texts_do_not_share_draws():
    model, ids, caches = long_read(torch.float32)
    starts = torch.tensor([0, 17, 30, 51])
    losses = [ttt_context.span_loss(model, caches, ids, start[None], 8).item() for start in starts]

    def nearest_span(loss):
        return min(range(4), key=lambda i: abs(losses[i] - loss))

    with ttt_context.trainable_queries(model) as weights:
        # with lr 0 the loss of a step tells which span was drawn
        def draw(ids, steps, starts=starts, **options):
            arguments = (model, weights, caches, ids, starts)
            return list(ttt_context.train_queries(*arguments, steps=steps, n=8, lr=0.0, **options))

        drawn = [nearest_span(loss) for loss in draw(ids, 60)]
        for i in range(4):
            assert drawn.count(i) > 5, f"span {i} of 4 should come in about 15 of 60 draws"
        assert draw(ids, 2, starts[-1:]) == pytest.approx([losses[3]] * 2, rel=1e-5)

        # a text that differs in one token, which is a target of the last span alone
        changed = ids.clone()
        changed[-1] = (changed[-1] + 1) % 64
        assert [nearest_span(loss) for loss in draw(changed, 20)] != drawn[:20]
        assert draw(ids, 9, seed=1) != draw(ids, 9), "another seed should draw other spans"

        # a batch of two spans has their mean loss
        means = {round((a + b) / 2, 4) for a in losses for b in losses}
        for loss in draw(ids, 20, batch=2):
            assert round(loss, 4) in means


LENGTHS = [  # T, n, held-out spans
    (25, 8, 1), (60, 8, 1), (128, 8, 1), (129, 8, 2), (512, 8, 7), (1000, 8, 8), (4, 1, 1),
    (300, 7, 5), (5000, 128, 4),
]  # fmt: skip


@pytest.mark.parametrize("T,n,n_held_out", LENGTHS)
def test_no_held_out_target_is_trained_on(T, n, n_held_out):
    held_out, starts = ttt_context.split_spans(T, n)
    held_out = held_out.tolist()
    assert len(held_out) == n_held_out
    assert min(held_out) >= 0
    assert max(held_out) < T - n

    # spans that begin at least n positions from every held-out one share no target with it
    expected = []
    for start in range(T - n):
        if all(abs(start - held) >= n for held in held_out):
            expected.append(start)
    assert expected
    assert starts.tolist() == expected


def test_held_out_spans_are_evenly_spaced():
    held_out, _ = ttt_context.split_spans(1000, 8)
    assert held_out.tolist() == [round((i + 0.5) * 991 / 8) for i in range(8)]
    with pytest.raises(ValueError, match="24 tokens, which is too short for spans of 8"):
        ttt_context.split_spans(24, 8)


def test_bfloat16_queries_are_kept_in_float32():
    model, ids, _ = long_read(torch.float32)
    model = model.to(torch.bfloat16)
    model.dtype = torch.bfloat16
    caches = ttt_context.prefill(model, ids)
    before = model.layers[0].self_attn.q_proj.weight.clone()
    with ttt_context.adapt(model, caches, ids, torch.arange(51), steps=2, n=9, lr=1e-6) as weights:
        assert weights[0].dtype == torch.float32
        largest_change = (weights[0] - before.float()).abs().max()
        assert 0 < largest_change < 1e-4
    assert torch.equal(model.layers[0].self_attn.q_proj.weight, before)


def test_a_loss_that_is_not_finite_is_an_error():
    model, ids, caches = long_read(torch.float32)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="--lr"):
        with ttt_context.adapt(model, caches, ids, torch.arange(52), n=8, lr=1e30):
            pass
    assert is_equal(dict(model.state_dict()), before)


# -- answers, theory, cost -------------------------------------------------------------------------


def test_answers_as_a_plain_forward_does_and_lr_0_changes_nothing():
    model, ids, caches = long_read(T=40)
    question = [7, 9, 3]
    text = ids.tolist() + question
    for _ in range(6):
        text.append(int(model(torch.tensor([text]))[0, -1].argmax()))

    def reply(n=6, limit=None):
        return list(ttt_context.answer(model, caches, 40, question, n, limit))

    assert reply() == text[43:]
    assert reply(3) == text[43:46]
    assert reply() == text[43:], "an earlier answer should leave no trace in the caches"
    limit = max(text[43:])
    assert max(reply(limit=limit)) < limit, "ids from the limit on should not be generated"
    with ttt_context.adapt(model, caches, ids, torch.arange(32), steps=3, n=8, lr=0.0):
        assert reply() == text[43:]


def test_theory():
    """One query q (16,) looks for the key at position `needle` among T keys k (T, 16)."""
    generator = torch.Generator().manual_seed(0)
    needle = 3
    for T in (10, 100, 1000):
        k = torch.randn(T, 16, dtype=torch.float64, generator=generator)
        q = torch.zeros(16, dtype=torch.float64, requires_grad=True)

        def margin(q, k=k):
            p = (k @ q / 4).softmax(0)[needle]
            return (p / (1 - p)).log().item()

        # a gradient step on q moves it towards the needle's key and raises the margin
        loss = -(k @ q / 4).log_softmax(0)[needle]
        (grad,) = torch.autograd.grad(loss, q)
        p = (k @ q.detach() / 4).softmax(0)
        assert torch.allclose(grad, (p @ k - k[needle]) / 4, atol=1e-12)
        assert margin(q.detach() - 0.1 * grad) > margin(q.detach())

        # probability 1 - e needs a margin of log((1 - e) / e); equal distractors attain the bound
        e = 0.1
        logits = torch.zeros(T, dtype=torch.float64)
        logits[needle] = math.log((T - 1) * (1 - e) / e)
        assert abs(logits.softmax(0)[needle] - (1 - e)) < 1e-12


class DenseCache(ttt_context.FrozenCache):
    """A cache that attends by the definition, in matrix products that PyTorch's counter knows."""

    def attend(self, module, heads):
        return ttt_context.reference(heads[0], self.k[0], self.v[0], self.starts)


@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_flops_are_those_pytorch_counts(shape, monkeypatch):
    model, ids, caches = long_read(torch.float32, T=40, room=0, **shape)
    monkeypatch.setattr(ttt_context, "FrozenCache", DenseCache)
    c = model.config
    head_width = c.n_layer * c.n_head * c.head_dim

    # a training step, of a text of 79 tokens: a token sees 40 of them on average
    n = 9
    with ttt_context.trainable_queries(model), FlopCounterMode(display=False) as counter:
        ttt_context.span_loss(model, caches, ids, torch.tensor([20]), n).backward()
    # the layers project keys and values that are not used
    unused = 2 * n * 2 * c.n_layer * c.n_kv_head * c.head_dim * c.n_embd
    # dense attention keeps P for the backward pass, which a kernel computes again
    recomputed = 2 * head_width * n * 40
    expected = ttt_cost.flops_of_spans(model, n, 79) + unused - recomputed
    assert counter.get_total_flops() == expected

    # one generated token
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids[None, :1])
    difference = counter.get_total_flops() - ttt_cost.flops_of_tokens(model, 0, 1)
    assert abs(difference) <= 4 * head_width  # torch may not count the attention to one key
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    if not c.tied:
        matrices -= model.embed_tokens.weight.numel()  # a lookup, no product
    assert ttt_cost.flops_of_tokens(model, 9, 1) == 2 * matrices + 4 * head_width * 10

    # seven tokens, each with one more key
    generated = [ttt_cost.flops_of_tokens(model, 50 + i, 1) for i in range(7)]
    assert ttt_cost.flops_of_tokens(model, 50, 7) == sum(generated)
    assert generated[1] - generated[0] == 4 * head_width


def test_thinking_tokens_are_as_many_as_fit():
    model = small_gpt()
    for flops in (0, 1e6, 1e8):
        counts = []
        for T in (10, 1000, 10**6):
            count = ttt_cost.thinking_tokens(model, T, flops)
            counts.append(count)
            assert ttt_cost.flops_of_tokens(model, T, count) <= flops
            assert flops < ttt_cost.flops_of_tokens(model, T, count + 1)
        assert sorted(counts, reverse=True) == counts
    exact = ttt_cost.flops_of_tokens(model, 100, 5)
    assert ttt_cost.thinking_tokens(model, 100, exact) == 5


def memory_needed(monkeypatch, model, n_tokens, n_span_tokens):
    """Return the smallest number of free bytes with which check_memory is content."""
    free = 0
    monkeypatch.setattr(ttt_cost, "free_bytes", lambda device: free)
    for i in reversed(range(50)):
        free += 2**i - 1  # is this still too little?
        try:
            ttt_cost.check_memory(model, n_tokens, n_span_tokens)
            free -= 2**i - 1
        except ValueError:
            free += 1
    return free


def test_memory_of_the_machine_is_in_bytes(monkeypatch):
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    with monkeypatch.context() as patch:
        patch.setattr(ttt_cost.os, "sysconf", sizes.get)
        assert ttt_cost.free_bytes(torch.device("cpu")) == 1000 * 4096


def test_memory_of_a_prompt_and_of_spans(monkeypatch):
    def needed(n_tokens, n_span_tokens, **shape):
        return memory_needed(monkeypatch, small_gpt(**shape), n_tokens, n_span_tokens)

    # each layer has a cache; only one at a time has activations of the prompt
    caches = long_read(torch.float32, T=1000, room=0, n_kv_head=2)[2]
    bytes_of_a_cache = sum(t.nbytes for t in caches[0].tensors)
    two_layers = needed(1000, 0, n_kv_head=2)
    assert needed(1000, 0, n_kv_head=2, n_layer=4) - two_layers == 2 * bytes_of_a_cache
    assert two_layers - 2 * bytes_of_a_cache > 1000 * 4 * 4 * 32, "activations take memory, too"
    assert needed(3000, 0, n_kv_head=2) == 3 * two_layers

    # spans keep the activations of all layers
    assert needed(0, 80, n_layer=4) == 2 * needed(0, 80) == 4 * needed(0, 40)
    assert needed(1000, 80) == needed(1000, 0) + needed(0, 80)

    # a number in bfloat16 takes half as much
    low = small_gpt(n_kv_head=2)
    low.dtype = torch.bfloat16
    assert 2 * memory_needed(monkeypatch, low, 1000, 0) == two_layers
    monkeypatch.setattr(ttt_cost, "free_bytes", lambda device: 2**29)
    with pytest.raises(ValueError, match=r"take about \d+.\d GB, but only 0.5 GB are free"):
        ttt_cost.check_memory(low, 10**6, 0)
