"""Small stand-ins for lmms-eval, accelerate and VLMEvalKit, where those are not installed.

They hold what the adapters import, in the form of lmms-eval 0.7.3 and VLMEvalKit of September 2026. The slow test in
test_lmms_eval.py runs lmms-eval itself.
"""

import importlib.util
import sys
import types
from dataclasses import dataclass


@dataclass
class Instance:
    """A chat request: `args` is (context, doc_to_messages, generation settings, document, task, split)."""

    args: tuple


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


class Lmms:
    def __init__(self):
        self._rank, self._world_size, self.task_dict, self.cache_hook = 0, 1, {}, self

    def add_partial(self, *_):
        pass

    rank = property(lambda self: self._rank)


class Accelerator:
    device, process_index, num_processes = "cpu", 0, 1


class BaseModel:
    """VLMEvalKit's: `generate` makes a list of dicts of what it gets."""

    def generate(self, message, dataset=None):
        assert all(item["type"] in self.allowed_types for item in message)
        return self.generate_inner(message, dataset)


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None


STAND_INS = {
    "lmms_eval": {
        "lmms_eval.api.instance": {"Instance": Instance, "GenerationResult": GenerationResult,
                                   "TokenCounts": TokenCounts},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "accelerate": {"Accelerator": Accelerator},
    },
    "vlmeval": {"vlmeval.vlm.base": {"BaseModel": BaseModel}},
}


def install(monkeypatch) -> None:
    """Puts the stand-ins of packages that are not installed among the imported modules, for one test."""
    for package, modules in STAND_INS.items():
        if importlib.util.find_spec(package) is not None:
            continue
        for name, content in modules.items():
            for parent in (name.rpartition(".")[0], name.partition(".")[0]):
                if parent and parent not in sys.modules:
                    monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
            module = types.ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
        for adapter in ("lmms_eval", "vlmevalkit", "registration"):
            monkeypatch.delitem(sys.modules, f"vocojax.evaluation.harnesses.{adapter}", raising=False)
