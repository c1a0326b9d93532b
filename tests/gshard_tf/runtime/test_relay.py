"""The connection to the first process, when that one is gone."""

import socket

import pytest

from gshard_tf.runtime.relay import Relay


@pytest.fixture
def service():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(10)
        yield listening


def connected(service):
    relay = Relay(*service.getsockname(), timeout=10)
    host, port = relay.address.split(":")
    near = socket.create_connection((host, int(port)), 10)
    far, _ = service.accept()
    far.settimeout(10)
    return relay, near, far


def test_it_forwards_both_ways_and_outlives_the_other_side(service):
    relay, near, far = connected(service)
    near.sendall(b"question")
    assert far.recv(100) == b"question"
    far.sendall(b"answer")
    assert near.recv(100) == b"answer"
    assert not relay.gone.is_set()
    far.close()
    assert relay.gone.wait(10)
    # What jax's client would abort at: the end of its connection.
    near.settimeout(0.3)
    with pytest.raises(TimeoutError):
        near.recv(100)
    near.sendall(b"is anybody there?")


def test_a_client_that_leaves_is_no_loss(service):
    relay, near, far = connected(service)
    near.close()
    assert far.recv(100) == b""
    far.close()
    assert not relay.gone.wait(0.3)


def test_the_other_side_may_come_later(service):
    address = service.getsockname()
    service.close()
    relay = Relay(*address, timeout=10)
    host, port = relay.address.split(":")
    near = socket.create_connection((host, int(port)), 10)
    near.sendall(b"early")
    with socket.create_server(address) as late:
        late.settimeout(10)
        far, _ = late.accept()
        far.settimeout(10)
        assert far.recv(100) == b"early"
    assert not relay.gone.is_set()
