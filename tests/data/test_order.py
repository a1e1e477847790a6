import itertools

import pytest
import torch
from torch.utils.data import BatchSampler, DistributedSampler

from lightning_ae.data import EpochOrder


def ranks(num_examples, batch_size, world_size, **options):
    return [
        EpochOrder(num_examples, batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]


@pytest.mark.parametrize(("num_examples", "world_size"), [(23, 1), (23, 2), (24, 3), (2, 5)])
def test_even_shares_are_those_of_distributed_sampler(num_examples, world_size):
    for order in ranks(num_examples, 4, world_size, shuffle=False, even=True):
        sampler = DistributedSampler(range(num_examples), world_size, order.rank, shuffle=False)
        assert [batch.tolist() for batch in order] == list(BatchSampler(sampler, 4, drop_last=False))
        assert len(order) == len(list(order))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("epoch", [0, 3])
def test_batches_of_all_ranks_together_are_the_batch_of_one_device(epoch, drop_last):
    num_examples, batch_size, world_size = 62, 5, 3
    one = EpochOrder(num_examples, batch_size * world_size, shuffle=True, even=True, drop_last=drop_last)
    many = ranks(num_examples, batch_size, world_size, shuffle=True, even=True, drop_last=drop_last)
    for order in (one, *many):
        order.set_epoch(epoch)
    assert {len(order) for order in many} == {len(one)}
    for whole, parts in zip(one, zip(*many, strict=True), strict=True):
        together = torch.stack(parts, dim=1).flatten()  # ranks take turns
        assert together[: len(whole)].equal(whole)
        assert len(together) - len(whole) < world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_each_epoch_is_a_new_permutation_of_all_examples(world_size):
    orders = ranks(60, 7, world_size, shuffle=True, even=True)
    seen = []
    for epoch in range(3):
        for order in orders:
            order.set_epoch(epoch)
        drawn = torch.cat([batch for order in orders for batch in order])
        assert drawn.sort().values.equal(torch.arange(60))
        seen.append(drawn.tolist())
    assert seen[0] != seen[1] != seen[2] != seen[0]


def test_shuffle_depends_on_seed_and_epoch_and_not_on_their_sum():
    def drawn(seed, epoch):
        order = EpochOrder(100, 10, shuffle=True, seed=seed)
        order.set_epoch(epoch)
        return order.epoch_indices.tolist()

    assert drawn(1, 2) == drawn(1, 2)
    assert drawn(0, 1) != drawn(1, 0)
    assert drawn(0, 0) != drawn(1, 0)


def test_shuffling_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    list(EpochOrder(10, 2, shuffle=True))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(("num_examples", "batch_size", "world_size"), [(100, 8, 3), (10, 3, 3), (25, 4, 2), (7, 7, 1)])
def test_evaluation_sees_each_example_once_in_equally_many_batches(num_examples, batch_size, world_size):
    orders = ranks(num_examples, batch_size, world_size, shuffle=False)
    batches = [list(order) for order in orders]
    assert len({len(mine) for mine in batches}) == 1
    assert sorted(torch.cat([batch for mine in batches for batch in mine]).tolist()) == list(range(num_examples))
    for mine in batches:
        sizes = [len(batch) for batch in mine]
        assert max(sizes) <= batch_size
        assert min(sizes) > 0
        assert world_size == 1 or max(sizes) - min(sizes) <= 1


def test_one_process_evaluates_in_plain_batches_with_a_ragged_last():
    assert [batch.tolist() for batch in EpochOrder(5, 2, shuffle=False)] == [[0, 1], [2, 3], [4]]


def test_drop_last_keeps_full_batches_only():
    order = EpochOrder(11, 4, shuffle=True, drop_last=True)
    assert [len(batch) for batch in order] == [4, 4]


def test_indices_are_the_batches_of_the_current_epoch():
    order = EpochOrder(20, 6, shuffle=True, rank=1, world_size=2, even=True)
    for epoch in range(2):
        order.set_epoch(epoch)
        for batch_idx, batch in enumerate(order):
            assert order.indices(batch_idx).equal(batch)
            assert batch.dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_examples": 0}, "num_examples: expected a positive whole number, got 0"),
        ({"batch_size": -1}, "batch_size: expected a positive whole number, got -1"),
        ({"seed": -1}, "seed: expected"),
        ({"rank": 2, "world_size": 2}, "rank: expected less than world_size=2, got 2"),
        ({"num_examples": 7, "batch_size": 4, "world_size": 2, "drop_last": True}, "drop_last: expected at least"),
        ({"num_examples": 2, "world_size": 3}, "leave some of the 3 ranks with an empty batch"),
        ({"num_examples": 3, "batch_size": 1, "world_size": 2}, "leave some of the 2 ranks with an empty batch"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        EpochOrder(**{"num_examples": 10, "batch_size": 2, "shuffle": False} | arguments)


def test_a_number_of_another_type_is_named():
    with pytest.raises(TypeError, match=r"batch_size: expected a positive whole number, got 2\.0 of type float"):
        EpochOrder(10, 2.0, shuffle=False)


def test_batch_out_of_range_is_named():
    order = EpochOrder(10, 4, shuffle=False)
    for batch_idx in (-1, 3):
        with pytest.raises(ValueError, match=f"batch_idx: expected 0 <= batch_idx < 3, got {batch_idx}"):
            order.indices(batch_idx)


def test_every_rank_raises_alike_so_none_waits_for_the_others():
    for num_examples, batch_size, world_size in itertools.product(range(1, 12), (1, 2, 3), (2, 3)):
        outcomes = set()
        for rank in range(world_size):
            try:
                outcomes.add(len(EpochOrder(num_examples, batch_size, shuffle=False, rank=rank, world_size=world_size)))
            except ValueError:
                outcomes.add("error")
        assert len(outcomes) == 1
