"""Knowing tensors again without keeping them."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from lightning_ae.diagnostics.watch import Watch
from lightning_ae.diagnostics.watch.trace import Trace


class TestATrace:
    def test_knows_a_tensor_in_another_shape_and_not_its_part_or_copy(self):
        x = torch.randn(4, 6)
        trace = Trace(x)
        assert trace.is_of(x)
        assert trace.is_of(x.view(24))
        assert trace.is_of(Trace(x.detach()))
        assert not trace.is_of(x[:2])
        assert not trace.is_of(x.clone())
        assert not Trace(x[:2]).is_of(x[2:])

    def test_takes_nothing_for_what_is_gone_though_it_has_its_address(self):
        x = torch.randn(1000)
        address, trace = x.data_ptr(), Trace(x)
        del x
        others = [torch.randn(1000) for _ in range(50)]
        assert not any(trace.is_of(other) for other in others)
        if all(other.data_ptr() != address for other in others):
            return  # the allocator did not give the place away again
        assert Trace(others[0]).is_of(others[0])

    def test_of_a_sparse_tensor_is_of_nothing(self):
        x = torch.eye(3).to_sparse()
        assert not Trace(x).is_of(x)
        assert not Trace(torch.eye(3)).is_of(x)


class Memory(nn.Module):
    """Says what is left of a pre-activation when the activation has been applied."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        h = self.layer(x)
        storage = h.untyped_storage()
        self.gone = weakref.ref(h), torch.multiprocessing.reductions.StorageWeakRef(storage)
        return h.relu()


class Followed:
    def __getattr__(self, name):
        if not name.startswith("on_"):
            raise AttributeError(name)
        return lambda *args: None


def test_a_pre_activation_is_not_kept_in_memory_by_a_watch_that_follows_everything():
    network, x = Memory(), torch.randn(3, 4)
    with Watch().open(network, [Followed()], None, (x,)) as watching:
        y = network(x)
        assert [made.name for made in watching.lineage.of(y)] == ["relu", "layer"]
        assert network.gone[0]() is None
        assert network.gone[1].expired()
