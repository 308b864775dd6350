import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from effbackbones.config.schema import AugmentConfig, DataConfig
from effbackbones.data import ImageData, build_data, build_mixup
from effbackbones.data.errors import DataError
from effbackbones.data.transforms import train_transform

STRONG = AugmentConfig(policy="rand-m9-mstd0.5-inc1", erase=0.5)


def build(augment=STRONG, seed=5, overfit=False, **options) -> ImageData:
    options = {"source": "synthetic", "num_classes": 3, "size": 32, "batch_size": 4, "workers": 0} | options
    return build_data(DataConfig(**({"synthetic_images": 14} | options)), augment, seed=seed, overfit=overfit)


def on_rank(data, rank, world):
    data.trainer = SimpleNamespace(
        global_rank=rank,
        world_size=world,
        accumulate_grad_batches=1,
        limit_train_batches=1.0,
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=SimpleNamespace(processed=0)))
        ),
    )
    return data


def equal(batches, others):
    pairs = list(zip(batches, others, strict=True))
    return bool(pairs) and all(torch.equal(x, y) for pair in pairs for x, y in zip(*pair, strict=True))


def test_training_batches_are_normalised_float_images_with_integer_targets():
    images_bchw, targets_b = next(iter(build().train_dataloader()))
    assert images_bchw.shape == (4, 3, 32, 32)
    assert images_bchw.dtype == torch.float32
    assert images_bchw.min() < 0 < images_bchw.max()
    assert targets_b.shape == (4,)
    assert targets_b.dtype == torch.int64


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "v0", "augmix-m10"])
def test_policies_posterize_to_black_where_they_keep_no_bits(policy):
    transform = train_transform(DataConfig(), AugmentConfig(policy=policy))
    (policy,) = [step for step in transform.transforms if hasattr(step, "ops") or hasattr(step, "policy")]
    operations = policy.ops if hasattr(policy, "ops") else [op for ops in policy.policy for op in ops]
    posterized = [op for op in operations if op.name.startswith("Posterize") and not any(op.level_fn(op.magnitude, {}))]
    assert posterized
    for op in posterized:
        op.prob, op.magnitude_std = 1, 0
        assert op(Image.new("RGB", (8, 8), "white")).getcolors() == [(64, (0, 0, 0))]


def test_classes_are_known_after_construction():
    data = build(num_classes=7)
    assert len(data.classes) == 7


def test_batches_are_bit_identical_with_and_without_workers():
    alone, with_workers = build(), build(workers=2)
    assert equal(alone.train_dataloader(), with_workers.train_dataloader())
    assert equal(alone.val_dataloader(), with_workers.val_dataloader())


def test_batches_do_not_depend_on_what_ran_before():
    loader = build().train_dataloader()
    first = list(loader)
    torch.rand(3), np.random.rand(3), random.random()
    assert equal(first, loader)


def test_augmentation_differs_between_seeds_and_between_views_of_an_image():
    data = build()
    assert not torch.equal(data.train_dataset[0, 1][0], data.train_dataset[0, 2][0])
    assert not equal(data.train_dataloader(), build(seed=6).train_dataloader())


def test_batches_of_two_ranks_are_the_halves_of_those_of_one():
    alone = list(build(batch_size=4).train_dataloader())
    halves = [list(on_rank(build(batch_size=2), rank, 2).train_dataloader()) for rank in (0, 1)]
    together = [[torch.cat(parts) for parts in zip(*pair, strict=True)] for pair in zip(*halves, strict=True)]
    assert equal(alone, together)


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_random_generators_of_the_process_alone(workers):
    data = build(workers=workers)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    list(data.train_dataloader()), list(data.val_dataloader())
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1][1])
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("world", [1, 4])
def test_evaluation_takes_every_image_once_in_order_over_the_ranks(world):
    data = build(eval_batch_size=3, num_classes=14)
    ranks = [torch.cat([t for _, t in on_rank(data, rank, world).val_dataloader()]).tolist() for rank in range(world)]
    assert ranks == [list(range(14))[rank::world] for rank in range(world)]


def test_evaluation_batches_have_the_evaluation_batch_size():
    assert [len(targets) for _, targets in build(eval_batch_size=5).val_dataloader()] == [5, 5, 4]
    assert [len(targets) for _, targets in build().test_dataloader()] == [4, 4, 4, 2]


@pytest.mark.parametrize("world", [1, 2])
def test_overfit_trains_on_one_batch_and_evaluates_its_images(world):
    trained, evaluated = set(), []
    for rank in range(world):
        data = on_rank(build(overfit=True, num_classes=16, synthetic_images=16), rank, world)
        first, *others = data.train_dataloader()
        assert others
        assert all(equal([first], [other]) for other in others)
        trained |= set(first[1].tolist())
        evaluated += torch.cat([targets for _, targets in data.val_dataloader()]).tolist()
    assert len(trained) == 4 * world
    assert sorted(evaluated) == sorted(trained)


def test_overfit_evaluates_the_images_of_the_training_split():
    data = build(overfit=True)
    image, _ = data.val_dataset[3]
    assert torch.equal(image, data.eval_transform(data.train_dataset.source[3][0]))


def test_dataset_smaller_than_a_batch_is_an_error():
    with pytest.raises(DataError, match="the training set has 14 images, fewer than one global batch of 16"):
        build(batch_size=16).train_dataloader()


def test_synthetic_images_are_deterministic_and_differ_between_splits():
    train, val = build().train_dataset.source, build().val_dataset.source
    assert np.array_equal(np.asarray(train[4][0]), np.asarray(build().train_dataset.source[4][0]))
    assert not np.array_equal(np.asarray(train[4][0]), np.asarray(val[4][0]))
    assert not np.array_equal(np.asarray(train[4][0]), np.asarray(build(seed=6).train_dataset.source[4][0]))
    assert train[4][0].size == (32, 32)


def test_synthetic_classes_can_be_told_apart_by_the_nearest_training_image():
    data = build(num_classes=5, synthetic_images=40)
    train, val = (np.stack([np.asarray(s[i][0], float).ravel() for i in range(40)]) for s in sources(data))
    nearest = ((val[:, None] - train[None]) ** 2).sum(-1).argmin(1)
    assert np.array_equal(nearest % 5, np.arange(40) % 5)


def sources(data):
    return data.train_dataset.source, data.val_dataset.source


def test_synthetic_source_without_num_classes_is_an_error():
    with pytest.raises(DataError, match=r"data.source=synthetic needs data.num_classes"):
        build(num_classes=None)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "RGB"])
@pytest.mark.parametrize("size", [(20, 70), (32, 32), (5, 3)])
def test_evaluation_transform_takes_an_image_of_any_mode_and_size(mode, size):
    image = build(interpolation="random").eval_transform(Image.new(mode, size))
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.float32


def test_evaluation_transform_resizes_crops_the_centre_and_normalises():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[16:48, 16:48] = 255
    data = build(crop_pct=0.5, mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
    assert torch.equal(data.eval_transform(Image.fromarray(pixels)), torch.full((3, 32, 32), 2.0))


def test_full_scale_and_ratio_without_flip_and_erasing_keep_the_whole_image():
    data = build(AugmentConfig(scale=[1, 1], ratio=[1, 1], hflip=0), crop_pct=1.0)
    whole = data.eval_transform(data.train_dataset.source[0][0])
    assert torch.allclose(data.train_dataset[0, 0][0], whole)


PLAIN = {"scale": [1, 1], "ratio": [1, 1], "hflip": 0.0}


def views(count=8, **augment):
    """Return training images (count, 3, 32, 32), augmented by these keys alone."""
    data = build(AugmentConfig(**(PLAIN | augment)))
    return torch.stack([data.train_dataset[index, 100 + index][0] for index in range(count)])


@pytest.mark.parametrize(
    "augment",
    [
        {"policy": "rand-m9-mstd0.5-inc1"},
        {"policy": "original"},
        {"policy": "v0"},
        {"policy": "augmix-m3-w3"},
        {"color_jitter": 0.4},
        {"erase": 1.0},
        {"scale": [0.1, 0.3]},
        {"ratio": [0.5, 0.6]},
    ],
    ids=str,
)
def test_augmentation_acts_and_follows_from_seed_and_index(augment):
    augmented = views(**augment)
    changed = [not torch.equal(*pair) for pair in zip(augmented, views(), strict=True)]
    assert sum(changed) >= 6  # of 8: a policy may draw an operation that leaves an image alone
    assert torch.equal(augmented, views(**augment))


def test_flip_mirrors_images():
    assert torch.equal(views(hflip=1.0), views().flip(-1))


def test_erasing_puts_noise_into_a_box():
    changed = (views(erase=1.0) != views()).any(1)
    for box in changed:
        rows, columns = (box.any(dim).nonzero().flatten() for dim in (1, 0))
        assert box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 0 < box.sum() < box.numel() / 2


def test_repeats_of_a_recipe_give_different_views_of_an_image_in_a_batch():
    data = build(AugmentConfig(repeats=2))
    images, targets = next(iter(data.train_dataloader()))
    first, *_ = data.train_dataloader().batch_sampler
    assert [index for index, _ in first[::2]] == [index for index, _ in first[1::2]]
    assert targets[::2].tolist() == targets[1::2].tolist()
    assert not torch.equal(images[::2], images[1::2])


def test_unknown_policy_is_an_error_that_names_it():
    with pytest.raises(DataError, match=r"augment.policy='rand-m9-q3' is no policy of timm \(Unknown RandAugment"):
        build(AugmentConfig(policy="rand-m9-q3"))


def test_mixup_is_absent_where_both_alphas_are_zero():
    assert build_mixup(AugmentConfig(smoothing=0.1), 5) is None


@pytest.mark.parametrize("options", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_mixup_gives_soft_smoothed_targets(options):
    np.random.seed(0)
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 32, 32).clone()
    mixed, targets = build_mixup(AugmentConfig(**options, smoothing=0.1), 5)(images.clone(), torch.tensor([0, 1, 2, 3]))
    assert mixed.shape == images.shape
    assert not torch.equal(mixed, images)
    assert targets.shape == (4, 5)
    assert torch.allclose(targets.sum(1), torch.ones(4))
    assert targets.min() == pytest.approx(0.02)
    assert torch.allclose(mixed[:, 0].mean((1, 2)), (targets[:, :4] - 0.02) @ torch.arange(4.0) / 0.9, atol=1e-4)


def test_mixup_probability_zero_only_smooths():
    images = torch.rand(2, 3, 8, 8)
    augment = AugmentConfig(mixup=0.8, mix_prob=0, smoothing=0.1)
    mixed, targets = build_mixup(augment, 2)(images.clone(), torch.tensor([0, 1]))
    assert torch.equal(mixed, images)
    assert torch.allclose(targets, torch.tensor([[0.95, 0.05], [0.05, 0.95]]))
