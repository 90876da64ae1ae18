"""Module paths of version 0.1, until version 0.3: an old path imports the new module and warns.

Nothing is imported, and no ordinary import takes longer, before an old path is used.
"""

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

# Old module -> new module, both below `vocojax.`.
MODULES = {
    "convert.conversion": "pretrained.conversion",
    "convert.export": "pretrained.export",
    "convert.orbax_files": "runs.weights",
    "convert.pretrained": "pretrained.loading",
    "convert.source": "pretrained.source",
    "convert.weights": "weights",
    "data.benchmark": "costs.data",
    "data.lanes": "data.packers",
    "data.processor": "pretrained.processor",
    "inference.ask": "inference.many",
    "inference.cache": "inference.caches.cache",
    "inference.cache_files": "inference.caches.files",
    "inference.decode": "inference.decoding.decode",
    "inference.efficiency": "costs.answers",
    "inference.fingerprint": "inference.caches.fingerprint",
    "inference.flops": "costs.flops",
    "inference.mesh": "parallel.mesh",
    "inference.sampling": "inference.decoding.sampling",
    "inference.store": "inference.caches.store",
    "inference.text": "inference.decoding.text",
    "kernels.static_cost": "costs.kernels",
    "kernels.static_cost.bundles": "costs.kernels.bundles",
    "kernels.static_cost.gpu": "costs.kernels.gpu",
    "kernels.static_cost.hlo": "costs.hlo",
    "kernels.static_cost.layouts": "costs.kernels.layouts",
    "kernels.static_cost.report": "costs.kernels.report",
    "kernels.static_cost.tpu": "costs.kernels.tpu",
    "models.parts": "models.gathering",
    "quickstart": "experiments.quickstart",
    "terminal": "cli.flag_checks",
    "training.checksums": "runs.checksums",
    "training.compile_report": "costs.steps",
    "training.compile_report.attention": "costs.steps.attention",
    "training.compile_report.compiling": "costs.steps.compiling",
    "training.compile_report.costs": "costs.steps.program",
    "training.compile_report.report": "costs.steps.report",
    "training.compile_report.search": "costs.steps.search",
    "training.compile_report.tables": "costs.steps.tables",
    "training.contrastive": "experiments.contrastive",
    "training.distributed": "parallel.cluster",
    "training.preemption": "parallel.preemption",
    "training.run_files": "runs.directory",
    "training.run_weights": "runs.parameters",
    "training.sharding": "parallel.shardings",
}
# Old name -> new name, for those that did not move with the rest of their module.
NAMES = {
    "convert.export.new_directory": "files.new_directory",
    "convert.mapping.ConvertError": "errors.ConvertError",
    "convert.mapping.Shape": "weights.Shape",
    "convert.mapping.check_tensors": "weights.check_tensors",
    "convert.pretrained.ParametersInMemory": "weights.ParametersInMemory",
    "convert.pretrained.read_parameters": "weights.read_parameters",
    "convert.weights.MappedWeights": "convert.mapped.MappedWeights",
    "data.loader.unit_shape": "layout.unit_shape",
    "data.prepared.unit_shape": "layout.unit_shape",
    # The job of 0.1's function, a file's identity in a run's data state, is done by the digest of all bytes: an edit in
    # the middle of a large file went unseen. Its values, for states of 0.1, are those of `sampled_digest`.
    "data.sources.columnar.sample_digest": "data.sources.columnar.file_digest",
    "inference.cache_files.is_remote": "files.is_remote",
    "inference.cache_files.write_atomically": "files.write_atomically",
    "convert.orbax_files.is_run": "runs.directory.is_run",
    "data.lanes.Lane": "data.packers.Packer",
    "models.parts.held_back": "models.gathering.scatter_gradients_first",
    "training.run_weights.read_arrays": "runs.checkpoint_files.read_arrays",
    "training.run_weights.read_progress": "runs.checkpoint_files.read_progress",
    "training.run_weights.sha256": "runs.checkpoint_files.sha256",
    "training.config.config_to_dict": "config.config_to_dict",
    "training.config.differing_keys": "config.differing_keys",
    "training.config.MeshConfig": "parallel.mesh.MeshConfig",
    "training.distributed.EXCHANGE_SECONDS": "parallel.processes.EXCHANGE_SECONDS",
    "training.distributed.MissingProcesses": "parallel.processes.MissingProcesses",
    "training.distributed.from_all": "parallel.processes.from_all",
    "training.distributed.from_first": "parallel.processes.from_first",
    "training.distributed.is_first": "parallel.processes.is_first",
    "training.distributed.to_first": "parallel.processes.to_first",
    "training.distributed.row_share": "parallel.shardings.row_share",
    "training.run_files.is_remote": "files.is_remote",
    "training.run_files.write_atomically": "files.write_atomically",
    "training.run_files.write_directory": "files.write_files",
    "training.sharding.AXES": "parallel.mesh.AXES",
    "training.sharding.BATCH": "parallel.mesh.BATCH",
    "training.sharding.BATCH_AXES": "parallel.mesh.BATCH_AXES",
    "training.sharding.make_mesh": "parallel.mesh.make_mesh",
    "training.sharding.replicated": "parallel.mesh.replicated",
    "training.sharding.shard_batch": "parallel.mesh.shard_batch",
    "training.sharding.on_every_device": "parallel.shardings.over_devices",
    "terminal.show_own_messages": "cli.runner.show_own_messages",
}
_SPLIT = {f"vocojax.{name.rpartition('.')[0]}" for name in NAMES}


class _OldPaths:
    """A finder and loader of modules that have moved."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        """Leaves the stand-in to be made as any module is."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the spec of a module that stands in for the one that has moved."""
        old = fullname.removeprefix("vocojax.")
        if old in MODULES:
            package = any(module.startswith(f"{old}.") for module in MODULES)
            return importlib.machinery.ModuleSpec(fullname, self, is_package=package)  # type: ignore[arg-type]
        return None

    def exec_module(self, module: ModuleType) -> None:
        """Fills the stand-in with the names of the new module."""
        old = module.__name__.removeprefix("vocojax.")
        _warn(module.__name__, f"vocojax.{MODULES[old]}")
        new = importlib.import_module(f"vocojax.{MODULES[old]}")
        vars(module).update({name: value for name, value in vars(new).items() if not name.startswith("__")})
        module.__doc__ = new.__doc__
        _find_moved_names(module)


class _SplitModules:
    """A finder of modules that are where they were, without some of their names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Returns the module's own spec, with a loader that adds the names that have moved."""
        if fullname not in _SPLIT:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _find_moved_names(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _find_moved_names(module: ModuleType) -> None:
    """Lets a module find names that have moved elsewhere."""
    old = module.__name__.removeprefix("vocojax.")

    def find(name: str) -> Any:
        if f"{old}.{name}" not in NAMES:
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
        home, _, now = f"vocojax.{NAMES[f'{old}.{name}']}".rpartition(".")
        _warn(f"{module.__name__}.{name}", f"{home}.{now}")
        return getattr(importlib.import_module(home), now)

    vars(module)["__getattr__"] = find


def _warn(old: str, new: str) -> None:
    """Warns at the line that imports: `warnings` does not count the frames of the import system."""
    warnings.warn(f"{old} has moved to {new}; the old path goes in version 0.3", DeprecationWarning, stacklevel=3)


def install() -> None:
    """Makes the old paths work."""
    sys.meta_path.insert(0, _SplitModules())
    sys.meta_path.append(_OldPaths())
