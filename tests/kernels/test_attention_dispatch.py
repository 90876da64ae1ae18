"""Which implementation runs, and where: platform dispatch, and rows and heads on the devices of a mesh."""

import logging
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.environment import on_cpu
from vocojax.kernels import sharding
from vocojax.kernels.interval_attention import IntervalMask, api, interval_attention

# Runs in a process of its own, because the number of devices is fixed when JAX starts.
ON_A_MESH = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from vocojax.kernels.interval_attention import IntervalMask, chunked, interval_attention

chunked.CHUNK = 16
B, S, H, G, D = 8, 64, 4, 2, 8
rng = np.random.default_rng(0)
q, k, v = (jnp.asarray(rng.normal(size=(B, S, n, D)), jnp.float32) for n in (H, G, G))
start = np.arange(S) // 20 * 20
mask = IntervalMask(jnp.asarray(np.tile(start, (B, 1)), jnp.int32), jnp.asarray(np.tile(start + 20, (B, 1)), jnp.int32))
function = lambda q, k, v, mask: jax.value_and_grad(
    lambda *x: jnp.square(interval_attention(*x, mask, implementation="chunked")).sum(), argnums=(0, 1, 2)
)(q, k, v)
want = jax.jit(function)(q, k, v, mask)

mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(getattr(AxisType, sys.argv[1]),) * 3)
rows, heads = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
with jax.set_mesh(mesh):
    args = *(jax.device_put(x, heads) for x in (q, k, v)), jax.device_put(mask, rows)
    got = jax.jit(function)(*args)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)
    attend = lambda q, k, v, mask: interval_attention(q, k, v, mask, implementation="chunked")
    passes = lambda q, k, v, mask: jax.vjp(lambda *x: attend(*x, mask), q, k, v)[1](q)
    for program in (jax.jit(attend), jax.jit(passes)):
        text = program.lower(*args).compile().as_text()
        collective = re.findall(r"all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute", text)
        assert not collective, collective
    first = jax.tree.map(lambda x: x[:1], (q, k, v, mask))
    one_row = jax.jit(attend)(*first)
    assert one_row.shape == (1, S, H, D)
print("passed")
"""


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
def test_eight_devices_compute_their_rows_and_heads_without_a_collective(axis_type):
    process = subprocess.run(
        [sys.executable, "-c", ON_A_MESH, axis_type],
        env={"PATH": "/usr/bin:/bin", **on_cpu(devices=8)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.stdout.endswith("passed\n"), process.stderr[-3000:]


def test_the_platform_decides_and_the_log_says_so_once(caplog):
    api._for_platform.cache_clear()
    with caplog.at_level(logging.INFO, logger=api.__name__):
        assert [api._for_platform(x) for x in ("tpu", "gpu", "cpu", "cpu")] == [
            *("pallas_tpu", "pallas_gpu", "chunked", "chunked")
        ]
    assert len(caplog.messages) == 3
    assert "pallas_tpu, because the default backend is tpu" in caplog.messages[0]


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_named_on_the_wrong_platform_is_an_error(implementation):
    x = jnp.zeros((1, 128, 1, 128))
    with pytest.raises(Exception, match=r"(?i)interpret|platform|backend"):
        interval_attention(x, x, x, IntervalMask.causal(1, 128), implementation=implementation)


def test_axes_that_do_not_divide_are_left_out_and_logged(caplog):
    sharding._warn.cache_clear()
    sizes = {"data": 2, "fsdp": 4}
    assert sharding._dividing(["data", "fsdp"], sizes, 16, "rows") == ("data", "fsdp")
    assert not caplog.messages
    assert sharding._dividing(["data", "fsdp"], sizes, 6, "rows") == ("data",)
    assert "6 rows do not divide over mesh axis 'fsdp' of 4 devices" in caplog.messages[0]


def test_without_a_mesh_the_function_runs_as_it_is():
    function = lambda x: x
    assert sharding.per_shard(function, ["BQHD"], ["BQHD"], 4, 4, 4) is function
    assert jax.sharding.get_abstract_mesh().empty
