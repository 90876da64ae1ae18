"""Several processes as one run: who is found, who is missed, and the same losses however many there are."""

import dataclasses
import json
import shutil
import socket
import threading
import time

import pytest

from tests.helpers import run_processes as runs
from vocojax.evaluation.report import loss_curve
from vocojax.parallel import cluster, processes
from vocojax.parallel.cluster import Cluster, ClusterError, find_cluster
from vocojax.parallel.mesh import MeshConfig
from vocojax.parallel.processes import MissingProcesses
from vocojax.parallel.shardings import row_share
from vocojax.training.config import CheckpointConfig


@pytest.mark.parametrize(
    ("arguments", "environment", "expected"),
    [
        ((), {}, None),
        (("host:1", 4, 3), {}, Cluster("host:1", 4, 3)),
        ((), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, Cluster("a:1", 2, 0)),
        ((), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "1"},
         Cluster("a:1", 2, 1)),
        ((None, None, 0), {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
         Cluster("a:1", 2, 0)),
        ((), {"JOB_COMPLETION_INDEX": "1"}, None),  # of a job that is no cluster of ours
    ],
)
def test_who_is_found(arguments, environment, expected):
    assert find_cluster(*arguments, environment=environment) == expected


def test_slurm_is_detected(monkeypatch):
    for name, value in {"JOB_ID": "7", "STEP_NODELIST": "node[03-04]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0",
                        "STEP_NUM_NODES": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert find_cluster(environment={}) == Cluster("node03:61447", 2, 1, (0,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host:1", None, None), "must be given together, got 'host:1', None and None"),
        (("host", 2, 0), "must be HOST:PORT, got 'host'"),
        (("host:1", 2, 2), r"process_id must be in \[0, 2\), got 2"),
    ],
)
def test_half_a_cluster_is_an_error(arguments, message):
    with pytest.raises(ClusterError, match=message):
        find_cluster(*arguments, environment={})


def meet(*told, limit=1.0):
    """Returns what processes that are started with (count, id) are answered."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    answers = {}

    def one(place, count, index):
        try:
            cluster._rendezvous(Cluster(address, count, index), limit)
            answers[place] = "all there"
        except (MissingProcesses, ClusterError) as error:
            answers[place] = str(error).removeprefix(f"start at {address}: ")

    threads = [threading.Thread(target=one, args=(place, *who)) for place, who in enumerate(told)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [answers[place] for place in range(len(told))]


def test_a_start_names_who_is_missing():
    assert meet((3, 2), (3, 1), (3, 0)) == ["all there"] * 3
    assert meet((4, 0), (4, 2)) == ["processes 1, 3 of 4 did not arrive within 1 s; look at the log there"] * 2
    assert meet((3, 1), (3, 2)) == ["process 0 of 3 did not arrive within 1 s; look at the log there"] * 2


def test_a_start_names_who_is_there_twice():
    assert set(meet((3, 0), (3, 1), (3, 1))) == {"two processes have the id 1, one of them at ::ffff:127.0.0.1"}
    assert "was started with 3 processes, process 0 with 2" in meet((2, 0), (3, 1))[0]


def test_a_start_names_who_left_and_takes_back_who_came_again():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = probe.getsockname()
    answers = []

    def told(count):
        try:
            answers.append(cluster._rendezvous(Cluster(f"127.0.0.1:{address[1]}", count, 0), 20.0))
        except MissingProcesses as error:
            answers.append(str(error).partition(": ")[2])

    def arrive(index, count):
        while True:
            try:
                connection = socket.create_connection(address, 5)
            except ConnectionRefusedError:
                continue
            connection.sendall(json.dumps({"process_id": index, "num_processes": count}).encode() + b"\n")
            return connection

    for comings in ((1, 2), (1, 1, 2)):  # process 1 leaves at once, the first time it comes
        count = 3
        first = threading.Thread(target=told, args=(count,))
        first.start()
        arrive(comings[0], count).close()
        time.sleep(0.1)
        staying = [arrive(index, count) for index in comings[1:]]
        first.join()
        for connection in staying:
            connection.close()
    assert answers == ["process 1 of 3 left before all had arrived; look at the log there", None]


class Device:
    def __init__(self, process_index):
        self.process_index = process_index


class Spread:
    """Stands for a sharding of rows: device i of process `owners[i]` holds `spans[i]`."""

    def __init__(self, owners, spans):
        self._map = {Device(owner): (slice(*span),) for owner, span in zip(owners, spans, strict=True)}

    def devices_indices_map(self, shape):
        return self._map


@pytest.mark.parametrize(
    ("owners", "spans", "shares"),
    [
        ([0, 0, 1, 1], [(0, 2), (2, 4), (4, 6), (6, 8)], {0: (0, 2), 1: (1, 2)}),
        ([0, 1, 2, 3], [(0, 4), (0, 4), (4, 8), (4, 8)], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
        ([0, 1], [(None, None), (None, None)], {0: (0, 1), 1: (0, 1)}),
        ([1, 0], [(0, 4), (4, 8)], {0: (1, 2), 1: (0, 2)}),
    ],
)
def test_a_process_makes_the_rows_its_devices_hold(owners, spans, shares, monkeypatch):
    for process, share in shares.items():
        monkeypatch.setattr(processes.jax, "process_index", lambda process=process: process)
        assert row_share(Spread(owners, spans), 8) == share


def test_rows_that_overlap_are_refused(monkeypatch):
    monkeypatch.setattr(processes.jax, "process_index", lambda: 0)
    with pytest.raises(ClusterError, match="overlapping rows"):
        row_share(Spread([0, 0, 1], [(0, 2), (2, 4), (2, 4)]), 4)


@pytest.mark.slow
def test_any_number_of_processes_and_any_mesh_train_alike(quickstart_stage, tmp_path):
    """One process on one device against 2 and 4 processes and meshes of 8 devices."""
    stage = dataclasses.replace(quickstart_stage, batch_size=8, steps=6, checkpoint=CheckpointConfig(every=3))
    runs.run(stage, tmp_path / "one")
    one = loss_curve(tmp_path / "one")
    for name, count, devices, mesh in (
        ("two", 2, 1, MeshConfig()), ("four", 4, 2, MeshConfig(data=2, fsdp=2, tensor=2)),
        ("eight devices of one", 1, 8, MeshConfig(data=2, fsdp=2, tensor=2)),
        ("slices", 1, 8, MeshConfig(slice=2, data=2, fsdp=2)), ("tensor over two", 2, 1, MeshConfig(data=1, tensor=2)),
    ):
        runs.run(dataclasses.replace(stage, mesh=mesh), tmp_path / name, count, devices)
        curve = loss_curve(tmp_path / name)
        assert len(curve) == 6
        for (_, mine), (_, theirs) in zip(curve, one, strict=True):
            assert abs(mine - theirs) <= 1e-5 * theirs, (name, curve, one)


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_on_another_mesh(quickstart_stage, tmp_path):
    stage = dataclasses.replace(quickstart_stage, batch_size=8, steps=6, checkpoint=CheckpointConfig(every=3))
    runs.run(stage, tmp_path / "one")
    whole = loss_curve(tmp_path / "one")
    workdir = tmp_path / "moved"
    for count, devices, mesh, last in (
        (1, 8, MeshConfig(data=2, fsdp=2, tensor=2), 3), (2, 2, MeshConfig(data=1, fsdp=4), 6),
    ):
        runs.run(dataclasses.replace(stage, mesh=mesh), workdir, count, devices)
        for (_, mine), (_, theirs) in zip(loss_curve(workdir), whole, strict=True):
            assert abs(mine - theirs) <= 1e-5 * theirs
        if last == 3:  # as if it had been killed after the third step
            shutil.rmtree(workdir / "checkpoints" / "6")
    assert [step for step, _ in loss_curve(workdir)] == [1, 2, 3, 4, 5, 6]
