"""What test_plans.py runs in a process with eight virtual devices: both plans on a mesh, and what its program moves."""

import dataclasses
import json
import math
import pickle
import re
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from tests.training.test_plans import batches_of, compiled, parameters, plans_of
from vocojax.costs import hlo
from vocojax.costs.steps.program import COLLECTIVES
from vocojax.data.tokenizer import Tokenizer
from vocojax.models.gathering import cut
from vocojax.models.parameters import abstract
from vocojax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh, shard_batch
from vocojax.parallel.shardings import over_devices, parameter_shardings, parts_of
from vocojax.training import objectives
from vocojax.training.plan import deal
from vocojax.training.program import make_model
from vocojax.training.step import TrainState, make_objective, numbered

DRAWN = [(3, 2, 1), (0, 1, 1), (1, 4, 2), (2, 1, 1), (1, 1, 2), (0, 2, 1), (3, 3, 1), (1, 2, 1), (1, 1, 1), (0, 1, 1)]


def on_mesh(config, mesh):
    """(trained, state, batch) -> (gradients, sums), jitted for the devices of a mesh."""
    model = abstract(lambda: make_model(config, nnx.Rngs(0)))
    shardings = parameter_shardings(model, mesh)
    objective = make_objective(cut(model, parts_of(shardings, mesh), config.dtype), None, config, BATCH_AXES)
    return jax.jit(over_devices(jax.grad(objective, has_aux=True), mesh, shardings)), shardings


def collectives(text):
    """[op, bytes of the whole arrays, sizes of every array] of each collective, as often as it runs."""
    module, found = hlo.parse(text), []
    for name, instructions in module.computations.items():
        for i in instructions:
            if i.op.removesuffix("-start") in COLLECTIVES:
                whole = hlo.array_bytes(i.shape) * (hlo.group_size(i, 8) if i.op == "reduce-scatter" else 1)
                sizes = [[int(size) for size in re.findall(r"\d+", array.partition("[")[2].partition("]")[0])]
                         for array in hlo.arrays(i.shape)]
                found.append((i.op, module.runs[name] * whole, sizes))
    return found


def differences_with_dropout(stage, words, mesh):
    """The largest relative difference of each plan's gradients between the mesh and one device, with LoRA's dropout."""
    plans, found = plans_of(stage, vocos=3, chunk=4), []
    for config, batch in zip(plans, batches_of(DRAWN, *plans, words, seed=0), strict=True):
        trained, frozen = parameters(config)
        state, gradients = TrainState(jax.numpy.int32(3), {}, frozen, (), {}), []
        for devices in (mesh, make_mesh(MeshConfig(data=1), jax.devices()[:1])):
            ways = math.prod(devices.shape[axis] for axis in BATCH_AXES)
            dealt = deal(batch, ways) if config.plan == "two_stage" else batch
            with jax.set_mesh(devices):
                gradient, shardings = on_mesh(config, devices)
                placed = {name: jax.device_put(value, shardings[name]) for name, value in trained.items()}
                rows = shard_batch({name: np.asarray(array) for name, array in numbered(dealt).items()}, devices)
                gradients.append(jax.device_get(gradient(placed, state, rows)[0]))
        found.append(max(float(np.abs(gradients[0][name] - value).max() / max(np.abs(value).max(), 1e-9))
                         for name, value in gradients[1].items()))
    return found


def main(stage_file, tokenizer, data, fsdp, tensor, task=""):
    stage, words = pickle.loads(Path(stage_file).read_bytes()), Tokenizer.from_directory(tokenizer)
    stage = dataclasses.replace(stage, batch_size=8)
    objectives.CPU_CHUNK = 2  # devices have targets in different numbers of chunks
    mesh, report = make_mesh(MeshConfig(data=int(data), fsdp=int(fsdp), tensor=int(tensor))), {"moved": {}}
    if task == "dropout":
        print(json.dumps({"dropout": differences_with_dropout(stage, words, mesh)}))
        return
    for images in (4, 8) if mesh.shape["tensor"] == 1 else (4,):
        single, double = plans_of(stage, vocos=3, chunk=images)
        double = dataclasses.replace(double, data=dataclasses.replace(double.data, images_per_row=images))
        whole, text = batches_of(DRAWN, single, double, words, seed=0)
        trained, frozen = parameters(single)
        state = TrainState(jax.numpy.int32(0), {}, frozen, (), {})
        with jax.set_mesh(mesh):
            gradient, shardings = on_mesh(double, mesh)
            placed = {name: jax.device_put(value, shardings[name]) for name, value in trained.items()}
            batch = shard_batch(deal(text, math.prod(mesh.shape[axis] for axis in BATCH_AXES)), mesh)
            program = gradient.lower(placed, state, batch).compile()
            report["moved"][images] = collectives(program.as_text())
        if images == 4:
            found, sums = program(placed, state, batch)
            (_, (wanted_sums, _)), wanted = compiled(single)(trained, frozen, whole)
            with jax.set_mesh(mesh):  # devices have images in different numbers of chunks
                rows = shard_batch({name: np.asarray(array) for name, array in whole.items()}, mesh)
                found_single, sums_single = on_mesh(single, mesh)[0](placed, state, rows)
            report["losses"] = [float(each.loss) for each in (wanted_sums, sums, sums_single)]
            report["worst"] = {name: max(float(np.abs(each[name] - value).max() / max(np.abs(value).max(), 1e-9))
                                         for each in (found, found_single)) for name, value in wanted.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
