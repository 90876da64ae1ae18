"""vocojax: VoCo-LLaMA (arXiv 2406.12275) in JAX/Flax for TPU and GPU."""

__version__ = "0.1.0"
