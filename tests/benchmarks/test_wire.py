"""The bytes on the wire are those that were sent; `tests/test_distributed.py` measures two processes."""

import socket
import sys

import pytest
import torch
from lth_sparse.benchmarks import wire

import lth_sparse as lth


@pytest.mark.skipif(sys.platform != "linux", reason="bytes are counted by Linux")
def test_bytes_received_are_counted_and_no_socket_is_closed():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as one:
        other, _ = server.accept()
        with other:
            before = wire.received()
            for sender, receiver, count in ((one, other, 1000), (other, one, 30)):
                sender.sendall(bytes(count))
                assert len(receiver.recv(count, socket.MSG_WAITALL)) == count
            assert wire.received() - before == 1030


@pytest.mark.parametrize("build", wire.NETWORKS.values())
def test_networks_are_packed_whole_and_take_the_inputs(build):
    dense, masked, packed = (wire.network(build, state, 0.1) for state in ("dense", "masked", "packed"))
    assert lth.density(masked) == lth.density(packed) == pytest.approx(0.1, rel=1e-3)
    weights = sum(mask.numel() for mask in lth.get_masks(masked).values())
    lengths = [sum(p.numel() for p in model.parameters()) for model in (dense, masked, packed)]
    assert lengths[0] == lengths[1] and lengths[0] - lengths[2] == weights - round(lth.density(packed) * weights)
    x = torch.randn(2, wire.INPUTS)
    torch.testing.assert_close(packed(x), masked(x), rtol=1e-4, atol=1e-5)
