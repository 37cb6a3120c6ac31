"""Find a winning ticket of your own model, in your own training loop: `python find_a_ticket_of_your_own_model.py`.

The task is synthetic and small: 16 numbers, of which the sum of four, squared, says the class.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lth_sparse as lth


def examples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [count, 16] and their classes 0 to 2 [count]."""
    x = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return x, torch.bucketize(x[:, :4].sum(1).square(), torch.tensor([1.0, 5.0]))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 3))


def train(model: nn.Module, steps: int = 300) -> float:
    """Your own training: a new optimizer each time, the model trained in place. Returns the test accuracy."""
    (x, y), (test_x, test_y) = examples(2000, seed=1), examples(2000, seed=2)
    optimizer, generator = torch.optim.Adam(model.parameters(), 2e-3), torch.Generator().manual_seed(3)
    for _ in range(steps):
        batch = torch.randint(len(x), (60,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return (model(test_x).argmax(1) == test_y).float().mean().item()


def main(rounds: int = 6, steps: int = 300) -> list[tuple[float, float, float]]:
    """Rows of density, accuracy of the ticket, and of the same masks with fresh starting values."""
    model = lth.sparsify_(make_model())
    found = lth.find_ticket(model, lambda model: train(model, steps), rounds=rounds, rate=0.4)
    rows = []
    print("density  ticket  fresh values")
    for ticket in found:
        control = lth.reinit_(ticket.ticket_(model), torch.Generator().manual_seed(ticket.round))
        rows.append((ticket.density, ticket.metrics, train(control, steps)))
        print(f"{ticket.density:7.1%}  {ticket.metrics:6.1%}  {rows[-1][2]:12.1%}")
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Find a winning ticket of your own model.")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=300)
    main(**vars(parser.parse_args()))
