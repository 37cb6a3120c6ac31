"""The networks of the lottery ticket paper (Frankle and Carbin, 2019, arXiv:1803.03635v5, Figure 2)."""

from collections import Counter, OrderedDict

import torch
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}
_GROUPS = {  # (3x3 convolutions, channels) of each group; a 2x2 max-pooling follows every group
    "lenet-300-100": [],
    "conv-2": [(2, 64)],
    "conv-4": [(2, 64), (2, 128)],
    "conv-6": [(2, 64), (2, 128), (2, 256)],
}
_VGG_GROUPS = [(2, 64), (2, 128), (4, 256), (4, 512), (4, 512)]
_RESNET_BLOCKS = [16] * 3 + [32] * 3 + [64] * 3  # channels of each residual block
_DEEP = ("resnet-18", "vgg-19")
NAMES = (*_GROUPS, *_DEEP)


class Network(nn.Sequential):
    """Named layers in sequence, with the paper's initialisation; the last Linear is called `output`.

    `kept_whole` names the layers that the paper never prunes in this network.
    """

    kept_whole: tuple[str, ...] = ()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every weight anew: Glorot normal (paper, section 2); biases 0, batch norm as torch makes it.

        `generator` is torch's global one for the CPU unless given. Values are drawn on its device and copied,
        so that a seed stands for the same network wherever the network lives.
        """
        device = generator.device if generator else "cpu"
        for layer in self.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()
            elif isinstance(layer, (nn.Conv2d, nn.Linear)):
                drawn = torch.empty(layer.weight.shape, device=device)
                layer.weight.copy_(nn.init.xavier_normal_(drawn, generator=generator))
                if layer.bias is not None:
                    layer.bias.zero_()


class Dropout(nn.Module):
    """Dropout from a random stream of its own, so that a seed stands for the same units in every thread.

    Whoever trains sets `seed` before each step; None, as in eval mode, drops nothing.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate, self.seed = rate, None

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.seed is None:
            return input
        generator = torch.Generator(input.device).manual_seed(self.seed)
        kept = torch.rand(input.shape, generator=generator, device=input.device) >= self.rate
        return input * kept / (1 - self.rate)


class Block(nn.Module):
    """Residual block: two 3x3 convolutions; where it widens, stride 2 and a 1x1 convolution as `shortcut`."""

    def __init__(self, inputs: int, channels: int):
        super().__init__()
        stride = 1 if inputs == channels else 2
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride == 2:
            conv = nn.Conv2d(inputs, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(channels)))

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.relu1(self.bn1(self.conv1(input)))
        return self.relu2(self.bn2(self.conv2(hidden)) + self.shortcut(input))


def build(
    name: str,
    input_shape: tuple[int, int, int] = (1, 28, 28),
    classes: int = 10,
    activation: str = "relu",
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> Network:
    """Make one of `NAMES` on the CPU, float32, initialised by `Network.reset_parameters(generator)`.

    Its input is float [batch, *input_shape], its output the logits [batch, classes]. resnet-18 is the paper's
    20-layer network for CIFAR-10, not ImageNet's.

    Args:
        input_shape: channels, height, width.
        activation: of the hidden layers: "relu", or "sigmoid" or "tanh" for lenet-300-100 and conv-2, -4, -6.
        dropout: rate before each Linear but the first, for conv-2, -4, -6 (paper, section 3: 0.5).
        generator: draws the initial weights; torch's global one unless given.

    Raises:
        ValueError: an unknown name or activation, or an input or a number of classes that no network takes.
    """
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(NAMES)}")
    _check_activation(name, activation)
    if not 0 <= dropout < 1 or (dropout and not _GROUPS.get(name)):
        raise ValueError(f"dropout must be 0, or below 1 for conv-2, -4 and -6, got {dropout} for {name}")
    _check_input(name, input_shape)
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"classes must be a positive integer, got {classes!r}")
    with torch.device("meta"):  # or torch would draw initial values of its own, from the global generator
        network = Network(_numbered(_layers(name, input_shape, classes, activation, dropout)))
    if name in _DEEP:
        shortcuts = [layer for layer, _ in network.named_modules() if layer.endswith("shortcut.conv")]
        network.kept_whole = (*shortcuts, "output")
    network.to_empty(device="cpu").reset_parameters(generator)
    return network


def pruning_rates(model: nn.Module, fc: float = 0.2, conv: float = 0.1) -> dict[str, float]:
    """Rate per round of each convolution and Linear, by layer name (paper, section 2 and Figure 2).

    Convolutions go at `conv`, Linears at `fc`, the last Linear at half of that; what `model.kept_whole` names
    (the 1x1 shortcuts and the output of resnet-18 and vgg-19, section 4) at 0. The paper's `conv` is 0.1 for
    conv-2 and conv-4, 0.15 for conv-6, and 0.2, over all layers together, for resnet-18 and vgg-19.

    Raises:
        ValueError: a rate outside [0, 1).
    """
    for kind, rate in {"fc": fc, "conv": conv}.items():
        if not 0 <= rate < 1:
            raise ValueError(f"the {kind} pruning rate must lie in [0, 1), got {rate}")
    convolutions = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    linears = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    rates = dict.fromkeys(convolutions, conv) | dict.fromkeys(linears, fc)
    rates |= dict.fromkeys(linears[-1:], fc / 2)
    return rates | dict.fromkeys(getattr(model, "kept_whole", ()), 0.0)


def _check_activation(name, activation):
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose from {', '.join(ACTIVATIONS)}")
    if name in _DEEP and activation != "relu":
        raise ValueError(f"{name} takes the activation 'relu' only, got {activation!r}")


def _check_input(name, shape):
    is_shape = isinstance(shape, (tuple, list)) and len(shape) == 3
    if not is_shape or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"input_shape must be 3 positive integers (channels, height, width), got {shape!r}")
    poolings = {"vgg-19": len(_VGG_GROUPS) - 1, "resnet-18": 0}.get(name, len(_GROUPS.get(name, [])))
    smallest = 2**poolings
    if min(shape[1:]) < smallest:
        raise ValueError(f"{name} takes images of {smallest}x{smallest} or more, got {shape[1]}x{shape[2]}")


def _numbered(layers) -> OrderedDict[str, nn.Module]:
    """(kind, layer) pairs by name: conv1, relu1, conv2, ...; what a network has once has no number."""
    named, seen = OrderedDict(), Counter()
    for kind, layer in layers:
        seen[kind] += 1
        once = kind in ("flatten", "avgpool", "output")
        named[kind if once else f"{kind}{seen[kind]}"] = layer
    return named


def _layers(name, shape, classes, activation, dropout) -> list[tuple[str, nn.Module]]:
    if name == "resnet-18":
        return _resnet(shape[0]) + _head(64, (), classes, activation, 0)
    if name == "vgg-19":
        features = _features(_VGG_GROUPS, shape[0], activation, batch_norm=True)
        # the last group is pooled over the whole image instead
        return [*features[:-1], ("avgpool", nn.AdaptiveAvgPool2d(1))] + _head(512, (), classes, activation, 0)
    groups = _GROUPS[name]
    channels = groups[-1][1] if groups else shape[0]
    inputs = channels * (shape[1] >> len(groups)) * (shape[2] >> len(groups))
    widths = (256, 256) if groups else (300, 100)
    return _features(groups, shape[0], activation) + _head(inputs, widths, classes, activation, dropout)


def _features(groups, inputs, activation, batch_norm=False):
    layers = []
    for depth, channels in groups:
        for _ in range(depth):
            # batch norm would subtract the bias again
            layers.append(("conv", nn.Conv2d(inputs, channels, 3, padding=1, bias=not batch_norm)))
            layers += [("bn", nn.BatchNorm2d(channels))] if batch_norm else []
            layers.append((activation, ACTIVATIONS[activation]()))
            inputs = channels
        layers.append(("pool", nn.MaxPool2d(2)))
    return layers


def _resnet(channels):
    stem = [("conv", nn.Conv2d(channels, 16, 3, padding=1, bias=False)), ("bn", nn.BatchNorm2d(16))]
    widths = zip([16, *_RESNET_BLOCKS[:-1]], _RESNET_BLOCKS, strict=True)
    blocks = [("block", Block(inputs, outputs)) for inputs, outputs in widths]
    return [*stem, ("relu", nn.ReLU()), *blocks, ("avgpool", nn.AdaptiveAvgPool2d(1))]


def _head(inputs, widths, classes, activation, dropout):
    layers = [("flatten", nn.Flatten())]
    for width in widths:
        layers += [("fc", nn.Linear(inputs, width)), (activation, ACTIVATIONS[activation]())]
        layers += [("dropout", Dropout(dropout))] if dropout else []
        inputs = width
    return [*layers, ("output", nn.Linear(inputs, classes))]
