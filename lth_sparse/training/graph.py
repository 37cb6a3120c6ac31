"""Several steps to a launch: captured in a CUDA graph, or one launch of their own."""

import logging

import torch
from torch import Tensor

STEPS = 25  # a launch; evaluations every 100 iterations then fall between launches
_log = logging.getLogger("lth_sparse")


class Steps:
    """Takes steps of a learner, on CUDA `STEPS` at a time from a captured graph where there are as many.

    The first are taken one by one, which also makes the optimizer's state and compiles the kernels; so are what is left
    over before a multiple, and all of them where capture fails. A learner that has `steps` is given as many as there
    are instead. `captured` is True, or says why not.
    """

    def __init__(self, learner, cuda: bool):
        self.learner, self.graph = learner, None
        self.captured: bool | str = cuda or "there is no CUDA device"
        if cuda and getattr(learner, "draws", False):
            self.captured = "each step draws from a seed of its own, on the host"
        if hasattr(learner, "steps"):
            self.captured = "many steps are one launch"
        self.warm = False

    def take(self, indices: Tensor, moves: Tensor | None, rates: list[float]) -> None:
        """Train for one step on each of `indices` [k, R, B], `moves` [k, R, B, 3] and learning `rates` (k)."""
        if hasattr(self.learner, "steps"):
            self.learner.steps(indices, rates)
        elif self.captured is True and self.warm and len(rates) == STEPS:
            self._replay(indices, moves, rates)
        else:
            self._step_by_step(indices, moves, rates)
            self.warm = True

    def _step_by_step(self, indices, moves, rates):
        for at, rate in enumerate(rates):
            for group in self.learner.optimizer.param_groups:
                group["lr"] = rate
            self.learner.step(indices[at], None if moves is None else moves[at])

    def _replay(self, indices, moves, rates):
        rates = torch.tensor(rates, dtype=torch.float32).to(indices.device)
        if self.graph is None:
            self.given = indices.clone(), None if moves is None else moves.clone(), rates
            try:
                self._capture()
            except RuntimeError as error:
                self.captured, self.graph = f"capture failed: {error}".partition("\n")[0], None
                _log.warning("training without a CUDA graph: %s", self.captured)
                self.take(indices, moves, rates.tolist())
                return
        for static, new in zip(self.given, (indices, moves, rates), strict=True):
            if static is not None:
                static.copy_(new)
        self.graph.replay()

    def _capture(self):
        """Record the steps; nothing is trained by that."""
        indices, moves, rates = self.given
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._step_by_step(indices, moves, rates.unbind())
