"""Images made up on the spot, for trials without a dataset."""

import numpy as np
from PIL import Image

GRID = 4


class SyntheticImages:
    """Square images with a 4 by 4 grid of colours, which tells the class, under noise.

    The grid of a class is always the same; the noise depends on the index and `seed`. Classes take turns.
    """

    def __init__(self, images: int, size: int, num_classes: int, seed: tuple[int, ...]) -> None:
        self.images = images
        self.size = size
        self.seed = seed
        self.classes = tuple(f"class {i}" for i in range(num_classes))

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        target = index % len(self.classes)
        grid = np.random.default_rng(target).integers(0, 192, (GRID, GRID, 3), np.uint8)
        noise = np.random.default_rng((*self.seed, index)).integers(0, 64, (self.size, self.size, 3), np.uint8)
        cell = np.arange(self.size) * GRID // self.size
        return Image.fromarray(grid[cell][:, cell] + noise), target
