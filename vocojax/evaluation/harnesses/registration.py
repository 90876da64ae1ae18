"""The entry point that lmms-eval reads at its start: says where the adapter is, without importing JAX."""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("vocojax", chat_class_path="vocojax.evaluation.harnesses.lmms_eval.VocojaxModel")
