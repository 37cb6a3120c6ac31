"""What `compiled.py` compiles: every kernel, called by its launcher on tensors without memory."""

import importlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Case(NamedTuple):
    """One kernel as one of its launchers launches it.

    The product of the constants named in `tile` is what a program computes: instructions are counted for each of
    those elements that a thread holds. `wide` names the instruction that must move 16 bytes at a time: LDGSTS or LDG
    of operands, STG of results; the whole opcode where only some must; "" where none must.
    """

    name: str
    launch: Callable[[], object]
    kernel: str
    tile: tuple[str, ...]
    matrix: bool = False
    wide: str = "LDGSTS"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def cases() -> Iterator[Case]:
    """Every kernel, with the operand types, layouts and sizes that its launcher meets."""
    yield from _weight_gradient()
    yield from _refresh()
    yield from _bitmap_linear()
    yield from _dense_linear()
    yield from _step()
    yield from _csr_linear()
    yield from _optimizers()
    yield from _conv_direct()
    yield from _conv_tiles()
    yield from _ticket_trainer()


def _bitmap(tickets, n, k):
    shape = (tickets, n, -(-k // 32))
    return _kernels("pattern").Bitmap(meta(*shape, dtype=torch.int32), meta(*shape, dtype=torch.int32))


def _weight_gradient():
    module, bits, masks = _kernels("weight_gradient"), _bitmap(1, 4096, 4096), meta(1, 4096, 4096, dtype=torch.bool)
    for dtype, precision in _precisions():
        dy, x = meta(1, 60, 4096, dtype=dtype), meta(1, 60, 4096, dtype=dtype)
        launches = {
            "weight_gradient": partial(module.weight_gradient, dy, x, bits, 10**6 + 1, True, precision),
            "masked_weight_gradient": partial(module.masked_weight_gradient, dy, x, masks, True, precision),
        }
        for name, launch in launches.items():
            matrix = (dtype, precision) != (torch.float32, "ieee")
            label = f"{name} {_label(dtype, precision)}"
            yield Case(label, launch, "_weight_gradient_kernel", ("ROWS", "COLUMNS"), matrix)


def _refresh():
    module, bits = _kernels("shadow"), _bitmap(1, 4096, 4096)
    for dtype in (torch.float32, torch.bfloat16):
        shadow, values = meta(1, 4096, 4096, dtype=dtype), meta(1, 10**6 + 1, dtype=dtype)
        yield Case(
            f"refresh {_label(dtype)}",
            lambda shadow=shadow, values=values: module.refresh_(shadow, values, bits),
            "_refresh_kernel",
            ("ROWS", "COLUMNS"),
            wide="STG",
        )


def _bitmap_linear():
    module, bits, values, bias = _kernels("bitmap_linear"), _bitmap(1, 4096, 4096), meta(1, 10**6 + 1), meta(1, 4096)
    wide, tile = "LDG.E.128", ("OUT", "STEP")  # of x; the values that a thread gathers are 4 bytes each
    for dtype, precision in _precisions():
        x, matrix = meta(1, 60, 4096, dtype=dtype), (dtype, precision) != (torch.float32, "ieee")
        launches = {
            "forward": partial(module.forward, x, values, bits, bias, True, precision),
            "input gradient": partial(module.input_gradient, x, values, bits, 4096, precision),
            "gated input gradient": partial(module.input_gradient, *_gated(dtype, precision)),
        }
        for name, launch in launches.items():
            label = f"bitmap_linear {name} {_label(dtype, precision)}"
            yield Case(label, launch, "_bitmap_linear_kernel", tile, matrix, wide)
        if precision == "ieee":
            add_up = f"bitmap_linear add up {_label(dtype)}"
            yield Case(add_up, launches["forward"], "_add_up_kernel", ("BLOCK",), wide=wide)


def _gated(dtype, precision):
    """Operands of the input gradient of LeNet's second layer, of 32 tickets, so that no sum is split."""
    dy, gate = meta(32, 60, 100, dtype=dtype), meta(32, 60, 300, dtype=dtype)
    return dy, meta(32, 3001), _bitmap(32, 100, 300), 300, precision, gate


def _dense_linear():
    module, tile = _kernels("dense_linear"), ("OUT", "BATCH")
    # The first and the second layer of LeNet, and a wide one, evaluated.
    for tickets, batch, n, k in ((1, 60, 300, 784), (64, 60, 100, 300), (4, 1000, 1024, 1024)):
        for dtype, precision in _precisions():
            weight, bias = meta(tickets, n, k, dtype=dtype), meta(tickets, n)
            x, dy = meta(tickets, batch, k, dtype=dtype), meta(tickets, batch, n, dtype=dtype)
            launches = {
                "forward": partial(module.forward, x, weight, bias, True, precision),
                "input gradient": partial(module.input_gradient, dy, weight, x, precision),
            }
            # Tiles of one ticket are smaller than Hopper's instructions for matrices; it has Ampere's, too.
            matrix = (dtype, precision) != (torch.float32, "ieee") and tickets > 1
            wide = "LDGSTS" if dtype == torch.float32 or n == 1024 else ""  # rows of 300 bfloat16 are moved by 8 bytes
            for name, launch in launches.items():
                label = f"dense_linear {name} {_label(dtype, precision)} {tickets}x{n}x{k}"
                yield Case(label, launch, "_dense_linear_kernel", tile, matrix, wide)


def _step():
    """What a step of LeNet is made of beside its products."""
    batches, loss, indices = _kernels("batches"), _kernels("loss"), meta(64, 60, dtype=torch.int64)
    for kind in (torch.uint8, torch.float32):
        images = meta(55_000, 1, 784, dtype=kind)
        for dtype in (torch.float32, torch.bfloat16):
            launch = partial(batches.gather, images, indices, meta(1), meta(1), dtype)
            yield Case(f"gather {str(kind)[6:]} to {_label(dtype)}", launch, "_gather_kernel", ("BLOCK",), wide="STG")
    labels, tile = meta(55_000, dtype=torch.int64), ("ROWS", "CLASSES")
    for classes in (10, 1000):
        step = partial(loss.cross_entropy, meta(64, 60, classes), labels, indices, meta(64))
        yield Case(f"cross_entropy {classes}", step, "_cross_entropy_kernel", tile, wide="")
        evaluation = meta(64, 10_000, classes), labels[:10_000], meta(64, 2, dtype=torch.float64)
        yield Case(f"tally {classes}", partial(loss.tally, *evaluation), "_tally_kernel", tile, wide="")


def _csr_linear():
    module, groups = _kernels("csr_linear"), _kernels("groups").Groups
    for dtype, size, batch in ((torch.float32, 4096, 512), (torch.bfloat16, 4096, 512), (torch.float32, 300, 60)):
        nnz = size * size // 20 + 1
        starts, order, long = (meta(1, n, dtype=torch.int32) for n in (size + 1, nnz, size))
        index = meta(1, nnz, dtype=torch.uint16)
        lists = groups(starts, index, long, starts, index, long, order)
        x, values, bias = meta(1, batch, size, dtype=dtype), meta(1, nnz), meta(1, size)
        launches = {
            "forward": lambda x=x, v=values, b=bias, g=lists: module.forward(x, v, g, b, relu=True),
            "input_gradient": lambda x=x, v=values, g=lists: module.input_gradient(x, v, g),
            "weight_gradient": lambda x=x, g=lists: module.weight_gradient(x, x, g),
        }
        for name, launch in launches.items():
            sampled = name == "weight_gradient"
            kernel = "_weight_gradient_kernel" if sampled else "_multiply_kernel"
            tile = ("ROWS", "BATCH", "BLOCKS" if sampled else "STEPS")
            yield Case(f"csr {name} {_label(dtype)} {size}", launch, kernel, tile, wide="LDG.E.128")


def _optimizers():
    module, tables = _kernels("optimizer"), _kernels("table")
    shadow, kept = meta(4096, 4096), meta(10**6 + 1, dtype=torch.int32)
    tensors = [meta(10**6 + 1) for _ in range(4)]
    rows = tables.table([tables.Update(*tensors, meta(1), shadow, kept)])
    launches = {
        "adam": lambda: module.adam_(rows, meta(1)),
        "adamw": lambda: module.adam_(rows, 1e-3, weight_decay=0.01, decoupled=True),
        "sgd": lambda: module.sgd_(rows, meta(1)),
        "sgd nesterov": lambda: module.sgd_(rows, 0.1, momentum=0.9, nesterov=True),
    }
    for name, launch in launches.items():
        kernel = "_adam_kernel" if name.startswith("adam") else "_sgd_kernel"
        yield Case(name, launch, kernel, ("BLOCK",), wide="LDG.E.128")


def _conv_direct():
    for dtype in (torch.float32, torch.bfloat16):
        for channels, size in ((64, 32), (512, 2)):  # the largest and the smallest shape of a program
            forward, gradient = _conv_direct_launches(channels, size, dtype)
            tile, label = ("TILES", "GROUP", "LANES", "IMAGES"), f"{_label(dtype)} {channels}x{size}x{size}"
            yield Case(f"conv_direct forward {label}", forward, "_direct_kernel", tile, wide="LDG.E.128")
            yield Case(f"conv_direct input gradient {label}", gradient, "_direct_kernel", tile, wide="LDG.E.128")
        yield Case(f"conv_direct copy {_label(dtype)}", forward, "_interleave_kernel", ("BLOCK", "IMAGES"), wide="STG")


def _conv_direct_launches(channels, size, dtype):
    """Launches of both directions for a 3x3 convolution of as many inputs as outputs."""
    module, taps, geometry = _kernels("conv_direct"), _kernels("taps"), _kernels("geometry").geometry(3, padding=1)
    starts, places, order, long = (meta(n, dtype=torch.int32) for n in (channels + 1, 1105, 1105, channels))
    near = taps.Reads(starts, places, meta(1105, dtype=torch.uint16), long)
    lists, values, bias = taps.Taps(geometry, near, taps.Reads(starts, places, order, long)), meta(1105), meta(channels)
    x = meta(60, channels, size, size, dtype=dtype)
    return (
        lambda: module.forward(x, values, lists, bias, geometry, relu=True),
        lambda: module.input_gradient(x, values, lists, geometry, (size, size)),
    )


def _conv_tiles():
    weight_gradient, bitmap = _kernels("conv_weight_gradient"), _kernels("conv_bitmap")
    bits, values, tile = _bitmap(1, 128 * 9, 64), meta(10**6 + 1), ("PIXELS", "CHANNELS")
    for (dtype, precision), stride in itertools.product(_precisions(), (1, 2)):
        window = _kernels("geometry").geometry(3, stride, 1)
        x, dy = (meta(128, c, 32 // by, 32 // by, dtype=dtype) for c, by in ((64, 1), (128, stride)))
        gradients = partial(weight_gradient.weight_gradient, dy, x, bits, 10**6 + 1, window, True, precision)
        forward = partial(bitmap.forward, x, values, bits, meta(128), window, True, precision)
        gradient = partial(bitmap.input_gradient, dy, values, bits, window, tuple(x.shape), precision)
        label, matrix = f"{_label(dtype, precision)} stride {stride}", (dtype, precision) != (torch.float32, "ieee")
        name = f"conv_weight_gradient {label}"
        yield Case(name, gradients, "_weight_gradient_kernel", ("ROWS", "COLUMNS"), matrix)
        # Only copies of 16 bytes bypass the first cache; those of the bitmap and the values are 4 bytes each.
        wide = "LDGSTS.E.BYPASS"
        yield Case(f"conv_bitmap forward {label}", forward, "_forward_kernel", tile, matrix, wide)
        yield Case(f"conv_bitmap input gradient {label}", gradient, "_input_gradient_kernel", tile, matrix, wide)


def _precisions():
    """Operand types and how float32 is multiplied, as every matrix kernel is compiled."""
    return [(torch.bfloat16, "ieee"), *((torch.float32, precision) for precision in ("tf32", "tf32x3", "ieee"))]


def _label(dtype, precision=""):
    return f"{TYPES[dtype]} {precision}".strip()


def _kernels(module):
    return importlib.import_module(f"lth_sparse.kernels.{module}")


def _ticket_trainer(tickets=132, steps=25):
    """LeNet-300-100 with 13,300 weights kept."""
    module, groups = _kernels("ticket_trainer"), _kernels("groups").Groups
    layers = []
    for rows, columns, nnz in ((300, 784, 11_733), (100, 300, 1_467), (10, 100, 100)):
        sizes = rows + 1, columns + 1, nnz, rows, columns
        starts, column_starts, order, long, long_columns = (meta(tickets, n, dtype=torch.int32) for n in sizes)
        index = meta(tickets, nnz, dtype=torch.uint16)
        lists = groups(starts, index, long, column_starts, index, long_columns, order)
        layers.append(module.Layer(*(meta(tickets, n) for n in (nnz, nnz, nnz, rows, rows, rows)), lists))
    images, labels = meta(55_000, 784, dtype=torch.uint8), meta(55_000, dtype=torch.int64)
    indices = meta(steps, tickets, 60, dtype=torch.int64)
    launch = partial(module.train, images, labels, indices, 1 / 255, 0.0, layers, 100, meta(steps), meta(tickets))
    yield Case("ticket_trainer lenet-300-100", launch, "_train_kernel", ("ROWS", "BATCH"), wide="")
