"""Settings of an experiment: the paper's values by default, checked, and resolved to what decides the bits."""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches

import torch

from . import data, dispatch, models, scores
from .arms import ARMS
from .prune import SCOPES, check_rate

OPTIMIZERS = ("adam", "adamw", "radam", "sgd")
LOSSES = ("cross-entropy", "squared-error")
PRECISIONS = ("fp32", "tf32", "bf16")
AUGMENTATIONS = ("none", "crop-flip")

_ADAM = dict(batch_size=60, optimizer="adam", scope="layer", prune_rate_fc=0.2)
_SGD = dict(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, scope="global", prune_rate_conv=0.2)
# Frankle & Carbin 2019, Figure 2; for the last two also appendix I: weight decay, and where the rate falls.
PAPER = {
    "lenet-300-100": dict(_ADAM, iterations="50000", lr=1.2e-3, prune_rate_conv=0.0),
    "conv-2": dict(_ADAM, iterations="20000", lr=2e-4, prune_rate_conv=0.1),
    "conv-4": dict(_ADAM, iterations="25000", lr=3e-4, prune_rate_conv=0.1),
    "conv-6": dict(_ADAM, iterations="30000", lr=3e-4, prune_rate_conv=0.15),
    "resnet-18": dict(_SGD, iterations="30000", batch_size=128, milestones=("20000", "25000"), prune_rate_fc=0.0),
    "vgg-19": dict(_SGD, iterations="112000", batch_size=64, milestones=("56000", "84000"), prune_rate_fc=0.0),
}
# 8x8 digits: 2,000 iterations of 60 are 96 epochs, and evaluating 540 images is cheap.
_DIGITS = dict(rounds=8, iterations="2000", evaluate_every="50")
_AUGMENTED = ("resnet-18", "vgg-19")  # paper, appendix I
_DEFAULTS = dict(rounds=20, evaluate_every="100", milestones=(), momentum=0.9, weight_decay=0.0)
_RANGES = dict(
    rounds=(0, 99),
    trials=(1, 1000),
    batch_size=(1, 2**20),
    untrained=(0, 1),
    learn_masks=(0, 10**9),
    threads=(0, 1024),
    seed=(0, 2**63 - 1),
)
# LeNet has no convolution, and the only Linear of the deep networks, their output, stays whole.
_RATES = {"lenet-300-100": ("prune_rate_fc",), "resnet-18": ("prune_rate_conv",), "vgg-19": ("prune_rate_conv",)}


def _option(default, text, *aliases, **more):
    return field(default=default, metadata={"help": text, "aliases": aliases, **more})


def _off(default, text, **more):
    """An option that changes nothing at its default, so that what ran before there was one keeps its identity."""
    return _option(default, text, off=True, **more)


@dataclass(frozen=True)
class Recipe:
    """One experiment. None stands for the paper's value for the model; counts of steps may be iterations or "26ep".

    `resolve` turns every field into plain numbers; `identity` then names all that decides the bits of a run.
    """

    model: str = _option("lenet-300-100", "the network", choices=models.NAMES)
    dataset: str = _option("mnist", "the data set", choices=data.NAMES)
    rounds: int | None = _option(None, "how often to prune (20; digits 8)")
    iterations: str | None = _option(None, "training steps per round", "--max-iteration")
    first_iterations: str = _off("", "training steps of round 0, if others")
    trials: int = _option(1, "independent repetitions", "--num-repetitions")
    arms: tuple[str, ...] = _option(("ticket", "reinit", "random"), f"what to train, of {', '.join(ARMS)}")
    tickets_of: str = _off("", "a run whose tickets are trained here: a folder, or another variant of the recipe")
    without: str = _off("", "a run from whose initial network its winning ticket is taken away, to start from the rest")
    scope: str | None = _option(None, "rank weights per layer or over all of them", choices=SCOPES)
    prune_rate_fc: float | None = _option(None, "rate per round of linear layers; the output layer gets half")
    prune_rate_conv: float | None = _option(None, "rate per round of convolutions")
    final_density: float = _off(0.0, "the rates at which each layer that is pruned keeps this part at the end")
    exclude: tuple[str, ...] = _off((), "layers that are kept whole, as output,conv1")
    score: str = _option("magnitude", "which weights stay", choices=tuple(scores.SCORES))
    rewind: str = _option("0", "rewind to this iteration (or 2ep, or a fraction of the training: 0.02)")
    optimizer: str | None = _option(None, "adam, adamw, radam, or sgd with momentum", choices=OPTIMIZERS)
    lr: float | None = _option(None, "learning rate", "--learning-rate")
    loss: str = _off("cross-entropy", "squared-error: a regression of the ten indicators", choices=LOSSES)
    momentum: float | None = _option(None, "momentum of sgd (0.9)")
    weight_decay: float | None = _option(None, "weight decay")
    milestones: tuple[str, ...] | None = _option(None, "when the learning rate falls to a tenth, as 20000,25000")
    warmup: str = _option("0", "steps over which the learning rate rises from 0")
    batch_size: int | None = _option(None, "images per step")
    evaluate_every: str | None = _option(None, "steps between evaluations (100; digits 50)", "--validate-each")
    validation_size: int | None = _option(None, "images held out (5000; digits 180)", "--val-set-size")
    normalization: str = _option("unit", "scaling of the inputs", choices=data.NORMALIZATIONS)
    images: str = _off("original", "grey-28: grey and 28x28, in the shape of MNIST", choices=data.IMAGES)
    activation: str = _option("relu", "of the hidden layers", choices=tuple(models.ACTIVATIONS))
    dropout: float = _off(0.0, "before each linear layer of conv-2, -4 and -6 but the first")
    perturbation: float = _off(0.0, "noise, in deviations of a layer, on its smallest weights after each epoch")
    untrained: int = _off(0, "1: evaluate tickets before their training too")
    learn_masks: int = _off(0, "also learn masks of the untrained network, for so many steps of 250 images")
    precision: str = _option("fp32", "arithmetic of the training", choices=PRECISIONS)
    augmentation: str | None = _option(
        None, "of training images (crop-flip for resnet-18 and vgg-19 on cifar10)", choices=AUGMENTATIONS
    )
    strategy: str = _option(
        "auto", "how layers are computed; auto: as measured", choices=("auto", *dispatch.NAMES, "trainer")
    )
    device: str = _option("auto", "cpu, cuda, or auto: cuda where there is one")
    threads: int = _option(0, "cores per ticket on the CPU; 0 shares them out")
    seed: int = _option(0, "everything random follows from it")

    def __post_init__(self):
        for f in fields(self):
            choices, value = f.metadata.get("choices"), getattr(self, f.name)
            if choices and value is not None and value not in choices:
                raise ValueError(unknown(f.name, value, choices))
        defaults = _DEFAULTS | PAPER[self.model] | (_DIGITS if self.dataset == "digits" else {})
        defaults["augmentation"] = "crop-flip" if self.dataset == "cifar10" and self.model in _AUGMENTED else "none"
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        _check(self)

    def resolve(self, train_size: int) -> "Recipe":
        """The same recipe with steps as iterations, for a training set of that size.

        Raises:
            ValueError: a count of steps that cannot be read or is out of range, a batch larger than the set.
        """
        if self.batch_size > train_size:
            raise ValueError(f"batch_size must be at most the {train_size} training images, got {self.batch_size}")
        epoch = train_size / self.batch_size
        iterations = steps("iterations", self.iterations, epoch)
        if iterations < 1:
            raise ValueError(f"iterations must be 1 or more, got {self.iterations}")
        resolved = {"iterations": iterations}
        if self.first_iterations:
            resolved["first_iterations"] = steps("first_iterations", self.first_iterations, epoch)
        for name, least in {"rewind": 0, "warmup": 0, "evaluate_every": 1}.items():
            resolved[name] = steps(name, getattr(self, name), epoch, iterations)
            if not least <= resolved[name] <= iterations - (name == "rewind"):
                given = getattr(self, name)
                raise ValueError(f"{name} must lie between {least} and the {iterations} iterations, got {given}")
        if resolved["rewind"] >= resolved.get("first_iterations", iterations):
            given = self.first_iterations
            raise ValueError(f"first_iterations must be more than rewind, which is {resolved['rewind']}, got {given}")
        resolved["milestones"] = tuple(steps("milestones", m, epoch, iterations) for m in self.milestones)
        threads = self.threads or max(1, (os.cpu_count() or 1) // (len(self.arms) * self.trials))
        return replace(self, **resolved, threads=threads)

    def settings(self) -> dict:
        """Every field, but options that change nothing."""
        off = {f.name for f in fields(self) if f.metadata.get("off") and getattr(self, f.name) == f.default}
        return {name: value for name, value in asdict(self).items() if name not in off}

    def identity(self) -> str:
        """Eight hexadecimal digits that differ when any setting does."""
        return digest(self.settings())

    @property
    def name(self) -> str:
        return f"{self.model}-{self.dataset}"


def digest(content: object) -> str:
    """Eight hexadecimal digits of what can be written as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def unknown(what: str, given: object, known: Iterable[str]) -> str:
    """A sentence that names the known thing nearest to what was given, or all where none is near."""
    known = list(known)
    near = get_close_matches(str(given), known, n=1)
    return f"unknown {what} {given!r}: " + (f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}")


def parse(settings: Mapping[str, object]) -> Recipe:
    """A recipe from values as a file or a command line gives them (strings are read as the field's type).

    Raises:
        ValueError: an unknown setting, or a value that its field does not take.
    """
    known = {f.name: f for f in fields(Recipe)}
    for name in settings:
        if name not in known:
            raise ValueError(unknown("setting", name, known))
    return Recipe(**{name: _read(known[name], value) for name, value in settings.items() if value is not None})


def steps(name: str, given: str | int | float, epoch: float, whole: int | None = None) -> int:
    """Iterations in `given`: a count ("500"), epochs ("2ep"), or, with `whole`, a fraction of it ("0.02").

    Raises:
        ValueError: `given` is none of these, or negative.
    """
    text = str(given).strip()
    try:
        if text.endswith("ep"):
            count = round(float(text[:-2]) * epoch)
        elif whole is not None and 0 < float(text) < 1:
            count = round(float(text) * whole)
        else:
            count = int(text)
        if count < 0:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError(f"{name} must be iterations (500) or epochs (2ep), got {given!r}") from None
    return count


def _read(f, value):
    kind = str(f.type)
    try:
        if "tuple" in kind:
            parts = value.split(",") if isinstance(value, str) else list(value)
            return tuple(str(part).strip() for part in parts if str(part).strip())
        if "int" in kind:
            if float(value) != int(value):
                raise ValueError
            return int(value)
        return float(value) if "float" in kind else _spelled(str(value), f.metadata.get("choices", ()))
    except (ValueError, TypeError, OverflowError):
        wanted = "a whole number" if "int" in kind else "a number" if "float" in kind else "a list"
        raise ValueError(f"{f.name} must be {wanted}, got {value!r}") from None


def _spelled(value, choices):
    """The choice that `value` means: "fashion_mnist" and "lenet300100" are spellings too."""
    plain = {choice.replace("-", ""): choice for choice in choices}
    return plain.get(value.lower().replace("-", "").replace("_", ""), value)


def _check(recipe: Recipe) -> None:
    for name, (least, most) in _RANGES.items():
        if not least <= getattr(recipe, name) <= most:
            raise ValueError(f"{name} must lie between {least} and {most}, got {getattr(recipe, name)}")
    for name in ("prune_rate_fc", "prune_rate_conv"):
        check_rate(getattr(recipe, name), name, zero=True)
    applied = _RATES.get(recipe.model, ("prune_rate_fc", "prune_rate_conv"))
    if not any(getattr(recipe, name) for name in applied):
        raise ValueError(f"nothing would be pruned: {' and '.join(applied)} must not all be 0")
    for name, least in {"lr": 1e-12, "momentum": 0, "weight_decay": 0}.items():
        if not least <= getattr(recipe, name) < math.inf:
            raise ValueError(f"{name} must be a number of {least} or more, got {getattr(recipe, name)}")
    for name, below in {"dropout": 1, "final_density": 1, "perturbation": math.inf}.items():
        if not 0 <= getattr(recipe, name) < below:
            raise ValueError(f"{name} must be at least 0 and below {below}, got {getattr(recipe, name)}")
    _check_arms(recipe)
    _check_device(recipe)


def _check_arms(recipe):
    for arm in recipe.arms:
        if arm not in ARMS:
            raise ValueError(unknown("entry of arms", arm, ARMS))
        lacking = [other for other in ARMS[arm].masks_of if other not in recipe.arms]
        if lacking:
            raise ValueError(f"the arm {arm!r} takes the masks of the arm {lacking[0]!r}, which arms lacks")
    if not recipe.arms or len(set(recipe.arms)) < len(recipe.arms):
        raise ValueError(f"arms must be one or more, each once, got {','.join(recipe.arms) or 'none'}")
    own = [arm for arm in recipe.arms if arm != "ticket" and not ARMS[arm].masks_of]
    if recipe.tickets_of and own:
        raise ValueError(f"with tickets_of all masks are those of its tickets, but the arm {own[0]!r} makes its own")


def _check_device(recipe):
    has_cuda = torch.cuda.is_available()
    if recipe.device == "auto":
        object.__setattr__(recipe, "device", "cuda" if has_cuda else "cpu")
    if recipe.device not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {recipe.device!r}: choose from auto, cpu, cuda")
    if recipe.device == "cuda" and not has_cuda:
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device here")
    if recipe.precision == "tf32" and recipe.device != "cuda":
        raise ValueError("precision 'tf32' needs a CUDA device: choose fp32 or bf16 on the CPU")
