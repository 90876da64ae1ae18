"""What interval attention is held to: packings drawn at random, the visible pairs by the method's own words, and
softmax attention with its gradients in float64 numpy. Nothing here knows how the kernels read `start` and `stop`."""

import dataclasses

import jax
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vocojax.kernels.interval_attention import IntervalMask, interval_attention

QUICK = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@dataclasses.dataclass(frozen=True)
class Token:
    """One position of a row. `unit` is set inside a unit, `thread` inside a thread of text; padding has neither."""

    role: str  # "bos", "vision", "newline", "voco", "text" or "pad"
    sample: int = -1
    unit: int | None = None
    thread: int | None = None


def sample_tokens(sample: int, units: list[tuple[int, int]], threads: list[int]) -> list[Token]:
    """A sample: `units` are (vision tokens, VoCo tokens), `threads` the lengths of texts that share those units."""
    tokens = []
    for unit, (vision, voco) in enumerate(units):
        roles = ["bos"] + ["vision"] * vision + ["newline"] + ["voco"] * voco
        tokens += [Token(role, sample, unit=unit) for role in roles]
    for thread, length in enumerate(threads):
        tokens += [Token("text", sample, thread=thread)] * length
    return tokens


def may_see(row: list[Token], i: int, j: int) -> bool:
    """The method, sentence by sentence: may the token at `i` attend to the token at `j`?"""
    query, key = row[i], row[j]
    if query.role == "pad" or key.role == "pad":  # padding is seen by nobody and sees nobody
        return False
    if query.sample != key.sample:  # nothing crosses from one packed sample to another
        return False
    if query.unit is not None:  # a unit sees nothing outside itself; inside a unit: causal
        return key.unit == query.unit and j <= i
    if key.unit is not None:  # text sees, of every unit before it, only the VoCo tokens
        return key.role == "voco" and j < i
    return key.thread == query.thread and j <= i  # and causally all earlier text (of its own thread)


def visible_pairs(row: list[Token]) -> np.ndarray:
    """bool `[S, S]` by asking `may_see` for every pair."""
    return np.array([[may_see(row, i, j) for j in range(len(row))] for i in range(len(row))])


def interval_vectors(row: list[Token]) -> tuple[np.ndarray, np.ndarray]:
    """`start` and `stop` of a row as the design defines them."""

    def span(same) -> tuple[int, int]:
        where = [at for at, token in enumerate(row) if same(token)]
        return where[0], where[-1] + 1

    start, stop = [], []
    for at, token in enumerate(row):
        if token.role == "pad":
            start.append(at)
            stop.append(at)
            continue
        sample = span(lambda t, token=token: t.sample == token.sample)
        part = span(lambda t, token=token: (t.sample, t.unit, t.thread) == (token.sample, token.unit, token.thread))
        start.append(part[0] if token.unit is not None else sample[0])
        stop.append(sample[1] if token.role == "voco" else part[1])
    return np.array(start, np.int32), np.array(stop, np.int32)


@st.composite
def packed_rows(draw: st.DrawFn, length: int) -> list[Token]:
    """A row of exactly `length` tokens: samples while they fit, and padding before, between or after them."""
    row: list[Token] = []
    sample = 0
    while len(row) < length:
        if draw(st.integers(0, 3)) == 0:
            row += [Token("pad")] * draw(st.integers(1, max(1, length // 4)))
        units = draw(st.lists(st.tuples(st.integers(0, length // 4), st.integers(1, 3)), max_size=3))
        threads = draw(st.lists(st.integers(1, max(1, length // 4)), max_size=3))
        tokens = sample_tokens(sample, units, threads)
        if len(row) + len(tokens) > length:
            break
        row += tokens
        sample += 1
    return (row + [Token("pad")] * length)[:length]


def any_vectors(queries: int, keys: int) -> st.SearchStrategy[tuple[np.ndarray, np.ndarray]]:
    """Any `start` and `stop` of two rows: entries near the sequence, the ends of int32, and all between."""
    low, high = -(2**31), 2**31 - 1
    ends = st.sampled_from([low, low + 1, high - 1, high])
    entries = st.one_of(st.integers(-2, keys + 2), st.integers(0, keys), ends, st.integers(low, high))
    vector = lambda length: st.lists(entries, min_size=2 * length, max_size=2 * length).map(
        lambda values: np.array(values, np.int32).reshape(2, length))
    return st.tuples(vector(queries), vector(keys))


def visible_by_rule(start_BQ: np.ndarray, stop_BK: np.ndarray) -> np.ndarray:
    """The rule of `IntervalMask` pair by pair, in Python's unbounded integers."""
    (_, Q), K = start_BQ.shape, stop_BK.shape[1]
    return np.array([[[int(start[r]) <= j <= K - Q + r < int(stop[j]) for j in range(K)] for r in range(Q)]
                     for start, stop in zip(start_BQ, stop_BK, strict=True)])


def masks(rows: list[list[Token]], queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows' vectors and visible pairs with their last `queries` positions as the queries."""
    start, stop = (np.stack(x) for x in zip(*map(interval_vectors, rows), strict=True))
    return start[:, -queries:], stop, np.stack([visible_pairs(row)[-queries:] for row in rows])


def normal(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def attention(q_BQHD, k_BKGD, v_BKGD, visible_BQK, scale):
    """Softmax attention over the visible pairs in float64; a row that sees nothing is 0. -> (out, weights)"""
    q, k, v = (np.asarray(x, np.float64) for x in (q_BQHD, k_BKGD, v_BKGD))
    repeats = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, repeats, axis=2) for x in (k, v))
    scores = scale * np.einsum("bqhd,bkhd->bhqk", q, k)
    visible = visible_BQK[:, None]
    highest = np.max(scores, axis=-1, keepdims=True, where=visible, initial=-1e30)
    weights = np.exp(np.where(visible, scores - highest, -np.inf))
    total = weights.sum(-1, keepdims=True)
    weights = weights / np.where(total > 0, total, 1)
    return np.einsum("bhqk,bkhd->bqhd", weights, v), weights


def attention_gradients(q_BQHD, k_BKGD, v_BKGD, visible_BQK, scale, dout_BQHD):
    """The gradients of `sum(attention(...) * dout)` with respect to q, k and v, by hand, in float64."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q_BQHD, k_BKGD, v_BKGD, dout_BQHD))
    B, K, G, D = k.shape
    repeats = q.shape[2] // G
    _, weights = attention(q, k, v, visible_BQK, scale)
    dweights = np.einsum("bqhd,bkhd->bhqk", dout, np.repeat(v, repeats, axis=2))
    dscores = weights * (dweights - np.sum(weights * dweights, axis=-1, keepdims=True)) * scale
    dq = np.einsum("bhqk,bkhd->bqhd", dscores, np.repeat(k, repeats, axis=2))
    dk = np.einsum("bhqk,bqhd->bkhd", dscores, q).reshape(B, K, G, repeats, D).sum(3)
    dv = np.einsum("bhqk,bqhd->bkhd", weights, dout).reshape(B, K, G, repeats, D).sum(3)
    return dq, dk, dv


def check_garbage_is_ignored(Q: int, K: int, H: int, G: int, D: int, implementation: str) -> None:
    """NaN and Inf in keys and values that nobody sees, and in queries and cotangents of rows that see nothing, leave
    `interval_attention` and its gradients as they are, and the gradients of what nobody sees at exactly 0."""

    @jax.jit
    def passes(q, k, v, start, stop, dout):
        attend = lambda *x: interval_attention(*x, IntervalMask(start, stop), implementation=implementation)
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(dout)

    @settings(QUICK, max_examples=4)
    @given(st.lists(packed_rows(K), min_size=2, max_size=2), st.sampled_from([np.nan, np.inf]), st.integers(0, 2**31))
    def check(rows, garbage, seed):
        start, stop, visible = masks(rows, Q)
        q, k, v, dout = normal(seed, (2, Q, H, D), (2, K, G, D), (2, K, G, D), (2, Q, H, D))
        want = passes(q, k, v, start, stop, dout)
        unseen, blind = ~visible.any(1), ~visible.any(2)
        k[unseen] = v[unseen] = garbage
        q[blind] = dout[blind] = garbage
        got = passes(q, k, v, start, stop, dout)
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x, y)
        out, dq, dk, dv = map(np.asarray, got)
        assert np.isfinite(out).all() and not out[blind].any() and not dq[blind].any()
        assert not dk[unseen].any() and not dv[unseen].any()

    check()
