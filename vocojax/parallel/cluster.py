"""Several processes as one run: who they are, and a start that names the processes that are missing."""

import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax._src import clusters  # how `jax.distributed.initialize` detects a cluster; it has no public name

from vocojax.errors import VocojaxError
from vocojax.parallel.preemption import handed_to_jax
from vocojax.parallel.processes import MissingProcesses, missing_message, named

LOG = logging.getLogger(__name__)
START_SECONDS = 300.0


class ClusterError(VocojaxError, ValueError):
    """The description of the cluster contradicts itself or is incomplete."""


@dataclass(frozen=True)
class Cluster:
    """This process's place among the processes of a run.

    Attributes:
      coordinator: host:port of process 0.
      num_processes: of the run.
      process_id: of this process, from 0 on.
      local_device_ids: the devices of this process; None for all that it sees.
    """

    coordinator: str
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ClusterError(f"coordinator_address must be HOST:PORT, got {self.coordinator!r}")
        if not 0 <= self.process_id < self.num_processes:
            raise ClusterError(f"process_id must be in [0, {self.num_processes}), got {self.process_id}")


def find_cluster(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Cluster | None:
    """Returns the cluster that this process belongs to, or None if it is on its own.

    Arguments come first, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (a Kubernetes job's
    JOB_COMPLETION_INDEX serves as the id if the other two are set), then what JAX detects: TPU metadata, SLURM, MPI.

    Args:
      coordinator: host:port of process 0.
      num_processes: of the run.
      process_id: of this process.
      environment: the environment variables.

    Raises:
      ClusterError: some of the three are given and the rest can't be found, or a variable holds no number.
    """
    def number(name: str) -> int | None:
        value = environment.get(name)
        if value and not value.isdecimal():
            raise ClusterError(f"{name} must be a whole number, got {value!r}: correct it or unset it")
        return int(value) if value else None

    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS") or None
    num_processes = number("JAX_NUM_PROCESSES") if num_processes is None else num_processes
    process_id = number("JAX_PROCESS_ID") if process_id is None else process_id
    if coordinator and num_processes is not None and process_id is None:
        process_id = number("JOB_COMPLETION_INDEX")
    if coordinator and num_processes is not None and process_id is not None:
        return Cluster(coordinator, num_processes, process_id)
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address, count, index, devices = detect(coordinator, num_processes, process_id, None, None, int(START_SECONDS))
    if address and count is not None and index is not None:
        return Cluster(address, count, index, None if devices is None else tuple(devices))
    if coordinator or num_processes is not None or process_id is not None:
        raise ClusterError("coordinator_address, num_processes and process_id must be given together, got "
                           f"{coordinator!r}, {num_processes} and {process_id}: set all three, by flag or as "
                           "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or none")
    return None


def initialize(cluster: Cluster | None, limit: float = START_SECONDS, heartbeat: int = 100) -> None:
    """Joins the processes of a cluster. Has to be called before anything uses a device.

    Args:
      cluster: of this process; None for a process on its own.
      limit: seconds to wait for the others.
      heartbeat: seconds without a message after which a process counts as dead and the others stop.

    Raises:
      MissingProcesses: names those that did not arrive within the limit, or left before all had arrived.
      ClusterError: two processes have the same id, or they disagree on how many there are.
    """
    if cluster is None or cluster.num_processes == 1:
        return
    _rendezvous(cluster, limit)
    with handed_to_jax():
        jax.distributed.initialize(
            cluster.coordinator, cluster.num_processes, cluster.process_id,
            local_device_ids=cluster.local_device_ids, cluster_detection_method="deactivate",
            initialization_timeout=int(limit), heartbeat_timeout_seconds=heartbeat, shutdown_timeout_seconds=60,
        )
    LOG.info("process %d of %d, %d of %d devices", jax.process_index(), jax.process_count(),
             jax.local_device_count(), jax.device_count())


def _rendezvous(cluster: Cluster, limit: float) -> None:
    """Waits until all processes are there.

    JAX's own start ends the program if one is missing, and does not say which. Process 0 listens where JAX's service
    will listen later. The others send it their id. It answers once all have done so, or with what is wrong.
    """
    deadline = time.monotonic() + limit
    verdict = (_receive_all if cluster.process_id == 0 else _report)(cluster, deadline, limit)
    if verdict["missing"]:
        raise MissingProcesses(missing_message(verdict["missing"], cluster.num_processes,
                                                f"start at {cluster.coordinator}", limit))
    if verdict["left"]:
        which = named(verdict["left"], cluster.num_processes)
        raise MissingProcesses(f"start at {cluster.coordinator}: {which} left before all had arrived; look at the log "
                               "there")
    if verdict["problem"]:
        raise ClusterError(verdict["problem"])


def _receive_all(cluster: Cluster, deadline: float, limit: float) -> dict[str, Any]:
    arrived: dict[int, socket.socket] = {}
    strays: list[socket.socket] = []
    problem = ""
    port = int(cluster.coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(("", port), family=family, backlog=cluster.num_processes,
                              dualstack_ipv6=family == socket.AF_INET6) as server:
        while len(arrived) < cluster.num_processes - 1 and not problem:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                connection, address = server.accept()
            except TimeoutError:
                break
            said = _read_line(connection)
            if said is None or "process_id" not in said:
                connection.close()  # not one of ours
                continue
            index = said["process_id"]
            if said["num_processes"] != cluster.num_processes:
                problem = (f"process {index} at {address[0]} was started with {said['num_processes']} processes, "
                           f"process 0 with {cluster.num_processes}")
            elif index == 0 or (index in arrived and not _has_left(arrived[index])):
                problem = f"two processes have the id {index}, one of them at {address[0]}"
            if problem:
                strays.append(connection)
            else:
                arrived[index] = connection
        missing = [] if problem else sorted(set(range(1, cluster.num_processes)) - arrived.keys())
        left = [] if problem or missing else [i for i, connection in sorted(arrived.items()) if _has_left(connection)]
        verdict = {"missing": missing, "left": left, "problem": problem}
        for connection in [*arrived.values(), *strays]:
            with connection:
                try:
                    connection.sendall(json.dumps(verdict).encode() + b"\n")
                except OSError:
                    LOG.warning("a process left before all had arrived")
    return verdict


def _report(cluster: Cluster, deadline: float, limit: float) -> dict[str, Any]:
    host, _, port = cluster.coordinator.rpartition(":")
    said = {"process_id": cluster.process_id, "num_processes": cluster.num_processes}
    # Process 0 answers by its own deadline, which may be later than this one.
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5) as connection:
                connection.sendall(json.dumps(said).encode() + b"\n")
                verdict = _read_line(connection, max(deadline - time.monotonic(), 0) + limit)
            if verdict is not None and "missing" in verdict:
                return verdict
        except OSError:
            pass
        time.sleep(0.2)
    return {"missing": [0], "left": [], "problem": ""}


def _has_left(connection: socket.socket) -> bool:
    """Returns whether a process that has sent its id has closed the connection since."""
    try:
        connection.settimeout(0)
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        connection.settimeout(5.0)


def _read_line(connection: socket.socket, limit: float = 5.0) -> dict[str, Any] | None:
    """Reads a JSON object from one line; None if there is none."""
    connection.settimeout(limit)
    try:
        with connection.makefile("rb") as file:
            said = json.loads(file.readline(65536))
    except (OSError, ValueError):
        return None
    return said if isinstance(said, dict) else None
