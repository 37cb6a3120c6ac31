"""Data sets: splits, scaling, files missing, damaged or hostile; the real ones where LTH_DATA is set."""

import gzip
import hashlib
import os
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lth_sparse import data

ROOT = os.environ.get("LTH_DATA")
real = pytest.mark.skipif(not ROOT, reason="LTH_DATA names no folder with the real data sets")
datasets = pytest.importorskip("torchvision.datasets")
COUNTS = {"train": 40, "t10k": 20}


def idx(array):
    """`array` uint8 as an IDX file."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def mnist(tmp_path, monkeypatch):
    """A small MNIST under tmp_path that passes for the real one; image i has levels i and label i % 10."""
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for prefix, count in COUNTS.items():
        images = np.arange(count, dtype=np.uint8).repeat(784).reshape(count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    sums = {file.name: md5(file.read_bytes()) for file in folder.iterdir()}
    monkeypatch.setitem(data._IDX_MD5, "mnist", sums)
    monkeypatch.setitem(data._TRAINING, "mnist", COUNTS["train"])
    return folder


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """A small CIFAR-10 under tmp_path that passes for the real one; image i has levels i and label i % 10."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    sums = {}
    for name, first in [("data_batch_1", 0), ("data_batch_2", 20), ("test_batch", 0)]:
        levels = np.arange(first, first + 20, dtype=np.uint8)
        batch = {"data": levels.repeat(3072).reshape(20, 3072), "labels": [int(i) % 10 for i in levels]}
        sums[name] = write_pickle(folder / name, batch)
    meta = {"filename": "batches.meta", "key": "label_names"}
    meta["md5"] = write_pickle(folder / "batches.meta", {"label_names": list("0123456789")})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in (1, 2)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    monkeypatch.setitem(data._TRAINING, "cifar10", 40)
    return folder


def write_pickle(path, value):
    path.write_bytes(pickle.dumps(value))
    return md5(path.read_bytes())


@pytest.fixture
def offline(monkeypatch):
    """Every download fails as it does without a network; the list gets one entry per attempt."""
    attempts = []

    def download(self):
        attempts.append(self.root)
        raise OSError("no route to host\nTried again, got: no route to host")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    return attempts


def refusal(*args, **kwargs):
    """The message of the ValueError that `load` raises: one line."""
    with pytest.raises(ValueError) as error:
        data.load(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def same(a, b):
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def assert_well_formed(loaded, sizes, shape):
    assert loaded.input_shape == shape and loaded.classes == 10
    for split, size in zip((loaded.train, loaded.validation, loaded.test), sizes, strict=True):
        assert split.images.shape == (size, *shape) and split.labels.shape == (size,)
        assert split.images.dtype in (torch.uint8, torch.float32) and split.labels.dtype == torch.int64
        assert split.images.is_contiguous() and loaded.inputs(split.images).isfinite().all()
        assert split.labels.min() == 0 and split.labels.max() == 9
    assert loaded.test.labels.unique().tolist() == list(range(10))


def test_digits_need_no_files():
    loaded = data.load("digits", root="/nowhere")
    assert_well_formed(loaded, (1257, 180, 360), (1, 8, 8))
    assert (loaded.name, loaded.normalization) == ("digits", "unit")
    images = loaded.inputs(loaded.train.images)
    assert images.dtype == torch.float32 and images.min() == 0 and images.max() == 1
    assert loaded.train.images.dtype == torch.uint8 and loaded.train.images.max() == 16  # as it is stored


def test_digits_are_split_without_loss_or_overlap():
    from sklearn.datasets import load_digits

    loaded = data.load("digits", normalization="none", validation_size=77)
    rows = torch.cat([split.images.flatten(1) for split in loaded[1:4]]).tolist()
    assert len(loaded.validation.labels) == 77
    assert sorted(rows) == sorted(load_digits().data.tolist())


def test_seed_moves_the_split_but_never_the_test_set():
    first, again, other = (data.load("digits", seed=seed) for seed in (0, 0, 1))
    assert all(same(a, b) for a, b in zip(first[1:4], again[1:4], strict=True))
    assert same(first.test, other.test)
    assert not same(first.validation, other.validation)


def test_validation_comes_first_in_the_permutation():
    small, large = (data.load("digits", validation_size=size) for size in (10, 20))
    assert torch.equal(small.validation.images, large.validation.images[:10])
    assert torch.equal(small.train.images[10:], large.train.images)


def test_global_generator_is_left_alone():
    torch.manual_seed(5)
    data.load("digits")
    data.load("maxgroup", size=30, noise=0.1, validation_size=5)
    assert torch.get_rng_state().equal(torch.manual_seed(5).get_state())


@pytest.mark.parametrize("name, shape", [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_files_are_read_in_their_layout(name, shape, tmp_path, request, offline):
    request.getfixturevalue(name)
    loaded = data.load(name, tmp_path, "none", validation_size=15)
    assert_well_formed(loaded, (25, 15, 20), shape)
    assert loaded.test.images[:, 0, 0, 0].tolist() == list(range(20))  # in the original order
    original = torch.cat([loaded.validation.images, loaded.train.images])
    assert torch.equal(original, original[:, :1, :1, :1].expand_as(original))
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(original[:, 0, 0, 0], order.byte())
    assert torch.equal(torch.cat([loaded.validation.labels, loaded.train.labels]), order % 10)
    assert offline == []


def test_cifar10_pixels_keep_their_place(cifar10, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    digest = write_pickle(cifar10 / "test_batch", {"data": pixels, "labels": [i % 10 for i in range(20)]})
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", digest]])
    test = data.load("cifar10", tmp_path, "none", validation_size=5).test
    assert torch.equal(test.images, torch.from_numpy(pixels).view(20, 3, 32, 32))


def test_home_and_str_roots(mnist, tmp_path, monkeypatch, offline):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same(data.load("mnist", "~", validation_size=5).test, data.load("mnist", tmp_path, validation_size=5).test)


@pytest.mark.parametrize("name, file", [("mnist", "t10k-labels-idx1-ubyte"), ("cifar10", "batches.meta")])
def test_missing_file_is_named(name, file, tmp_path, request, offline):
    folder = request.getfixturevalue(name)
    (folder / file).unlink()
    want = f"{name} needs its original files in {folder}, but {file} is missing"
    assert refusal(name, tmp_path, validation_size=5, download=False) == want
    assert offline == []
    assert refusal(name, tmp_path, validation_size=5) == want + ", and downloading failed (OSError)"
    assert offline == [str(tmp_path)]


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
@pytest.mark.parametrize("root", ["absent", "file"])
def test_absent_root_names_folder_and_every_file(name, root, tmp_path, offline):
    (tmp_path / "file").write_text("")
    message = refusal(name, tmp_path / root)
    folder = {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}[name]
    assert str(tmp_path / root / folder) in message
    assert message.count("is missing") == (7 if name == "cifar10" else 4)


def truncated(content):
    return content[:-1]


def flipped(content):
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


def emptied(content):
    return b""


@pytest.mark.parametrize("damage", [truncated, flipped, emptied])
@pytest.mark.parametrize(
    "name, file",
    [("mnist", "train-images-idx3-ubyte"), ("mnist", "t10k-labels-idx1-ubyte"), ("cifar10", "data_batch_2")],
)
def test_damaged_file_is_named(name, file, damage, tmp_path, request, offline):
    path = request.getfixturevalue(name) / file
    path.write_bytes(damage(path.read_bytes()))
    message = refusal(name, tmp_path, validation_size=5)
    assert f"needs its original files in {path.parent}, but {file} is damaged" in message


def test_folder_in_place_of_a_file_counts_as_damaged(mnist, tmp_path, offline):
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    (mnist / "t10k-labels-idx1-ubyte").mkdir()
    assert "t10k-labels-idx1-ubyte is damaged" in refusal("mnist", tmp_path, validation_size=5)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("file", ["data_batch_1", "test_batch", "batches.meta"])
def test_hostile_pickle_is_never_opened(file, cifar10, tmp_path, offline):
    trap = tmp_path / "sprung"
    (cifar10 / file).write_bytes(pickle.dumps(Hostile(trap)))
    assert f"{file} is damaged" in refusal("cifar10", tmp_path, validation_size=5)
    assert f"{file} is damaged" in refusal("cifar10", tmp_path, validation_size=5, download=False)
    assert not trap.exists()
    pickle.loads((cifar10 / file).read_bytes())
    assert trap.exists()  # the trap works


def test_mnist_of_old_torchvision_is_ignored(mnist, tmp_path):
    (tmp_path / "MNIST" / "processed").mkdir()
    for file in ("training.pt", "test.pt"):
        torch.save((torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3)), mnist.parent / "processed" / file)
    assert len(data.load("mnist", tmp_path, validation_size=5).test.labels) == COUNTS["t10k"]


def test_archives_in_place_are_unpacked_when_downloads_are_allowed(mnist, tmp_path, monkeypatch, capsys):
    resources = []
    for file in list(mnist.iterdir()):
        archive = mnist / f"{file.name}.gz"
        archive.write_bytes(gzip.compress(file.read_bytes()))
        resources.append((archive.name, md5(archive.read_bytes())))
        file.unlink()
    monkeypatch.setattr(datasets.MNIST, "resources", resources)
    assert "is missing" in refusal("mnist", tmp_path, validation_size=5, download=False)
    loaded = data.load("mnist", tmp_path, "none", validation_size=5)
    assert loaded.test.images[:, 0, 0, 0].tolist() == list(range(20))
    assert capsys.readouterr().out == ""


def test_whatever_a_download_prints_stays_off_stdout(mnist, tmp_path, monkeypatch, capsys):
    (mnist / "t10k-labels-idx1-ubyte").rename(tmp_path / "kept")

    def download(self):
        print("Downloading")
        (tmp_path / "kept").rename(mnist / "t10k-labels-idx1-ubyte")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    data.load("mnist", tmp_path, validation_size=5)
    assert capsys.readouterr() == ("", "Downloading\n")


@pytest.mark.parametrize("failure", [ImportError("no module"), RuntimeError("operator torchvision::nms\nis missing")])
def test_broken_torchvision_is_one_sentence(failure, mnist, tmp_path, monkeypatch):
    class Broken:
        def __getattr__(self, name):
            raise failure

    monkeypatch.setitem(sys.modules, "torchvision", Broken())
    assert "torchvision, which cannot be imported here" in refusal("mnist", tmp_path, validation_size=5)
    assert data.load("digits").classes == 10


def scaled(images, normalization, levels=255):
    scale, shift = data._scaling(normalization, levels, images)
    images = data._lengths_to_one(images) if normalization == "l2" else images
    return images * scale[:, None, None] + shift[:, None, None]


def test_normalizations_of_known_levels():
    images = torch.tensor([0, 51, 102, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    want = {
        "none": [0, 51, 102, 255],
        "unit": [0, 0.2, 0.4, 1],
        "half": [-1, -0.6, -0.2, 1],
        "lecun": [(u - 0.078) / 0.784 for u in (0, 0.2, 0.4, 1)],
        "l2": [u / 1.2**0.5 for u in (0, 0.2, 0.4, 1)],
        "statistics": [(u - 0.4) / 0.3742 for u in (0, 0.2, 0.4, 1)],
    }
    assert want.keys() == set(data.NORMALIZATIONS)
    for normalization, values in want.items():
        got = scaled(images, normalization)
        torch.testing.assert_close(got, torch.tensor(values, dtype=torch.float32).view(1, 1, 2, 2))


def test_statistics_are_per_channel_and_of_the_original_training_set():
    images = torch.randint(0, 256, (400, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[:, 1] //= 2
    got = scaled(images, "statistics")
    assert got.mean((0, 2, 3)).abs().max() < 1e-3 and (got.std((0, 2, 3)) - 1).abs().max() < 1e-3
    first, second = (data.load("digits", "", "statistics", size) for size in (100, 700))
    assert same(first.test, second.test)
    everything = first.inputs(torch.cat([first.train.images, first.validation.images]))
    assert everything.mean().abs() < 1e-3 and (everything.std() - 1).abs() < 1e-3


def test_l2_leaves_blank_images_blank():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[1, 2, 3, 3] = 1
    got = scaled(images, "l2")
    assert not got[0].any()
    assert got[1].norm() == 1


@pytest.mark.parametrize("normalization", data.NORMALIZATIONS)
def test_every_normalization_of_every_set_without_files(normalization):
    for name, options in [("digits", {}), ("maxgroup", {"size": 200, "validation_size": 100})]:
        loaded = data.load(name, normalization=normalization, **options)
        images = loaded.inputs(loaded.train.images)
        assert loaded.normalization == normalization and images.dtype == torch.float32 and images.isfinite().all()
        largest = {"digits": 16, "maxgroup": 1}[name] if normalization == "none" else 1
        assert normalization not in ("none", "unit", "half") or images.max() == pytest.approx(largest, abs=1e-4)


def test_maxgroup_label_is_the_group_with_the_largest_sum():
    images, labels = data.maxgroup(500)
    groups = images.flatten(1).double().numpy()[:, :780].reshape(500, 10, 78).sum(2)
    assert (groups.argmax(1) == labels.numpy()).all()
    assert images.shape == (500, 1, 28, 28) and images.min() >= 0 and images.max() < 1


def test_maxgroup_classes_are_near_balanced():
    counts = data.maxgroup(20_000)[1].bincount(minlength=10)
    assert counts.min() > 1800 and counts.max() < 2200  # 2000 +- 42, one standard deviation


def test_maxgroup_noise_comes_after_the_labels():
    clean, noisy = data.maxgroup(2000), data.maxgroup(2000, noise=0.3)
    assert torch.equal(clean.labels, noisy.labels)
    added = noisy.images - clean.images
    assert added.std() == pytest.approx(0.3, rel=0.01) and abs(added.mean()) < 0.002
    assert noisy.images.min() < 0 and noisy.images.max() > 1


def test_maxgroup_is_the_same_data_in_every_run():
    loaded = data.load("maxgroup", size=50, validation_size=10, normalization="none")
    again = data.load("maxgroup", size=50, validation_size=10, normalization="none", seed=9)
    assert len(loaded.train.labels) == 50 and len(loaded.test.labels) == 10_000
    assert same(loaded.test, again.test) and same(loaded.test, data.maxgroup(10_000, seed=1))
    pools = [torch.cat([d.train.images, d.validation.images]).flatten(1) for d in (loaded, again)]
    assert sorted(pools[0].tolist()) == sorted(pools[1].tolist())
    assert not same(loaded.train, again.train)
    assert data.maxgroup(1000).images.double().sum().item() == pytest.approx(392_000, rel=2e-3)


def test_maxgroup_labels_are_pinned():
    assert data.maxgroup(12).labels.tolist() == [4, 7, 2, 7, 9, 7, 5, 7, 9, 4, 1, 5]


@pytest.mark.slow
def test_maxgroup_default_size():
    assert_well_formed(data.load("maxgroup"), (55_000, 5000, 10_000), (1, 28, 28))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            {"name": "svhn"},
            "unknown data set 'svhn': choose from digits, mnist, fashion-mnist, cifar10, maxgroup",
        ),
        (
            {"normalization": "zca"},
            "unknown normalization 'zca': choose from unit, statistics, half, lecun, l2, none",
        ),
        ({"size": 10}, "size and noise are options of maxgroup only, but the data set is digits"),
        ({"name": "mnist", "noise": 0.0}, "options of maxgroup only, but the data set is mnist"),
        ({"name": "maxgroup", "size": 0}, "size must be 1 or more training images, got 0"),
        ({"name": "maxgroup", "noise": -0.1}, "noise must be a standard deviation of 0 or more, got -0.1"),
        (
            {"name": "maxgroup", "noise": float("nan")},
            "noise must be a standard deviation of 0 or more, got nan",
        ),
        ({"validation_size": 0}, "validation_size must be 1 or more images, got 0"),
        ({"name": "maxgroup", "validation_size": -5}, "validation_size must be 1 or more images, got -5"),
        ({"validation_size": 1437}, "validation_size must be below the 1437 images of digits, got 1437"),
        ({"name": "mnist", "validation_size": 60_000}, "below the 60000 images of mnist, got 60000"),
        ({"device": "abacus"}, "the device 'abacus' is not available"),
        ({"device": "cuda:99"}, "the device 'cuda:99' is not available"),
    ],
)
def test_refusals(arguments, message):
    assert message in refusal(**{"name": "digits", "root": "/nowhere", **arguments})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_cuda_where_there_is_none_is_refused():
    assert "the device 'cuda' is not available" in refusal("digits", device="cuda")


@pytest.mark.gpu
def test_the_gpu_gets_the_same_bits():
    cpu, gpu = (data.load("digits", normalization="statistics", device=device) for device in ("cpu", "cuda"))
    assert gpu.train.images.is_cuda and gpu.test.labels.is_cuda
    assert all(same(a, data.Split(b.images.cpu(), b.labels.cpu())) for a, b in zip(cpu[1:4], gpu[1:4], strict=True))
    torch.testing.assert_close(gpu.inputs(gpu.test.images).cpu(), cpu.inputs(cpu.test.images))


@real
@pytest.mark.parametrize(
    "name, sizes, shape, mean, std",
    [
        ("mnist", (55_000, 5000, 10_000), (1, 28, 28), [0.1307], [0.3081]),
        ("fashion-mnist", (55_000, 5000, 10_000), (1, 28, 28), [0.2860], [0.3530]),
        ("cifar10", (45_000, 5000, 10_000), (3, 32, 32), [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_real_sets(name, sizes, shape, mean, std):
    loaded = data.load(name, ROOT, "statistics", download=False)
    assert_well_formed(loaded, sizes, shape)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    levels = 255 * (loaded.inputs(loaded.test.images) * std + mean)
    assert (levels - levels.round()).abs().max() < 1e-3
    assert levels.round().min() == 0 and levels.round().max() == 255
    first = {"mnist": [7, 2, 1, 0, 4], "fashion-mnist": [9, 2, 1, 1, 6], "cifar10": [3, 8, 8, 0, 6]}[name]
    assert loaded.test.labels[:5].tolist() == first
    counts = loaded.train.labels.bincount() + loaded.validation.labels.bincount()
    assert counts.sum() == sum(sizes[:2]) and (name == "mnist" or (counts == counts[0]).all())


def coloured(cifar10, monkeypatch, pixels):
    """The test set of the small CIFAR-10 with these images, uint8 [20, 3, 32, 32]."""
    batch = {"data": pixels.reshape(20, 3072), "labels": [i % 10 for i in range(20)]}
    digest = write_pickle(cifar10 / "test_batch", batch)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", digest]])


def test_grey_28_weighs_colours_and_cuts_the_middle_out(cifar10, tmp_path, monkeypatch):
    pixels = np.zeros((20, 3, 32, 32), dtype=np.uint8)
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (10, 20, 30), (0, 0, 0), (1, 1, 1)]
    for place, colour in enumerate(colours):
        pixels[0, :, 2, 2 + place] = colour  # the first row that stays, from its first column on
    pixels[0, :, 29, 29] = 200  # the last that stays
    pixels[0, :, 1], pixels[0, :, 30], pixels[0, :, :, 1], pixels[0, :, :, 30] = 99, 99, 99, 99
    coloured(cifar10, monkeypatch, pixels)
    loaded = data.load("cifar10", tmp_path, validation_size=15, images="grey-28")
    assert_well_formed(loaded, (25, 15, 20), (1, 28, 28))
    image = loaded.test.images[0, 0]
    # ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B, rounded
    assert image[0, :8].tolist() == [76, 150, 29, 255, 18, 0, 1, 0]
    assert image[27, 27] == 200 and 99 not in image and loaded.test.images.dtype == torch.uint8
    assert loaded.inputs(loaded.test.images)[0, 0, 0, 3] == 1


def test_grey_28_leaves_images_of_that_shape_as_they_are(mnist, tmp_path):
    plain, grey = (data.load("mnist", tmp_path, validation_size=5, images=images) for images in ("original", "grey-28"))
    assert all(same(a, b) for a, b in zip(plain[1:4], grey[1:4], strict=True)) and grey.input_shape == (1, 28, 28)
    assert same(data.load("maxgroup", size=9, images="grey-28").train, data.load("maxgroup", size=9).train)


def test_doubled_makes_four_of_each_pixel():
    plain, doubled = (data.load("digits", images=images) for images in ("original", "doubled"))
    assert_well_formed(doubled, (1257, 180, 360), (1, 16, 16))
    for row in (0, 1):
        for column in (0, 1):
            assert torch.equal(doubled.train.images[:, :, row::2, column::2], plain.train.images)
    assert torch.equal(doubled.train.labels, plain.train.labels)


def test_statistics_are_those_of_the_changed_images(cifar10, tmp_path):
    loaded = data.load("cifar10", tmp_path, "statistics", validation_size=5, images="grey-28")
    assert loaded.scale.shape == (1,)
    original = loaded.inputs(torch.cat([loaded.validation.images, loaded.train.images]))
    assert abs(original.mean()) < 1e-2 and abs(original.std(correction=0) - 1) < 1e-2


def test_images_refused():
    assert (
        refusal("digits", images="grey-28") == "images 'grey-28' are cut from larger ones, but those of digits are 8x8"
    )
    assert refusal("digits", images="blue") == "unknown images 'blue': choose from original, grey-28, doubled"
