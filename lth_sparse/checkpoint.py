"""Tickets as files: nnz-long values and bit-packed masks in safetensors.

Layout, readable with safetensors alone. Each masked weight NAME (its `state_dict` key, as in "fc1.weight") has
`NAME.values` [nnz], its kept values in row-major order, and `NAME.bits` uint8 [ceil(numel / 8)], its mask in
row-major order with the first weight in the lowest bit. Everything else (biases, normalisation) is stored dense
under its own key; so are the values of pruned weights that are frozen, under `NAME_frozen`, zero on the mask. The
metadata entry `lth_sparse` is JSON with `format`, `shapes` from NAME to the weight's shape, and the `checksum` of the
file. A file of masks alone has no values and no dense entries.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from . import ops
from .actions import check_same_entries
from .convert import mask_layer_, maskable, weight_names
from .masks import masked_weights
from .nn import MASKED_CLASSES, MaskedLayer

FORMAT = "lth-ticket-1"
UNSEALED = "sha256:" + 64 * "0"  # what a file's content holds as its "checksum" until it is written
_SEAL = re.compile(rb"checksum\W{3,6}sha256:([0-9a-f]{64})")
_TIMES = re.compile(rb'"(?:seconds|joules)": (?:\{[^}]*\}|[^,}]*)')


def save(model: nn.Module, path: str | os.PathLike, values: bool = True) -> None:
    """Write the masked `model` to `path` as a ticket; a file there is replaced in one piece.

    Args:
        values: False writes the masks alone, 1 bit per weight.

    Raises:
        ValueError: the model has no masked layer.
        OSError: the file cannot be written; what was there before stays.
    """
    masked_weights(model)
    state, masks = _state(model), _masks(model)
    tensors = {name + ".bits": ops.pack_bits(mask) for name, mask in masks.items()}
    if values:
        tensors |= {name + ".values": state[name][mask] for name, mask in masks.items()}
        tensors |= {name: tensor for name, tensor in state.items() if name not in masks}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    write_tensors(path, tensors, {"format": FORMAT, "shapes": shapes})


def load_(model: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Give `model` the masks and values of the ticket at `path`; plain layers it names become masked. Returns it.

    A file of masks alone leaves the values as they are that it keeps, and those frozen that it does not. Layers that
    the ticket does not name keep everything.

    Raises:
        ValueError: not a ticket, a damaged file, or a ticket of another model; the model is then unchanged.
        FileNotFoundError: there is no such file.
    """
    state, masks = read_ticket(path)
    current = _state(model)
    frozen = {name + "_frozen" for name in masks | _masks(model)}
    wanted = current if state else {name: current[name] for name in masks if name in current}
    check_same_entries(str(path), _without(frozen, state or masks), _without(frozen, wanted))
    for layer in _layers_of(model, masks, frozen & set(state), path):
        mask_layer_(layer)
    masks |= {name: torch.ones_like(mask) for name, mask in _masks(model).items() if name not in masks}
    given = {name + "_mask": mask for name, mask in masks.items()}
    given |= {} if state else {name: current[name] for name in frozen & set(current)}
    model.load_state_dict((state or wanted) | given, strict=bool(state))
    return model


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: dict) -> None:
    """Write a safetensors file by rename, with its checksum; equal content gives equal bytes."""
    # clone: safetensors refuses tensors that share memory, as tied weights do
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    # one entry: safetensors writes several in an order that differs from call to call
    entry = json.dumps({"checksum": UNSEALED, **metadata})
    write_bytes(path, safetensors.torch.save(tensors, metadata={"lth_sparse": entry}))


def checksum(content: bytes) -> str:
    """The sha256 of what a file holds, in 64 digits, `UNSEALED` standing for the checksum in it.

    What clocks and meters say in a JSON file does not count: runs that come to the same bits have equal checksums.
    """
    return hashlib.sha256(_TIMES.sub(b"", content)).hexdigest()


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file by rename: `path` holds the old content or the new, never a part, even after a power cut.

    The first `UNSEALED` in the content becomes its checksum.
    """
    blank, part = UNSEALED.encode(), Path(f"{path}.part")
    if blank in content:
        content = content.replace(blank, b"sha256:" + checksum(content).encode(), 1)
    try:
        part.unlink(missing_ok=True)
        with part.open("xb") as file:  # never through a link that somebody put there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not name the file
    finally:
        part.unlink(missing_ok=True)


def read_bytes(path: str | os.PathLike) -> bytes:
    """What a file holds; one without a checksum, as older versions and other tools write, is taken as it is.

    Raises:
        ValueError: the file is not what was written.
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    content = Path(path).read_bytes()
    seal = _SEAL.search(content)
    if seal:
        unsealed = content.replace(b"sha256:" + seal[1], UNSEALED.encode(), 1)
        whole = checksum(unsealed) == seal[1].decode()
    else:  # half a seal is none that was never there
        whole = b"checksum" not in content and b"sha256:" not in content
    if not whole:
        raise ValueError(f"{path} is damaged: it does not have the checksum that it was written with")
    return content


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """All tensors and the metadata that `write_tensors` wrote.

    Raises:
        ValueError: the file is damaged or not one of ours.
        FileNotFoundError: there is no such file.
    """
    content = read_bytes(path)
    try:
        # from bytes: safe_open hands storages to torch.asarray, which makes a TypeError of an interrupt
        tensors = safetensors.torch.load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = dict(json.loads((header.get("__metadata__") or {}).get("lth_sparse", "{}")))
    except (SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file of ours: {error}") from error
    metadata.pop("checksum", None)
    return tensors, metadata


def read_ticket(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Dense state (empty if the file holds masks alone) and bool masks of a ticket, both by `state_dict` key.

    Raises:
        ValueError: not a ticket, or a damaged one.
        FileNotFoundError: there is no such file.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a ticket: its format is {metadata.get('format')!r}, wanted {FORMAT!r}")
    masks = {}
    try:
        for name, shape in metadata["shapes"].items():
            masks[name] = ops.unpack_bits(tensors.pop(name + ".bits"), tuple(shape))
            if name + ".values" in tensors:
                tensors[name] = _scatter(name, masks[name], tensors.pop(name + ".values"))
            if tensors.get(name + "_frozen", masks[name]).shape != masks[name].shape:
                raise ValueError(f"{name} has frozen values of another shape")
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{path} is a damaged ticket: {error}") from error
    return tensors, masks


def _scatter(name, mask, values):
    kept = int(mask.count_nonzero())
    if values.shape != (kept,):
        raise ValueError(f"{name} has values of shape {tuple(values.shape)} for {kept} kept weights")
    return torch.zeros(mask.shape, dtype=values.dtype).masked_scatter_(mask, values)


def _without(names, state):
    return {name: tensor for name, tensor in state.items() if name not in names}


def _layers_of(model, masks, frozen, path):
    """The layers that the masks are for; ValueError if one of them cannot be masked, or its weights not frozen."""
    layers = maskable(model, {name.rpartition(".")[0] for name in masks})
    for name in masks:
        layer_name, _, weight = name.rpartition(".")
        layer = model.get_submodule(layer_name)
        if layer not in layers or weight not in weight_names(layer):
            raise ValueError(f"{path} has a mask for {name!r}, which cannot be masked in a {type(layer).__name__} here")
        if name + "_frozen" in frozen and not MASKED_CLASSES.get(type(layer), layer).freezes:
            raise ValueError(f"{path} has frozen weights for {name!r}, but attention cannot have any")
    return layers


def _state(model):
    """`state_dict()` without masks."""
    masks = {name + "_mask" for name in _masks(model)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in masks}


def _masks(model) -> dict[str, Tensor]:
    """`state_dict` key of each masked weight -> its mask, tied weights under each of their keys."""
    return {
        f"{prefix}.{name}" if prefix else name: getattr(layer, name + "_mask")
        for prefix, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, MaskedLayer)
        for name in layer.masked_names()
    }
