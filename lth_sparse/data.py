"""Data sets as tensors on the device, split, scaled and the same in every run."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "maxgroup")
IMAGES = ("original", "grey-28", "doubled")
NORMALIZATIONS = ("unit", "statistics", "half", "lecun", "l2", "none")
_TRAINING = {"digits": 1437, "mnist": 60_000, "fashion-mnist": 60_000, "cifar10": 50_000}  # original images
_LEVELS = {"digits": 16, "maxgroup": 1}  # the largest level; the others' is 255
_CLASS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "CIFAR10"}  # in torchvision.datasets
_IDX_MD5 = {  # of the unpacked files, which torchvision reads unchecked: it knows only those of the archives
    "mnist": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "fashion-mnist": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


class Split(NamedTuple):
    """Images [n, C, H, W], contiguous, uint8 or float32, and their labels, int64 [n], on one device."""

    images: Tensor
    labels: Tensor


class Data(NamedTuple):
    """A data set ready to train on; `input_shape` is (C, H, W).

    What a network is given are images * scale + shift, float32 [C] each, as images of whole levels are kept as uint8;
    without scale and shift it is given the images.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    input_shape: tuple[int, int, int]
    classes: int
    normalization: str
    scale: Tensor | None = None
    shift: Tensor | None = None

    def inputs(self, images: Tensor) -> Tensor:
        """Images [n, C, H, W] as a network takes them: scaled, float32."""
        if self.scale is None:
            return images
        return images.float() * self.scale[:, None, None] + self.shift[:, None, None]

    @torch.no_grad()
    def evaluate(self, forward: Callable[[Tensor], Tensor], split: Split) -> tuple[float, float]:
        """Mean cross-entropy and accuracy (a fraction), over `split`, of the logits that `forward` makes of inputs."""
        size = 1000 if split.labels.device.type == "cpu" else 5000  # as the engine's Network
        logits = torch.cat([forward(self.inputs(images)) for images in split.images.split(size)]).float()
        correct = (logits.argmax(1) == split.labels).double().mean()
        return float(F.cross_entropy(logits, split.labels)), float(correct)

    def scaled(self) -> "Data":
        """The same with images that are scaled already, in four times the memory."""
        splits = {name: getattr(self, name) for name in ("train", "validation", "test")}
        inputs = {name: Split(self.inputs(split.images), split.labels) for name, split in splits.items()}
        return self._replace(**inputs, scale=None, shift=None)


def load(
    name: str,
    root: str | Path = "datasets",
    normalization: str = "unit",
    validation_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    download: bool = True,
    size: int | None = None,
    noise: float | None = None,
    images: str = "original",
) -> Data:
    """Load one of `NAMES`: ten classes each, the same bits for the same arguments.

    The original training set is permuted by `seed`: the first `validation_size` images validate, the rest
    train. The test set is the original one in its order, whatever the seed; of digits (8x8, inside
    scikit-learn) 360 images drawn once and for all.

    Args:
        root: folder of mnist, fashion-mnist and cifar10 in torchvision's layout (MNIST/raw, FashionMNIST/raw,
            cifar-10-batches-py).
        normalization: "unit" divides by the largest level (255; digits 16; maxgroup 1), which gives u;
            "statistics" u to mean 0 and deviation 1 per channel over the original training set; "half"
            (u - 0.5) / 0.5; "lecun" (u - 0.078) / 0.784; "l2" u / |u| per image, blank ones staying blank;
            "none" keeps the levels.
        validation_size: 180 for digits and 5000 for the others unless given.
        download: fetch what `root` lacks.
        size: maxgroup's training images, those for validation not counted; 55,000 unless given.
        noise: standard deviation of maxgroup's noise; 0 unless given.
        images: "grey-28" makes them grey (ITU-R BT.601) and cuts their middle 28x28 out, which gives cifar10 MNIST's
            shape; images that have it already stay as they are. "doubled" makes 2x2 of each pixel.

    Raises:
        ValueError: an unknown name or normalization, an argument out of range or of another data set, a
            device that is not there, files that are damaged, or missing and not to be downloaded.
    """
    validation_size = (180 if name == "digits" else 5000) if validation_size is None else validation_size
    _check(name, normalization, validation_size, size, noise, images)
    device = _usable(device)
    if name == "maxgroup":
        count = (55_000 if size is None else size) + validation_size
        original, test = maxgroup(count, noise or 0.0, seed=0), maxgroup(10_000, noise or 0.0, seed=1)
    elif name == "digits":
        original, test = _digits()
    else:
        original, test = _torchvision(name, Path(root).expanduser(), download)
    if images != "original":
        change = _grey_28 if images == "grey-28" else _doubled
        original, test = (Split(change(part.images), part.labels) for part in (original, test))
    if normalization == "l2":
        original, test = (Split(_lengths_to_one(part.images), part.labels) for part in (original, test))
    scale, shift = _scaling(normalization, _LEVELS.get(name, 255), original.images)
    order = torch.randperm(len(original.labels), generator=torch.Generator().manual_seed(seed))

    def there(images, labels):
        return Split(images.to(device), labels.to(device))

    parts = order[validation_size:], order[:validation_size]
    train, validation = (there(original.images[part], original.labels[part]) for part in parts)
    shape = tuple(test.images.shape[1:])
    return Data(name, train, validation, there(*test), shape, 10, normalization, scale.to(device), shift.to(device))


def maxgroup(count: int, noise: float = 0.0, seed: int = 0) -> Split:
    """MaxGroup: which of ten groups of inputs has the largest sum? A synthetic set with MNIST's shape.

    The 784 inputs of a 1x28x28 image are independent and uniform in [0, 1). Group g is the inputs 78 g to
    78 g + 77 in row-major order; the last four belong to none. The label is the group with the largest sum,
    so all classes are equally likely. Then Gaussian noise of standard deviation `noise` is added to every
    input, unclipped. `load` takes training and validation images from seed 0, the test set from seed 1.
    Returns images float32 [count, 1, 28, 28] and labels.
    """
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 784, generator=generator)
    # Inputs are multiples of 2**-24, so float64 sums are exact: no label hangs on the order of additions.
    labels = images[:, :780].unflatten(1, (10, 78)).sum(2, dtype=torch.float64).argmax(1)
    if noise:
        images += noise * torch.randn(images.shape, generator=generator)
    return Split(images.view(count, 1, 28, 28), labels)


def _check(name, normalization, validation_size, size, noise, images):
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(NAMES)}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"unknown normalization {normalization!r}: choose from {', '.join(NORMALIZATIONS)}")
    if images not in IMAGES:
        raise ValueError(f"unknown images {images!r}: choose from {', '.join(IMAGES)}")
    if images == "grey-28" and name == "digits":
        raise ValueError("images 'grey-28' are cut from larger ones, but those of digits are 8x8")
    if name != "maxgroup" and (size is not None or noise is not None):
        raise ValueError(f"size and noise are options of maxgroup only, but the data set is {name}")
    if size is not None and size < 1:
        raise ValueError(f"size must be 1 or more training images, got {size}")
    if noise is not None and not 0 <= noise < float("inf"):
        raise ValueError(f"noise must be a standard deviation of 0 or more, got {noise}")
    if validation_size < 1:
        raise ValueError(f"validation_size must be 1 or more images, got {validation_size}")
    if name in _TRAINING and validation_size >= (total := _TRAINING[name]):
        raise ValueError(f"validation_size must be below the {total} images of {name}, got {validation_size}")


def _usable(device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without that device
        raise ValueError(f"the device {str(device)!r} is not available to torch on this machine") from error


def _scaling(normalization, levels, original) -> tuple[Tensor, Tensor]:
    """Scale and shift of each channel for images of levels 0 to `levels`, on the CPU, so on every device the same."""
    channels = original.shape[1]
    if normalization in ("none", "l2"):
        return torch.ones(channels), torch.zeros(channels)
    if normalization == "statistics":
        std, mean = torch.std_mean(original.float() / levels, dim=(0, 2, 3), correction=0)
        # Four decimals, as usually quoted, so that no bit hangs on the order of additions.
        mean, std = mean.round(decimals=4).double(), std.round(decimals=4).double()
    else:
        mean, std = {"unit": (0.0, 1.0), "half": (0.5, 0.5), "lecun": (0.078, 0.784)}[normalization]
        mean, std = (torch.full((channels,), value, dtype=torch.float64) for value in (mean, std))
    return (1 / (levels * std)).float(), (-mean / std).float()


def _grey_28(images):
    if images.shape[1] == 3:
        red, green, blue = images.int().unbind(1)
        images = ((299 * red + 587 * green + 114 * blue + 500) // 1000).byte()[:, None]
    top, left = ((side - 28) // 2 for side in images.shape[2:])
    return images[:, :, top : top + 28, left : left + 28].contiguous()


def _doubled(images):
    return images.repeat_interleave(2, 2).repeat_interleave(2, 3)


def _lengths_to_one(images):
    """Each image divided by its Euclidean norm, which no scale of a channel can do; blank ones stay blank."""
    return F.normalize(images.float(), dim=(1, 2, 3), eps=1e-30)


def _digits() -> tuple[Split, Split]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.tensor(digits.images).byte().unsqueeze(1), torch.tensor(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return Split(images[train], labels[train]), Split(images[test], labels[test])


def _torchvision(name, root, download) -> tuple[Split, Split]:
    """The original training and test sets as uint8 [n, C, H, W], from files whose md5 is the original one."""
    try:
        from torchvision import datasets
    except Exception as error:  # a build for another torch raises RuntimeError, not ImportError
        raise ValueError(f"{name} is read by torchvision, which cannot be imported here") from error
    source = getattr(datasets, _CLASS[name])
    if name == "cifar10":
        folder = root / source.base_folder
        md5 = dict(source.train_list + source.test_list) | {source.meta["filename"]: source.meta["md5"]}
    else:
        folder, md5 = root / _CLASS[name] / "raw", _IDX_MD5[name]
    _require(name, source, root, folder, md5, download)
    return tuple(_read(name, source, root, folder, train) for train in (True, False))


def _require(name, source, root, folder, md5, download):
    """Download what `folder` lacks; ValueError unless it then holds every file of `md5` as it should be."""
    from torchvision.datasets.utils import check_integrity

    def wrong():
        return [file for file, digest in md5.items() if not check_integrity(folder / file, digest)]

    files, failure = wrong(), ""
    if files and download:
        try:
            _download(source, root)
        except Exception as error:  # no network, no space, a bad archive: torchvision raises many kinds
            failure = f", and downloading failed ({type(error).__name__})"
        files = wrong()
    if files:
        states = ", ".join(f"{f} is {'damaged' if (folder / f).exists() else 'missing'}" for f in files)
        raise ValueError(f"{name} needs its original files in {folder}, but {states}{failure}")


def _download(source, root):
    dataset = source.__new__(source)  # its constructor would go on to read, even unpickle, unchecked files
    dataset.root = str(root)
    with redirect_stdout(sys.stderr):  # stdout belongs to the program's own output
        dataset.download()


def _read(name, source, root, folder, train) -> Split:
    if name == "cifar10":
        # torchvision unpickles these files; `_require`, and it too, has checked their md5 before that.
        dataset = source(root, train=train)
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(dataset.targets))
    from torchvision.datasets.mnist import read_image_file, read_label_file

    prefix = folder / ("train" if train else "t10k")
    images = read_image_file(f"{prefix}-images-idx3-ubyte")
    return Split(images.unsqueeze(1), read_label_file(f"{prefix}-labels-idx1-ubyte"))
