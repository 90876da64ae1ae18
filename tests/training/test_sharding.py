"""Where parameters lie: the whole table for 7B on 64 chips, the rules behind it, and gathers in stages."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from tests.helpers.environment import on_cpu
from vocojax.config import ConfigError, preset
from vocojax.models.parameters import abstract
from vocojax.models.voco import VocoLlama
from vocojax.parallel.mesh import AXES, MeshConfig, make_mesh
from vocojax.parallel.shardings import parameter_shardings

GOLDEN = Path(__file__).parent.parent / "golden" / "shardings_7b_v5p_4x4x4.txt"


def shardings(name: str, *sizes: int) -> dict[str, tuple]:
    """(shape, spec, shape of a part) of every parameter on a mesh of slice x data x fsdp x tensor."""
    model = abstract(lambda: VocoLlama(preset(name), nnx.Rngs(0)))
    shapes = {"/".join(map(str, path)): v.shape for path, v in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    placed = parameter_shardings(model, AbstractMesh(sizes, AXES))
    return {n: (shapes[n], tuple(s.spec), s.shard_shape(shapes[n])) for n, s in placed.items()}


def test_7b_on_64_chips_lies_as_the_golden_file_says():
    """After a change that is meant: write the lines that the failure shows to tests/golden."""
    lines = [f"{name} {shape} {spec} {part}" for name, (shape, spec, part) in
             shardings("clip_l_336_vicuna_7b", 1, 1, 64, 1).items()]
    assert "\n".join(sorted(lines)) + "\n" == GOLDEN.read_text()


@pytest.mark.parametrize("fsdp", [4, 8, 16, 64, 256])
def test_parts_of_the_7b_decoder_are_whole_tiles(fsdp):
    for name, (shape, spec, part) in shardings("clip_l_336_vicuna_7b", 1, 1, fsdp, 1).items():
        if name.startswith("decoder/") and "fsdp" in spec:
            at = spec.index("fsdp")
            assert part[at] % 16 == 0 and part[at] * fsdp == shape[at], name


def test_tensor_and_fsdp_cut_different_axes():
    table = shardings("clip_l_336_vicuna_7b", 1, 2, 4, 2)
    assert table["decoder/blocks/up/kernel"][1:] == ((None, "fsdp", "tensor"), (32, 1024, 5504))
    assert table["decoder/blocks/down/kernel"][1:] == ((None, "tensor", "fsdp"), (32, 5504, 1024))
    assert table["decoder/blocks/mlp_norm/scale"][1] == (None, None)


def test_a_large_parameter_that_nothing_divides_is_refused():
    with pytest.raises(ConfigError, match=r"mesh\.fsdp must divide an axis of every large parameter, but 7 divides"):
        shardings("clip_l_336_vicuna_7b", 1, 1, 7, 1)


def test_a_mesh_must_have_as_many_devices_as_there_are():
    with pytest.raises(ConfigError, match="fsdp x tensor must multiply to the 1 devices there are, got 2"):
        make_mesh(MeshConfig(slice=2, data=1), jax.devices()[:1])


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU device as laying out a mesh asks for."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    device_kind: str = "TPU v6 lite"
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def torus(x: int, y: int, slice_index: int = 0) -> list[Chip]:
    return [Chip(slice_index * 100 + j * x + i, (i, j, 0), slice_index) for j in range(y) for i in range(x)]


def test_axes_of_a_mesh_may_share_an_axis_of_the_torus():
    mesh = make_mesh(MeshConfig(data=2, fsdp=8), torus(4, 4))
    assert mesh.devices.shape == (1, 2, 8, 1) and len({chip.id for chip in mesh.devices.flat}) == 16
    for group in mesh.devices.reshape(2, 8):  # each a block of the torus, not chips from all over it
        sides = [max(side) - min(side) + 1 for side in zip(*(chip.coords for chip in group), strict=True)]
        assert sorted(sides) == [1, 2, 4]


def test_the_slices_of_a_mesh_are_the_slices_of_the_devices():
    chips = torus(4, 2) + torus(4, 2, slice_index=1)
    mesh = make_mesh(MeshConfig(slice=2, data=2, fsdp=-1), chips)
    assert mesh.devices.shape == (2, 2, 4, 1)
    for index, block in enumerate(mesh.devices):
        assert {chip.slice_index for chip in block.flat} == {index}
    with pytest.raises(ConfigError, match=r"mesh\.slice must be the 2 slices that the devices are in, got 1"):
        make_mesh(MeshConfig(data=4, fsdp=4), chips)
    with pytest.raises(ConfigError, match=r"mesh slice x data x fsdp x tensor = \[2, 1, 6, 1\] can't be laid over"):
        make_mesh(MeshConfig(slice=2, data=1, fsdp=6), torus(4, 1) + torus(4, 2, slice_index=1))


def test_gathers_in_stages_and_their_gradients_are_those_of_one_stage():
    """Eight virtual devices: 4 x 2 in two stages, against the array itself and the sum over devices."""
    code = textwrap.dedent("""
        import functools, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import PartitionSpec as P
        from vocojax.models.gathering import Parts
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
        w = jnp.arange(16 * 24, dtype=jnp.float32).reshape(16, 24)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16)), jnp.float32)
        for axis, spec in ((-2, P("fsdp", None)), (-1, P(None, "fsdp"))):
            for stages in ((8,), (4, 2), (2, 4)):
                parts = Parts("fsdp", axis, stages)
                run = lambda w, x: jax.value_and_grad(lambda w: ((x @ parts.gather(w)) ** 2).sum())(w)
                total = lambda w, x: (jax.lax.psum(run(w, x)[0], "fsdp"), run(w, x)[1])
                mapped = jax.shard_map(total, mesh=mesh, in_specs=(spec, P("fsdp")), out_specs=(P(), spec),
                                       check_vma=False)
                loss, grad = jax.jit(mapped)(w, x)
                wanted = jax.value_and_grad(lambda w: ((x @ w) ** 2).sum())(w)
                np.testing.assert_allclose(loss, wanted[0], rtol=1e-5)
                np.testing.assert_allclose(grad, wanted[1], rtol=1e-4)
    """)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **on_cpu(devices=8)})
