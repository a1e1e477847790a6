import pytest
import torch

from lightning_ae.data import BlockOrder

BLOCKS = [7, 7, 3, 7, 1, 7, 7, 5, 7, 2]  # 53 examples


def order(batch_size=4, pool_size=15, *, shuffle=True, **options):
    return BlockOrder(BLOCKS, batch_size, pool_size=pool_size, shuffle=shuffle, **options)


def listed(batches):
    return [batch.tolist() for batch in batches]


@pytest.mark.parametrize("pool_size", [1, 5, 15, 1000])
def test_an_epoch_has_each_example_once_in_a_new_order(pool_size):
    one = order(pool_size=pool_size)
    epochs = []
    for epoch in range(3):
        one.set_epoch(epoch)
        epochs.append(torch.cat(list(one)).tolist())
        assert [len(batch) for batch in one] == [4] * 13 + [1]
    assert all(sorted(epoch) == list(range(53)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert all(epoch != sorted(epoch) for epoch in epochs)


def test_a_pool_is_whole_blocks_permuted_among_themselves():
    found = torch.cat(list(BlockOrder([5] * 12, 7, pool_size=15, shuffle=True)))
    for pool in found.split(15):
        blocks = pool.div(5, rounding_mode="floor")
        assert blocks.bincount().tolist().count(5) == 3
        assert len(blocks.unique_consecutive()) > 5
    assert found[:15].div(5, rounding_mode="floor").unique().tolist() != [0, 1, 2]


def test_the_order_of_blocks_is_new_in_each_epoch_and_that_within_them_in_each_pool():
    one, found = BlockOrder([5] * 12, 5, pool_size=5, shuffle=True), []
    for epoch in range(2):
        one.set_epoch(epoch)
        found.append(torch.stack(list(one)))  # a pool is a block here, and a batch
    assert (found[0] // 5)[:, 0].tolist() != (found[1] // 5)[:, 0].tolist()
    assert all(len((epoch % 5).unique(dim=0)) > 6 for epoch in found)


def test_neighbours_are_mixed_within_a_pool():
    whole = torch.cat(list(BlockOrder([100] * 10, 10, pool_size=1000, shuffle=True)))
    # in a full shuffle of 1000 the mean distance of successive examples is a third of that
    assert whole.diff().abs().float().mean().item() == pytest.approx(1000 / 3, rel=0.1)


def test_without_shuffle_the_order_is_that_of_the_data():
    assert torch.cat(list(order(shuffle=False))).tolist() == list(range(53))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_batches_together_are_those_of_one_device(world_size):
    ranks = [order(4, even=True, rank=rank, world_size=world_size) for rank in range(world_size)]
    one = order(4 * world_size)
    for parts, batch in zip(zip(*ranks, strict=True), one, strict=True):
        together = torch.stack([part for part in parts], 1).flatten()
        assert together[: len(batch)].tolist() == batch.tolist()
    seen = [set(torch.cat(list(rank)).tolist()) for rank in ranks]
    assert set().union(*seen) == set(range(53))
    repeated = sum(map(len, seen)) - 53
    assert repeated <= world_size - 1


def test_evaluation_sees_each_example_once_over_all_ranks():
    ranks = [order(4, shuffle=False, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(torch.cat([batch for rank in ranks for batch in rank]).tolist()) == list(range(53))


def test_drop_last_leaves_full_batches():
    assert [len(batch) for batch in order(4, drop_last=True)] == [4] * 13


def test_a_batch_does_not_depend_on_which_were_asked_for_before():
    expected = listed(order())
    for batch_idx in (13, 0, 7, 3, 12):
        assert order().indices(batch_idx).tolist() == expected[batch_idx]
    assert order().epoch_indices.tolist() == [example for batch in expected for example in batch]


def test_seeds_and_epochs_do_not_share_orders():
    first, other = order(seed=0), order(seed=1)
    first.set_epoch(1)
    assert listed(first) != listed(other)
    assert listed(order(seed=1)) == listed(other)


def test_a_wrong_pool_size_is_an_error():
    with pytest.raises(ValueError, match="pool_size: expected a positive whole number, got 0"):
        order(pool_size=0)
