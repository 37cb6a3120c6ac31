"""Log the rounds of a search to TensorBoard: `python log_to_tensorboard.py FOLDER`, then `tensorboard --logdir FOLDER`.

`on_metrics` is called after each round with {"round", "density", "metrics"}; metrics are what your `train` returned.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

import lth_sparse as lth


def logger(writer) -> Callable[[dict], None]:
    """An `on_metrics` that writes to a `torch.utils.tensorboard.SummaryWriter`, or to all that has `add_scalar`."""

    def log(found: dict) -> None:
        for name, value in {"density": found["density"], **found["metrics"]}.items():
            writer.add_scalar(name, value, found["round"])

    return log


class Printer:
    """Stands in for a SummaryWriter where TensorBoard is not installed."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        print(f"round {step}  {name:8}  {value:.4f}")

    def close(self) -> None:
        pass


def writer_for(folder: str):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return Printer()
    return SummaryWriter(folder)


def train(model: nn.Module, steps: int = 100) -> dict[str, float]:
    x = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), x[:, :1].sin())
        loss.backward()
        optimizer.step()
    return {"loss": loss.item()}


def main(folder: str = "runs/tensorboard", rounds: int = 4, writer=None) -> list:
    torch.manual_seed(0)
    model = lth.sparsify_(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)))
    writer = writer or writer_for(folder)
    found = lth.find_ticket(model, train, rounds=rounds, rate=0.3, on_metrics=logger(writer))
    writer.close()
    print(f"{len(found)} rounds, down to {found[-1].density:.1%} of the weights")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Log the rounds of a search to TensorBoard.")
    parser.add_argument("folder", nargs="?", default="runs/tensorboard")
    main(parser.parse_args().folder)
