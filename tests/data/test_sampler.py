from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbackbones.data.errors import DataError
from effbackbones.data.sampler import PARTS_TOGETHER, EpochBatches, derive_seed, shuffled_parts


def batches(images=23, batch_size=2, epoch=0, consumed=0, seed=7, **options):
    return list(EpochBatches(images, batch_size, seed=seed, position=lambda: (epoch, consumed), **options))


@pytest.mark.parametrize("world", [2, 4])
def test_global_batches_split_over_ranks_are_those_of_one_rank(world):
    alone = batches(batch_size=8, epoch=3)
    ranks = [batches(batch_size=8 // world, epoch=3, rank=rank, world=world) for rank in range(world)]
    together = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]
    assert together == alone


@pytest.mark.parametrize("world", [1, 3])
def test_epoch_takes_every_image_at_most_once_and_drops_less_than_a_global_batch(world):
    keys = [key for rank in range(world) for batch in batches(rank=rank, world=world) for key in batch]
    assert len(keys) == 23 // (2 * world) * 2 * world
    assert max(Counter(index for index, _ in keys).values()) == 1
    assert len({seed for _, seed in keys}) == len(keys)


def test_epoch_of_a_divisible_dataset_takes_every_image():
    assert sorted(index for batch in batches(images=24) for index, _ in batch) == list(range(24))


def test_iteration_from_a_position_gives_the_remaining_batches():
    assert batches(epoch=5, consumed=4) == batches(epoch=5)[4:]


def test_position_is_asked_when_iteration_starts():
    position = [0, 0]
    sampler = EpochBatches(23, 2, seed=7, position=lambda: tuple(position))
    iterator = iter(sampler)
    position[:] = [1, 3]
    assert list(iterator) == batches()
    assert list(sampler) == batches(epoch=1)[3:]


def test_length_is_that_of_a_full_epoch_at_every_position():
    assert len(EpochBatches(23, 2, seed=7, position=lambda: (2, 9))) == 11


def test_order_and_seeds_differ_between_epochs_and_between_seeds():
    first, other_epoch, other_seed = batches(), batches(epoch=1), batches(seed=8)
    for other in (other_epoch, other_seed):
        assert [index for batch in first for index, _ in batch] != [index for batch in other for index, _ in batch]
        assert not {seed for batch in first for _, seed in batch} & {seed for batch in other for _, seed in batch}


def test_repeats_stand_in_a_row_with_different_seeds_in_an_epoch_of_unchanged_length():
    keys = [key for batch in batches(images=24, batch_size=6, repeats=3) for key in batch]
    indices = [index for index, _ in keys]
    assert len(keys) == 24
    assert indices == [index for index in indices[::3] for _ in range(3)]
    assert len(set(indices)) == 8
    assert len({seed for _, seed in keys}) == 24


def test_repeats_that_do_not_divide_the_dataset_are_truncated():
    indices = [index for batch in batches(images=23, batch_size=1, repeats=3) for index, _ in batch]
    assert sorted(Counter(indices).values()) == [2] + [3] * 7


@pytest.mark.parametrize("epoch", [0, 4])
def test_overfit_gives_the_first_batch_of_epoch_0_again_and_again(epoch):
    first = batches(rank=1, world=2)[0]
    assert batches(epoch=epoch, rank=1, world=2, overfit=True) == [first] * 5
    assert batches(epoch=epoch, consumed=3, rank=1, world=2, overfit=True) == [first] * 2


def test_first_images_are_those_of_the_first_global_batch():
    sampler = EpochBatches(23, 4, seed=7, position=lambda: (0, 0), rank=1, world=2)
    expected = {index for rank in (0, 1) for index, _ in batches(batch_size=4, rank=rank, world=2)[0]}
    assert sampler.first_images() == sorted(expected)


# Parts

PARTS = [3, 1, 0, 7, 2, 5, 4, 6, 3, 2, 8, 1, 4, 5, 3, 2, 6, 1, 9]
IN_PARTS = {"images": sum(PARTS), "parts": PARTS}


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.integers(0, 9), min_size=1, max_size=40).filter(any),
    batch_size=st.integers(1, 4),
    world=st.integers(1, 3),
    epoch=st.integers(0, 3),
)
def test_every_image_of_parts_of_any_sizes_comes_once_in_an_epoch(parts, batch_size, world, epoch):
    images = sum(parts) // (batch_size * world) * batch_size * world
    if not images:
        return
    ranks = (batches(sum(parts), batch_size, epoch, parts=parts, rank=rank, world=world) for rank in range(world))
    seen = [index for rank in ranks for batch in rank for index, _ in batch]
    assert len(seen) == len(set(seen)) == images
    assert set(seen) <= set(range(sum(parts)))
    order = shuffled_parts(parts, torch.Generator().manual_seed(epoch))
    assert sorted(order.tolist()) == list(range(sum(parts)))


def test_images_come_from_a_few_parts_at_a_time_and_mixed():
    parts, together = [50] * 40, 50 * PARTS_TOGETHER
    part = shuffled_parts(parts, torch.Generator().manual_seed(0)) // 50
    blocks = [block.tolist() for block in part.split(together)]
    assert [len(set(block)) for block in blocks] == [PARTS_TOGETHER] * 5
    assert all(len(set(block[:50])) == PARTS_TOGETHER for block in blocks)
    assert sorted(set(blocks[0])) != list(range(PARTS_TOGETHER))


def test_order_of_parts_is_a_function_of_seed_and_epoch():
    assert batches(**IN_PARTS, epoch=2) == batches(**IN_PARTS, epoch=2)
    assert batches(**IN_PARTS, epoch=2, consumed=5) == batches(**IN_PARTS, epoch=2)[5:]
    orders = [batches(**IN_PARTS, epoch=2), batches(**IN_PARTS, epoch=3), batches(**IN_PARTS, epoch=2, seed=8)]
    indices = [[index for batch in order for index, _ in batch] for order in orders]
    assert indices[0] != indices[1] != indices[2] != indices[0]


def test_global_batches_of_parts_split_over_ranks_are_those_of_one_rank():
    ranks = [batches(**IN_PARTS, batch_size=3, rank=rank, world=2) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == batches(**IN_PARTS, batch_size=6)


# Nodes


def test_ranks_of_a_node_share_its_images_and_no_two_samples_of_a_step_their_seed():
    own = {0: {"parts": [5, 8, 4]}, 1: {"parts": [6, 3, 4, 2]}}
    images = 15  # the fewest
    ranks = [batches(images, 2, rank=rank, world=4, nodes=2, **own[rank // 2]) for rank in range(4)]
    assert [len(rank) for rank in ranks] == [images // 4] * 4
    for node, first in ((0, 0), (1, 2)):
        pair = ranks[first : first + 2]
        together = [one + other for one, other in zip(*pair, strict=True)]
        alone = batches(images, 4, **own[node])
        assert [[index for index, _ in batch] for batch in together] == [[index for index, _ in b] for b in alone]
    seeds = [seed for rank in ranks for batch in rank for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


def test_node_with_fewer_images_than_its_batch_is_an_error():
    with pytest.raises(DataError, match=r"7 images, fewer than .* batch of 8 \(data.batch_size=4 on 2 devices"):
        EpochBatches(7, 4, seed=0, position=lambda: (0, 0), world=4, nodes=2, parts=[7])


def test_dataset_smaller_than_a_global_batch_is_an_error():
    with pytest.raises(DataError, match=r"7 images, fewer than .* batch of 8 \(data.batch_size=4 on 2 devices"):
        EpochBatches(7, 4, seed=0, position=lambda: (0, 0), world=2)


def test_derived_seeds_are_stable_over_releases():
    assert [derive_seed(0, 0), derive_seed(0, 0, 0), derive_seed(1, 2, 3)] == [3757552657, 4088532484, 690637451]
