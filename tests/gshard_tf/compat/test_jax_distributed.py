"""The client of jax's coordination service has the methods that messages need."""

from processes import run_python

from gshard_tf.compat.jax_distributed import coordination_client


def test_one_process_has_no_client():
    assert coordination_client() is None


def test_the_client_passes_messages():
    run_python(
        """
        import socket
        import jax
        from gshard_tf.compat.jax_distributed import coordination_client
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
        jax.distributed.initialize(f"127.0.0.1:{port}", 1, 0)
        client = coordination_client()
        client.key_value_set("a/b", "1", allow_overwrite=True)
        client.key_value_set("a/b", "2", allow_overwrite=True)
        assert client.blocking_key_value_get("a/b", 1000) == "2"
        assert client.key_value_dir_get("a/") == [("a/b", "2")]
        """
    )
