"""Tar shards in webdataset's layout, read in any order through an index of their members.

A sample is the members of one key in a row: KEY.jpg (or .jpeg, .png, .webp) with its class index in KEY.cls, or as
`cls` or `label` of KEY.json. What else a key has is not read, and nothing is ever unpacked.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from PIL import Image

from effbackbones.data.classes import imagenet_classes, read_class_map
from effbackbones.data.errors import BadImageError, DataError
from effbackbones.data.images import load_image
from effbackbones.files import replacing

SUFFIXES = ("jpg", "jpeg", "png", "webp")

SAMPLE = np.dtype([("offset", "<i8"), ("size", "<i8"), ("target", "<i4")])
"""An image of a shard: where its bytes begin, how many they are, and its class."""

_KEY_AND_SUFFIX = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)", re.DOTALL)  # webdataset's rule
_META = re.compile(r"__[^/]*__($|/)")  # what webdataset skips
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MAX_TEXT = 1 << 20  # bytes of a .cls or .json
_THREADS = 16  # reading a header takes a round trip where shards lie on a network
_KEPT_OPEN = 64


class ShardImages:
    """The images of tar shards, in the order of the shards and of their members.

    The index lies in memory that worker processes share, however those are started; each opens shards for itself.

    Attributes:
        classes: Names of the classes.
        parts: Images of each shard.

    Raises DataError where a shard is missing, damaged or holds what no shard should, naming shard and member.
    """

    def __init__(self, shards: Sequence[Path], classes: Sequence[str]) -> None:
        with ThreadPoolExecutor(_THREADS) as threads:
            indices = list(threads.map(index_shard, shards))
        self.shards = tuple(shards)
        self.classes = tuple(classes)
        self.parts = [len(index) for index in indices]
        self._ends = np.cumsum(self.parts)
        self._index = torch.from_numpy(np.concatenate(indices).view(np.uint8)).share_memory_()
        self._files: dict[int, BinaryIO] = {}
        if not len(self):
            raise DataError(f"{self.shards[0]}: no image in the {len(shards)} shards from this one on")
        if (largest := self.targets.max()) >= len(self.classes):
            _, name, _ = self._read(int(self.targets.argmax()))
            raise DataError(
                f"{name}: class {largest}, expected 0 to {len(self.classes) - 1}, as data.num_classes or the "
                "classes.txt in data.root says"
            )

    def __len__(self) -> int:
        return len(self._index) // SAMPLE.itemsize

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        content, name, target = self._read(index)
        return load_image(io.BytesIO(content), name), target

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    @property
    def targets(self) -> np.ndarray:
        """Class indices (N,) int32."""
        return self._samples["target"]

    @property
    def _samples(self) -> np.ndarray:
        return self._index.numpy().view(SAMPLE)

    def _read(self, index: int) -> tuple[bytes, str, int]:
        """Return the bytes of an image, its shard and member as errors call it, and its class."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        offset, size, target = self._samples[index].tolist()
        path = self.shards[shard]
        try:
            content = os.pread(self._file(shard), tarfile.BLOCKSIZE + size, offset - tarfile.BLOCKSIZE)
            name = tarfile.TarInfo.frombuf(content[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape").name
        except OSError as error:
            raise BadImageError(f"{path}: cannot be read ({error})") from error
        except tarfile.HeaderError as error:
            raise BadImageError(f"{path}: no member at byte {offset}; the shard has changed since the start") from error
        return content[tarfile.BLOCKSIZE :], f"{path}: {name}", target

    def _file(self, shard: int) -> int:
        """Return the descriptor of a shard, the last used of which stay open."""
        self._files[shard] = file = self._files.pop(shard, None) or self.shards[shard].open("rb", buffering=0)
        if len(self._files) > _KEPT_OPEN:
            self._files.pop(next(iter(self._files))).close()
        return file.fileno()


def shard_classes(root: Path, num_classes: int | None) -> tuple[str, ...]:
    """Return the names of the classes: of root/classes.txt, or of ImageNet-1K where there are 1000, or numbers.

    Raises DataError where neither the file nor the recipe says how many there are.
    """
    if (file := root / "classes.txt").is_file():
        return tuple(read_class_map(file))
    if num_classes is None:
        raise DataError(f"{root}: set data.num_classes, or write the names of the classes into {file}, one per line")
    return tuple(imagenet_classes()) if num_classes == 1000 else tuple(map(str, range(num_classes)))


def find_shards(root: Path, names: str) -> list[Path]:
    """Return the shards of a glob pattern, of names with ranges ({0000..0145}) or of a .txt list, relative to `root`.

    Those of a range or a list need not be there. Raises DataError where there are none.
    """
    if names.endswith(".txt"):
        try:
            lines = (root / names).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise DataError(f"{root / names}: no list of shards ({error}); expected a line for each") from error
        found = [root / line.strip() for line in lines if line.strip()]
    elif _RANGE.search(names):
        found = [root / name for name in _expand(names)]
    else:
        found = [Path(path) for path in sorted(glob.glob(os.path.join(glob.escape(str(root)), names)))]
    if not found:
        raise DataError(f"{root}: no shards named {names}; data.train_shards and data.val_shards say what they are")
    return found


def _expand(names: str) -> Iterator[str]:
    """Yield the names of a pattern with ranges of numbers, written with as many digits as the first one has."""
    pieces = _RANGE.split(names)
    texts, firsts, lasts = pieces[::3], pieces[1::3], pieces[2::3]
    ranges = [
        [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        for first, last in zip(firsts, lasts, strict=True)
    ]
    for numbers in itertools.product(*ranges):
        yield "".join(itertools.chain.from_iterable(itertools.zip_longest(texts, numbers, fillvalue="")))


def index_shard(path: Path) -> np.ndarray:
    """Return the samples of a shard, (N,) of :data:`SAMPLE`; from a file in the user's cache where it is up to date.

    Raises DataError where the shard is missing, damaged or holds what no shard should.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; data.train_shards and data.val_shards name the shards") from error
    key = f"{path.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effbackbones" / "shards"
    cached = folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()}.npy"
    with contextlib.suppress(OSError, ValueError, EOFError):
        samples = np.load(cached, allow_pickle=False)
        if samples.dtype == SAMPLE and samples.ndim == 1:
            return cast(np.ndarray, samples)
    samples = np.array(list(_walk(path)), SAMPLE)
    with contextlib.suppress(OSError):  # a cache that cannot be written is none
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(cached) as part, part.open("wb") as file:
            np.save(file, samples, allow_pickle=False)
    return samples


def _walk(path: Path) -> Iterator[tuple[int, int, int]]:
    """Yield offset, size and class of the samples of a shard."""
    at = "its beginning"
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            key, members = None, dict[str, tarfile.TarInfo]()
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep all, which its stub does not know
                at = member.name
                _check_member(path, member)
                match = _KEY_AND_SUFFIX.fullmatch(member.name)
                if not member.isreg() or _META.match(member.name) or not match:
                    continue
                if match[1] != key:
                    yield from _sample(path, key, members, file)
                    key, members = match[1], {}
                suffix = match[2].lower()
                if suffix in members:
                    raise DataError(f"{path}: {member.name}: twice in a row; expected one member of a name")
                members[suffix] = member
            if os.pread(file.fileno(), tarfile.BLOCKSIZE, tar.offset) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("no end-of-archive mark")
            yield from _sample(path, key, members, file)
    except DataError:
        raise
    except Exception as error:  # a damaged header can lead tarfile to nearly every built-in error
        reason = f"{type(error).__name__}: {error}"
        raise DataError(
            f"{path}: damaged, or no uncompressed tar file, after {at} ({reason}): fetch or write it again"
        ) from error


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(f"{path}: {member.name}: refused, as it points out of the shard; expected a relative path")
    if not (member.isreg() or member.isdir()) or member.issparse() or member.size < 0:
        raise DataError(f"{path}: {member.name}: refused, as a link, device or sparse file; expected plain files")


def _sample(
    path: Path, key: str | None, members: dict[str, tarfile.TarInfo], file: BinaryIO
) -> Iterator[tuple[int, int, int]]:
    """Yield offset, size and class of the image among the members of a key, if there is one."""
    images = [suffix for suffix in SUFFIXES if suffix in members]
    if not images and "cls" in members:
        raise DataError(f"{path}: {key}.cls: no image beside it; expected one of {', '.join(SUFFIXES)}")
    if len(images) > 1:
        raise DataError(f"{path}: {members[images[1]].name}: the second image of its sample; expected one")
    for suffix in images:
        image = members[suffix]
        label = members.get("cls") or members.get("json")
        if label is None:
            raise DataError(f"{path}: {image.name}: no class beside it; expected {key}.cls or {key}.json")
        yield image.offset_data, image.size, _read_label(path, label, file)


def _read_label(path: Path, member: tarfile.TarInfo, file: BinaryIO) -> int:
    text = os.pread(file.fileno(), min(member.size, _MAX_TEXT), member.offset_data)
    label: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        label = int(text) if member.name.lower().endswith(".cls") else json.loads(text)
    if isinstance(label, dict):
        label = label.get("cls", label.get("label"))
    if type(label) is not int or not 0 <= label < 1 << 31:
        raise DataError(
            f"{path}: {member.name}: {text[:40]!r} is no class; expected its index, in a .json as cls or label"
        )
    return label
