"""What the tests of every kernel share: awkward masks, random operands, and how far from float64 one may be."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = ["random", "all", "one", "none", "empty row and column"]


def make_masks(kind, tickets, n, k):
    """Bool masks [R, N, K] that keep equally many weights; "random" keeps a fifth, elsewhere in each ticket."""
    masks = torch.zeros(tickets, n, k, dtype=torch.bool)
    for ticket in masks:
        if kind == "random":
            ticket.view(-1)[torch.randperm(n * k)[: max(1, n * k // 5)]] = True
        elif kind == "one":
            ticket[n // 2, k // 3] = True
        elif kind != "none":
            ticket.fill_(True)
    if kind == "empty row and column":
        masks[:, n // 2], masks[:, :, k // 2] = False, False
    return masks.to(DEVICE)


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def packed(dense, masks):
    """The kept entries [R, nnz] of `dense` [R, N, K], in row-major order of each mask."""
    return dense[masks].view(len(masks), -1)


def close(ours, wanted, theirs):
    """At most twice the error of torch in the same precision, or a few roundings of the largest value."""
    if wanted.numel() == 0:
        return ours.shape == wanted.shape
    allowed = 2 * (theirs.double() - wanted).abs().max()
    least = 4 * torch.finfo(torch.float32).eps * wanted.abs().max()
    return ours.shape == wanted.shape and bool((ours.double() - wanted).abs().max() <= max(allowed, least))
