"""One run of the query-only study: the variants of one model, on contexts of one length.

    in context            the model as it is
    log T                 logits times log T / log(training length), without training
    fitted temperature    one factor per head, trained like the queries
    trained queries       the method: queries trained on this context
    foreign queries       queries trained on another context of the same kind
    other-kind queries    queries trained on a context where the other column decides
    equal-FLOP thinking   majority of sampled answers, for as many FLOPs as the steps
    2 N k thinking        majority of 2 N k samples, the paper's count for N steps of k tokens

All variants answer the same questions from the same cache. Learning rates are chosen for each
model, on contexts of seed 0, which are not reported.
"""

import itertools
import math
import statistics
import time
from contextlib import ExitStack, contextmanager

import torch

from experiments import ttt_sandbox
from experiments.ttt_cost import flops_of_spans, thinking_tokens
from experiments.ttt_sandbox import TASKS
from support import distributed
from ttt_context import prefill, train_queries, trainable_queries

# --------------------------------------------------------------------------------------------------
# Asking questions about a context. The needles of a question are the positions in the context that
# hold its answer.


class QuestionCache:
    """One layer's frozen keys and values (1, Hkv, T, D) of a context, for Q questions about it.

    needles (Q, T): bool. The Q questions are a batch, and all of them attend to the same context.
    If the layer has softmax attention, `attend` sets `needle_attention` (Q, H): the probability
    that the last token of each question gives to its needles.
    """

    needle_attention = None

    def __init__(self, k, v, needles):
        self.k = k
        self.v = v
        self.length = k.shape[2]
        self.needles = needles

    def attend(self, module, heads):
        """Return the attention of a layer to the context and the question, (Q, H, n, D).

        heads: q (Q, H, n, D), k and v (Q, Hkv, n, D) of the n tokens of each question.
        """
        q, k, v = heads
        Q, H, _, D = q.shape
        k = torch.cat([self.k.expand(Q, -1, -1, -1), k], dim=2)  # (Q, Hkv, T + n, D)
        v = torch.cat([self.v.expand(Q, -1, -1, -1), v], dim=2)
        if getattr(module.function, "has_logits", True):
            # attention of the last token to the T positions of the context
            keys = k.repeat_interleave(H // k.shape[1], dim=1)  # (Q, H, T + n, D)
            scores = q[:, :, -1:] @ keys.transpose(2, 3) * D**-0.5  # (Q, H, 1, T + n)
            p = scores.softmax(-1)[:, :, 0, : self.length]  # (Q, H, T)
            is_needle = self.needles[:, None]  # (Q, 1, T)
            self.needle_attention = (p * is_needle).sum(-1)
        return module.function(q, k, v, **module.options)


@torch.no_grad()
def ask(model, caches, context):
    """Return the logits of the answers, (Q, V), and the attention to the needles, (Q, heads).

    caches: from `prefill`. The heads are those of all softmax layers.
    """
    question_caches = [QuestionCache(*cache.tensors, context.needles) for cache in caches]
    logits = model(context.questions, cache=question_caches)[:, -1]  # after the last token
    needle_attention = []
    for cache in question_caches:
        if cache.needle_attention is not None:
            needle_attention.append(cache.needle_attention)
    return logits, torch.cat(needle_attention, dim=1)


def log_odds(logits, answers):
    """Return log(p / (1 - p)) for the probability p of each answer, (Q).

    logits (Q, V). answers (Q): token ids.
    """
    # log(p / (1 - p)) is the logit of the answer less the log-sum-exp of all other logits
    is_answer = torch.arange(logits.shape[1], device=logits.device) == answers[:, None]  # (Q, V)
    others = logits.masked_fill(is_answer, -torch.inf)
    return logits[is_answer] - others.logsumexp(1)


def score(model, caches, context):
    """Return {"margin", "accuracy", "needle_attention"}, each a mean over the questions.

    The margin is the log odds of the right answer, in nats. The attention is that of the head that
    attends to the needles most.
    """
    logits, needle_attention = ask(model, caches, context)
    margins = log_odds(logits, context.answers)  # (Q)
    is_right = logits.argmax(-1) == context.answers  # (Q)
    by_head = needle_attention.mean(0)  # (heads)
    return {
        "margin": margins.mean().item(),
        "accuracy": is_right.float().mean().item(),
        "needle_attention": by_head.max().item(),
    }


def vote(model, caches, context, n_samples, seed):
    """Return {"margin", "accuracy"} of answering with the most frequent of n_samples samples.

    An answer is one token, so all samples can be drawn from the same logits. The margin is
    log(right / wrong), where right and wrong are numbers of samples, plus 1/2 so neither is 0.
    """
    # sample answers to each question
    logits, _ = ask(model, caches, context)
    generator = torch.Generator().manual_seed(seed)
    p = logits.cpu().softmax(-1)
    samples = torch.multinomial(p, n_samples, replacement=True, generator=generator)  # (Q, samples)

    # compare the samples, and the most frequent one, with the right answer
    answers = context.answers.cpu()
    n_right = (samples == answers[:, None]).sum(1)  # (Q)
    odds = (n_right + 0.5) / (n_samples - n_right + 0.5)  # (Q)
    is_right = samples.mode(dim=1).values == answers  # (Q)
    return {"margin": odds.log().mean().item(), "accuracy": is_right.float().mean().item()}


# --------------------------------------------------------------------------------------------------
# What is trained


@contextmanager
def temperatures(model, factor=1.0):
    """Freeze the model and multiply the queries of each head by a trainable factor.

    Yields the logarithms of the factors, (H, 1) for each layer. Above 10 they act as 10, which
    multiplies logits by 22,000: softmax attention then picks one key already, and the rounding
    errors of larger logits would not be small compared with 1. The factors are applied after the
    QK-norm, if there is one, because it would undo them. When the block ends, they are removed.
    """
    with trainable_queries(model) as weights, ExitStack() as hooks:
        log_factors = []
        for layer, weight in zip(model.layers, weights):
            weight.requires_grad_(False)
            shape = (model.config.n_head, 1)
            log_factor = torch.full(shape, math.log(factor), device=weight.device)
            log_factors.append(log_factor.requires_grad_())

            # multiply the output of the QK-norm, q (B, T, H, D); without a norm it is an identity
            def scale(norm, inputs, q, log_factor=log_factor):
                return (q * log_factor.clamp(max=10.0).exp()).to(q.dtype)

            hook = layer.self_attn.q_norm.register_forward_hook(scale)
            hooks.enter_context(hook)  # removed when the block ends
        yield log_factors


# {variant that is trained: a context manager, which takes a model and yields the parameters}
TRAINED = {"trained queries": trainable_queries, "fitted temperature": temperatures}


def fit(model, variant, caches, ids, recipe, lr):
    """Train a variant on random spans of ids (T). Return its parameters and restore the model.

    If the training diverges, they are the parameters before it.
    """
    n = min(recipe["span"], len(ids) // 2)
    starts = torch.arange(len(ids) - n)
    with TRAINED[variant](model) as weights:
        before = [w.detach().clone() for w in weights]
        options = {"steps": recipe["steps"], "n": n, "lr": lr}
        try:
            for _ in train_queries(model, weights, caches, ids, starts, **options):
                pass  # train_queries is a generator, which takes a step for each loss it yields
        except FloatingPointError:
            return before
        after = [w.detach().clone() for w in weights]
        is_finite = all(w.isfinite().all() for w in after)  # the last step may have diverged
        return after if is_finite else before


@contextmanager
def fitted(model, variant, parameters):
    """Give the model the parameters of a variant, from `fit`, inside the `with` block."""
    with TRAINED[variant](model) as weights, torch.no_grad():
        for weight, parameter in zip(weights, parameters):
            weight.copy_(parameter)
        yield


# --------------------------------------------------------------------------------------------------
# The run


def make_context(task, recipe, T, seed, c, device="cpu"):
    """Return context number c of a seed. In the task `columns` there are two kinds of contexts:

    c                            0  1  2  3  4  5  6  7
    column that decides (key)    a  a  b  b  a  a  b  b
    """
    generator = torch.Generator().manual_seed(10**6 * seed + 10 * T + c)
    key_column = c // 2 % 2
    n_questions = recipe["questions"]
    context = ttt_sandbox.make_context(task, T, recipe, generator, n_questions, key_column)
    tensors = [t.to(device) for t in context]
    return ttt_sandbox.Context(*tensors)


def make_contexts(model, task, recipe, T, seed, numbers):
    """Return contexts of a seed, each as a pair (context, KV caches after reading it)."""
    device = model.embed_tokens.weight.device
    contexts = [make_context(task, recipe, T, seed, c, device) for c in numbers]
    return [(context, prefill(model, context.ids)) for context in contexts]


def sweep_rates(model, task, T, recipe):
    """Return {variant: {learning rate: mean margin}} on contexts of seed 0, one of each kind."""
    contexts = make_contexts(model, task, recipe, T, 0, (0, 2))
    margins = {}
    for variant, lrs in recipe["lrs"].items():
        margins[variant] = {}
        for lr in lrs:
            margins[variant][lr] = mean_margin(model, variant, contexts, recipe, lr)
    return margins


def mean_margin(model, variant, contexts, recipe, lr):
    """Train a variant on each of the contexts; return the mean of its margins there."""
    margins = []
    for context, caches in contexts:
        parameters = fit(model, variant, caches, context.ids, recipe, lr)
        with fitted(model, variant, parameters):
            margins.append(score(model, caches, context)["margin"])
    return statistics.fmean(margins)


def thinking_samples(model, T, recipe):
    """Return how many samples, of one token each, the two ways of thinking get."""
    n = min(recipe["span"], T // 2)
    flops = flops_of_spans(model, recipe["steps"] * n, T)
    return {
        "equal-FLOP thinking": thinking_tokens(model, T, flops),
        "2 N k thinking": 2 * recipe["steps"] * n,
    }


def compare_variants(model, task, T, recipe, seed):
    """Compare the variants of a model on contexts of T tokens.

    Returns {variant: {"margin": [value on each context], "accuracy": [...], ...}}. Thinking also
    has "samples", their number. Trained variants also have "lr", and "sweep": a list of
    [learning rate, mean margin] on contexts of seed 0.
    """
    # choose the learning rates; swept: {variant: {learning rate: mean margin}}
    swept = sweep_rates(model, task, T, recipe)
    best_lrs = {variant: max(margins, key=margins.get) for variant, margins in swept.items()}

    # train on every context
    contexts = make_contexts(model, task, recipe, T, seed, range(recipe["contexts"]))
    trained = {}  # {variant: [parameters trained on context 0, on context 1, ...]}
    for variant, lr in best_lrs.items():
        trained[variant] = []
        for context, caches in contexts:
            trained[variant].append(fit(model, variant, caches, context.ids, recipe, lr))

    # Ask about every context with every variant
    log_t_factor = math.log(T) / math.log(recipe["train"]["tokens"])
    n_samples = thinking_samples(model, T, recipe)
    results = {}

    def add(variant, scores):
        """Append a variant's scores on one context, from `score` or `vote`, to the results."""
        for name, value in scores.items():
            results.setdefault(variant, {}).setdefault(name, []).append(round(value, 4))

    for c, (context, caches) in enumerate(contexts):
        add("in context", score(model, caches, context))
        with temperatures(model, log_t_factor):
            add("log T", score(model, caches, context))
        with fitted(model, "fitted temperature", trained["fitted temperature"][c]):
            add("fitted temperature", score(model, caches, context))

        # Queries that were trained on this context, or on another one (number `other`). Contexts 0
        # and 1 are of one kind, 2 and 3 of the other, and so on.
        trained_on = {"trained queries": c, "foreign queries": c ^ 1}  # 0 <-> 1, 2 <-> 3
        if task == "columns":
            trained_on["other-kind queries"] = c ^ 2  # 0 <-> 2, 1 <-> 3
        for variant, other in trained_on.items():
            with fitted(model, "trained queries", trained["trained queries"][other]):
                add(variant, score(model, caches, context))

        # thinking: the majority of n sampled answers
        for variant, n in n_samples.items():
            add(variant, vote(model, caches, context, n, seed))

    for variant, n in n_samples.items():
        results[variant]["samples"] = n
    for variant, margins in swept.items():
        results[variant]["lr"] = best_lrs[variant]
        results[variant]["sweep"] = [[lr, round(margin, 4)] for lr, margin in margins.items()]
    return results


def study_model(job):
    """Train one model and compare the variants on it, for both tasks and all lengths.

    job: {recipe, seed, norm, lengths, device}. Returns {"scores", "seconds"}, where scores is
    {"task, norm, T: variant": the variant's entry from compare_variants}.
    """
    start_time = time.perf_counter()
    recipe = job["recipe"]
    seed = job["seed"]
    norm = job["norm"]
    device = distributed.pick_device(job["device"])
    model = ttt_sandbox.train_model(recipe, norm, seed, device)
    scores = {}
    for task, T in itertools.product(TASKS, job["lengths"]):
        for variant, found in compare_variants(model, task, T, recipe, seed).items():
            scores[f"{task}, {norm}, {T}: {variant}"] = found
    return {"scores": scores, "seconds": time.perf_counter() - start_time}
