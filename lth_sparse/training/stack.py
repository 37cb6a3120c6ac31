"""Multilayer perceptrons of the same shapes, trained together: R tickets along the first dimension, no autograd.

Each has its own masks, values and batches, and gets the same numbers as alone but for the order of additions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..data import Data, Split
from ..dispatch import MASKED, Layer, choose
from ..hooks import attach_shadow
from ..nn import MaskedLinear
from ..recipe import Recipe
from .optimizer import make_optimizer

_LINEAR = {**ops.STRATEGIES["linear"], "masked": ops.Masked()}
_LINEAR["trainer"] = _LINEAR["csr"]  # which reads the same lists


class Activation(NamedTuple):
    """An activation in place, and the gradient by its input from that by its output and the output."""

    function: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


ACTIVATIONS = {
    nn.Sigmoid: Activation(torch.sigmoid_, torch.ops.aten.sigmoid_backward),
    nn.Tanh: Activation(torch.tanh_, torch.ops.aten.tanh_backward),
    nn.ReLU: None,  # strategies have it in their products
}


def perceptron(model: nn.Module) -> dict[str, MaskedLinear] | None:
    """The layers of a model that is Linear layers with an activation between each two, by name; else None."""
    named = [(name, m) for name, m in model.named_children() if not isinstance(m, nn.Flatten)]
    layers, between = dict(named[::2]), [module for _, module in named[1::2]]
    fits = isinstance(model, nn.Sequential) and len(layers) == len(between) + 1
    fits = fits and all(type(m) is MaskedLinear and m.bias is not None for m in layers.values())
    return layers if fits and all(type(m) in ACTIVATIONS for m in between) else None


class _Layer(NamedTuple):
    """R Linear layers of one shape; `values` [R, nnz], or [R, N, K] in the strategy "masked"."""

    how: ops.strategy.Strategy
    values: nn.Parameter
    bias: nn.Parameter
    shadow: Tensor | None
    pattern: tuple[Tensor, ...]
    masks: Tensor
    activation: nn.Module | None  # what comes after

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.masks.shape[1],)


class Stack:
    """R perceptrons on their way. `loss` [R] grows by the mean loss of each batch."""

    def __init__(self, models: Sequence[nn.Module], data: Data, recipe: Recipe, strategies: Mapping[str, str]):
        self.models, self.data, self.recipe = models, data, recipe
        self.columns = {name: [perceptron(m)[name] for m in models] for name in perceptron(models[0])}
        self.strategies = {name: strategies.get(name, "masked") for name in self.columns}
        activations = [m for m in models[0].children() if type(m) in ACTIVATIONS]
        self.layers = [
            _stacked(column, _LINEAR[self.strategies[name]], activation)
            for (name, column), activation in zip(self.columns.items(), [*activations, None], strict=True)
        ]
        self.optimizer = make_optimizer([p for layer in self.layers for p in (layer.values, layer.bias)], recipe)
        self.loss = torch.zeros(len(models), device=recipe.device)
        self.dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32

    @torch.no_grad()
    def step(self, indices: Tensor, moves: None = None) -> None:
        """Train every ticket for one step on its own batch: `indices` int64 [R, B] of training images."""
        inputs, logits = self._forward(self._images(self.data.train, indices))
        dy = ops.cross_entropy(logits, self.data.train.labels, indices, self.loss)
        for depth in reversed(range(len(self.layers))):
            layer, x = self.layers[depth], inputs[depth]
            dy = layer.how.arranged(dy)
            if layer.values.is_cuda:  # the next gradients take this memory: the optimizer's table of addresses holds
                layer.values.grad = layer.bias.grad = None
            gradient, layer.bias.grad = layer.how.weight_gradient(dy, x, layer.values, layer.pattern, layer.sizes)
            layer.values.grad = gradient.view_as(layer.values)
            if depth:
                dy = self._through(depth, dy, x)
        if not self.optimizer.again():
            self.optimizer.step()

    @torch.no_grad()
    def evaluate(self, split: Split) -> Tensor:
        """Mean cross-entropy and accuracy of each ticket over `split`: float64 [R, 2], on the CPU."""
        # LeNet, 15,000 images, one core: 100 ms in batches of 1,000, 145 in one (torch 2.15); a GPU wants them large
        size = 1000 if self.recipe.device == "cpu" else 10_000
        sums = torch.zeros(len(self.models), 2, dtype=torch.float64, device=self.loss.device)
        every = torch.arange(len(split.labels), device=self.loss.device)
        for indices in every.split(size):
            images = self._images(split, indices[None]).expand(len(self.models), -1, -1)
            ops.tally(self._forward(images)[1], split.labels[indices], sums)
        return sums.cpu() / len(split.labels)

    def tensors(self) -> dict[str, Tensor]:
        """What training moves: values and biases of all tickets, [R, ...]."""
        named = zip(self.columns, self.layers, strict=True)
        return {f"{name}.{what}": getattr(layer, what).data for name, layer in named for what in ("values", "bias")}

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values that `tensors` of an equal stack gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        for layer in self.layers:
            if layer.shadow is not None:
                ops.refresh_(layer.shadow, layer.values.detach(), layer.pattern)

    def dense(self, tensors: Mapping[str, Tensor], ticket: int) -> dict[str, Tensor]:
        """What `tensors` hold of one ticket, in the names and shapes of its model."""
        found = {}
        for name, layer in zip(self.columns, self.layers, strict=True):
            values, mask = tensors[f"{name}.values"][ticket], layer.masks[ticket]
            packed = values.new_zeros(mask.shape).masked_scatter_(mask, values) if values.dim() == 1 else values.clone()
            found |= {f"{name}.weight": packed, f"{name}.bias": tensors[f"{name}.bias"][ticket].clone()}
        return found

    def finish(self) -> None:
        """Nothing is left behind: the models were never touched."""

    def _images(self, split, indices):
        images = split.images.flatten(2)
        return ops.gather(images, indices, self.data.scale, self.data.shift, self.dtype)

    def _forward(self, x) -> tuple[list[Tensor], Tensor]:
        """The input of each layer, and the logits."""
        inputs = []
        for layer in self.layers:
            inputs.append(layer.how.arranged(x))
            given = inputs[-1], layer.values, layer.bias, layer.shadow, layer.pattern, layer.sizes
            fused = isinstance(layer.activation, nn.ReLU)
            x = layer.how.activated(*given) if fused else layer.how.forward(*given)
            activation = ACTIVATIONS.get(type(layer.activation))
            x = activation.function(x) if activation else x
        return inputs, x

    def _through(self, depth, dy, x):
        """Back through a layer and the activation before it."""
        layer, activation = self.layers[depth], ACTIVATIONS[type(self.layers[depth - 1].activation)]
        given = dy, layer.values, layer.shadow, layer.pattern, layer.sizes, x.shape
        if activation is None:
            return layer.how.gated(*given, x)
        return activation.gradient(layer.how.input_gradient(*given), x)


def strategies(models: Sequence[nn.Module], recipe: Recipe) -> dict[str, str]:
    """How to compute each layer of perceptrons of the same shapes: as measured, or as `recipe.strategy` says.

    Tickets that keep different numbers of weights are computed masked.
    """
    columns = {name: torch.stack([perceptron(m)[name].weight_mask for m in models]) for name in perceptron(models[0])}
    chosen = {}
    for depth, (name, masks) in enumerate(columns.items()):
        kept = masks.flatten(1).sum(1)
        shape = recipe.batch_size, masks.shape[2]
        layer = Layer("linear", masks[:1], (masks.shape[1],), torch.float32, shape, depth > 0)
        packs = bool((kept == kept[0]).all())
        choice = choose(layer, True, recipe.strategy).strategy if packs else "masked"
        alone = choice == "shrink" and len(models) > 1
        chosen[name] = "masked" if choice in MASKED or alone else choice
    return chosen


def _stacked(column: list[MaskedLinear], how, activation) -> _Layer:
    masks = torch.stack([layer.weight_mask for layer in column])
    weights = torch.stack([layer.weight.detach() for layer in column])
    bias = nn.Parameter(torch.stack([layer.bias.detach() for layer in column]))
    if isinstance(how, ops.Masked):
        return _Layer(how, nn.Parameter(weights), bias, None, how.structures(masks, ()), masks, activation)
    pattern, live = how.structures(masks, (masks.shape[1],)), how.live(masks)
    values = nn.Parameter(weights[masks].view(len(column), -1))
    shadow = None if live is None else weights.new_zeros(live.shape).masked_scatter_(live, values.detach())
    if shadow is not None:
        attach_shadow(values, shadow, pattern)
    return _Layer(how, values, bias, shadow, pattern, masks, activation)
