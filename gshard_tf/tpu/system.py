"""From the name of a TPU to an initialised system."""

import importlib.metadata

import tensorflow as tf


def connect(
    tpu: str | tf.distribute.cluster_resolver.ClusterResolver | None,
    topology: tf.tpu.experimental.Topology | None = None,
) -> tuple[
    tf.distribute.cluster_resolver.ClusterResolver, tf.tpu.experimental.Topology
]:
    """Connects to a TPU and initialises it, as far as that is still to do.

    Also switches TensorFlow's MLIR bridge on. It is what lowers a step for the TPU in
    all our tests; the older one, which this TensorFlow would take by itself, has
    never been seen with split variables.

    Returns:
        The resolver and the topology.

    Raises:
        ImportError: a TPU of this machine is asked for, and the TensorFlow installed
            has nothing that drives one.
        ValueError: a topology without the resolver that it is from.
    """
    tf.config.experimental.enable_mlir_bridge()
    if topology is not None:
        if not isinstance(tpu, tf.distribute.cluster_resolver.ClusterResolver):
            raise ValueError(
                "With a topology, tpu is the resolver that initialize_tpu_system was "
                f"called with. Received: tpu={tpu!r}"
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
        found = importlib.metadata.version("tensorflow")
        raise ImportError(
            "A TPU of this machine needs the wheel tensorflow-tpu in place of "
            "tensorflow: pip uninstall tensorflow; pip install "
            "'tensorflow-tpu==2.20.0' 'libtpu==0.0.14'. Received: tensorflow "
            f"{found}, which has no TPU operations"
        ) from error
