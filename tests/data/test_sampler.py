from collections import Counter
from itertools import chain

import pytest

from effbackbones.data.errors import DataError
from effbackbones.data.sampler import EpochBatches, derive_seed


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


def test_dataset_smaller_than_a_global_batch_is_an_error():
    with pytest.raises(DataError, match=r"7 images, fewer than .* batch of 8 \(data.batch_size=4 on 2 devices"):
        EpochBatches(7, 4, seed=0, position=lambda: (0, 0), world=2)


def test_derived_seeds_are_stable_over_releases():
    assert [derive_seed(0, 0), derive_seed(0, 0, 0), derive_seed(1, 2, 3)] == [3757552657, 4088532484, 690637451]
