"""Plain to masked and back: what is masked, what is left alone and why, and that every parameter is accounted for."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import lth_sparse as lth
from lth_sparse.dispatch import Choice
from lth_sparse.masks import freeze_, get_masks, masked_weights
from lth_sparse.nn import MaskedLayer


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3)
        self.norm1, self.norm2 = nn.BatchNorm2d(3), nn.GroupNorm(2, 4)

    def forward(self, x):
        return self.norm2(self.conv2(self.norm1(self.conv1(x)))).mean((2, 3))


def network():
    torch.manual_seed(0)
    blocks = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    return nn.ModuleDict({"body": Body(), "blocks": blocks, "head": nn.Linear(4, 2)})


def run(model):
    model.eval()
    return model["head"](model["blocks"](model["body"](torch.ones(2, 1, 6, 6))))


def masked_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


ALL = ("body.conv1", "body.conv2", "blocks.0", "blocks.1", "head")  # in model order


def test_sparsify_swaps_classes_and_nothing_else():
    model = network()
    plain, want = copy.deepcopy(model), run(model)
    parameters = list(model.parameters())
    assert lth.sparsify_(model) is model
    assert masked_names(model) == set(ALL) and lth.density(model) == 1 and torch.equal(run(model), want)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model["head"], nn.Linear) and type(model["head"]).__name__ == "MaskedLinear"
    assert type(model["body"].norm1) is nn.BatchNorm2d
    assert str(model).replace("Masked", "") == str(plain)


def test_sparsify_again_keeps_masks_and_adds_layers():
    model = lth.prune_(lth.sparsify_(network(), targets="head"), 0.5)
    mask = model["head"].weight_mask
    assert masked_names(lth.sparsify_(model, targets=["head"])) == {"head"}
    assert masked_names(lth.sparsify_(model)) == set(ALL)
    assert model["head"].weight_mask is mask and mask.sum() == 4


def test_densify_gives_exact_torch_types_and_the_same_output():
    plain, model = network(), lth.prune_(lth.sparsify_(network()), 0.7)
    want = run(model)
    assert lth.densify_(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()] and str(model) == str(plain)
    assert model.state_dict().keys() == plain.state_dict().keys() and torch.equal(run(model), want)
    run(model).sum().backward()
    assert (model["head"].weight.grad != 0).all() and (model["head"].weight == 0).any()
    with torch.no_grad():
        model["head"].weight.fill_(1)
    run(model)
    assert (model["head"].weight == 1).all()
    with pytest.raises(ValueError, match="no masked layers"):
        lth.density(model)


def test_densify_drops_what_was_written_off_the_mask():
    model = lth.prune_(lth.sparsify_(network()), 0.5)
    mask = model["head"].weight_mask.clone()
    nn.init.ones_(model["head"].weight)
    assert torch.equal(lth.densify_(model)["head"].weight.detach(), mask.float())


def frozen(model):
    """`model` with all that is pruned frozen at 2."""
    return freeze_(model, {name: torch.full(mask.shape, 2.0) for name, mask in get_masks(model).items()})


def test_densify_writes_what_is_frozen_into_the_weights():
    model = frozen(lth.prune_(lth.sparsify_(network()), 0.5))
    want, mask = run(model), model["head"].weight_mask
    lth.densify_(model)
    assert torch.equal(run(model), want) and ((model["head"].weight == 2) == ~mask).all()
    assert model.state_dict().keys() == network().state_dict().keys() and model["head"].weight.requires_grad


def test_frozen_weights_are_not_counted_as_kept_but_noted():
    model = frozen(lth.prune_(lth.sparsify_(network(), targets="head"), 0.25))
    (row,) = [row for row in lth.summary(model) if row.state == "masked"]
    assert (row.kept, row.total, row.note) == (6, 8, "2 pruned weights are frozen") and lth.density(model) == 0.75


@pytest.mark.parametrize(
    "targets, exclude, want",
    [
        ("head", (), {"head"}),
        (["conv1", "body.conv2"], (), {"body.conv1", "body.conv2"}),
        ("conv?", (), {"body.conv1", "body.conv2"}),
        ("blocks.*", "1", {"blocks.0"}),
        ("all", ["head", "b*.conv[2]"], {"body.conv1", "blocks.0", "blocks.1"}),
        (iter(["0", "head"]), iter(["head"]), {"blocks.0"}),
    ],
)
def test_targets_and_exclude(targets, exclude, want):
    assert masked_names(lth.sparsify_(network(), targets, exclude)) == want


@pytest.mark.parametrize(
    "targets, exclude, message",
    [
        (
            "tail",
            (),
            "no layer matches 'tail': the model has 'body.conv1', 'body.conv2', 'blocks.0', 'blocks.1', 'head'",
        ),
        ("all", ["head", "ead"], "no layer matches 'ead': .*"),
        ("norm1", (), "no layer matches 'norm1': .*"),
        ("head", "head", "nothing to mask: .*"),
        ([], (), "nothing to mask: .*"),
    ],
)
def test_targets_that_match_nothing_are_refused_and_change_nothing(targets, exclude, message):
    model = network()
    with pytest.raises(ValueError, match=f"^{message}$"):
        lth.sparsify_(model, targets, exclude)
    assert not masked_names(model)


def test_nothing_to_mask():
    for model in (nn.Sequential(), nn.BatchNorm1d(3), nn.Sequential(nn.Embedding(3, 4))):
        with pytest.raises(ValueError, match="^nothing to mask: "):
            lth.sparsify_(model)


@pytest.mark.parametrize("make", [lambda: nn.Linear(5, 4), lambda: nn.MultiheadAttention(4, 2)])
def test_the_root_itself_may_be_a_layer(make):
    model = lth.prune_(lth.sparsify_(make()), 0.5)
    assert isinstance(model, MaskedLayer) and lth.density(model) == 0.5
    assert [row.name for row in lth.summary(model) if row.state == "masked"]
    plain = make()
    plain.load_state_dict(lth.densify_(model).state_dict())
    assert type(model) is type(plain)


class Mine(nn.Linear):
    pass


def tied_embedding(first):
    pair = [("emb", nn.Embedding(4, 4)), ("head", nn.Linear(4, 4))]
    model = nn.ModuleDict(pair if first else pair[::-1])
    model["head"].weight = model["emb"].weight
    return model


def in_proj_pruned():
    return prune.l1_unstructured(nn.MultiheadAttention(4, 2), "in_proj_weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "make, entry, reason",
    [
        (lambda: Mine(4, 4), "odd.weight", "Mine is a subclass of Linear with a forward of its own"),
        (lambda: nn.LazyLinear(4), "odd.weight", "LazyLinear is lazy: run the model once first"),
        (
            lambda: parametrizations.weight_norm(nn.Linear(4, 4)),
            "odd.parametrizations.weight.original1",
            ".*parametrized",
        ),
        (
            lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
            "odd.parametrizations.weight.original",
            ".*parametrized",
        ),
        (lambda: weight_norm(nn.Linear(4, 4)), "odd.weight_v", "its weight is recomputed in every forward.*"),
        (lambda: prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "odd.weight_orig", ".*recomputed in every.*"),
        (in_proj_pruned, "odd.in_proj_weight_orig", "its weight is recomputed in every forward.*"),
        (in_proj_pruned, "odd.out_proj.weight", "read by odd, which is not a target"),
        (lambda: tied_embedding(True), "odd.emb.weight", "tied with odd.head: Embedding is never pruned"),
        (lambda: tied_embedding(False), "odd.head.weight", "tied with odd.emb: Embedding is never pruned"),
        (lambda: nn.LSTM(4, 4), "odd.weight_ih_l0", "LSTM is never pruned"),
        (lambda: nn.Bilinear(4, 4, 4), "odd.weight", "Bilinear is never pruned"),
        (lambda: nn.BatchNorm1d(4), "odd.weight", "BatchNorm1d is never pruned"),
        (lambda: nn.LayerNorm(4), "odd.bias", "biases are never pruned"),
        (lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True), "odd.bias_k", "biases are never pruned"),
    ],
)
def test_what_cannot_be_masked_is_left_alone_with_its_reason(make, entry, reason):
    model = nn.ModuleDict({"odd": make(), "fc": nn.Linear(4, 4)})
    lth.prune_(lth.sparsify_(model), 0.5)
    (row,) = [row for row in lth.summary(model) if row.name == entry]
    assert row.state == "dense" and row.kept == row.total and re.fullmatch(reason, row.note), row
    owner = model.get_submodule(entry.rpartition(".")[0])
    assert not isinstance(owner, MaskedLayer) or "bias" in entry


def test_out_proj_needs_its_attention():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    with pytest.raises(ValueError, match="nothing to mask"):
        lth.sparsify_(model, targets="out_proj")
    lth.sparsify_(model, exclude="self_attn")
    assert masked_names(model) == {"linear1", "linear2"}
    lth.sparsify_(model, targets="self_attn")
    assert masked_names(lth.sparsify_(model, targets="out_proj")) >= {"self_attn", "self_attn.out_proj"}


class Tied(nn.Module):
    """Two layers with one weight, and one more that only shares a bias."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.second.weight = self.first.weight
        self.third.bias = self.first.bias

    def forward(self, x):
        return self.third(self.second(self.first(x)))


def reloaded(model):
    twin = lth.sparsify_(Tied())
    twin.load_state_dict(model.state_dict())
    return twin


MOVES = {
    "as it is": lambda model: model,
    "deepcopy": copy.deepcopy,
    "dtype": lambda model: model.double().float(),
    "device": lambda model: model._apply(torch.clone),  # what .to(device) does: new tensors for every buffer
    "load": reloaded,
}


@pytest.mark.parametrize("how", MOVES)
def test_tied_layers_have_one_mask_and_are_counted_once(how):
    model = MOVES[how](lth.prune_(lth.sparsify_(Tied()), 0.5))
    assert model.first.weight is model.second.weight
    assert model.first.weight_mask is model.second.weight_mask or how == "device"
    for kept in (4, 2):
        lth.prune_(model, 0.5)
        assert [(w.name, len(w.owners), int(w.mask.sum())) for w in masked_weights(model)] == [
            ("first", 2, kept),
            ("third", 1, kept),
        ]
        assert lth.density(model) == kept / 16 and sum(row.kept for row in lth.summary(model)) == 2 * kept + 8
        assert torch.equal(model.first.weight_mask, model.second.weight_mask)
        optimizer = torch.optim.Adam(model.parameters())
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        assert (model.first.weight[~model.first.weight_mask] == 0).all()


def test_a_weight_tied_to_a_layer_that_is_not_a_target_is_left_alone():
    model = lth.sparsify_(Tied(), exclude="second")
    assert masked_names(model) == {"third"}
    notes = {row.name: row.note for row in lth.summary(model)}
    assert notes["first.weight"] == "tied with second: not a target"
    with pytest.raises(ValueError, match="nothing to mask"):
        lth.sparsify_(Tied(), targets="first")


def test_a_module_registered_twice_is_one_layer():
    layer = nn.Linear(4, 4)
    model = lth.prune_(lth.sparsify_(nn.Sequential(layer, layer)), 0.5)
    assert lth.density(model) == 0.5 and len(masked_weights(model)) == 1


def test_summary_accounts_for_every_parameter():
    model = lth.sparsify_(network(), exclude="head")
    lth.prune_(model, 0.5)
    rows = {row.name: row for row in lth.summary(model)}
    assert list(rows) == [name for name, _ in model.named_parameters()]
    for name, p in model.named_parameters():
        assert (rows[name].shape, rows[name].total) == (tuple(p.shape), p.numel())
        assert rows[name].kept == (p != 0).sum() or rows[name].state == "dense"
        assert (rows[name].state == "masked") == (rows[name].note == "")
    masked = [row for row in rows.values() if row.state == "masked"]
    assert {row.name for row in masked} == {name + ".weight" for name in ALL if name != "head"}
    assert sum(row.kept for row in masked) / sum(row.total for row in masked) == lth.density(model)
    assert (
        rows["head.weight"].note == "not a target" and rows["body.norm1.weight"].note == "BatchNorm2d is never pruned"
    )


def test_summary_prints_an_aligned_table():
    model = lth.prune_(lth.sparsify_(nn.ModuleDict({"a": nn.Linear(100, 20), "norm": nn.LayerNorm(3)})), 0.25)
    assert str(lth.summary(model)).splitlines() == [
        "layer        shape   kept   of     density  state   strategy  gain  note",
        "a.weight     20x100  1,500  2,000  75.00%   masked  masked",
        "a.bias       20      20     20     100.00%  dense                   biases are never pruned",
        "norm.weight  3       3      3      100.00%  dense                   LayerNorm is never pruned",
        "norm.bias    3       3      3      100.00%  dense                   biases are never pruned",
    ]
    assert str(lth.summary(nn.ReLU())) == "layer  shape  kept  of  density  state  strategy  gain  note"


def test_masks_made_in_inference_mode_serve_training():
    model = network()
    with torch.inference_mode():
        lth.prune_(lth.sparsify_(model), 0.5)
    run(model).sum().backward()
    assert (model["head"].weight.grad[~model["head"].weight_mask] == 0).all() and model["head"].weight.grad.any()


def test_a_lazy_layer_is_masked_once_it_has_run():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="nothing to mask"):
        lth.sparsify_(model)
    model(torch.ones(1, 2))
    assert masked_names(lth.sparsify_(model)) == {"0"}


def test_a_first_layer_is_measured_without_an_input_gradient(monkeypatch):
    model = lth.prune_(lth.sparsify_(nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 20))), 0.9)
    seen = []
    monkeypatch.setattr("lth_sparse.packing.choose", lambda layer, *rest: seen.append(layer) or Choice("masked"))
    with torch.no_grad():
        lth.pack_(model, torch.rand(7, 40))
    assert [(layer.shape, layer.differentiated) for layer in seen] == [((7, 40), False), ((7, 30), True)]
    assert seen[0].key() != seen[0]._replace(differentiated=True).key()
