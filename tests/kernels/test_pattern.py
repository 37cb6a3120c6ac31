"""Index structures: bits, bitmap and CSR of a mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lth_sparse.kernels.geometry import geometry
from lth_sparse.kernels.groups import groups
from lth_sparse.kernels.pattern import bitmap, pack_bits, unpack_bits
from lth_sparse.kernels.taps import taps


def test_first_weight_lies_in_the_lowest_bit():
    mask = torch.tensor([[1, 0, 0, 0, 1], [0, 0, 1, 0, 1]]).bool()
    bits = pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.tolist() == [0b1001_0001, 0b10]
    assert pack_bits(mask.T).tolist() == [0b0010_0001, 0b11]  # row-major of what is given, not of memory


@given(st.lists(st.integers(0, 9), max_size=4), st.integers(0, 2**20), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_bits_round_trip_in_one_eighth_of_the_bytes(shape, seed, density):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    bits = pack_bits(mask)
    assert bits.numel() == -(-mask.numel() // 8)
    back = unpack_bits(bits, tuple(shape))
    assert back.dtype == torch.bool and back.shape == mask.shape and torch.equal(back, mask)


@pytest.mark.parametrize(
    "bits, got",
    [
        (torch.zeros(1, dtype=torch.uint8), r"torch.uint8 \(1,\)"),
        (torch.zeros(3, dtype=torch.uint8), r"torch.uint8 \(3,\)"),
        (torch.zeros(2, 1, dtype=torch.uint8), r"torch.uint8 \(2, 1\)"),
        (torch.zeros(2, dtype=torch.int32), r"torch.int32 \(2,\)"),
    ],
)
def test_bits_of_another_mask_are_refused(bits, got):
    with pytest.raises(ValueError, match=rf"^a mask of shape \(3, 5\) is 2 bytes of bits, got {got}$"):
        unpack_bits(bits, (3, 5))


@pytest.mark.parametrize(
    "structure", [bitmap, groups, lambda masks: taps(masks[0, :, :, None, None], geometry((1, 1)))]
)
def test_what_int32_cannot_index_is_refused(structure):
    too_many = torch.ones((), dtype=torch.bool).expand(1, 2**14, 2**17)
    with pytest.raises(ValueError, match=r"^masks must keep .* fewer than 2\*\*31, got \[2147483648\]$"):
        structure(too_many)


def test_bitmap_counts_what_lies_before_each_word():
    masks = torch.zeros(2, 2, 40, dtype=torch.bool)
    masks[0, 0, [0, 31, 32]], masks[0, 1, 39] = True, True
    masks[1, 1, :4] = True
    words, offsets = bitmap(masks)
    assert words.tolist() == [[[1 - 2**31, 1], [0, 1 << 7]], [[0, 0], [15, 0]]]
    assert offsets.tolist() == [[[0, 2], [3, 3]], [[0, 0], [0, 4]]]


def test_bitmap_wants_equally_many_weights():
    masks = torch.eye(4, dtype=torch.bool).repeat(2, 1, 1)
    masks[1, 0, 0] = False
    with pytest.raises(ValueError, match=r"equally many weights.*got \[4, 3\]"):
        bitmap(masks)
