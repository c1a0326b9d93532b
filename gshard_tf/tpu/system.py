"""Connection to a TPU system: from its name to a resolver and a topology."""

import importlib.metadata

import tensorflow as tf

from gshard_tf.compat.versions import LIBTPU, TPU_WHEEL


def connect(
    tpu: str | tf.distribute.cluster_resolver.ClusterResolver | None,
    topology: tf.tpu.experimental.Topology | None = None,
) -> tuple[
    tf.distribute.cluster_resolver.ClusterResolver, tf.tpu.experimental.Topology
]:
    """Connects to a TPU and initializes it; neither where there is a topology.

    Also switches TensorFlow's MLIR bridge on. It lowers a step for the TPU in all tests
    of this package; the older one, TensorFlow's default, was never tried with sharded
    variables.

    Args:
        tpu: The TPU's name or address, or its resolver.
        topology: That of a system which `tpu`, a resolver, has initialized.

    Returns:
        The resolver and the topology.

    Raises:
        ImportError: when a TPU of this machine is requested, and the installed
            TensorFlow has no operations for one.
        ValueError: when there is a topology without the resolver that it is from.
    """
    tf.config.experimental.enable_mlir_bridge()
    if topology is not None:
        if not isinstance(tpu, tf.distribute.cluster_resolver.ClusterResolver):
            raise ValueError(
                "With `topology`, `tpu` must be the resolver that "
                f"initialize_tpu_system was called with. Received: tpu={tpu!r}"
            )
        return tpu, topology
    if not isinstance(tpu, tf.distribute.cluster_resolver.ClusterResolver):
        if tpu in (None, "", "local"):
            _check_has_tpu_kernels()
        tpu = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu or "")
    tf.config.experimental_connect_to_cluster(tpu)
    return tpu, tf.tpu.experimental.initialize_tpu_system(tpu)


def _check_has_tpu_kernels() -> None:
    try:
        importlib.metadata.version("tensorflow-tpu")
    except importlib.metadata.PackageNotFoundError as error:
        version = importlib.metadata.version("tensorflow")
        raise ImportError(
            "A TPU of this machine needs the wheel tensorflow-tpu in place of "
            "tensorflow: pip uninstall tensorflow; pip install "
            f"'tensorflow-tpu=={TPU_WHEEL}' 'libtpu=={LIBTPU}'. Received: tensorflow "
            f"{version}, which has no TPU operations"
        ) from error
