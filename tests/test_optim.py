"""Optimizers that step a group in one launch: torch's numbers, torch's state dicts, and shadows that follow."""

import copy
import pickle

import pytest
import torch
from torch import nn, optim

import lth_sparse as lth
from lth_sparse.hooks import attach_shadow
from lth_sparse.ops import optimizer as operators
from lth_sparse.optim import SGD, Adam, AdamW

KINDS = {
    "adam": (Adam, optim.Adam, {}),
    "adam with decay": (Adam, optim.Adam, dict(weight_decay=0.1, eps=1e-3)),
    "adamw": (AdamW, optim.AdamW, dict(weight_decay=0.1)),
    "sgd": (SGD, optim.SGD, dict(weight_decay=0.1)),
    "dampened": (SGD, optim.SGD, dict(momentum=0.9, dampening=0.5)),
    "nesterov": (SGD, optim.SGD, dict(momentum=0.9, nesterov=True, weight_decay=0.1)),
}
every_kind = pytest.mark.parametrize("ours, torchs, options", KINDS.values(), ids=KINDS)
three_kinds = pytest.mark.parametrize(
    "ours, torchs, options",
    [KINDS[kind] for kind in ("adamw", "dampened", "nesterov")],
    ids=["adamw", "dampened", "nesterov"],
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def launches(monkeypatch):
    """Have the kernels step CPU tensors too, in the interpreter; the tables they are given."""
    given = []
    monkeypatch.setattr("lth_sparse.ops.strategy.DEVICE_TYPES", {"cpu", "cuda"})
    for name in ("adam_", "sgd_"):
        launch = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda table, *a, f=launch: (given.append(table), f(table, *a)))
    return given


def parameters(sizes=((33, 7), (5,), (0,), (1100,)), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator).to(DEVICE, dtype).requires_grad_() for size in sizes]


def give_gradients(params, seed, skip=()):
    generator = torch.Generator().manual_seed(seed)
    for at, parameter in enumerate(params):
        gradient = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.grad = None if at in skip else gradient


def train(optimizer, steps, first=0, skip=()):
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for seed in range(first, first + steps):
        optimizer.zero_grad(set_to_none=seed % 2 == 0)
        give_gradients(params, seed, skip=skip if seed < first + 3 else ())
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in params])


def error(values, wanted):
    return (values.double() - wanted).abs().max()


@every_kind
def test_two_groups_err_no_more_than_torch_in_one_launch_each(launches, ours, torchs, options):
    def groups(params):
        return [{"params": params[:2]}, {"params": params[2:], "lr": 3e-3, "weight_decay": 0.01}]

    steps, skip = 20, (1, 3)  # these have no gradient in the first three steps
    exact = train(torchs(groups(parameters(dtype=torch.float64)), 1e-2, **options), steps, skip=skip)
    theirs = train(torchs(groups(parameters()), 1e-2, **options), steps, skip=skip)
    optimizer = ours(groups(parameters()), 1e-2, **options)
    found = train(optimizer, steps, skip=skip)
    assert 0 < error(found, exact) <= 2 * error(theirs, exact) < 1e-4
    first_is_torchs = 1 if options.get("dampening") else 0
    assert len(launches) == 2 * (steps - first_is_torchs)
    assert launches[-1].tensors == 2
    counts = [state["step"].item() for state in optimizer.state.values() if "step" in state]
    assert sorted(counts) == ([17, 17, 20, 20] if ours is not SGD else [])


@every_kind
def test_on_the_cpu_the_step_is_torchs_own(ours, torchs, options):
    if DEVICE == "cuda":
        pytest.skip("the parameters are on the GPU")
    theirs = train(torchs(parameters(), 1e-2, **options, fused=True), 5)
    assert torch.equal(train(ours(parameters(), 1e-2, **options), 5), theirs)


@three_kinds
def test_state_dicts_are_torchs_both_ways(launches, ours, torchs, options):
    mine, theirs = ours(parameters(), 1e-2, **options), torchs(parameters(), 1e-2, **options)
    for optimizer in (mine, theirs):
        train(optimizer, 4)
    mine_state, their_state = copy.deepcopy(mine.state_dict()), copy.deepcopy(theirs.state_dict())
    assert mine_state["param_groups"][0].keys() == their_state["param_groups"][0].keys()
    assert {k: v.keys() for k, v in mine_state["state"].items()} == {
        k: v.keys() for k, v in their_state["state"].items() if v
    }
    swapped = [ours(mine.param_groups[0]["params"], 1.0), torchs(theirs.param_groups[0]["params"], 1.0)]
    swapped[0].load_state_dict(their_state)
    swapped[1].load_state_dict(mine_state)
    assert swapped[0].param_groups[0]["fused"] is True
    count = len(launches)
    results = [train(optimizer, 6, first=4) for optimizer in swapped]
    assert len(launches) == count + 6
    torch.testing.assert_close(*results, rtol=0, atol=1e-5)
    wanted = train(torchs(parameters(dtype=torch.float64), 1e-2, **options), 10)
    assert all(error(result, wanted) < 1e-5 for result in results)
    assert all(state["step"].device.type == DEVICE for state in swapped[0].state.values() if "step" in state)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [AdamW, SGD])
def test_copies_go_on_alike_and_apart(launches, kind, copier):
    optimizer = kind(parameters(), 1e-2)
    train(optimizer, 2)
    other = copier(optimizer)
    assert torch.equal(train(other, 3, first=2), train(optimizer, 3, first=2))
    assert len(launches) == 8


@pytest.mark.parametrize("kind", [Adam, SGD])
def test_the_learning_rate_may_change_as_a_tensor_or_by_a_scheduler(launches, kind):
    lr = torch.tensor(1e-2, device=DEVICE)
    by_tensor, by_scheduler = kind(parameters(), lr), kind(parameters(), 1e-2)
    scheduler = optim.lr_scheduler.ExponentialLR(by_scheduler, 0.5)
    for seed in range(4):
        results = [train(optimizer, 1, first=seed) for optimizer in (by_tensor, by_scheduler)]
        lr.mul_(0.5)
        scheduler.step()
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)
    assert by_scheduler.param_groups[0]["lr"] == pytest.approx(1e-2 / 16) and len(launches) == 8


REST = {
    "float64": (Adam, optim.Adam, {}, torch.float64),
    "amsgrad": (AdamW, optim.AdamW, dict(amsgrad=True), torch.float32),
    "maximize": (SGD, optim.SGD, dict(maximize=True), torch.float32),
    "bfloat16": (SGD, optim.SGD, dict(momentum=0.9), torch.bfloat16),
}


@pytest.mark.parametrize("ours, torchs, options, dtype", REST.values(), ids=REST)
def test_what_the_kernels_cannot_take_is_left_to_torch(launches, ours, torchs, options, dtype):
    theirs = train(torchs(parameters(dtype=dtype), 1e-2, fused=True, **options), 3)
    assert torch.equal(train(ours(parameters(dtype=dtype), 1e-2, **options), 3), theirs) and launches == []


def test_a_group_may_be_taken_in_part(launches):
    mixed = [*parameters(), *parameters(dtype=torch.float64)]
    optimizer = Adam(mixed, 1e-2)
    train(optimizer, 3)
    assert [table.tensors for table in launches] == [4, 4, 4]
    assert optimizer.refreshed == set(mixed[:4])
    assert {state["step"].item() for state in optimizer.state.values()} == {3}
    alone = parameters(dtype=torch.float64)
    reference = optim.Adam([*parameters(), *alone], 1e-2)
    train(reference, 3)
    for found, wanted in zip(mixed[4:], alone, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("taken", [True, False])
def test_gradients_may_move_and_have_other_strides(launches, monkeypatch, taken):
    if not taken:
        monkeypatch.setattr("lth_sparse.ops.strategy.DEVICE_TYPES", set())
    params, others = parameters(((6, 8), (4, 3, 1, 1))), parameters(((6, 8), (4, 3, 1, 1)))
    ours, theirs = SGD(params, 0.1), optim.SGD(others, 0.1)
    held = []  # so that no address comes back
    for seed in range(4):
        for optimizer, (matrix, tensor) in ((ours, params), (theirs, others)):
            give_gradients([matrix, tensor], seed)
            matrix.grad = matrix.grad.t().contiguous().t() if seed == 2 else matrix.grad
            tensor.grad = tensor.grad.to(memory_format=torch.channels_last)
            held += [matrix.grad, tensor.grad]
            optimizer.step()
    assert len(launches) == (4 if taken else 0)
    assert len({table.cells.data_ptr() for table in launches}) == len(launches)
    assert all(map(torch.allclose, params, others))


def test_moments_take_the_strides_of_the_parameter_when_loaded(launches):
    plain = parameters(((4, 3, 2, 2),))
    last = [plain[0].detach().clone(memory_format=torch.channels_last).requires_grad_()]
    ours, theirs = Adam(last, 1e-2), optim.Adam(plain, 1e-2)
    train(theirs, 2)
    with torch.no_grad():
        last[0].copy_(plain[0])
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    torch.testing.assert_close(train(ours, 2, first=2), train(theirs, 2, first=2))
    assert len(launches) == 2 and last[0].stride() == ours.state[last[0]]["exp_avg"].stride() != plain[0].stride()


@pytest.mark.parametrize("device_types", [set(), {"cpu", "cuda"}], ids=["torch", "kernels"])
def test_parameters_that_are_not_dense_are_refused(launches, monkeypatch, device_types):
    monkeypatch.setattr("lth_sparse.ops.strategy.DEVICE_TYPES", device_types)
    memory = torch.ones(4, 6, device=DEVICE)
    parameter = memory[:, ::2].requires_grad_()
    give_gradients([parameter], 0)
    with pytest.raises(ValueError, match=r"SGD steps dense parameters.*got strides \(6, 2\).*shape of \(4, 3\)"):
        SGD([parameter]).step()
    assert (memory == 1).all()
    dense = torch.ones(4, 3, 2, 2, device=DEVICE, requires_grad=True)
    optimizer = Adam([dense])
    train(optimizer, 1)
    dense.data = dense.data.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="moments alike in memory"):
        train(optimizer, 1)


def test_nothing_is_made_anew_while_nothing_moves(launches):
    params = parameters()
    optimizer = Adam(params)
    for seed in range(3):
        give_gradients(params, seed) if seed == 0 else None
        optimizer.step()
    assert len(launches) == 3 and len({id(table) for table in launches}) == 1


def test_writes_are_seen_by_autograd(launches):
    params = parameters(((3,),))
    output = (params[0] ** 2).sum()
    give_gradients(params, 0)
    SGD(params).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("options", [dict(foreach=True), dict(differentiable=True)])
def test_other_implementations_are_refused_by_torch(options):
    with pytest.raises(RuntimeError, match="`fused`"):
        Adam(parameters(), **options)


def packed_network(monkeypatch):
    monkeypatch.setenv("LTH_STRATEGY", "dense")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10, bias=False)).to(DEVICE)
    masked = lth.prune_(lth.sparsify_(model), 0.7)
    return masked, lth.pack_(copy.deepcopy(masked))


def fit(model, optimizer, steps):
    generator, like = torch.Generator().manual_seed(1), next(model.parameters())
    for _ in range(steps):
        x = torch.randn(7, 20, generator=generator).to(like.device, like.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def only_the_launch_refreshes(monkeypatch):
    monkeypatch.setattr("lth_sparse.hooks.ops.refresh_", lambda *args: None)


@three_kinds
def test_packed_layers_train_as_masked_ones(launches, monkeypatch, ours, torchs, options):
    masked, packed = packed_network(monkeypatch)
    if not options.get("dampening"):  # whose first step is torch's, and the hook's to refresh
        only_the_launch_refreshes(monkeypatch)
    exact, before = copy.deepcopy(masked).double(), packed[0].shadow.clone()
    for model, kind in ((exact, torchs), (masked, torchs), (packed, ours)):
        fit(model, kind(model.parameters(), 1e-2, **options), 10)
    assert len(launches) in (9, 10) and launches[-1].tensors == 3
    assert not torch.equal(packed[0].shadow, before)
    for at in (0, 2):
        assert torch.equal(packed[at].shadow.view_as(packed[at].weight), packed[at].weight)
        allowed = 2 * error(masked[at].weight, exact[at].weight) + 1e-7
        assert error(packed[at].weight, exact[at].weight) <= allowed


def test_shadows_attached_anew_are_followed_in_their_dtype(launches, monkeypatch):
    _, packed = packed_network(monkeypatch)
    only_the_launch_refreshes(monkeypatch)
    optimizer, layer = Adam(packed.parameters(), 1e-2), packed[0]
    fit(packed, optimizer, 2)
    old, half = layer.shadow, layer.shadow.bfloat16()
    kept_old = old.clone()
    attach_shadow(layer.values, half, layer.pattern)
    optimizer.step()  # with gradients that did not move
    assert torch.equal(old, kept_old) and not torch.equal(layer.weight, kept_old.view_as(layer.weight))
    half = half.view_as(layer.weight)
    assert torch.equal(half != 0, layer.weight_mask)
    assert (half.float() - layer.weight).abs().max() <= 2**-7 * layer.weight.abs().max()
    assert optimizer.refreshed == set(packed.parameters())


def test_only_what_the_last_step_wrote_counts_as_refreshed(launches, monkeypatch):
    _, packed = packed_network(monkeypatch)
    optimizer = Adam(packed.parameters(), 1e-2)
    fit(packed, optimizer, 1)
    assert optimizer.refreshed == set(packed.parameters())
    optimizer.param_groups[0]["maximize"] = True  # torch's step, and the hook's refresh
    fit(packed, optimizer, 1)
    assert optimizer.refreshed == set()
    assert torch.equal(packed[0].shadow.view_as(packed[0].weight), packed[0].weight)


@pytest.mark.gpu
@every_kind
def test_a_graph_of_the_whole_step_follows_the_learning_rate(ours, torchs, options):
    if options.get("dampening"):
        pytest.skip("no different once it has begun")
    lr, runs = torch.tensor(1e-2, device=DEVICE), []
    for graphed in (False, True):
        params = parameters()
        optimizer = ours(params, lr.fill_(1e-2), **options)
        data = torch.ones(4, device=DEVICE)

        def step(params=params, optimizer=optimizer, data=data):
            optimizer.zero_grad(set_to_none=True)
            sum((parameter * data[at]).sin().sum() for at, parameter in enumerate(params)).backward()
            optimizer.step()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            assert len(optimizer.captured) == 1
            step = graph.replay
        for number in range(5):
            lr.fill_(1e-2 / (number + 1))
            step()
        runs.append(torch.cat([parameter.detach().flatten() for parameter in params]))
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    "ours, torchs, options, change",
    [
        (Adam, optim.Adam, {}, {"maximize": True}),
        (Adam, optim.Adam, {}, {"lr": 0.5, "eps": 0.1, "weight_decay": 0.2}),
        (SGD, optim.SGD, {"momentum": 0.9}, {"maximize": True}),
        (SGD, optim.SGD, {}, {"momentum": 0.9}),
    ],
)
def test_options_may_change_between_steps(ours, torchs, options, change):
    sides = [
        (kind(given, 0.1, fused=True, **options), given)
        for kind, given in zip((ours, torchs), (parameters(), parameters()), strict=True)
    ]
    for optimizer, _ in sides:
        train(optimizer, 3)
        for group in optimizer.param_groups:
            group.update(change)
        train(optimizer, 3, first=3)
    for mine, theirs in zip(sides[0][1], sides[1][1], strict=True):
        torch.testing.assert_close(mine, theirs)
