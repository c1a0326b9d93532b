"""Packaging. Versions are pinned to what the tests ran with."""

import pathlib

from setuptools import find_packages, setup

CORE = [
    "tensorflow==2.20.0",
    "keras==3.15.1",
    "jax==0.10.2",
    "jaxlib==0.10.2",
    "numpy>=2.0,<3",
]
TRANSLATION = [
    "tensorflow-text==2.20.1",
    "sentencepiece==0.2.3",
    "sacrebleu==2.6.0",
    "scikit-learn==1.9.1",
    "matplotlib>=3.10,<4",
    "tensorboard==2.20.0",
    "polib>=1.2,<2",
    "fluent.syntax>=0.19,<1",
    "javaproperties>=0.8.2,<1",
    # The default corpus is read from the message catalogues of these four.
    "django==5.2.19",
    "plone.app.locales==7.0.4",
    "gramps==6.0.8",
    "pycountry==26.2.16",
]
# The server, and the messages of TensorFlow Serving.
SERVE = [
    "tensorflow-text==2.20.1",
    "starlette==1.10.0",
    "uvicorn==0.54.0",
    "prometheus-client==0.26.0",
    "tensorflow-serving-api==2.20.0",
]
# What benchmarks.moe.peers measures beside our layer.
BENCHMARKS = [
    "torch==2.13.0",
    "transformers==5.23.0",
    "keras-hub==0.32.0",
    "tf-models-official==2.20.0",
    "st-moe-pytorch==0.1.8",
    "mixture-of-experts==0.2.3",
    "mesh-tensorflow==0.1.21",
    "matplotlib>=3.10,<4",
]
# The TPU compiler, for planning; no TPU is needed.
AOT = ["libtpu==0.0.52"]
TEST = [
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "hypothesis>=6,<7",
    "ruff==0.17.*",
    # Keras 2, whose models train under the strategy too.
    "tf_keras==2.20.1",
]

setup(
    name="gshard-tf",
    version="0.1.0",
    description="GShard for Keras 3 on TensorFlow: sharding annotations, XLA's SPMD "
    "partitioner under model.fit, and Mixture-of-Experts layers",
    long_description=pathlib.Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    # The translator and its server are a package of their own name; benchmarks run
    # from a checkout.
    packages=find_packages(include=["gshard_tf*", "keras_layers*"])
    + find_packages("examples"),
    package_dir={"gshard_examples": "examples/gshard_examples"},
    package_data={
        "gshard_tf": ["py.typed"],
        "gshard_tf.planning.html": ["page.css", "page.js"],
        "gshard_examples.serving": ["page/*"],
        "keras_layers": ["py.typed"],
    },
    install_requires=CORE,
    extras_require={
        "translation": TRANSLATION,
        "serve": SERVE,
        "benchmarks": BENCHMARKS,
        "aot": AOT,
        "test": TRANSLATION + SERVE + AOT + TEST,
    },
    entry_points={
        "console_scripts": [
            "gshard-translate=gshard_examples.translation.cli:main",
            "gshard-plan=gshard_tf.planning.arguments:main",
            "gshard-checkpoints=gshard_tf.checkpoints.cli:main",
        ]
    },
)
