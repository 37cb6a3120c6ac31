"""Iterative magnitude pruning as one writes it today, without this library: DataLoader, torch.nn.utils.prune, Adam.

The protocol is that of `lth find-ticket lenet-300-100`: the same split sizes, batches, initialisation, rates,
evaluation of validation and test set, early stop and training accuracy; masks are multiplied into dense weights.
"""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, Dataset

RATES = (0.2, 0.2, 0.1)  # of each layer and round
ARMS = ("ticket", "reinit", "random")


class Splits(NamedTuple):
    """Data sets of (image, label) pairs."""

    train: Dataset
    validation: Dataset
    test: Dataset


def mnist(root: str) -> Splits:
    """MNIST by torchvision, 5,000 of its training images held out."""
    from torchvision import datasets, transforms

    train, test = (datasets.MNIST(root, train=part, transform=transforms.ToTensor()) for part in (True, False))
    return Splits(*torch.utils.data.random_split(train, [55_000, 5000]), test)


def network(inputs: int) -> nn.Sequential:
    """LeNet-300-100, Glorot normal."""
    layers = nn.Linear(inputs, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    for layer in layers[::2]:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(nn.Flatten(), *layers)


def rounds(splits: Splits, iterations: int, evaluate_every: int, batch_size: int, device: str) -> Iterator[dict]:
    """Train every arm for a round, prune, and again without end; yields by arm {"loss", "accuracy", "train_accuracy"}.

    "loss" is the lowest validation loss, "accuracy" that on the test set at the same iteration.
    """
    inputs = splits.train[0][0].numel()
    models = {arm: network(inputs).to(device) for arm in ARMS}
    start = copy.deepcopy(models["ticket"].state_dict())
    while True:
        yield {arm: train(m, splits, iterations, evaluate_every, batch_size, device) for arm, m in models.items()}
        for ticket, reinit, random, rate in zip(*map(_linear, models.values()), RATES, strict=True):
            prune.l1_unstructured(ticket, "weight", amount=rate)
            prune.random_unstructured(random, "weight", amount=rate)
            prune.custom_from_mask(reinit, "weight", mask=ticket.weight_mask)
        for arm, model in models.items():
            fresh = start if arm == "ticket" else network(inputs).state_dict()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(fresh[name.removesuffix("_orig")])


def train(model: nn.Module, splits: Splits, iterations: int, evaluate_every: int, batch_size: int, device: str) -> dict:
    """One training from the model's values; see `rounds` for what it returns."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1.2e-3)
    loader = DataLoader(splits.train, batch_size, shuffle=True)
    best, iteration = {"loss": float("inf")}, 0
    while iteration < iterations:
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()
            iteration += 1
            if iteration % evaluate_every == 0 or iteration == iterations:
                loss, _ = evaluate(model, splits.validation, device)
                _, accuracy = evaluate(model, splits.test, device)
                best = min(best, {"loss": loss, "accuracy": accuracy}, key=lambda row: row["loss"])
            if iteration == iterations:
                break
    return best | {"train_accuracy": evaluate(model, splits.train, device)[1]}


@torch.no_grad()
def evaluate(model: nn.Module, dataset: Dataset, device: str) -> tuple[float, float]:
    """Mean cross-entropy and accuracy over a data set."""
    loss, right, count = 0.0, 0, 0
    for images, labels in DataLoader(dataset, 1000):
        logits, labels = model(images.to(device)), labels.to(device)
        loss += F.cross_entropy(logits, labels, reduction="sum").item()
        right += (logits.argmax(1) == labels).sum().item()
        count += len(labels)
    return loss / count, right / count


def _linear(model):
    return [layer for layer in model if isinstance(layer, nn.Linear)]
