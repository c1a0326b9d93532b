"""A translator as a SavedModel, for TensorFlow Serving and whatever else reads one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

from gshard_examples.translation.package_files import MissingPackageError
from gshard_examples.translation.translator import Translator
from gshard_tf.io.atomic_folders import Contents, check_folder, new_folder
from gshard_tf.io.paths import local_path

#: Where TensorFlow Serving looks for requests to send itself before it answers others.
WARM_UP = Path("assets.extra", "tf_serving_warmup_requests")
#: Words of the texts in these requests, and how many texts are in one.
WARM_UP_WORDS, WARM_UP_BATCHES = (1, 8, 30), (1, 8)
#: What `export` writes, and so may replace.
SAVED_MODEL = Contents(
    "a SavedModel",
    (
        "saved_model.pb",
        "fingerprint.pb",
        "variables/variables.index",
        "variables/variables.data-*",
        "assets",
        WARM_UP.as_posix(),
    ),
    mark="saved_model.pb",
)


def check_export(folder: str | Path, replace: bool = False) -> Path:
    """Raises what `export` would for its folder, before there is anything to export.

    Returns:
        The folder, without links.

    Raises:
        ValueError: `folder` is remote, `gs://` say.
        FileExistsError: `folder` exists, and `replace` is false or it holds anything
            but a SavedModel.
    """
    return check_folder(folder, replace, SAVED_MODEL)


def export(
    translator: Translator,
    folder: str | Path,
    replace: bool = False,
    warm_up_as: str | None = None,
) -> Path:
    """Writes a SavedModel: it needs tensorflow and tensorflow-text, nothing of ours.

    docs/serving.md lists its signatures.

    Args:
        translator: What to export. Its model must be a plain Keras model, not one
            on a mesh (`train.load_model` gives such a one).
        folder: Where to write it; it appears only when it is complete.
        replace: Whether to replace a folder that is there. Only an empty one and one
            that holds a SavedModel and nothing else is replaced.
        warm_up_as: Also write requests with which TensorFlow Serving warms up, to a
            model of this name. Needs the package tensorflow-serving-api.

    Returns:
        `folder`.

    Raises:
        ValueError: `folder` is remote, `gs://` say.
        FileExistsError: `folder` exists, and `replace` is false or it holds anything
            but a SavedModel.
        MissingPackageError: requests were asked for without their package.
        OSError: it could not be written.
    """
    check_export(folder, replace)
    requests = None
    if warm_up_as is not None:
        requests = list(warm_up_requests(translator, warm_up_as))
    folder = local_path(folder)
    signatures = dict(translator.functions)
    signatures["serving_default"] = signatures["translate"]
    served = tf.Module(name="translator")
    served.vocabulary = translator.vocabulary
    served.weights = translator.weights
    with new_folder(folder, replace, SAVED_MODEL) as partial:
        tf.saved_model.save(served, str(partial), signatures=signatures)
        if requests is not None:
            path = partial / WARM_UP
            path.parent.mkdir(exist_ok=True)
            with tf.io.TFRecordWriter(str(path)) as writer:
                for request in requests:
                    writer.write(request.SerializeToString())
    return folder


def warm_up_requests(translator: Translator, name: str) -> Iterator[Any]:
    """`PredictionLog`s of texts of several lengths, for the signatures with texts.

    Raises:
        MissingPackageError: without the package tensorflow-serving-api.
    """
    try:
        from tensorflow_serving.apis import prediction_log_pb2
    except ImportError as error:
        raise MissingPackageError(
            "Requests to warm up with are written by tensorflow-serving-api, which is "
            "not installed. Install it with: pip install 'gshard-tf[serve]'"
        ) from error
    tag = translator.vocabulary.languages[0]
    for signature in ("translate", "serving_default", "encode", "score", "tokenize"):
        for batch in WARM_UP_BATCHES:
            for words in WARM_UP_WORDS:
                log = prediction_log_pb2.PredictionLog()
                request = log.predict_log.request
                request.model_spec.name = name
                request.model_spec.signature_name = signature
                text = " ".join(["word"] * words)
                inputs = {"texts": text, "languages": tag}
                if signature == "score":
                    inputs["translations"] = text
                for key, value in inputs.items():
                    request.inputs[key].CopyFrom(tf.make_tensor_proto([value] * batch))
                yield log
