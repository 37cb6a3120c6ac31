"""In models that nobody here wrote: masked, pruned, trained, packed and handed on, as with masks multiplied in by hand.

Each family runs small, built of torchvision's own parts, and in full under the marker large. timm and transformers are
no dependencies: their models run where they are installed.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from masked_models import assert_clean
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.resnet import Bottleneck

import lth_sparse as lth
from lth_sparse.masks import masked_weights

vision = torchvision.models
IMAGES = (8, 3, 32, 32)


def resnet():
    return vision.ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, width_per_group=4)


def convnext():
    return vision.ConvNeXt([CNBlockConfig(16, 32, 2), CNBlockConfig(32, None, 1)], num_classes=10)


def timm_mixer():
    mixer = pytest.importorskip("timm.models.mlp_mixer")
    return mixer.MlpMixer(num_classes=10, img_size=32, patch_size=8, num_blocks=2, embed_dim=32)


def bert():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=50, num_labels=10, **sizes))


SMALL = {
    "resnet": resnet,
    "mobilenet_v3_small": lambda: vision.mobilenet_v3_small(num_classes=10),
    "vit": lambda: vision.VisionTransformer(32, 8, 2, 2, 32, 64, num_classes=10),
    "convnext": convnext,
    "swin": lambda: vision.SwinTransformer([4, 4], 16, [2, 1], [2, 2], [4, 4], num_classes=10),
    "timm": timm_mixer,
    "bert": bert,
}
FULL = {
    "resnet50": lambda: vision.resnet50(num_classes=10),
    "vgg16": lambda: vision.vgg16(num_classes=10),
    "vit_b_16": lambda: vision.vit_b_16(image_size=32, num_classes=10),
    "convnext_tiny": lambda: vision.convnext_tiny(num_classes=10),
    "swin_t": lambda: vision.swin_t(num_classes=10),
}
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-3),
}
HALF_IS_SLOW = ("resnet", "resnet50", "vgg16")
# Ours and the masks multiplied in by hand came out bit for bit the same (torch 2.15); another build may sum otherwise.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(scope="module", params=[*SMALL, *(pytest.param(name, marks=pytest.mark.large) for name in FULL)])
def case(request):
    """A model as its library gives it, the same one masked, and pruned to a tenth; nobody writes to them."""
    torch.manual_seed(0)
    plain = (SMALL | FULL)[request.param]()
    masked = lth.sparsify_(copy.deepcopy(plain))
    x = torch.randint(50, (8, 7)) if request.param == "bert" else torch.randn(IMAGES)
    pruned = lth.prune_(copy.deepcopy(masked), 0.9)
    return SimpleNamespace(name=request.param, plain=plain, masked=masked, pruned=pruned, x=x)


def output(model, x):
    found = model(x)
    return getattr(found, "logits", found)  # transformers' models return an object


def evaluated(model, x):
    with torch.no_grad():
        return output(model.eval(), x)


def loss_of(model, x, half):
    torch.manual_seed(0)  # dropout is drawn alike in every step, or the loss of three steps need not fall
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        logits = output(model, x)
    return F.cross_entropy(logits.float(), torch.arange(len(x)) % logits.shape[1])


def train(model, parameters, optimizer, x, half=False, steps=3, check=lambda: None):
    """Train on one batch, under bfloat16 autocast with a scaled loss if `half`; the losses, one more than steps."""
    optimizer, scaler = OPTIMIZERS[optimizer](parameters), torch.amp.GradScaler("cpu", 1024, enabled=half)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, x, half)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        check()
        losses.append(loss.item())
    return [*losses, loss_of(model, x, half).item()]


def by_hand(model):
    """A plain twin of a masked model: a forward that multiplies masks into its parameters, these, and the products."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks = {names[id(weight.parameter)]: weight.mask.clone() for weight in masked_weights(model)}
    plain = lth.densify_(copy.deepcopy(model)).train()
    parameters = dict(plain.named_parameters())

    def masked():
        return {name: p * masks[name] if name in masks else p for name, p in parameters.items()}

    return lambda x: functional_call(plain, masked(), (x,)), parameters, masked


def test_masking_changes_no_output(case):
    plain = copy.deepcopy(case.plain)
    assert torch.equal(evaluated(copy.deepcopy(case.masked), case.x), evaluated(plain, case.x))
    assert [name for name, _ in case.masked.named_parameters()] == [name for name, _ in plain.named_parameters()]


def test_summary_accounts_for_every_parameter(case):
    rows = {row.name: row for row in lth.summary(case.pruned)}
    assert list(rows) == [name for name, _ in case.plain.named_parameters()]
    assert all(row.note and row.kept == row.total for row in rows.values() if row.state == "dense")
    masked = [row for row in rows.values() if row.state == "masked"]
    assert all(row.kept == row.total - round(0.9 * row.total) for row in masked)
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention)
    layers = {name for name, layer in case.plain.named_modules() if isinstance(layer, kinds)}
    assert {row.name.rpartition(".")[0] for row in masked} == layers and len(layers) >= 5  # none of them was left out


def assert_trained_as_by_hand(case, optimizer, half):
    model = copy.deepcopy(case.pruned).train()
    forward, parameters, masked = by_hand(model)
    ours = train(model, model.parameters(), optimizer, case.x, half, check=lambda: assert_clean(model))
    theirs = train(forward, parameters.values(), optimizer, case.x, half)
    assert ours[-1] < ours[0] and ours == pytest.approx(theirs, rel=1e-5)
    wanted = masked()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.data, wanted[name].data, **CLOSE, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_trains_as_with_masks_multiplied_in_by_hand(case, optimizer):
    assert_trained_as_by_hand(case, optimizer, half=False)


def test_trains_in_bfloat16_with_a_scaled_loss_as_by_hand(case):
    if case.name in HALF_IS_SLOW:
        pytest.skip("large convolutions in bfloat16 take twenty times as long where the CPU has no such instructions")
    assert_trained_as_by_hand(case, "adamw", half=True)


def packed(model):
    """A packed copy: every Linear by the strategy of the CPU, the smallest convolution of one group on a shadow."""
    kinds = {name: type(layer).__name__ for name, layer in model.named_modules()}
    strategies = {name: "cpu" for name, kind in kinds.items() if kind == "MaskedLinear"}
    convolutions = {
        name: layer.weight.numel()
        for name, layer in model.named_modules()
        if kinds[name] == "MaskedConv2d" and layer.groups == 1 and layer.weight.numel() < 2000
    }
    if convolutions:
        strategies[min(convolutions, key=convolutions.get)] = "dense"
    return lth.pack_(copy.deepcopy(model), strategies=strategies), strategies


def test_packed_it_computes_and_trains_as_masked(case):
    masked = copy.deepcopy(case.pruned)
    model, strategies = packed(masked)
    rows = {row.name.removesuffix(".weight"): row for row in lth.summary(model) if row.state == "packed"}
    assert {name: row.strategy for name, row in rows.items()} == strategies and strategies
    torch.testing.assert_close(evaluated(model, case.x), evaluated(masked, case.x), **CLOSE)
    # Still in evaluation mode: dropout draws in the order of memory, which differs, and the batch statistics of a dead
    # channel are rounding alone, magnified 300 times.
    losses = [train(m, m.parameters(), "sgd", case.x, steps=2) for m in (model, masked)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]
    lth.unpack_(model)
    assert lth.density(model) == lth.density(masked)
    for (name, ours), theirs in zip(model.state_dict().items(), masked.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def test_gradients_are_masked_where_they_arise(case):
    """Also where a model reads weights past the forward of their layer, as torchvision's Swin does."""
    model = copy.deepcopy(case.pruned).train()
    for half in (False, True):
        model.zero_grad()
        loss_of(model, case.x, half and case.name not in HALF_IS_SLOW).backward()
        assert all(not weight.parameter.grad[~weight.mask].any() for weight in masked_weights(model))
        assert any(weight.parameter.grad.any() for weight in masked_weights(model))


@pytest.fixture
def model():
    """A pruned network with convolutions, normalisation, attention and a Linear, and its input; in evaluation mode."""
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(2)]
    layer = nn.TransformerEncoderLayer(9, 3, 16, dropout=0.0, batch_first=True)
    return lth.prune_(lth.sparsify_(nn.Sequential(*body, layer, nn.Flatten(), nn.Linear(72, 4))), 0.7).eval()


X = torch.randn(5, 1, 7, 7, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("max_norm", [0.01, 1e9])
def test_clipped_gradients_are_those_of_the_masks_multiplied_in(model, max_norm):
    forward, parameters, _ = by_hand(model.train())
    for run in (model, forward):
        run(X).square().sum().backward()
    norms = [nn.utils.clip_grad_norm_(p, max_norm) for p in (model.parameters(), parameters.values())]
    torch.testing.assert_close(*norms)
    assert norms[0] > 0.01
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, parameters[name].grad)


def test_averaged_weights_stay_off_the_masks_and_train_on(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    for _ in range(3):
        train(model.train(), model.parameters(), "sgd", X, steps=1)
        average.update_parameters(model)
        assert_clean(average.module)
    torch.optim.swa_utils.update_bn([X], average)
    assert lth.density(average.module) == lth.density(model)
    assert lth.densify_(copy.deepcopy(average.module)).eval()(X).isfinite().all()


@pytest.mark.parametrize("state", ["masked", "dense", "packed"])
def test_exported_programs_compute_the_same(model, state):
    if state == "dense":
        lth.densify_(model)
    elif state == "packed":
        lth.pack_(model, strategies={"6": "cpu", "4.linear1": "cpu"})
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (X,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(X), model(X))
    assert torch.equal(program.module()(X[:3]), model(X[:3]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("state", ["masked", "dense"])
def test_onnx_files_compute_the_same(model, state, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    if state == "dense":
        lth.densify_(model)
    torch.onnx.export(model, (X,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    proto = onnx.load(tmp_path / "model.onnx")
    (found,) = onnx.reference.ReferenceEvaluator(proto).run(None, {proto.graph.input[0].name: X.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(X).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("state", ["masked", "packed"])
def test_compiles_to_one_graph_and_trains(model, state):
    if state == "packed":
        lth.pack_(model, strategies={"6": "cpu", "4.linear1": "cpu"})
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), copy.deepcopy(model)(X))
    losses = train(compiled, model.parameters(), "adamw", X)
    assert losses[-1] < losses[0]
    assert_clean(lth.unpack_(model))


def test_gradients_are_averaged_over_processes(model, tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        alone, several = copy.deepcopy(model).train(), nn.parallel.DistributedDataParallel(model.train())
        losses = [train(m, m.parameters(), "adamw", X) for m in (alone, several)]
    finally:
        torch.distributed.destroy_process_group()
    assert_clean(model)
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert all(torch.equal(p, q) for p, q in zip(alone.parameters(), model.parameters(), strict=True))


def pruned_by_torch():
    """A network of which torch prunes three layers, one of them twice and one by rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 8), nn.ReLU(), nn.Linear(8, 4))
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[3], "weight", 0.5)
    prune.l1_unstructured(model[3], "weight", 0.5)
    prune.ln_structured(model[5], "weight", 0.25, n=2, dim=0)
    return model


def test_models_pruned_by_torch_are_taken_in_and_given_back():
    model = pruned_by_torch()
    masks = {name: model[int(name)].weight_mask.bool() for name in "035"}
    want, parameters = model(X), [id(p) for p in model.parameters()]
    assert lth.from_torch_prune_(model) is model and torch.equal(model(X), want)
    assert {id(p) for p in model.parameters()} == {*parameters} and not prune.is_pruned(model)
    found = lth.get_masks(model)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items()) and found.keys() == masks.keys()
    assert (lth.density(model), found["3"].float().mean()) == (pytest.approx((18 + 200 + 24) / 868), 0.25)
    train(model, model.parameters(), "adamw", X, check=lambda: assert_clean(model))
    want = model(X)
    lth.densify_(model)
    for name, mask in found.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask)
    assert torch.equal(model(X), want) and prune.is_pruned(model)
    assert torch.equal(lth.from_torch_prune_(model)(X), want)


def test_attention_pruned_by_torch_is_taken_in():
    torch.manual_seed(0)
    for names in (["in_proj_weight"], ["out_proj"], ["in_proj_weight", "out_proj"]):
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0))
        attention, x = model[0].self_attn, torch.randn(3, 2, 8)
        for name in names:
            prune.random_unstructured(
                *((attention.out_proj, "weight") if name == "out_proj" else (attention, name)), 0.5
            )
        want = model(x)
        assert torch.equal(lth.from_torch_prune_(model)(x), want)
        kept = {name: mask.float().mean() for name, mask in lth.get_masks(model).items()}
        assert kept["0.self_attn.in_proj_weight"] == (0.5 if "in_proj_weight" in names else 1)
        assert kept.get("0.self_attn.out_proj", 1) == (0.5 if "out_proj" in names else 1)


class Mine(nn.Linear):
    pass


def tied_pair():
    pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    pair[1].weight = pair[0].weight
    prune.l1_unstructured(pair[0], "weight", 0.5)
    return pair


LEFT_WITH_TORCH = {
    "a subclass": lambda: prune.l1_unstructured(Mine(4, 4), "weight", 0.5),
    "an embedding": lambda: prune.l1_unstructured(nn.Embedding(4, 4), "weight", 0.5),
    "a bias": lambda: prune.l1_unstructured(nn.Linear(4, 4), "bias", 0.5),
    "a weight and its bias": lambda: prune.l1_unstructured(
        prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "bias", 0.5
    ),
    "a tied weight": tied_pair,
}


@pytest.mark.parametrize("what", LEFT_WITH_TORCH)
def test_what_cannot_be_masked_stays_with_torch(what):
    torch.manual_seed(0)
    model = LEFT_WITH_TORCH[what]()
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(ValueError, match=r"^torch\.nn\.utils\.prune has pruned no layer here that can be masked"):
        lth.from_torch_prune_(model)
    both = nn.Sequential(model, prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5))
    lth.from_torch_prune_(both)
    assert lth.get_masks(both).keys() == {"1"} and prune.is_pruned(model)
    assert [name for name, _ in model.named_parameters()] == names
