"""Operators with a mask: exact zeros whatever lies there, every dtype and layout, derivatives of any order."""

import pytest
import torch

from lth_sparse import ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.mT,
    "strided": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(6, 8),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t[0, 0],
}


def seeded(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def half(*shape):
    return seeded(*shape) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masked_entries_are_plain_zeros_and_the_others_untouched(dtype, layout):
    tensor = LAYOUTS[layout](seeded(6, 8, dtype=dtype))
    mask = half(tensor.shape)
    poisoned = tensor.clone()
    bad = torch.tensor([float("nan"), float("inf"), -float("inf"), -1.0], dtype=dtype)
    poisoned[~mask] = bad.repeat(poisoned.numel())[: int((~mask).sum())]
    for given in (tensor, poisoned):
        out = ops.apply_mask(given, mask)
        assert out.dtype == dtype and torch.equal(out[mask], tensor[mask]) and (out[~mask] == 0).all()
        assert dtype.is_complex or not out[~mask].signbit().any()


@pytest.mark.parametrize("fill", [False, True])
def test_empty_and_full_masks(fill):
    tensor = seeded(3, 5)
    assert torch.equal(ops.apply_mask(tensor, torch.full((3, 5), fill)), tensor * fill)


def test_mask_stays_in_the_graph():
    tensor, mask = seeded(4, 3).requires_grad_(), half(4, 3)
    ops.apply_mask(tensor, mask).sum().backward()
    assert torch.equal(tensor.grad, mask.float())


def test_weight_is_passed_on_without_a_copy():
    weight, mask = seeded(4, 3).requires_grad_(), half(4, 3)
    out = ops.mask_gradient(weight, mask)
    assert out.data_ptr() == weight.data_ptr() and torch.equal(out, weight)


@pytest.mark.parametrize("poison", [1.0, float("nan"), float("inf")])
def test_gradient_is_exactly_zero_off_the_mask(poison):
    weight, mask = seeded(4, 3).requires_grad_(), half(4, 3)
    (gradient,) = torch.autograd.grad(ops.mask_gradient(weight, mask), weight, torch.full((4, 3), poison))
    assert (gradient[~mask] == 0).all()
    assert gradient[mask].equal(torch.full((int(mask.sum()),), poison)) or poison != poison


def test_derivatives_agree_with_float64_differences():
    mask = half(4, 3)
    weight = (seeded(4, 3, dtype=torch.float64) * mask).requires_grad_()

    def function(kept):  # of the kept weights alone: masked ones do not count as variables
        dense = torch.zeros(4, 3, dtype=torch.float64).masked_scatter(mask, kept)
        return ops.mask_gradient(dense, mask).pow(3).sum(1)

    kept = weight.detach()[mask].requires_grad_()
    assert torch.autograd.gradcheck(function, kept) and torch.autograd.gradgradcheck(function, kept)


def test_second_derivative_is_masked_too():
    weight, mask = seeded(4, 3).requires_grad_(), half(4, 3)
    (first,) = torch.autograd.grad(ops.mask_gradient(weight, mask).pow(3).sum(), weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert torch.allclose(first, 3 * weight**2 * mask) and torch.allclose(second, 6 * weight * mask)


def test_functional_transforms():
    weight, mask, inputs = seeded(4, 3), half(4, 3), seeded(5, 3)

    def loss(weight, x):
        return (ops.mask_gradient(weight, mask) @ x).pow(2).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, inputs)
    want = torch.stack([torch.func.grad(loss)(weight, x) for x in inputs])
    assert torch.allclose(gradients, want) and (gradients[:, ~mask] == 0).all() and want[:, mask].all()
    masks = torch.stack([mask, ~mask])
    both = torch.func.vmap(lambda m: torch.func.grad(lambda w: ops.mask_gradient(w, m).sum())(weight))(masks)
    assert torch.equal(both, masks.float())


def test_compiles_without_a_break():
    weight, mask = seeded(4, 3).requires_grad_(), half(4, 3)
    compiled = torch.compile(lambda w: ops.mask_gradient(w, mask).pow(2).sum(), backend="aot_eager", fullgraph=True)
    compiled(weight).backward()
    assert torch.equal(weight.grad, torch.where(mask, 2 * weight.detach(), 0))


def step(weight, mask, x, dy):
    ops.masked_linear(x, weight, mask, None).backward(dy)
    return weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
def test_masked_linear(dtype, fused):
    if fused and dtype != torch.float32:
        pytest.skip("the kernel has no float64, and the interpreter multiplies bfloat16 wrongly")
    weight, mask = seeded(5, 8, dtype=dtype), half(5, 8)
    x, dy, bias = seeded(2, 3, 8, dtype=dtype), seeded(2, 3, 5, dtype=dtype), seeded(5, dtype=dtype)
    found = []
    for function in (lambda *t: ops.masked_linear(*t[:2], mask, t[2], fused), torch.nn.functional.linear):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        output = function(*inputs)
        output.backward(dy)
        found.append([output, *(tensor.grad for tensor in inputs)])
    ours, theirs = found
    theirs[2] = theirs[2] * mask
    tolerance = {torch.bfloat16: 0.05}.get(dtype, 1e-5)
    assert all(torch.allclose(a, b, tolerance, tolerance) for a, b in zip(ours, theirs, strict=True))
    assert (ours[2][~mask] == 0).all()


def test_a_large_gradient_is_written_to_memory_that_nothing_else_uses(monkeypatch):
    monkeypatch.setattr(ops.masked, "_MAPPED", 0)
    weight, mask, x, dy = seeded(5, 8).requires_grad_(), half(5, 8), seeded(3, 8), seeded(3, 5)
    first = step(weight, mask, x, dy)
    copy, place = first.clone(), first.data_ptr()
    part, weight.grad = first[1:], None
    del first
    assert step(weight, mask, x, 2 * dy).data_ptr() != place and torch.equal(part, copy[1:])
    place, weight.grad = weight.grad.data_ptr(), None
    assert step(weight, mask, x, 3 * dy).data_ptr() == place
    assert torch.allclose(weight.grad, 3 * copy)


def test_a_mask_written_by_hand_is_seen():
    weight, mask, x, dy = seeded(5, 8).requires_grad_(), torch.ones(5, 8, dtype=torch.bool), seeded(3, 8), seeded(3, 5)
    assert step(weight, mask, x, dy).all()
    mask[2], weight.grad = False, None
    gradient = step(weight, mask, x, dy)
    assert not gradient[2].any() and gradient[mask].all()
