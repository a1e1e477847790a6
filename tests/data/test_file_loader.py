import multiprocessing

import pytest
import torch
from lightning.pytorch.utilities.combined_loader import _shutdown_workers_and_reset_iterator

from lightning_ae.data import EpochOrder, FileLoader


class Reader:
    """Tells which process reads."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.tensor([index, torch.utils.data.get_worker_info() is not None])


def test_workers_live_across_epochs_and_broken_off_passes():
    loader = FileLoader(Reader(), EpochOrder(8, 2, shuffle=True), num_workers=2)
    next(iter(loader))
    workers = {process.pid for process in multiprocessing.active_children()}
    for epoch in range(1, 3):
        batches = list(loader)
        expected = EpochOrder(8, 2, shuffle=True)
        expected.set_epoch(epoch)
        assert [batch[:, 0].tolist() for batch in batches] == [batch.tolist() for batch in expected]
        assert all(batch[:, 1].all() for batch in batches)
    assert {process.pid for process in multiprocessing.active_children()} == workers
    assert len(workers) == 2


def test_the_loader_reads_on_after_lightning_has_shut_down_its_workers():
    loader = FileLoader(Reader(), EpochOrder(8, 2, shuffle=False), num_workers=1)
    before = set(multiprocessing.active_children())
    list(loader)
    assert len(set(multiprocessing.active_children()) - before) == 1
    _shutdown_workers_and_reset_iterator(loader)
    assert set(multiprocessing.active_children()) <= before
    assert [batch[:, 0].tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_reading_ahead_does_not_move_the_place():
    loader = FileLoader(Reader(), EpochOrder(8, 1, shuffle=False), num_workers=2)
    iterator = iter(loader)
    for handed_out in range(1, 9):
        next(iterator)
        assert loader.state_dict() == {"epoch": 0, "batch": handed_out}


def test_reading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(FileLoader(Reader(), EpochOrder(8, 2, shuffle=True)))
    assert torch.get_rng_state().equal(before)


def test_order_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="order: expected num_examples=8, got 9"):
        FileLoader(Reader(), EpochOrder(9, 2, shuffle=False))


def test_negative_num_workers_is_an_error():
    with pytest.raises(ValueError, match="num_workers: expected a whole number >= 0, got -1"):
        FileLoader(Reader(), EpochOrder(8, 2, shuffle=False), num_workers=-1)
