"""What each level of the suite measures: layers with their batches, networks, densities and precisions."""

import math
from typing import NamedTuple

import torch
from torch import nn

from lth_sparse import models, ops

NETWORKS = {  # images and batch size, as the paper trains them; resnet50 as is usual on ImageNet
    "lenet-300-100": ((1, 28, 28), 60),
    "conv-2": ((3, 32, 32), 60),
    "conv-4": ((3, 32, 32), 60),
    "conv-6": ((3, 32, 32), 60),
    "resnet-18": ((3, 32, 32), 128),
    "vgg-19": ((3, 32, 32), 64),
    "resnet50": ((3, 224, 224), 64),
}


class Shape(NamedTuple):
    """A layer and the shape of its input, batch first; `arguments` are those of nn.Linear or nn.Conv2d."""

    kind: str
    arguments: tuple
    input: tuple[int, ...]

    def layer(self) -> nn.Module:
        return {"linear": nn.Linear, "conv2d": nn.Conv2d}[self.kind](*self.arguments)

    def __str__(self) -> str:
        inputs, outputs, *rest = self.arguments
        text = f"{inputs} to {outputs}"
        if self.kind == "conv2d":
            (kernel, stride), sides = rest[:2], self.input[2:]
            text += f", {kernel[0]}x{kernel[1]}" + (f" by {stride[0]}" if stride[0] > 1 else "")
            text += f" on {sides[0]}x{sides[1]}"
        return f"{text}, batch {self.input[0]}"


class Level(NamedTuple):
    """How much to measure. Convolutions are all of `convolutions`' networks, or of each the one with the most work."""

    minutes: float  # after them the suite stops, and says what is missing
    seconds: float  # to spend on the timings of one operator at one density; at least 7 of each are taken
    rounds: tuple[int, ...]  # of the pruning ladder, density 0.8 ** round
    precisions: tuple[str, ...] = ("fp32",)  # on CUDA; fp32 elsewhere
    parts: tuple[str, ...] = ("forward", "input gradient", "weight gradient", "optimizer", "step")
    linear: tuple[tuple[int, int, int], ...] = ()  # in, out, batch
    convolutions: tuple[str, ...] = ()
    every: bool = False
    networks: tuple[str, ...] = ()
    tickets: tuple[int, ...] = ()  # that train together
    widths: tuple[int, ...] = ()  # of a perceptron
    experiment: tuple[int, int] | None = None  # rounds and iterations of the main job, beside its peers

    def densities(self) -> list[float]:
        return [0.8**round for round in self.rounds]

    def linears(self) -> list[Shape]:
        return [Shape("linear", (inputs, outputs), (batch, inputs)) for inputs, outputs, batch in self.linear]

    def convolved(self, name: str) -> list[Shape]:
        """The convolutions to measure of one network of `convolutions`."""
        found = convolutions(name)
        return found if self.every else [max(found, key=work)]


WIDTHS = ((784, 300), (1024, 1024), (2048, 2048), (4096, 4096), (8192, 8192), (16384, 16384))
LEVELS = {
    "smoke": Level(
        minutes=2.5,
        seconds=0.3,
        rounds=(3, 7, 10, 13, 17, 20),
        linear=((784, 300, 60), (1024, 1024, 60), (2048, 2048, 60)),
        convolutions=("resnet-18",),
        networks=("lenet-300-100",),
        tickets=(1, 2, 4),
        widths=(100, 300),
    ),
    "core": Level(
        minutes=8,
        seconds=0.3,
        rounds=(3, 7, 10, 13, 17, 20),
        precisions=("tf32", "bf16", "fp32"),
        linear=(
            *((4096, 4096, batch) for batch in (60, 512, 4096)),
            *((1024, 1024, batch) for batch in (60, 512)),
            *((784, 300, 60), (16384, 16384, 60)),
        ),
        convolutions=("conv-6", "vgg-19", "resnet-18", "resnet50"),
        networks=("lenet-300-100", "conv-6", "vgg-19"),
        tickets=(1, 2, 4, 8, 16, 32, 64),
        widths=(100, 300, 1024, 4096),
        experiment=(2, 200),
    ),
    "full": Level(
        minutes=math.inf,
        seconds=1.0,
        rounds=tuple(range(21)),
        precisions=("tf32", "bf16", "fp32"),
        linear=tuple((*width, batch) for width in WIDTHS for batch in (1, 60, 512, 4096)),
        convolutions=tuple(name for name in NETWORKS if name != "lenet-300-100"),
        every=True,
        networks=models.NAMES,
        tickets=(1, 2, 4, 8, 16, 32, 64),
        widths=(100, 300, 1024, 4096, 8192),
        experiment=(20, 1000),
    ),
}


def network(name: str) -> nn.Module:
    """One of NETWORKS, on the CPU."""
    if name in models.NAMES:
        return models.build(name, NETWORKS[name][0])
    import torchvision

    return getattr(torchvision.models, name)()


def convolutions(name: str) -> list[Shape]:
    """The different convolutions of a network, in its own order, found by running it on tensors without memory."""
    image, batch = NETWORKS[name]
    with torch.device("meta"):
        model = network(name)
    seen: dict[Shape, None] = {}

    def note(layer, inputs):
        window = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
        arguments = (layer.in_channels, layer.out_channels, *window, layer.bias is not None)
        seen[Shape("conv2d", arguments, tuple(inputs[0].shape))] = None

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_pre_hook(note)
    model.to("meta")(torch.empty(batch, *image, device="meta"))
    return list(seen)


def work(shape: Shape) -> int:
    """Multiplications of a dense forward of a convolution."""
    with torch.device("meta"):
        layer = shape.layer()
    outputs = math.prod(ops.output_shape(shape.input, ops.conv_sizes(layer)))
    return outputs * layer.weight[0].numel()
