"""Prune a torchvision model while it trains, and save the ticket: `python prune_a_torchvision_model.py [--steps N]`.

The data are random images; put your own loader in place of `batches`.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import lth_sparse as lth


def batches(steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images [16, 3, 32, 32] of ten classes, each a colour of its own under noise."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(10, 3, 1, 1, generator=generator)
    for _ in range(steps):
        labels = torch.randint(10, (16,), generator=generator)
        yield colours[labels] + torch.randn(16, 3, 32, 32, generator=generator), labels


def main(steps: int = 10, path: Path | None = None) -> float:
    """Three times `steps` steps with a pruning of half the weights between them; the density at the end."""
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v3_small(num_classes=10)  # or your own, trained or not
    lth.sparsify_(model, exclude=["classifier.3"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    print("density  loss")
    for round in range(3):
        if round:
            lth.prune_(model, rate=0.5, scope="global", optimizer=optimizer)
        for images, labels in batches(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
        print(f"{lth.density(model):7.1%}  {loss.item():.3f}")
    with tempfile.TemporaryDirectory() as folder:
        path = path or Path(folder) / "ticket.safetensors"
        lth.save(model, path)  # lth.load_(fresh_model, path) brings it back
        plain = sum(tensor.nbytes for tensor in lth.densify_(model).state_dict().values())  # a plain model again
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, dense {plain / 1e6:.1f} MB")
    return sum(int(p.count_nonzero()) for p in model.parameters()) / sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Prune a torchvision model while it trains.")
    parser.add_argument("--steps", type=int, default=10)
    main(parser.parse_args().steps)
