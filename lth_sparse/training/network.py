"""One ticket of any model, trained by autograd."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..actions import snapshot
from ..data import Data, Split
from ..masks import sync_
from ..models import Dropout
from ..packing import pack_, unpack_
from ..recipe import Recipe
from .augmentation import augmented
from .optimizer import make_optimizer
from .perturbation import perturb_


class Network:
    """A masked model on its way, in place. `loss` [1] grows by the mean loss of each batch.

    Dropout and noise of step `iteration` follow from it and from `seed`; `draws` says whether there are any.
    """

    seed = iteration = 0

    def __init__(self, models: Sequence[nn.Module], data: Data, recipe: Recipe, strategies: Mapping[str, str]):
        (model,) = models
        self.model, self.data, self.recipe, self.strategies = model, data, recipe, dict(strategies)
        if set(self.strategies.values()) - {"masked"}:  # else there is nothing to pack, and frozen weights refuse it
            pack_(model, strategies=strategies)
        self.optimizer = make_optimizer(model.parameters(), recipe)
        self.loss = torch.zeros(1, device=recipe.device)
        self.dropouts = [module for module in model.modules() if isinstance(module, Dropout)]
        self.draws = bool(self.dropouts or recipe.perturbation)
        model.train()

    def step(self, indices: Tensor, moves: Tensor | None = None) -> None:
        """Train for one step on a batch: `indices` int64 [1, B] of training images; `moves`: see `augmented`."""
        self._draw()
        images = self._images(self.data.train, indices[0])
        images = images if moves is None else augmented(images, moves[0])
        with _precision(self.recipe):
            loss = self._loss(self.model(images), self.data.train.labels[indices[0]], "mean")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss += loss.detach()
        self.iteration += 1

    @torch.no_grad()
    def evaluate(self, split: Split) -> Tensor:
        """Mean loss and accuracy over `split`, in eval mode: float64 [1, 2], on the CPU; train mode after."""
        self.model.eval()
        # on the CPU batches of 50 to 1,000 take equally long (conv-2, conv-6; torch 2.15); a GPU wants them large
        size = 1000 if self.recipe.device == "cpu" else 5000
        sums = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
        for indices in torch.arange(len(split.labels), device=split.labels.device).split(size):
            with _precision(self.recipe):
                logits = self.model(self._images(split, indices)).float()
            labels = split.labels[indices]
            correct = (logits.argmax(1) == labels).sum()
            sums += torch.stack([self._loss(logits, labels, "sum"), correct]).double()
        self.model.train()
        return sums[None].cpu() / len(split.labels)

    def tensors(self) -> dict[str, Tensor]:
        """What training moves: parameters and buffers but masks and frozen weights, [1, ...]."""
        named = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {name: tensor.detach()[None] for name, tensor in named if not name.endswith(("_mask", "_frozen"))}

    @torch.no_grad()
    def load_(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the values that `tensors` of an equal network gave."""
        for name, tensor in self.tensors().items():
            tensor.copy_(tensors[name])
        sync_(self.model)

    def dense(self, tensors: Mapping[str, Tensor], ticket: int) -> dict[str, Tensor]:
        """What `tensors` hold, in the names and shapes of the masked model."""
        now = {name: tensor.clone() for name, tensor in self.tensors().items()}
        self.load_(tensors)
        found = snapshot(self.model)
        self.load_(now)
        return found

    def finish(self) -> None:
        """Leave the model masked; captured graphs of it are dead."""
        unpack_(sync_(self.model))

    def _images(self, split, indices):
        return self.data.inputs(split.images.index_select(0, indices))

    def _loss(self, logits, labels, reduction) -> Tensor:
        """Cross-entropy, or the squared distance to the indicators of the classes; "mean" or "sum" over images."""
        if self.recipe.loss == "cross-entropy":
            return F.cross_entropy(logits, labels, reduction=reduction)
        each = (logits - F.one_hot(labels, logits.shape[1])).square().sum(1)
        return each.mean() if reduction == "mean" else each.sum()

    def _draw(self):
        if not self.draws:
            return
        batch, size = self.recipe.batch_size, len(self.data.train.labels)
        if self.recipe.perturbation and self.iteration * batch // size > (self.iteration - 1) * batch // size >= 0:
            seed = (self.seed + self.iteration) % 2**63
            perturb_(self.model, self.recipe.prune_rate_fc, self.recipe.perturbation, seed)
        for depth, dropout in enumerate(self.dropouts):
            dropout.seed = (self.seed + len(self.dropouts) * self.iteration + depth) % 2**63


def _precision(recipe):
    return torch.autocast(recipe.device, torch.bfloat16) if recipe.precision == "bf16" else nullcontext()
