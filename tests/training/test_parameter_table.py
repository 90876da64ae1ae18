"""The table of parameters that a stage logs and writes as it starts."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vocojax.parallel.mesh import make_mesh
from vocojax.training.parameter_table import parameter_table, report_parameters
from vocojax.training.program import make_program


def test_it_says_of_every_parameter_what_it_is(tmp_path, caplog):
    mesh = AbstractMesh((2, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    leaf = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))
    parameters = {
        "a/kernel": leaf((3, 8, 4), jnp.float32, None, ("data", "fsdp"), "tensor"),
        "b/bias": leaf((8,), jnp.bfloat16, None), "c": leaf((), jnp.float32),
    }
    with caplog.at_level("INFO", "vocojax"):
        report_parameters(tmp_path, parameters, {"a/kernel": 0.1, "c": 1.0}, {"a/kernel": "runs/x", "b/bias": "runs/x",
                                                                              "c": "random"})
    assert (tmp_path / "parameters.txt").read_text() == """\
parameter  shape      dtype     sharding              learning rate  origin
a/kernel   3 x 8 x 4  float32   -, data+fsdp, tensor  x 0.1          runs/x
b/bias     8          bfloat16  whole                 frozen         runs/x
c          scalar     float32   whole                 x 1            random
105 numbers in 3 parameters, of which 97 in 2 train
"""
    (record,) = caplog.records
    assert record.getMessage().endswith("97 in 2 train")


def test_a_stage_has_a_line_for_every_parameter(stage):
    """A stack of blocks is one."""
    program = make_program(dataclasses.replace(stage, frozen_dtype="bfloat16"), make_mesh(stage.mesh))
    origins = dict.fromkeys(program.abstract_parameters, "random")
    (_, *rows, total) = parameter_table(program.abstract_parameters, program.multipliers, origins).splitlines()
    assert [row.split()[0] for row in rows] == sorted(program.abstract_parameters)
    for row in rows:
        assert ("frozen" in row) == row.startswith("vision/") == ("bfloat16" in row)
    layers = stage.model.decoder.depth
    assert any(row.startswith("decoder/blocks/query/kernel ") and f" {layers} x " in row for row in rows)
    assert f"in {len(rows)} parameters" in total
