"""Cache of plans on disk, keyed by the content that they depend on."""

import hashlib
import json
import os
import pathlib
import re
import warnings
from collections.abc import Sequence

from tensorflow.experimental import dtensor

from gshard_tf.compat.shardy import is_shardy_enabled
from gshard_tf.io.atomic_files import write_file
from gshard_tf.io.paths import local_path
from gshard_tf.planning.plan import FORMAT, Plan
from gshard_tf.planning.records import Weight
from gshard_tf.sharding.mesh import axis_sizes


def content_key(
    hlo: str,
    weights: Sequence[Weight],
    topology: str,
    mesh: dtensor.Mesh,
    mode: str,
    versions: dict[str, str],
) -> str:
    """Returns a hash of everything that a plan depends on; `hlo` is a module's text."""
    # Neither the model's source file nor the number of functions that TensorFlow has
    # traced before matters to a plan.
    text = re.sub(
        r'source_file="[^"]*"|source_(end_)?(line|column)=\d+|stack_frame_id=\d+'
        r"|_inference_\w+",
        "",
        hlo,
    )
    # The first lines list source files.
    text = text[text.find("\n%") :]
    other = {
        "format": FORMAT,
        "weights": [[w.path, w.role, w.rule, w.layout] for w in weights],
        "topology": topology,
        "mesh": list(axis_sizes(mesh).items()),
        "mode": mode,
        "shardy": is_shardy_enabled(),
        "versions": versions,
    }
    digest = hashlib.sha256(text.encode())
    digest.update(json.dumps(other, sort_keys=True).encode())
    return digest.hexdigest()


class PlanCache:
    """A folder of plans, one file each; without a folder, nothing is cached."""

    def __init__(self, folder: pathlib.Path | None):
        self.folder = folder

    @classmethod
    def from_option(cls, cache: bool | str | os.PathLike) -> "PlanCache":
        """Returns the cache that the `cache` argument of `plan` names.

        Raises:
            ValueError: for a remote folder, `gs://` say.
        """
        if cache is False:
            return cls(None)
        if cache is True:
            base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
            return cls(pathlib.Path(base).expanduser() / "gshard_tf" / "plans")
        return cls(local_path(cache, "cache"))

    def load(self, key: str) -> Plan | None:
        """Returns the plan of a key, or None."""
        if self.folder is None:
            return None
        path = self.folder / f"{key}.json"
        if not path.is_file():
            return None
        try:
            return Plan.from_json(path.read_text())
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(
                f"The plan is made again, because {path} is broken: {error}",
                stacklevel=3,
            )
            return None

    def save(self, plan: Plan) -> None:
        """Stores a plan atomically."""
        if self.folder is None:
            return
        write_file(self.folder / f"{plan.key}.json", plan.to_json().encode())
