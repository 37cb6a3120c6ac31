"""Sparse perceptrons trained by one program for each ticket, which stays on its multiprocessor for many steps."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .. import ops
from ..data import Data
from ..recipe import Recipe
from .stack import ACTIVATIONS, Stack, perceptron


class Programs(Stack):
    """R perceptrons on their way, many steps to a launch; evaluated by the strategy "csr"."""

    def __init__(self, models: Sequence[nn.Module], data: Data, recipe: Recipe, strategies: Mapping[str, str]):
        super().__init__(models, data, recipe, strategies)
        self.images, self.scale, self.shift = data.train.images.flatten(1), float(data.scale), float(data.shift)
        for parameter in self.optimizer.param_groups[0]["params"]:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": self.loss.new_zeros(())} | moments
        self.counter, self.begun = None, 0

    def step(self, indices: Tensor, moves: None = None) -> None:
        """Train every ticket for one step on its own batch: `indices` int64 [R, B] of training images."""
        self.steps(indices[None], [self.optimizer.param_groups[0]["lr"]])

    @torch.no_grad()
    def steps(self, indices: Tensor, rates: Sequence[float]) -> None:
        """Train every ticket for a step on each of `indices` int64 [k, R, B], at each of the learning `rates`."""
        options = [self.optimizer.param_groups[0][name] for name in ("betas", "eps", "weight_decay")]
        lr = torch.tensor(rates, dtype=torch.float32).to(indices.device)
        given = self.images, self.data.train.labels, indices, self.scale, self.shift, self._layers(), self._begun()
        ops.trainer.train(*given, lr, self.loss, *options)
        torch._foreach_add_([state["step"] for state in self.optimizer.state.values()], len(rates))
        self.begun += len(rates)

    def _layers(self) -> list[ops.trainer.Layer]:
        return [(*self._moved(layer.values), *self._moved(layer.bias), layer.pattern) for layer in self.layers]

    def _moved(self, parameter):
        state = self.optimizer.state[parameter]
        return parameter, state["exp_avg"], state["exp_avg_sq"]

    def _begun(self) -> int:
        """Steps that the moments have seen, read from the device only when the optimizer was given others."""
        counter = self.optimizer.state[self.layers[0].values]["step"]
        if counter is not self.counter:
            self.counter, self.begun = counter, int(counter)
        return self.begun


def fits(models: Sequence[nn.Module], recipe: Recipe) -> bool:
    """Whether the tickets are sparse enough to stay on a multiprocessor each, and equally so."""
    columns = zip(*(perceptron(model).values() for model in models), strict=True)
    masks = [torch.stack([layer.weight_mask for layer in column]) for column in columns]
    return ops.trainer.fits(masks, recipe.batch_size)


def check(model: nn.Module, data: Data, recipe: Recipe) -> None:
    """Refuse what no program trains, however sparse it is.

    Raises:
        ValueError: saying what is needed and what was given.
    """
    images = data.train.images
    relu = perceptron(model) and all(type(m) not in ACTIVATIONS or type(m) is nn.ReLU for m in model.children())
    of_bytes = images.dtype == torch.uint8 and images.shape[1] == 1 and data.scale is not None
    form = f"{str(images.dtype)[6:]} {tuple(images.shape[1:])}"
    wanted = (
        (ops.strategy.launches(images), "a CUDA device", recipe.device),
        (recipe.precision == "fp32", "precision 'fp32'", recipe.precision),
        (recipe.optimizer == "adam", "optimizer 'adam'", recipe.optimizer),
        (recipe.augmentation == "none", "augmentation 'none'", recipe.augmentation),
        (relu, "Linear layers with ReLU between them", f"{recipe.model} with {recipe.activation}"),
        (of_bytes, "images of one channel that are scaled bytes", f"{form} of {data.name}"),
        (recipe.batch_size <= ops.trainer.BATCH, f"batch_size up to {ops.trainer.BATCH}", recipe.batch_size),
    )
    for holds, needed, given in wanted:
        if not holds:
            raise ValueError(f"strategy 'trainer' needs {needed}, got {given}")
