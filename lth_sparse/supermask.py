"""Supermasks: masks under which a network whose weights were never trained classifies well.

Zhou, Lan, Liu, Yosinski 2019, "Deconstructing Lottery Tickets" (arXiv:1905.01067), section 5.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from . import actions
from .data import Data
from .masks import get_masks, masked_weights, set_masks_
from .packed import refuse_packed
from .training.order import Order

Tensors = Mapping[str, Tensor]


class Supermask(NamedTuple):
    """What `learn` found; the mappings go from the names of `masks.get_masks` to tensors shaped like the weights.

    `probabilities` (float32): how likely each weight is kept; `masks` (bool): those above 0.5, for `masks.set_masks_`.
    `history` has one dict per evaluation: iteration; train_loss, the mean since the last one; density, the mean
    probability; validation_loss, validation_accuracy, test_loss, test_accuracy (fractions), means over sampled masks;
    and the same four of `masks`, their names beginning with `thresholded_`.
    """

    masks: dict[str, Tensor]
    probabilities: dict[str, Tensor]
    history: list[dict]


def untrained_accuracy(
    model: nn.Module,
    start: Tensors,
    masks: Tensors,
    data: Data,
    action: str = "rewind",
    rescale: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Accuracies (fractions) of a masked model under `masks`, nothing trained: {"validation": a, "test": b}.

    Args:
        model: left as it is.
        start: a snapshot of its initial values.
        masks: as `masks.get_masks` returns them.
        action: what kept weights become, of `actions.KEPT`; the paper's are "rewind" and "constant-sign".
        rescale: multiply each layer's weights by their number over that of kept ones (dynamic weight rescaling), which
            changes nothing in a ReLU network whose biases are zero: its logits grow by one factor.
        seed: of an action that draws.

    Raises:
        ValueError: no masked layer, a packed one, an unknown action, a snapshot of another model.
    """
    if action not in actions.KEPT:
        raise ValueError(f"unknown action {action!r}: choose from {', '.join(actions.KEPT)}")
    network = _own_copy(model, data, "untrained_accuracy")
    set_masks_(network, masks)
    actions.KEPT[action](network, start, torch.Generator().manual_seed(seed))
    found = _evaluate(network, get_masks(network), data, rescale)
    return {split: found[f"{split}_accuracy"] for split in ("validation", "test")}


def learn(
    model: nn.Module,
    data: Data,
    iterations: int,
    batch_size: int = 250,
    lr: float = 100.0,
    momentum: float = 0.9,
    rescale: bool = False,
    evaluate_every: int = 1000,
    samples: int = 10,
    seed: int = 0,
    on_metrics: Callable[[dict], None] = lambda row: None,
) -> Supermask:
    """Learn which weights of a masked model to keep at the values they have: initial ones, or signed constants.

    Each weight has a score, 0 at first, and is kept with probability sigmoid(score), drawn anew in every step; the
    gradient passes the draw as if it were the probability. SGD trains the scores, nothing else. What `model` has
    pruned stays pruned. `model` is left as it is; everything is computed where `data` lies.

    Args:
        iterations: the authors take 440,000 for LeNet on MNIST (2,000 epochs).
        batch_size, lr, momentum: the authors' values. LeNet, rescaled, after 2,000 iterations on MNIST: 96.3% at this
            rate, 92.8 at a tenth of it, 95.8 at ten times as much; not rescaled, the larger is the faster.
        rescale: multiply each layer's weights by their number over that of kept ones (dynamic weight rescaling). The
            gradient goes through the number of kept ones too: 95.6 instead of 96.3% where it does not.
        evaluate_every: iterations; the last is evaluated in any case.
        samples: masks drawn for each evaluation.
        seed: the order of the data and all draws follow from it.
        on_metrics: called with each row of the history.

    Raises:
        ValueError: no masked layer, a packed one, iterations, evaluate_every or samples below 1, or a batch_size that
            is not between 1 and the number of training images.
    """
    _check(data, batch_size, iterations=iterations, evaluate_every=evaluate_every, samples=samples)
    network, device = _own_copy(model, data, "supermask.learn"), data.train.labels.device
    # a score of -inf has probability 0 and gradient 0
    scores = {name: torch.where(mask, 0.0, -torch.inf).requires_grad_() for name, mask in get_masks(network).items()}
    optimizer = torch.optim.SGD(scores.values(), lr, momentum)
    # a stream of its own for each purpose: evaluating oftener changes no training
    seeds = torch.randint(2**62, (3,), generator=torch.Generator().manual_seed(seed)).tolist()
    order = Order(len(data.train.labels), batch_size, seeds[0], str(device))
    training, evaluation = (torch.Generator(device).manual_seed(stream) for stream in seeds[1:])
    history, losses = [], []
    for iteration in range(1, iterations + 1):
        indices = order.batches(iteration - 1)[0]
        masks = {name: _straight_through(score.sigmoid(), training) for name, score in scores.items()}
        logits = _forward(network, masks, rescale, data.inputs(data.train.images[indices]))
        loss = F.cross_entropy(logits, data.train.labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if iteration % evaluate_every == 0 or iteration == iterations:
            probabilities = {name: score.detach().sigmoid() for name, score in scores.items()}
            row = {"iteration": iteration, "train_loss": float(torch.stack(losses).mean())}
            history.append(row | _row(network, probabilities, data, rescale, samples, evaluation))
            on_metrics(history[-1])
            losses.clear()
    return Supermask(_likely(probabilities), probabilities, history)


def _straight_through(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A Bernoulli draw of that shape, exactly 0 or 1, whose gradient goes to `probabilities` unchanged."""
    return _draw(probabilities, generator) + (probabilities - probabilities.detach())


def _draw(probabilities, generator):
    # torch.bernoulli takes 5.0 ms for LeNet's first layer on one core, this 1.3 (torch 2.15)
    return torch.rand(probabilities.shape, generator=generator, device=probabilities.device) < probabilities


def _likely(probabilities):
    return {name: p > 0.5 for name, p in probabilities.items()}


def _own_copy(model, data, verb):
    """A copy of a masked model, where `data` lies, in train mode, whose values want no gradients."""
    refuse_packed(model, verb)
    return copy.deepcopy(model).to(data.train.labels.device).train().requires_grad_(False)


def _forward(network, masks, rescale, inputs):
    """The logits of `network` with its weights under `masks`, of 0 and 1 or bool, which may want gradients."""
    names, weights = {id(parameter): name for name, parameter in network.named_parameters()}, {}
    for weight in masked_weights(network):
        mask = masks[weight.name]
        # of an emptied layer nothing is left to scale
        scale = mask.numel() / mask.sum().clamp(min=1) if rescale else 1
        weights[names[id(weight.parameter)]] = weight.parameter * mask * scale
    return functional_call(network, weights, inputs)


def _row(network, probabilities, data, rescale, samples, generator):
    """What an evaluation finds: see the history of `Supermask`."""
    likely = _evaluate(network, _likely(probabilities), data, rescale)
    sums = dict.fromkeys(likely, 0.0)
    for _ in range(samples):
        masks = {name: _draw(p, generator) for name, p in probabilities.items()}
        for name, value in _evaluate(network, masks, data, rescale).items():
            sums[name] += value
    density = float(torch.cat([p.flatten() for p in probabilities.values()]).double().mean())
    means = {name: total / samples for name, total in sums.items()}
    return {"density": density} | means | {f"thresholded_{name}": value for name, value in likely.items()}


def _evaluate(network, masks, data, rescale):
    """Mean cross-entropy and accuracy on validation and test, in eval mode; train mode after."""
    network.eval()
    found, forward = {}, partial(_forward, network, masks, rescale)
    for name in ("validation", "test"):
        loss, accuracy = data.evaluate(forward, getattr(data, name))
        found |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
    network.train()
    return found


def _check(data, batch_size, **counts):
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")
    size = len(data.train.labels)
    if not 1 <= batch_size <= size:
        raise ValueError(f"batch_size must lie between 1 and the {size} training images, got {batch_size}")
