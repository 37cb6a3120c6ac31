"""Batches gathered and scaled, against float64."""

import pytest
import torch
from kernel_oracle import DEVICE, close, random
from lth_sparse.kernels.batches import BLOCK, gather

# Images, channels and pixels, tickets and batch; the last but one of two blocks a channel.
SHAPES = [(7, 1, 784, 3, 20), (1, 1, 1, 1, 1), (300, 1, 13, 1, 257), (5, 3, BLOCK + 37, 2, 2), (9, 2, 64, 30, 1)]


def operands(n, channels, pixels, tickets, batch, dtype=torch.uint8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (n, channels, pixels), generator=generator, dtype=torch.uint8).to(dtype)
    indices = torch.randint(n, (tickets, batch), generator=generator)
    indices[0, 0], indices[-1, -1] = n - 1, 0
    return images.to(DEVICE), indices.to(DEVICE), random(channels).abs() / 255, random(channels, seed=1)


def scaled(images, indices, scale, shift):
    """In the precision of `scale`."""
    return (images[indices].to(scale.dtype) * scale[:, None] + shift[:, None]).flatten(2)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_oracle(shape, dtype):
    images, indices, scale, shift = operands(*shape, dtype=dtype)
    x = gather(images, indices, scale, shift)
    assert x.dtype == torch.float32 and x.is_contiguous()
    assert close(x, scaled(images, indices, scale.double(), shift.double()), scaled(images, indices, scale, shift))


# the interpreter cuts bits off where it should round to bfloat16 (Triton 3.9)
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float16])
def test_low_precisions_are_rounded_once(dtype):
    images, indices, scale, shift = operands(7, 3, 50, 2, 20)
    x = gather(images, indices, scale, shift, dtype)
    assert x.dtype == dtype and torch.equal(x, gather(images, indices, scale, shift).to(dtype))


def test_the_identity_is_exact():
    images, indices, scale, shift = operands(7, 2, 100, 2, 20, torch.float32)
    x = gather(images / 7, indices, torch.ones_like(scale), torch.zeros_like(shift))
    assert torch.equal(x, (images / 7)[indices].flatten(2))


def test_takes_any_strides_of_the_indices():
    images, indices, scale, shift = operands(7, 1, 10, 3, 4)
    wanted = gather(images, indices, scale, shift)
    assert torch.equal(gather(images, indices.t().contiguous().t(), scale, shift), wanted)
    assert torch.equal(gather(images, indices[:1].expand(2, -1), scale, shift), wanted[:1].expand(2, -1, -1))


def test_nothing_to_gather():
    images, indices, scale, shift = operands(7, 1, 10, 3, 4)
    assert gather(images, indices[:, :0], scale, shift).shape == (3, 0, 10)
    assert gather(images[:, :, :0].contiguous(), indices, scale, shift).shape == (3, 4, 0)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(images=lambda t: t.int()), r"images must be uint8 or float32 \[n, C, P\], contiguous, got torch.int32"),
        (dict(images=lambda t: t[0]), r"got torch.uint8 \(2, 10\)"),
        (dict(images=lambda t: t.mT), r"got non-contiguous torch.uint8 \(7, 10, 2\)"),
        (dict(indices=lambda t: t.int()), r"indices must be int64 \[R, B\] on .*, got torch.int32 \(3, 4\)"),
        (dict(indices=lambda t: t[0]), r"got torch.int64 \(4,\)"),
        (dict(scale=lambda t: t[:1]), r"scale must be float32 \(2,\) on .*, got torch.float32 \(1,\)"),
        (dict(shift=lambda t: t.double()), r"shift must be .*, got torch.float64"),
        (dict(shift=lambda t: t.to("meta")), r"shift must be .*, got .* on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    tensors = dict(zip(("images", "indices", "scale", "shift"), operands(7, 2, 10, 3, 4), strict=True))
    tensors = {name: change.get(name, lambda t: t)(tensor) for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=message):
        gather(**tensors)


def test_unknown_types_are_named():
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got torch.float64"):
        gather(*operands(7, 2, 10, 3, 4), dtype=torch.float64)
