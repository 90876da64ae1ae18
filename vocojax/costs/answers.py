"""Costs of an answer without a cache, with an image's vision tokens cached, and with its VoCo tokens (paper Table 7).

Every row is a prompt of one image and T tokens of text, laid out by `layout.py` and read by `decode.first_token`:

    no cache       the image and [BOS] [V x P] [newline] in front of the text, as LLaVA reads it
    full cache     the text after the keys and values of those P + 2 tokens
    VoCo cache     the text after the keys and values of N VoCo tokens
    text only      the same number of text tokens without any image: the floor

FLOPs are counted in the program of exactly that call, compiled for the CPU on every machine: its text spells out every
matrix product, whereas a GPU's or TPU's calls kernels. Attention is dense, so masked pairs count too.
Cache bytes are those of the arrays that `compress.run_units` returns. Times are measured, all rows in turns.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from tqdm import tqdm

from vocojax.config import ModelConfig
from vocojax.costs.flops import matmul_flops
from vocojax.costs.rows import LetterTokenizer
from vocojax.inference.compress import run_units
from vocojax.inference.decoding.decode import Prompts, first_token, more_tokens
from vocojax.inference.decoding.sampling import SamplingConfig, SamplingInputs, SamplingStatics
from vocojax.inference.prompts import text_prompts, whole_prompts, whole_rows
from vocojax.layout import Span, UnitShape, lay_out_sample, lay_out_unit
from vocojax.models.llama import KeyValues
from vocojax.models.parameters import abstract
from vocojax.models.voco import Rows, VocoLlama

Tree = TypeVar("Tree")
Create = Callable[[Callable[[], Any]], Any]  # makes what a function returns; `jax.eval_shape` makes shapes only
ANSWER_TOKENS = 16  # of the answers that are timed as a whole
REPEATS = 7
NO_END = -1  # no token has this id, so that every timed answer has its full length


class Case(NamedTuple):
    """A row of the table.

    Attributes:
      method: "no cache", "full cache", "VoCo cache" or "text only".
      vocos: number of VoCo tokens, 0 if the method has none.
      text: number of text tokens.
    """

    method: str
    vocos: int
    text: int


def efficiency(
    config: ModelConfig, vocos: Sequence[int], texts: Sequence[int], measured: ModelConfig | None = None
) -> dict[str, Any]:
    """Makes the report.

    Args:
      config: the model whose bytes and FLOPs are counted. Its parameters are never made.
      vocos: numbers of VoCo tokens, a row each.
      texts: numbers of text tokens.
      measured: the model whose time is measured on this machine, with random parameters; None for `measurable(config)`.

    Returns:
      `{"rows": [...], "summary": {...}, "model": ..., "measured": ...}`. The summary is that of the first number of
      VoCo tokens and of text tokens. `cache_saved` and `flops_saved` are shares of the full cache and of no cache,
      `flops_over_text_only` and `measured_first_token_ratio` are ratios to text only and to no cache.
    """
    measured = measurable(config) if measured is None else measured
    cases = [case for text in texts for case in _cases(vocos, text)]
    kept = {n: _compressed(config, n) for n in tqdm((0, *vocos), desc="compression", unit="program", leave=False)}
    seconds = _measure(measured, cases)
    rows = []
    for case in tqdm(cases, desc="FLOPs", unit="program", leave=False):
        cached = {"full cache": kept[0], "VoCo cache": kept.get(case.vocos)}.get(case.method)
        rows.append({
            **case._asdict(),
            "cache_bytes": cached["cache_bytes"] if cached else 0,
            "flops": count_flops(config, case),
            "flops_to_compress": cached["flops"] if cached else 0,
            "measured_first_token_seconds": seconds[case][0],
            "measured_answer_seconds": seconds[case][1],
        })
    return {
        "rows": rows,
        "summary": summarise(rows, vocos[0], texts[0]),
        "flops_counted_in": "the programs compiled for the CPU, with dense attention",
        "model": dataclasses.asdict(config),
        "measured": {
            "model": "the same" if measured == config else dataclasses.asdict(measured),
            "device": jax.devices()[0].device_kind, "answer_tokens": ANSWER_TOKENS, "repeats": REPEATS,
        },
    }


def summarise(rows: Sequence[Mapping[str, Any]], vocos: int, text: int) -> dict[str, float]:
    """Returns the figures of one number of VoCo tokens and of text tokens."""
    at = {row["method"]: row for row in rows if row["text"] == text and row["vocos"] in (0, vocos)}
    voco, full, none, floor = (at[m] for m in ("VoCo cache", "full cache", "no cache", "text only"))
    first = "measured_first_token_seconds"
    return {
        "vocos": vocos,
        "text": text,
        "cache_saved": 1 - voco["cache_bytes"] / full["cache_bytes"],
        "flops_saved": 1 - voco["flops"] / none["flops"],
        "flops_over_text_only": voco["flops"] / floor["flops"],
        "measured_first_token_ratio": voco[first] / none[first],
    }


def measurable(config: ModelConfig) -> ModelConfig:
    """Returns a model that this machine runs in seconds: with an accelerator the model itself.

    For a CPU it is one of the same shape with width 512, 8 layers and a small tower, and as many vision tokens.
    """
    if jax.default_backend() != "cpu" or config.decoder.width <= 512:
        return config
    decoder = dataclasses.replace(config.decoder, width=512, depth=8, num_heads=8, num_kv_heads=8, head_width=64,
                                  mlp_width=1376)
    vision = dataclasses.replace(config.vision, width=256, depth=6, num_heads=4, mlp_width=1024)
    return dataclasses.replace(config, decoder=decoder, vision=vision)


def count_flops(config: ModelConfig, case: Case) -> int:
    """Counts the FLOPs of a prompt up to the first token's logits, in the compiled program; nothing is executed."""
    prompts, prefix = _inputs(config, case, jnp.bfloat16, jax.eval_shape)
    sampling = SamplingConfig(max_new_tokens=1)
    model = _model(config, case.vocos, jnp.bfloat16, _state(config, jnp.bfloat16, jax.eval_shape))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        lowered = first_token.lower(model, prompts, prefix, SamplingInputs.of([sampling]), end_id=NO_END,
                                    statics=SamplingStatics.of([sampling]), attention="reference")
        return matmul_flops(lowered.compile())


def _compressed(config: ModelConfig, vocos: int) -> dict[str, int]:
    """Returns the bytes of an image's cache, and the FLOPs of making it."""
    model, rows, keep = _unit(config, vocos)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        flops = matmul_flops(run_units.lower(model, rows, keep, "reference").compile())
    return {"cache_bytes": cache_bytes(config, vocos), "flops": flops}


def cache_bytes(config: ModelConfig, vocos: int) -> int:
    """Returns the bytes of an image's cache in bfloat16: of its VoCo tokens, or with `vocos` 0 of the whole unit."""
    model, rows, keep = _unit(config, vocos)
    cache = jax.eval_shape(lambda model, rows: run_units(model, rows, keep), model, rows)
    return sum(x.size * x.dtype.itemsize for x in cache)


def _unit(config: ModelConfig, vocos: int) -> tuple[VocoLlama, Rows, int]:
    """Returns the shapes of a model and of one image's unit, and how many of its tokens are kept."""
    unit = lay_out_unit("unit", LetterTokenizer(config.voco.token_id), UnitShape(config.unit_tokens, vocos))
    rows = jax.eval_shape(lambda: _on_device(whole_rows([unit], [[_image(config)]], config, "voco", len(unit))))
    model = _model(config, vocos, jnp.bfloat16, _state(config, jnp.bfloat16, jax.eval_shape))
    return model, rows, vocos or len(unit)


def _measure(config: ModelConfig, cases: Sequence[Case]) -> dict[Case, tuple[float, float]]:
    """Measures the median seconds to the first token and of a whole answer.

    The cases take turns, so that a change of the machine's speed affects all of them.
    """
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    sampling = SamplingConfig(max_new_tokens=ANSWER_TOKENS)
    statics, inputs = SamplingStatics.of([sampling]), SamplingInputs.of([sampling])
    make: Create = lambda function: jax.jit(function)()
    state = _state(config, dtype, make)
    ready = {case: (_model(config, case.vocos, dtype, state), *_inputs(config, case, dtype, make)) for case in cases}
    taken: dict[Case, list[tuple[float, float]]] = {case: [] for case in cases}
    for repeat in tqdm(range(-1, REPEATS), desc="times", unit="round", leave=False):
        for case, (model, prompts, prefix) in ready.items():
            before = time.perf_counter()
            logits_BV, progress = first_token(model, prompts, prefix, inputs, end_id=NO_END, statics=statics)
            logits_BV.block_until_ready()
            first = time.perf_counter()
            jax.block_until_ready(
                more_tokens(model, progress, inputs, np.int32(ANSWER_TOKENS), end_id=NO_END, statics=statics)
            )
            if repeat >= 0:  # the first round compiles
                taken[case].append((first - before, time.perf_counter() - before))
    median = lambda index, times: statistics.median(pair[index] for pair in times)
    return {case: (median(0, times), median(1, times)) for case, times in taken.items()}


def _cases(vocos: Sequence[int], text: int) -> list[Case]:
    return [Case("no cache", 0, text), Case("full cache", 0, text), *(Case("VoCo cache", n, text) for n in vocos),
            Case("text only", 0, text)]


def _inputs(config: ModelConfig, case: Case, dtype: DTypeLike, create: Create) -> tuple[Prompts, KeyValues | None]:
    """Makes a case's prompt and prefix, as arrays or as shapes."""
    num_units = 0 if case.method == "text only" else 1
    own_token = bool(case.vocos) or not num_units  # BOS, or the newline in front of the text: one of the text's tokens
    text = [[Span("a" * (case.text - own_token))]]
    unit = UnitShape(config.unit_tokens, case.vocos)
    sample = lay_out_sample("a case", num_units, text, LetterTokenizer(config.voco.token_id), unit, 10**6)
    if case.method in ("full cache", "VoCo cache"):
        kept, length, decoder = case.vocos or sample.text_start, len(sample) - sample.text_start, config.decoder
        prompts = text_prompts([sample], "voco" if case.vocos else "causal", kept, length)
        shape = (decoder.depth, 1, kept, decoder.num_kv_heads, decoder.head_width)
        prefix = create(lambda: KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)))
    else:
        prefix = None
        prompts = whole_prompts([sample], [[_image(config)] * num_units], config, "causal", len(sample))
    return create(lambda: _on_device(prompts)), prefix


def _state(config: ModelConfig, dtype: DTypeLike, create: Create) -> nnx.State:
    """Makes random parameters, or their shapes. They do not depend on the number of VoCo tokens."""
    def make() -> nnx.State:
        return jax.tree.map(lambda x: x.astype(dtype), nnx.state(VocoLlama(config, nnx.Rngs(0), dtype)))

    return create(make)


def _model(config: ModelConfig, vocos: int, dtype: DTypeLike, state: nnx.State) -> VocoLlama:
    """Returns a model with this number of VoCo tokens (0: it is read without any) with these parameters."""
    config = dataclasses.replace(config, voco=dataclasses.replace(config.voco, num_vocos=max(1, vocos)))
    return nnx.merge(nnx.graphdef(abstract(lambda: VocoLlama(config, nnx.Rngs(0), dtype))), state)


def _image(config: ModelConfig) -> np.ndarray:
    return np.zeros((config.vision.image_size, config.vision.image_size, 3), np.uint8)


def _on_device(tree: Tree) -> Tree:
    return jax.tree.map(jnp.asarray, tree)


def format_rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as a table for a terminal."""
    head = ("text", "method", "N", "cache MiB", "TFLOPs", "to compress", "first token ms", "answer ms")
    lines = [head]
    for row in rows:
        seconds = (row["measured_first_token_seconds"], row["measured_answer_seconds"])
        lines.append((
            str(row["text"]), row["method"], str(row["vocos"] or "-"), f"{row['cache_bytes'] / 2**20:.2f}",
            *(f"{row[key] / 1e12:.4f}" for key in ("flops", "flops_to_compress")), *(f"{1e3 * s:.1f}" for s in seconds),
        ))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
