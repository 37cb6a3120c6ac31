"""Crops and flips against a loop over images."""

import torch
import torch.nn.functional as F

from lth_sparse.training.augmentation import MARGIN, augmented, draw_moves


def test_each_image_is_cropped_and_flipped_as_drawn():
    images, moves = torch.rand(40, 3, 6, 7), draw_moves(40, 3)
    got = augmented(images, moves)
    for image, (down, right, flip), moved in zip(images, moves.tolist(), got, strict=True):
        wanted = F.pad(image, (MARGIN,) * 4)[:, down : down + 6, right : right + 7]
        assert torch.equal(moved, wanted.flip(2) if flip else wanted)
    assert torch.equal(augmented(images, torch.tensor([[MARGIN, MARGIN, 0]]).expand(40, 3)), images)


def test_moves_are_even_and_seeded():
    moves = draw_moves(9000, 1)
    assert moves.min(0).values.tolist() == [0, 0, 0] and moves.max(0).values.tolist() == [8, 8, 1]
    for column, sides in zip(moves.T, (9, 9, 2), strict=True):
        assert (column.bincount() / 9000 - 1 / sides).abs().max() < 0.02
    assert torch.equal(moves, draw_moves(9000, 1)) and not torch.equal(moves, draw_moves(9000, 2))
