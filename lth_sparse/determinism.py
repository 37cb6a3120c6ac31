"""Whether this machine computes the same bits twice: a small LeNet is trained and compared with itself."""

from collections.abc import Iterator

import torch

from . import data, dispatch, models, training
from .convert import sparsify_
from .prune import prune_
from .recipe import Recipe

STEPS = 50
SAME = "same bits"


def check(device: str) -> Iterator[tuple[str, str]]:
    """Train LeNet on digits twice with each strategy that can run: its name, and "same bits" or where they differ."""
    loaded = data.load("digits", device=device)
    for strategy in dispatch.runnable(torch.device(device), torch.float32):
        given = dict(iterations=STEPS, evaluate_every=STEPS // 2, strategy=strategy, device=device, threads=1)
        recipe = Recipe(dataset="digits", **given).resolve(len(loaded.train.labels))
        first, second = (_trained(loaded, recipe) for _ in range(2))
        differ = [name for name, bits in first.items() if bits != second[name]]
        yield strategy, f"{', '.join(differ)} differ" if differ else SAME


def _trained(loaded, recipe) -> dict[str, bytes]:
    """What a training ends with, by name: weights and biases, and the history of its losses."""
    generator = torch.Generator().manual_seed(recipe.seed)
    model = models.build(recipe.model, loaded.input_shape, loaded.classes, generator=generator)
    model = prune_(sparsify_(model), 0.8)
    (result,) = training.train([training.Ticket(model, "ticket", recipe.seed)], loaded, recipe)
    tensors = {name: tensor.cpu().view(torch.uint8).numpy().tobytes() for name, tensor in model.state_dict().items()}
    return tensors | {"history": repr(result.history).encode()}
