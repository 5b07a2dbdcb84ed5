"""The transducer loss against enumeration, closed forms, known vectors, finite differences and
itself."""

import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rnnt_loss as module
from rnnt_loss import (joint_rnnt_align, joint_rnnt_loss, prune_band, rnnt_align, rnnt_loss,
                       rnnt_loss_reference, simple_rnnt_loss)

F64 = torch.float64


def batch(B=3, T=6, U=4, V=7, seed=0, dtype=F64):
    """Ragged, with an utterance of one frame and one without labels."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, T, U + 1, V, generator=g, dtype=F64).to(dtype).requires_grad_()
    frames, counts = torch.randint(1, T + 1, (B,), generator=g), torch.randint(
        0, U + 1, (B,), generator=g
    )
    frames[0], counts[0], frames[-1], counts[1 % B] = T, U, 1, 0
    return logits, torch.randint(1, V, (B, U), generator=g), frames, counts


def paths(T, U):
    """The frame of every label, for every path."""
    return itertools.combinations_with_replacement(range(T), U)


def path_logp(logp, labels, frames, blank):
    T, score, t = len(logp), 0.0, 0
    for u, (label, frame) in enumerate(zip(labels, frames)):
        score = score + sum(logp[s, u, blank] for s in range(t, frame)) + logp[frame, u, label]
        t = frame
    return score + sum(logp[s, len(labels), blank] for s in range(t, T))


def grad_of(loss, x, **kw):
    return torch.autograd.grad(loss, x, **kw)[0]


@pytest.mark.parametrize("blank", [0, 3, -1])
def test_enumeration_of_all_paths(blank):
    logits, _, frames, counts = batch(V=5, seed=1)
    targets = torch.tensor([[1, 2, 1, 2], [2, 2, 1, 1], [1, 1, 2, 1]])
    costs = rnnt_loss(logits, targets, frames, counts, blank, reduction="none")
    for b in range(3):
        T, U = frames[b], counts[b]
        logp = logits[b].log_softmax(-1)
        each = torch.stack(
            [
                torch.as_tensor(path_logp(logp[:T], targets[b, :U], p, blank))
                for p in paths(T, int(U))
            ]
        )
        assert abs(costs[b] + each.logsumexp(0)) < 1e-10
    assert torch.allclose(
        costs, rnnt_loss_reference(logits, targets, frames, counts, blank=blank), atol=1e-10
    )


@pytest.mark.parametrize(
    "T,U,V,cost", [(10, 2, 4, 12.6281991482), (1, 0, 5, 1.6094379124), (7, 5, 3, 7.0477825729)]
)
def test_closed_form(T, U, V, cost):
    lengths = torch.ones(1, U, dtype=torch.int32), torch.tensor([T]), torch.tensor([U])
    assert (
        abs(rnnt_loss(torch.zeros(1, T, U + 1, V, dtype=F64), *lengths, blank=0).item() - cost)
        < 1e-9
    )
    assert abs((T + U) * math.log(V) - math.log(math.comb(T - 1 + U, U)) - cost) < 1e-9


def test_known_vectors():
    acts = torch.tensor(
        [
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.6, 0.1, 0.1], [0.1, 0.1, 0.2, 0.8, 0.1]],
            [[0.1, 0.6, 0.1, 0.1, 0.1], [0.1, 0.1, 0.2, 0.1, 0.1], [0.7, 0.1, 0.2, 0.1, 0.1]],
        ],
        dtype=F64,
    )[None]
    acts.requires_grad_()
    y, one, two = torch.tensor([[1, 2]]), torch.tensor([1]), torch.tensor([2])
    cost = rnnt_loss(acts, y, two, two, blank=0)
    grad = grad_of(cost, acts)[0]
    assert abs(cost.item() - 4.495666773771) < 1e-11
    first = torch.tensor([-.13116686, -.39992680, .17703122, .17703122, .17703122], dtype=F64)
    last = torch.tensor([-.69258820, .16871117, .18645468, .16871117, .16871117], dtype=F64)
    assert (grad[0, 0] - first).abs().max() < 1e-8 and (grad[1, 2] - last).abs().max() < 1e-8
    assert abs(rnnt_loss(acts, y, two, two).item() - 5.095666773771) < 1e-11
    assert abs(rnnt_loss(acts, y, one, two, blank=0).item() - 4.274244594424) < 1e-11
    assert abs(rnnt_loss(acts, y, one, one - 1, blank=0).item() - 1.731429195773) < 1e-11
    # reported unscaled
    assert rnnt_loss(acts, y, two, two, blank=0, fastemit_lambda=0.5).item() == cost.item()


@pytest.mark.parametrize("options", [{}, {"fused_log_softmax": False}, {"delay_penalty": 0.3}])
def test_finite_differences_and_reference(options):
    logits, *rest = batch(T=4, U=2, V=4)
    up = torch.tensor([1.0, -2.0, 0.5], dtype=F64)  # upstream factors of any sign

    def loss(x):
        return (rnnt_loss(x, *rest, blank=0, reduction="none", **options) * up).sum()
    assert torch.autograd.gradcheck(loss, logits)
    want = grad_of((rnnt_loss_reference(logits, *rest, blank=0, **options) * up).sum(), logits)
    assert (grad_of(loss(logits), logits) - want).abs().max() < 1e-10


def test_fastemit_is_the_gradient_of_its_frozen_posterior_surrogate():
    logits, targets, frames, counts = batch()
    logp = logits.log_softmax(-1).detach().requires_grad_()
    arcs = -grad_of(
        rnnt_loss_reference(logp, targets, frames, counts, blank=0, fused_log_softmax=False).sum(),
        logp,
    )
    posterior_blank = arcs[..., 0]
    labels = torch.nn.functional.pad(targets, (0, 1), value=1)[:, None, :, None].expand(
        *logits.shape[:3], 1
    )
    posterior_label = arcs.gather(-1, labels)[..., 0]
    free = logits.log_softmax(-1)
    surrogate = -(
        posterior_blank * free[..., 0] + 1.25 * posterior_label * free.gather(-1, labels)[..., 0]
    ).sum()
    mine = rnnt_loss(
        logits, targets, frames, counts, blank=0, reduction="sum", fastemit_lambda=0.25
    )
    assert (grad_of(mine, logits) - grad_of(surrogate, logits)).abs().max() < 1e-10


def test_ragged_batch_equals_its_utterances_whatever_the_padding_holds():
    logits, targets, frames, counts = batch()
    dirty = logits.detach().clone()
    for b in range(3):
        dirty[b, frames[b]:], dirty[b, :, counts[b] + 1:] = math.nan, math.inf
    dirty.requires_grad_()
    costs = rnnt_loss(dirty, targets, frames, counts, blank=0, reduction="none")
    grad = grad_of(costs.sum(), dirty)
    for b in range(3):
        T, U = frames[b], counts[b]
        one = logits[b : b + 1, :T, : U + 1].detach().requires_grad_()  # not contiguous
        cost = rnnt_loss(one, targets[b:b + 1, :U], frames[b:b + 1], counts[b:b + 1], blank=0)
        assert abs(cost - costs[b]) < 1e-12
        assert (grad[b, :T, :U + 1] - grad_of(cost, one)[0]).abs().max() < 1e-12
        assert not grad[b, T:].any() and not grad[b, :, U + 1:].any()


@pytest.mark.parametrize(
    "dtype,tolerance",
    [(F64, 1e-10), (torch.float32, 2e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)],
)
def test_every_dtype(dtype, tolerance):
    logits, targets, frames, counts = batch(V=33, dtype=dtype)
    wide = logits.detach().double().requires_grad_()
    want = rnnt_loss_reference(wide, targets, frames, counts, blank=0)
    for ints in (torch.int32, torch.int64):
        costs = rnnt_loss(
            logits, targets.to(ints), frames.to(ints), counts.to(ints), blank=0, reduction="none"
        )
        assert costs.dtype == (F64 if dtype == F64 else torch.float32)
        assert torch.allclose(costs.double(), want, rtol=1e-6)
    grad = grad_of(costs.sum(), logits)
    assert (
        grad.dtype == dtype and (grad.double() - grad_of(want.sum(), wide)).abs().max() < tolerance
    )


def test_half_precision_goes_slab_by_slab(monkeypatch):
    logits, *rest = batch(dtype=torch.bfloat16)
    whole = rnnt_loss(logits, *rest, blank=0)
    whole_grad = grad_of(whole, logits)
    monkeypatch.setattr(module, "SLAB_BYTES", 100)
    assert rnnt_loss(logits, *rest, blank=0) == whole
    assert torch.equal(grad_of(rnnt_loss(logits, *rest, blank=0), logits), whole_grad)


def test_reductions_clamp_and_empty_batches():
    logits, *rest = batch()
    costs = rnnt_loss(logits, *rest, blank=0, reduction="none")
    assert torch.isclose(rnnt_loss(logits, *rest, blank=0), costs.mean())
    assert torch.isclose(rnnt_loss(logits, *rest, blank=0, reduction="sum"), costs.sum())
    unit = grad_of(costs.sum(), logits)
    clamped = grad_of(3 * rnnt_loss(logits, *rest, blank=0, clamp=0.1, reduction="sum"), logits)
    assert torch.allclose(clamped, 3 * unit.clamp(-0.1, 0.1)) and unit.abs().max() > 0.1
    nothing = torch.zeros(0, 4, 3, 5, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss = rnnt_loss(nothing, none.view(0, 2), none, none, blank=0)
    loss.backward()
    assert loss == 0 and nothing.grad.shape == nothing.shape


def test_all_targets_empty():
    logits = torch.randn(2, 4, 1, 5, dtype=F64, requires_grad=True)
    costs = rnnt_loss(
        logits,
        torch.zeros(2, 0, dtype=torch.int64),
        torch.tensor([4, 2]),
        torch.tensor([0, 0]),
        blank=0,
        reduction="none",
    )
    logp = logits.log_softmax(-1)
    assert torch.allclose(costs, torch.stack([-logp[0, :, 0, 0].sum(), -logp[1, :2, 0, 0].sum()]))


def test_padded_dimensions_longer_than_the_longest_length():
    logits, targets, frames, counts = batch()
    bigger = torch.nn.functional.pad(logits, (0, 0, 0, 2, 0, 3), value=1e4)
    for wide in (targets, torch.nn.functional.pad(targets, (0, 5), value=99)):
        costs = rnnt_loss(bigger, wide, frames, counts, blank=0, reduction="none")
        assert torch.allclose(
            costs, rnnt_loss(logits, targets, frames, counts, blank=0, reduction="none")
        )


def test_backward_twice_and_double_backward():
    logits, *rest = batch()
    loss = rnnt_loss(logits, *rest, blank=0)
    assert torch.equal(grad_of(loss, logits, retain_graph=True), grad_of(loss, logits))
    for again in (
        rnnt_loss(logits, *rest, blank=0),
        joint_rnnt_loss(*joint_inputs(), *rest, blank=0),
    ):
        with pytest.raises(RuntimeError, match="no second derivative"):
            again.backward(create_graph=True)


def test_no_path_costs_infinity_and_leaves_the_neighbours_alone():
    logits, targets, frames, counts = batch(seed=3)
    want = rnnt_loss(logits, targets, frames, counts, blank=0, reduction="none")
    blocked = logits.detach().clone()
    blocked[0, ..., 0] = -math.inf
    blocked.requires_grad_()
    costs = rnnt_loss(blocked, targets, frames, counts, blank=0, reduction="none")
    assert costs[0] == math.inf and torch.equal(costs[1:], want[1:])
    grad = grad_of(costs.sum(), blocked)
    assert not grad[0].any() and torch.equal(grad[1:], grad_of(want.sum(), logits)[1:])
    # some arcs forbidden, a path left: by the reference
    some = logits.detach().float().clone()
    some[0, 0, 0, 0] = some[0, 2, :2, 0] = -math.inf
    some.requires_grad_()
    cost = rnnt_loss(some, targets, frames, counts, blank=0, reduction="none")
    assert torch.isfinite(cost).all()
    logp = some.detach().double()[0].log_softmax(-1)
    each = torch.stack([torch.as_tensor(path_logp(logp, targets[0], p, 0)) for p in paths(6, 4)])
    assert abs(cost[0] + each.logsumexp(0)) < 1e-5
    grad = grad_of(cost.sum(), some)
    assert torch.isfinite(grad).all() and grad[0, 0, 0, 0] == 0


def test_long_audio_keeps_its_gradient():
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(1, 2000, 3, 5, generator=g)).requires_grad_()
    rest = torch.tensor([[1, 2]]), torch.tensor([2000]), torch.tensor([2])
    wide = logits.detach().double().requires_grad_()
    error = grad_of(rnnt_loss(logits, *rest, blank=0), logits) - grad_of(
        rnnt_loss(wide, *rest, blank=0), wide
    )
    assert error.abs().max() < 1e-5
    small = wide.detach()[:, :40].clone().requires_grad_()  # and float64 is the reference's
    rest = rest[0], torch.tensor([40]), rest[2]
    error = grad_of(rnnt_loss(small, *rest, blank=0), small) - grad_of(
        rnnt_loss_reference(small, *rest, blank=0).sum(), small)
    assert error.abs().max() < 1e-10


@pytest.mark.parametrize(
    "change,message",
    [
        ({"logit_lengths": torch.tensor([6, 0, 1])}, r"logit_lengths\[1\] is 0, not in 1..6"),
        ({"logit_lengths": torch.tensor([7, 1, 1])}, r"logit_lengths\[0\] is 7"),
        ({"target_lengths": torch.tensor([4, 0, 5])}, r"target_lengths\[2\] is 5, not in 0..4"),
        ({"target_lengths": torch.tensor([4, -1, 0])}, r"target_lengths\[1\] is -1"),
        (
            {"target_lengths": torch.tensor([4, 0])},
            "target_lengths must be 1-dimensional integers for 3 utterances",
        ),
        ({"targets": torch.tensor([[1, 2, 9, 1]] * 3)}, r"targets\[0, 2\] is 9"),
        (
            {"targets": torch.tensor([[1, 0, 2, 1]] * 3)},
            r"targets\[0, 1\] is 0, not in 0..6 without the blank, 0",
        ),
        ({"targets": torch.ones(3, 4)}, "not torch.float32"),
        (
            {"logit_lengths": torch.ones(3, dtype=torch.bool)},
            "logit_lengths must be .* not torch.bool",
        ),
        (
            {"logits": torch.zeros(3, 6, 5, 7, dtype=torch.int64)},
            "logits must be .* not torch.int64",
        ),
        ({"blank": 7}, "blank is 7, but a node has 7 logits"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
        ({"logits": torch.zeros(3, 6, 5)}, r"logits must be \(B,T,U\+1,V\) floats"),
    ],
)
def test_errors_show_the_value_and_its_place(change, message):
    logits, targets, frames, counts = batch()
    arguments = dict(
        logits=logits, targets=targets, logit_lengths=frames, target_lengths=counts, blank=0
    )
    with pytest.raises(ValueError, match=message):
        rnnt_loss(**{**arguments, **change})


def joint_inputs(dtype=F64, B=3, T=6, U1=5, J=8, V=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, T, J), (B, U1, J), (V, J), (V,)
    return [torch.randn(s, generator=g, dtype=F64).to(dtype).requires_grad_() for s in shapes]


def unfused_logits(encoder_out, label_out, weight, bias):
    return torch.nn.functional.linear(
        torch.tanh(encoder_out[:, :, None] + label_out[:, None]), weight, bias
    )


def unfused(encoder_out, label_out, weight, bias, *rest, **options):
    return rnnt_loss(unfused_logits(encoder_out, label_out, weight, bias), *rest, **options)


# row by row; cut; an utterance or two; all
@pytest.mark.parametrize("tile_bytes", [1, 3000, 9000, 1 << 20])
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none", "fastemit_lambda": 0.1, "delay_penalty": 0.2}]
)
def test_fused_with_the_joint(tile_bytes, options):
    _, *rest = batch()
    inputs, up = joint_inputs(), torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    ours = joint_rnnt_loss(*inputs, *rest, blank=0, tile_bytes=tile_bytes, **options)
    want = unfused(*inputs, *rest, blank=0, **options)
    assert torch.allclose(ours, want, atol=1e-10)
    for a, b in zip(torch.autograd.grad((ours * up).sum(), inputs, retain_graph=True),
                    torch.autograd.grad((want * up).sum(), inputs)):
        assert (a - b).abs().max() < 1e-10
    again = torch.autograd.grad((ours * up).sum(), inputs)
    assert all(torch.isfinite(a).all() for a in again)


def test_fused_under_autocast_and_without_gradient():
    _, *rest = batch()
    inputs = joint_inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = joint_rnnt_loss(*inputs, *rest, blank=0)
        want = unfused(*inputs, *rest, blank=0)
    assert loss.dtype == torch.float32 and abs(loss - want) < 0.05
    for a, b in zip(
        torch.autograd.grad(loss, inputs),
        torch.autograd.grad(unfused(*inputs, *rest, blank=0), inputs),
    ):
        assert a.dtype == torch.float32 and (a - b).abs().max() < 0.05
    with torch.no_grad():
        assert not joint_rnnt_loss(*inputs, *rest, blank=0).requires_grad


def test_fused_skips_padding_and_names_widths():
    _, targets, frames, counts = batch()
    inputs = joint_inputs()
    dirty = [a.detach().clone() for a in inputs]
    dirty[0][1, frames[1]:] = math.nan
    clean = joint_rnnt_loss(*inputs, targets, frames, counts, blank=0)
    assert torch.equal(joint_rnnt_loss(*dirty, targets, frames, counts, blank=0), clean)
    with pytest.raises(ValueError, match=r"are \(3, 6, 3\), \(3, 5, 8\), \(7, 8\), \(7,\)"):
        joint_rnnt_loss(inputs[0][..., :3], *inputs[1:], targets, frames, counts, blank=0)


    with pytest.raises(ValueError, match=r"are \(3, 6, 8\), \(4, 5, 8\)"):
        joint_rnnt_loss(
            inputs[0],
            torch.cat([inputs[1], inputs[1][:1]]),
            *inputs[2:],
            targets,
            frames,
            counts,
            blank=0,
        )


@pytest.mark.parametrize("wrong", [torch.float32, torch.bool])
@pytest.mark.parametrize("name", ["logit_lengths", "target_lengths"])
def test_fused_takes_integers_only(name, wrong):
    _, *rest = batch()
    rest[["logit_lengths", "target_lengths"].index(name) + 1] = torch.ones(3, dtype=wrong)
    with pytest.raises(
        ValueError, match=f"{name} must be 1-dimensional integers for 3 utterances, not {wrong}"
    ):
        joint_rnnt_loss(*joint_inputs(), *rest, blank=0)


@pytest.mark.parametrize("ints", [torch.int8, torch.uint8, torch.int16])
def test_narrow_integers_do_not_wrap(ints):
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=g) for s in ((2, 300, 3), (2, 21, 3), (5, 3), (5,))]
    rest = (
        torch.randint(1, 5, (2, 20), generator=g),
        torch.tensor([120, 99]),
        torch.tensor([20, 20]),
    )
    want = joint_rnnt_loss(*inputs, *rest, blank=0, reduction="none")
    narrow = [a.to(ints) for a in rest]
    assert torch.equal(joint_rnnt_loss(*inputs, *narrow, blank=0, reduction="none"), want)
    assert torch.allclose(unfused(*inputs, *narrow, blank=0, reduction="none"), want, rtol=1e-6)


def test_a_common_offset_of_the_logits_changes_nothing():
    """Whole numbers of 2^-10 and their sums with the offset are exact in float32, so all that is
    lost is ours."""
    logits, *rest = batch(T=50, U=19, V=100)
    logits = (logits.detach() * 1024).round() / 1024
    costs, grads = [], []
    for offset in (0.0, 1e4):
        x = (logits + offset).float().requires_grad_()
        costs.append(rnnt_loss(x, *rest, blank=0, reduction="none"))
        grads.append(grad_of(costs[-1].sum(), x))
    assert torch.allclose(*costs, rtol=1e-7) and (grads[0] - grads[1]).abs().max() < 1e-6


def test_no_gradient_is_formed_where_none_is_wanted(monkeypatch):
    formed = []
    monkeypatch.setattr(module, "gradient", lambda *args: formed.append(args))
    _, *rest = batch()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            joint_rnnt_loss(*joint_inputs(), *rest, blank=0)
    assert not formed
    joint_rnnt_loss(*joint_inputs(), *rest, blank=0)
    assert formed


@given(
    st.integers(1, 4),
    st.integers(1, 7),
    st.integers(0, 5),
    st.integers(2, 40),
    st.integers(0, 10**6),
)
@settings(max_examples=25, deadline=None)
def test_any_shape(B, T, U, V, seed):
    logits, targets, frames, counts = batch(B, T, U, V, seed)
    costs = rnnt_loss(logits, targets, frames, counts, blank=0, reduction="none")
    want = rnnt_loss_reference(logits, targets, frames, counts, blank=0)
    assert torch.allclose(costs, want, atol=1e-9)
    grad = grad_of(costs.sum(), logits)
    assert (grad - grad_of(want.sum(), logits)).abs().max() < 1e-9
    assert grad.sum(-1).abs().max() < 1e-9  # adding a constant to a node changes nothing
    single = grad_of(
        rnnt_loss(logits.float(), targets, frames, counts, blank=0, reduction="sum"), logits
    )
    assert (single - grad).abs().max() < 1e-5


# ---- pruned --------------------------------------------------------------------------------------

def nodes_of(T, U, frames):
    """The nodes that a path goes through, given the frame of every label."""
    t, nodes = 0, [(0, 0)]
    for u, frame in enumerate([*frames, T - 1]):
        nodes += [(s, u) for s in range(t + 1, frame + 1)]
        nodes += [(frame, u + 1)] * (u < U)
        t = frame
    return nodes


def random_band(T, U, width, g):
    """A legal band (T,U+1), drawn: which rows each frame keeps."""
    keep, first = torch.zeros(T, U + 1, dtype=torch.bool), 0
    last = max(0, U + 1 - width)
    for t in range(T):
        keep[t, first:first + width] = True
        lowest = max(first, last - (width - 1) * (T - 2 - t))
        highest = min(last, first + width - 1)
        first = int(torch.randint(lowest, highest + 1, (), generator=g)) if t < T - 1 else first
    return keep


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tile_bytes", [1, 3000, 1 << 20])
def test_pruned_is_the_sum_over_the_paths_in_the_band(seed, tile_bytes):
    logits, targets, frames, counts = batch(seed=seed)
    inputs, g = joint_inputs(seed=seed), torch.Generator().manual_seed(seed)
    keep = torch.rand(3, 6, 5, generator=g) < 0.5  # what padding holds does not matter
    for b in range(3):
        T, U = int(frames[b]), int(counts[b])
        width = -(-U // T) + 1 + seed % 2
        keep[b, :T, :U + 1] = random_band(T, U, width, g)
    keep[1, 0, 0] = seed % 4 > 0  # now and then no path is left
    logp = unfused_logits(*inputs).log_softmax(-1)
    wanted, all_paths = [], 0
    for b in range(3):
        T, U = int(frames[b]), int(counts[b])
        inside = [p for p in paths(T, U) if all(keep[b, t, u] for t, u in nodes_of(T, U, p))]
        all_paths += len(list(paths(T, U))) - len(inside)
        scores = [torch.as_tensor(path_logp(logp[b, :T], targets[b, :U], p, 0)) for p in inside]
        wanted.append(-torch.stack(scores).logsumexp(0) if scores else logp.new_tensor(math.inf))
    assert all_paths > 0                                                 # else nothing was pruned
    costs = joint_rnnt_loss(*inputs, targets, frames, counts, blank=0, keep=keep, reduction="none",
                            tile_bytes=tile_bytes)
    assert torch.allclose(costs, torch.stack(wanted), atol=1e-10)
    assert (costs[1] == math.inf) == (seed % 4 == 0)
    full = joint_rnnt_loss(*inputs, targets, frames, counts, blank=0, reduction="none")
    assert (costs >= full - 1e-12).all() and (costs > full + 1e-6).any()
    finite = torch.stack([cost for cost in wanted if cost < math.inf]).sum()
    total = joint_rnnt_loss(*inputs, targets, frames, counts, blank=0, keep=keep, reduction="sum",
                            tile_bytes=tile_bytes)
    for a, b in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(finite, inputs)):
        assert (a - b).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_bytes", [1, 3000, 9000, 1 << 20])
def test_all_kept_is_the_full_loss_to_the_bit(dtype, tile_bytes):
    _, *rest = batch()
    inputs, options = joint_inputs(dtype), {"fastemit_lambda": 0.1, "delay_penalty": 0.2}
    seen = []
    for keep in (None, torch.ones(3, 6, 5, dtype=torch.bool)):
        loss = joint_rnnt_loss(*inputs, *rest, blank=0, tile_bytes=tile_bytes, keep=keep, **options)
        seen.append([loss, *torch.autograd.grad(loss, inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*seen))


def test_pruned_with_delay_penalty_is_the_loss_with_forbidden_arcs():
    """The logits of a node outside may be anything; here its arcs are made impossible."""
    _, targets, frames, counts = batch()
    inputs, g = joint_inputs(), torch.Generator().manual_seed(1)
    keep = torch.zeros(3, 6, 5, dtype=torch.bool)
    for b in range(3):
        T, U = int(frames[b]), int(counts[b])
        keep[b, :T, :U + 1] = random_band(T, U, -(-U // T) + 2, g)
    logp = unfused_logits(*inputs).log_softmax(-1).masked_fill(~keep[..., None], -math.inf)
    options = dict(blank=0, reduction="sum", delay_penalty=0.3, fastemit_lambda=0.2)
    want = rnnt_loss(logp, targets, frames, counts, fused_log_softmax=False, **options)
    ours = joint_rnnt_loss(*inputs, targets, frames, counts, keep=keep, **options)
    assert abs(ours - want) < 1e-10
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(want, inputs)):
        assert (a - b).abs().max() < 1e-10


def test_only_nodes_kept_are_computed(monkeypatch):
    rows, product = [], torch.addmm
    monkeypatch.setattr(
        torch, "addmm", lambda *args, **out: rows.append(len(args[1])) or product(*args, **out)
    )
    _, *rest = batch()
    keep = torch.zeros(3, 6, 5, dtype=torch.bool)
    keep[0, :, 0] = keep[0, -1] = keep[1, 0, 0] = keep[2] = True       # some of it padding
    inside = sum(int(keep[b, :T, :U + 1].sum()) for b, (T, U) in enumerate(zip(*rest[1:])))
    joint_rnnt_loss(*joint_inputs(), *rest, blank=0, keep=keep)
    assert sum(rows) == inside < keep.sum()
    rows.clear()              # a node takes (2 * 7 classes + 4 * 8 of the joint) * 8 bytes = 368
    joint_rnnt_loss(*joint_inputs(), *rest, blank=0, tile_bytes=3000)
    assert max(rows) == 8 and len(rows) > 3


def test_the_default_device_is_nobodys_business():
    """Lists of lengths, and what is made on the way, lie where they are wanted."""
    _, targets, frames, counts = batch()
    inputs = joint_inputs()
    rest = targets, frames.tolist(), counts.tolist()
    want = joint_rnnt_loss(*inputs, *rest, blank=0)
    with torch.device("meta"):
        assert torch.equal(joint_rnnt_loss(*inputs, *rest, blank=0), want)
        each = joint_rnnt_loss(*inputs, *rest, blank=0, reduction="none")
    assert torch.allclose(each.mean(), want)


@pytest.mark.parametrize("number", [np.float32(0.5), torch.tensor(0.5), np.int64(1)])
def test_a_number_may_be_numpys_or_torchs(number):
    logits, *rest = batch()
    want = rnnt_loss(logits, *rest, blank=0, delay_penalty=float(number))
    assert torch.equal(rnnt_loss(logits, *rest, blank=0, delay_penalty=number), want)
    with pytest.raises(ValueError, match="delay_penalty must be a finite number, not '0.5'"):
        rnnt_loss(logits, *rest, blank=0, delay_penalty="0.5")


def test_backward_lets_go_of_what_it_used():
    """A list of losses, kept for their mean, holds no gradients."""
    _, *rest = batch()
    inputs = [a.requires_grad_() for a in joint_inputs()]
    loss = joint_rnnt_loss(*inputs, *rest, blank=0)
    node = loss.grad_fn
    while not hasattr(node, "saved_tensors") or len(node.saved_tensors) < 4:
        node = node.next_functions[0][0]
    assert [tuple(a.shape) for a in node.saved_tensors] == [tuple(a.shape) for a in inputs]
    loss.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        node.saved_tensors


def test_other_floats_are_refused_by_name():
    logits, *rest = batch()
    with pytest.raises(ValueError, match="not torch.float8_e4m3fn"):
        rnnt_loss(logits.to(torch.float8_e4m3fn), *rest, blank=0)


def test_half_precision_adds_up_in_float32():
    """A thousand blanks of probability 1/2, a tile each, are -0.5 each for the label's row; a sum
    in bfloat16 stays at -128, where half a step is lost."""
    half = dict(dtype=torch.bfloat16)
    encoder_out, label_out = torch.zeros(1, 1000, 1, **half), torch.zeros(1, 1, 1, **half)
    label_out.requires_grad_()
    cost = joint_rnnt_loss(encoder_out, label_out, torch.tensor([[1.0], [0.0]], **half),
                           torch.zeros(2, **half), torch.zeros(1, 0, dtype=torch.long), [1000], [0],
                           blank=0, reduction="sum", tile_bytes=1)
    assert torch.autograd.grad(cost, label_out)[0].item() == -500     # tanh' = 1


def rows_of(keep):
    """The first row that each frame keeps."""
    return keep[0].int().argmax(1).tolist()


def test_a_band_lies_around_its_path():
    """Windows that hold as much are not one as good as the other."""
    posteriors = torch.zeros(1, 5, 11)
    posteriors[0, range(5), [0, 3, 5, 8, 10]] = 1
    assert rows_of(prune_band(posteriors, [5], [10], 5)) == [0, 1, 3, 6, 6]


def test_the_band_of_the_comments():
    """The window that begins lower wins, so labels move to later frames."""
    posteriors = torch.zeros(1, 6, 6)
    for t, first in enumerate((2, 1, 3, 4, 3, 3)):
        posteriors[0, t, first:first + 2] = 0.5
    assert rows_of(prune_band(posteriors, [6], [5], 2)) == [0, 1, 2, 3, 3, 4]


def test_logits_that_are_all_negative():
    """log(1 + e^-1 + e^-199): the largest of them is found among negative numbers too."""
    x = torch.tensor([[[[-1.0, -200.0, -2.0]]]], requires_grad=True)
    cost = rnnt_loss(x, torch.zeros(1, 0, dtype=torch.long), [1], [0], blank=0)
    assert cost.item() == pytest.approx(0.3132617, abs=1e-6)
    grad = torch.autograd.grad(cost, x)[0].flatten().tolist()
    assert grad == pytest.approx([-0.2689414, 0.0, 0.2689414], abs=1e-6)


def test_joined_sentences_in_blocks_are_the_sentences():
    """Two utterances joined in time, keep their two blocks: one path crosses, by the first one's
    last blank. So the cost is the sum of the two costs, where the label encoder says the same to
    both."""
    g = torch.Generator().manual_seed(0)
    (T1, U1), (T2, U2), J, V = (5, 3), (7, 4), 8, 9
    encoder_out = torch.randn(1, T1 + T2, J, generator=g, dtype=F64, requires_grad=True)
    label_out = torch.randn(1, U1 + U2 + 1, J, generator=g, dtype=F64, requires_grad=True)
    weight, bias = (
        torch.randn(s, generator=g, dtype=F64, requires_grad=True) for s in ((V, J), (V,))
    )
    targets = torch.randint(1, V, (1, U1 + U2), generator=g)
    keep = torch.zeros(1, T1 + T2, U1 + U2 + 1, dtype=torch.bool)
    keep[:, :T1, : U1 + 1] = keep[:, T1:, U1:] = True  # the row of U1 labels is in both
    joined = joint_rnnt_loss(encoder_out, label_out, weight, bias, targets, torch.tensor([T1 + T2]),
                             torch.tensor([U1 + U2]), blank=0, keep=keep)
    first = joint_rnnt_loss(
        encoder_out[:, :T1],
        label_out[:, : U1 + 1],
        weight,
        bias,
        targets[:, :U1],
        torch.tensor([T1]),
        torch.tensor([U1]),
        blank=0,
    )
    second = joint_rnnt_loss(encoder_out[:, T1:], label_out[:, U1:], weight, bias, targets[:, U1:],
                             torch.tensor([T2]), torch.tensor([U2]), blank=0)
    assert abs(joined - first - second) < 1e-12
    inputs = encoder_out, label_out, weight, bias
    for a, b in zip(
        torch.autograd.grad(joined, inputs), torch.autograd.grad(first + second, inputs)
    ):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("keep,message", [
    (torch.ones(3, 6, 4, dtype=torch.bool), r"not torch.bool of shape \(3, 6, 4\)"),
    (torch.ones(3, 6, 5), r"keep must be bool of shape \(3, 6, 5\), not torch.float32")])
def test_keep_is_checked(keep, message):
    _, *rest = batch()
    with pytest.raises(ValueError, match=message):
        joint_rnnt_loss(*joint_inputs(), *rest, blank=0, keep=keep)


def simple_inputs(B=3, T=6, U1=5, V=7, seed=0, scale=1.0, dtype=F64):
    g = torch.Generator().manual_seed(seed)
    return [
        (scale * torch.randn(s, generator=g, dtype=F64)).to(dtype).requires_grad_()
        for s in ((B, T, V), (B, U1, V))
    ]


@pytest.mark.parametrize("scale,tolerance", [(1, 1e-10), (30, 1e-10), (1000, 1e-9)])
@pytest.mark.parametrize("blank", [0, -1])
def test_simple_loss_is_the_loss_of_the_summed_logits(scale, tolerance, blank):
    _, targets, frames, counts = batch()
    targets = targets.clamp(max=5)
    am, lm = simple_inputs(scale=scale)
    logits = am[:, :, None] + lm[:, None]
    costs, posteriors = simple_rnnt_loss(
        am, lm, targets, frames, counts, blank=blank, reduction="none"
    )
    logp = logits.log_softmax(-1)
    for b in range(3):
        T, U = int(frames[b]), int(counts[b])
        each = [
            torch.as_tensor(path_logp(logp[b, :T], targets[b, :U], p, blank)) for p in paths(T, U)
        ]
        each = torch.stack(each)
        assert abs(costs[b] + each.logsumexp(0)) < tolerance * scale
        share = torch.zeros(6, 5, dtype=F64)  # of the paths, over each node
        for p, weight in zip(paths(T, U), each.softmax(0).detach()):
            for node in nodes_of(T, U, p):
                share[node] += weight
        assert (posteriors[b] - share).abs().max() < tolerance
    assert not posteriors.requires_grad
    up = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    want = rnnt_loss(logits, targets, frames, counts, blank, reduction="none")
    for a, b in zip(
        torch.autograd.grad((costs * up).sum(), (am, lm)),
        torch.autograd.grad((want * up).sum(), (am, lm)),
    ):
        assert (a - b).abs().max() < tolerance


@pytest.mark.parametrize("slab", [100, 4 << 20])
@pytest.mark.parametrize("peak,direct", [(200.0, True), (40.0, True), (5.0, False)])
def test_simple_loss_where_the_product_underflows(peak, direct, slab, monkeypatch):
    """am and lm peak at other labels: e^-2peak e^-2peak is 0 in float32 long before 200."""
    monkeypatch.setattr(module, "SLAB_BYTES", slab)
    calls, at = [], module._log_sum_exp_at
    monkeypatch.setattr(
        module, "_log_sum_exp_at", lambda *args: calls.append(len(args[2])) or at(*args)
    )
    _, *rest = batch(V=12)
    am, lm = simple_inputs(V=12, dtype=torch.float32)
    g = torch.Generator().manual_seed(4)
    signs = [torch.randint(0, 2, a.shape, generator=g) * 2 - 1 for a in (am, lm)]
    am, lm = ((a.detach() + peak * sign).requires_grad_() for a, sign in zip((am, lm), signs))
    am.data[:, 2, :], lm.data[:, 1, :] = -peak, -peak                    # one peak each, elsewhere
    am.data[:, 2, 3] = lm.data[:, 1, 7] = peak
    costs, _ = simple_rnnt_loss(am, lm, *rest, blank=0, reduction="none")
    wide = [a.detach().double().requires_grad_() for a in (am, lm)]
    want = rnnt_loss_reference(wide[0][:, :, None] + wide[1][:, None], *rest, blank=0)
    assert torch.allclose(costs.double(), want, rtol=1e-6, atol=1e-5)
    assert bool(calls) == direct and all(len(rest[0]) * 6 * 5 > n for n in calls)
    for a, b in zip(
        torch.autograd.grad(costs.sum(), (am, lm)), torch.autograd.grad(want.sum(), wide)
    ):
        assert torch.isfinite(a).all() and (a - b).abs().max() < 1e-4
    if direct and slab == 4 << 20:  # a test that cannot fail is none
        monkeypatch.setattr(module, "_log_sum_exp_at", lambda am, lm, b, t, u: am[b, t, 0] * 0)
        wrong, _ = simple_rnnt_loss(am, lm, *rest, blank=0, reduction="none")
        assert not torch.allclose(wrong.double(), want, rtol=1e-3)


def test_simple_loss_padding_halves_autocast_and_errors():
    _, targets, frames, counts = batch()
    am, lm = simple_inputs(dtype=torch.float32)
    want, share = simple_rnnt_loss(am, lm, targets, frames, counts, blank=0)
    clean = torch.autograd.grad(want, (am, lm))
    dirty = [a.detach().clone() for a in (am, lm)]
    for b in range(3):
        dirty[0][b, frames[b]:], dirty[1][b, counts[b] + 1:] = math.nan, math.inf
    dirty = [a.requires_grad_() for a in dirty]
    cost, of_dirty = simple_rnnt_loss(*dirty, targets, frames, counts, blank=0)
    assert cost == want and torch.equal(of_dirty, share)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(cost, dirty), clean))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(simple_rnnt_loss(am, lm, targets, frames, counts, blank=0)[0], want)
    half = [a.detach().half().requires_grad_() for a in (am, lm)]
    cost, _ = simple_rnnt_loss(*half, targets, frames, counts, blank=0)
    assert cost.dtype == torch.float32 and abs(cost - want) < 1e-2
    assert all(a.dtype == torch.float16 for a in torch.autograd.grad(cost, half))
    with pytest.raises(
        ValueError, match=r"am \(B,T,V\), lm \(B,U1,V\) are \(3, 6, 7\), \(3, 5, 6\)"
    ):
        simple_rnnt_loss(am, lm[..., :6], targets, frames, counts, blank=0)
    with pytest.raises(ValueError, match=r"logit_lengths\[0\] is 7"):
        simple_rnnt_loss(am, lm, targets, frames + 1, counts, blank=0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        simple_rnnt_loss(am, lm, targets, frames, counts, blank=0)[0].backward(create_graph=True)


def assert_legal(keep, T, U, width):
    """keep (T,U1) of one utterance: one window a frame, from row 0 to row U, never falling,
    overlapping its last."""
    assert not keep[T:].any() and not keep[:, U + 1:].any()
    lows, highs = [], []
    for row in keep[:T]:
        at = row.nonzero()[:, 0]
        lows.append(int(at[0]))
        highs.append(int(at[-1]))
        assert len(at) == highs[-1] - lows[-1] + 1 <= width
        assert len(at) == min(width, U + 1)
    assert lows[0] == 0 and highs[-1] == U
    assert all(0 <= b - a <= width - 1 for a, b in zip(lows, lows[1:]))


@pytest.mark.filterwarnings("ignore:prune_band")
def test_bands_are_legal_whatever_the_posteriors():
    g = torch.Generator().manual_seed(0)
    wider = 0
    for n in range(400):
        B, T, U1 = (
            8,
            int(torch.randint(1, 30, (), generator=g)),
            int(torch.randint(1, 40, (), generator=g)),
        )
        width = int(torch.randint(1, 12, (), generator=g))
        posteriors = torch.rand(B, T, U1, generator=g) ** (1 + n % 9)
        posteriors *= torch.rand(B, T, 1, generator=g) > n % 3 / 3       # frames that know nothing
        frames = torch.randint(1, T + 1, (B,), generator=g)
        counts = torch.randint(0, U1, (B,), generator=g)
        keep = prune_band(posteriors, frames, counts, width)
        assert keep.dtype == torch.bool and keep.shape == posteriors.shape
        for b in range(B):
            T_b, U_b = int(frames[b]), int(counts[b])
            least = -(-U_b // T_b) + 1
            assert_legal(keep[b], T_b, U_b, max(width, least))
            wider += least > width
    assert wider > 500
    with pytest.raises(AssertionError):                                  # the check does see a gap
        assert_legal(torch.tensor([[True, False, False], [False, False, True]]), 2, 2, 2)


def test_a_band_finds_a_planted_path_and_keeps_nearly_the_full_cost():
    g = torch.Generator().manual_seed(2)
    T, U, V, width = 60, 40, 30, 8
    at = torch.sort(torch.randint(0, T, (U,), generator=g)).values
    at[20:24] = 30  # a burst of four labels and more in a frame
    at = torch.sort(at).values
    assert torch.bincount(at).max() < width
    targets = torch.randint(1, V, (1, U), generator=g)
    am, lm = torch.zeros(1, T, V), torch.zeros(1, U + 1, V)
    lm[0, torch.arange(U), targets[0]] = 6                               # what comes next, and
    for u, frame in enumerate(at):
        am[0, frame, targets[0, u]] = 12  # what is heard; a blank elsewhere
    am[..., 0] = 8
    lengths = torch.tensor([T]), torch.tensor([U])
    _, posteriors = simple_rnnt_loss(am, lm, targets, *lengths, blank=0)
    keep = prune_band(posteriors, *lengths, width)
    assert_legal(keep[0], T, U, width)
    assert posteriors[keep].sum() > 0.98 * posteriors.sum()
    logits = (am[:, :, None] + lm[:, None]).double()
    full = rnnt_loss(logits, targets, *lengths, blank=0)
    logp = logits.log_softmax(-1).masked_fill(~keep[..., None], -math.inf)
    pruned = rnnt_loss(logp, targets, *lengths, blank=0, fused_log_softmax=False)
    assert full <= pruned < full + 0.2
    # negative control: another's posteriors
    other = prune_band(posteriors.flip(1), *lengths, width)
    assert posteriors[other].sum() < 0.5 * posteriors.sum()


def test_a_band_as_wide_as_the_rows_keeps_all_and_a_narrow_one_says_that_it_is_wider():
    lengths = torch.tensor([6, 2]), torch.tensor([4, 3])
    keep = prune_band(torch.rand(2, 6, 5), *lengths, 5)
    assert keep[0].all() and keep[1, :2, :4].all() and keep.sum() == 30 + 8
    with pytest.warns(UserWarning, match="width 2 cannot write U labels in T frames"):
        keep = prune_band(torch.rand(2, 6, 5), *lengths, 2)
    assert_legal(keep[0], 6, 4, 2)
    assert_legal(keep[1], 2, 3, 3)
    for width in (0, -1, 2.5, "8"):
        with pytest.raises(ValueError, match="width must be a whole number"):
            prune_band(torch.rand(2, 6, 5), *lengths, width)
    for width in (np.int64(5), 2 ** 62, 10 ** 20):
        assert prune_band(torch.rand(2, 6, 5), *lengths, width).sum() == 30 + 8
    for frames, counts, message in (
            ([6, 7], [4, 3], r"logit_lengths\[1\] is 7, not in 1..6"),
            ([0, 2], [4, 3], r"logit_lengths\[0\] is 0"),
            ([6, 2], [4, 7], r"target_lengths\[1\] is 7, not in 0..4"),
            ([6, 2], [-1, 3], r"target_lengths\[0\] is -1")):
        with pytest.raises(ValueError, match=message):
            prune_band(torch.rand(2, 6, 5), frames, counts, 3)
    with pytest.raises(ValueError, match=r"\(B,T,U1\), not \(6, 5\)"):
        prune_band(torch.rand(6, 5), *lengths, 3)
    with pytest.raises(ValueError, match="must be a torch tensor, not list"):
        prune_band([[[1.0]]], [1], [0], 3)


@pytest.mark.parametrize("options, message", [
    ({"delay_penalty": math.inf}, "delay_penalty must be a finite number, not inf"),
    ({"delay_penalty": math.nan}, "delay_penalty"),
    ({"delay_penalty": "1"}, "delay_penalty .* '1'"),
    ({"fastemit_lambda": math.nan}, "fastemit_lambda"),
    ({"fastemit_lambda": -2.0}, "fastemit_lambda must be 0 or more, not -2.0")])
def test_numbers_that_would_make_the_costs_nan_or_turn_the_gradient(options, message):
    joint = [a.detach() for a in joint_inputs()]
    rest = torch.ones(3, 4, dtype=torch.long), [6, 6, 6], [4, 4, 4]
    for run in (lambda: rnnt_loss(unfused_logits(*joint), *rest, blank=0, **options),
                lambda: joint_rnnt_loss(*joint, *rest, blank=0, **options)):
        with pytest.raises(ValueError, match=message):
            run()


def test_what_is_no_tensor_or_of_another_type_is_named():
    joint = [a.detach() for a in joint_inputs()]
    rest = torch.ones(3, 4, dtype=torch.long), [6, 6, 6], [4, 4, 4]
    logits = unfused_logits(*joint)
    for clamp in (None, "0.1", math.nan):
        with pytest.raises(ValueError, match="clamp must be a finite number"):
            rnnt_loss(logits, *rest, blank=0, clamp=clamp)
    with pytest.raises(ValueError, match="logits must be a torch tensor, not ndarray"):
        rnnt_loss(logits.numpy(), *rest, blank=0)
    with pytest.raises(ValueError, match="weight must be a torch tensor, not list"):
        joint_rnnt_loss(*joint[:2], joint[2].tolist(), joint[3], *rest, blank=0)
    with pytest.raises(ValueError, match="am must be a torch tensor, not ndarray"):
        simple_rnnt_loss(joint[0].numpy(), joint[1], *rest, blank=0)
    with pytest.raises(ValueError, match="encoder_out is torch.float64, label_out torch.float32"):
        joint_rnnt_loss(joint[0], joint[1].float(), *joint[2:], *rest, blank=0)
    with pytest.raises(ValueError, match="tile_bytes must be a whole number, not 48000000.0"):
        joint_rnnt_loss(*joint, *rest, blank=0, tile_bytes=48e6)
    keep = np.tri(6, 5, dtype=bool)[None].repeat(3, 0)            # an array will do
    assert joint_rnnt_loss(*joint, *rest, blank=0, keep=keep) == joint_rnnt_loss(
        *joint, *rest, blank=0, keep=torch.from_numpy(keep))
    logits = torch.randn(1, 2, 2, 5)
    for blank in (0.0, "0", None, torch.tensor(0.0)):
        with pytest.raises(ValueError, match="blank must be a whole number"):
            rnnt_loss(logits, [[3]], [2], [1], blank=blank)
    for blank in (np.int32(0), torch.tensor(0)):
        assert (rnnt_loss(logits, [[3]], [2], [1], blank=blank)
                == rnnt_loss(logits, [[3]], [2], [1], blank=0))


def test_plain_numpy_where_no_path_is_left():
    """A label that cannot be written, on the only way: no path, no posterior, and no NaN. As in the
    kernels; the reference takes lists."""
    logits = torch.randn(1, 1, 2, 5, dtype=F64)
    logits[0, 0, 0, 3] = -math.inf
    arcs = module.plain_log_probs(logits[0].numpy(), [3], 0)
    logp, posteriors = module.plain_lattice(arcs)
    assert logp == -math.inf and (posteriors == 0).all()
    assert rnnt_loss(logits, [[3]], [1], [1], blank=0) == math.inf
    assert module.rnnt_loss_reference(logits, [[3]], [1], [1], blank=0) == math.inf


def test_viterbi_against_enumeration():
    logits, targets, frames, counts = batch(seed=5)
    found = rnnt_align(logits, targets, frames, counts, blank=0)
    for b in range(3):
        T, U = int(frames[b]), int(counts[b])
        logp = logits[b].log_softmax(-1)[:T]
        best = max(paths(T, U), key=lambda p: float(path_logp(logp, targets[b, :U], p, 0)))
        assert found[b].tolist() == [*best] + [-1] * (4 - U)


def test_viterbi_gives_a_planted_path_back():
    g = torch.Generator().manual_seed(2)
    planted = [1, 4, 4, 9]
    logits, targets = torch.randn(1, 12, 5, 6, generator=g), torch.tensor([[3, 1, 2, 5]])
    t = 0
    for u, frame in enumerate(planted + [12]):
        logits[0, t:frame, u, 0] += 12
        if u < 4:
            logits[0, frame, u, targets[0, u]] += 12
        t = frame
    assert rnnt_align(logits, targets, torch.tensor([12]), torch.tensor([4]), blank=0).tolist() == [
        planted
    ]


def test_viterbi_of_the_joint_and_without_a_path():
    _, *rest = batch()
    inputs = joint_inputs()
    logits = torch.tanh(inputs[0][:, :, None] + inputs[1][:, None]) @ inputs[2].T + inputs[3]
    assert torch.equal(
        joint_rnnt_align(*inputs, *rest, blank=0), rnnt_align(logits, *rest, blank=0)
    )
    logits = logits.detach().clone()
    logits[0, ..., 0] = -math.inf
    assert rnnt_align(logits, *rest, blank=0)[0].tolist() == [-1] * 4
    whole = rnnt_align(logits, *rest, blank=0)
    logits[0, 1, 1, 2] = math.nan  # spoils its own utterance, and no other
    assert torch.equal(rnnt_align(logits, *rest, blank=0)[1:], whole[1:])


@pytest.mark.parametrize(
    "right,wrong",
    [
        ("out[i, y[i]] += arc_grads[i, LABEL]", "out[i, y[i]] -= arc_grads[i, LABEL]"),
        (
            "arcs[t, u, BLANK] *= arcs[t + 1, u, BLANK] + arcs[t + 1, u, LABEL]",
            "arcs[t, u, BLANK] *= 1",
        ),
        ("32(x[i], norms[i], -(by_blank + by_label)", "32(x[i], norms[i], -by_blank"),
    ],
)
def test_negative_control_a_broken_gradient_is_seen(right, wrong, tmp_path):
    source = (ROOT / "rnnt_loss.py").read_text()
    assert source.count(right) == 1
    (tmp_path / "broken.py").write_text(source.replace(right, wrong).replace("parallel=True, ", ""))
    spec = importlib.util.spec_from_file_location("broken", tmp_path / "broken.py")
    broken = importlib.util.module_from_spec(spec)
    sys.modules["broken"] = broken
    spec.loader.exec_module(broken)
    logits, *rest = batch(dtype=torch.float32)
    wide = logits.detach().double().requires_grad_()
    want = grad_of(rnnt_loss_reference(wide, *rest, blank=0).sum(), wide)
    assert (
        grad_of(rnnt_loss(logits, *rest, blank=0, reduction="sum"), logits) - want
    ).abs().max() < 1e-5
    assert (
        grad_of(broken.rnnt_loss(logits, *rest, blank=0, reduction="sum"), logits) - want
    ).abs().max() > 1e-2


ONE_RUN = """
import hashlib, sys, torch
sys.path[:0] = sys.argv[1:2]
from rnnt_loss import rnnt_loss
threads = torch.get_num_threads()
logits = torch.randn(2, 50, 24, 333, generator=torch.Generator().manual_seed(0), requires_grad=True)
loss = rnnt_loss(logits, torch.arange(46).view(2, 23) + 1, [50, 44], [23, 20], blank=0)
loss.backward()
assert torch.get_num_threads() == threads == int(sys.argv[2]), (torch.get_num_threads(), threads)
print(loss.item().hex(), hashlib.md5(logits.grad.numpy().tobytes()).hexdigest())
"""


def test_threads_and_compiled_code_are_left_alone(tmp_path):
    """The first process compiles, the second loads what it compiled: the same bits, or a run could
    not be resumed exactly. One thread or two: the same bits. And torch's number of threads is
    torch's, though numba has another and both may use the same OpenMP."""
    def run(torch_threads, numba_threads):
        done = subprocess.run(
            [sys.executable, "-c", ONE_RUN, str(ROOT), str(torch_threads)],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "NUMBA_CACHE_DIR": str(tmp_path),
                "OMP_NUM_THREADS": str(torch_threads),
                "MKL_NUM_THREADS": str(torch_threads),
                "NUMBA_NUM_THREADS": str(numba_threads),
            },
        )
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert run(1, 2) == run(1, 2) == run(2, 2)


SIMULATED = """
import sys, math, torch
sys.path[:0] = sys.argv[1:2]
import rnnt_loss as m
logits = torch.randn(3, 4, 4, 7, generator=torch.Generator().manual_seed(0))
targets = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 1, 1]])
rest = targets, torch.tensor([4, 3, 1]), torch.tensor([2, 3, 0])
logits[1, 2, 0, 0] = -math.inf                             # an arc forbidden, a path left
options = dict(blank=0, reduction="none", fastemit_lambda=0.1, delay_penalty=0.2)
choose = m.runs_on_gpu
assert choose(logits.device, torch.float32)
for dtype, threads, more in (
        (torch.float32, 1024, {}), (torch.float32, 2, {"clamp": 0.2}), (torch.bfloat16, 3, {}),
        (torch.float16, 4, {"fused_log_softmax": False})):
    m.LATTICE_THREADS, seen = threads, []
    for gpu in (False, True):
        m.runs_on_gpu = lambda device, dtype: gpu
        x = logits.to(dtype).requires_grad_()
        costs = m.rnnt_loss(x, *rest, **options, **more)
        seen.append((costs, torch.autograd.grad((costs * torch.tensor([1., -2., 3.])).sum(), x)[0]))
    assert torch.allclose(seen[0][0], seen[1][0], rtol=1e-6), (dtype, seen)
    difference = (seen[0][1].double() - seen[1][1].double()).abs().max()
    assert difference < (1e-6 if dtype == torch.float32 else 1e-2), dtype
m.runs_on_gpu, m.LATTICE_THREADS = choose, 2
inputs = [torch.randn(s, generator=torch.Generator().manual_seed(1), requires_grad=True)
          for s in ((3, 4, 5), (3, 4, 5), (7, 5), (7,))]
for tile_bytes in (1000, 1 << 20):
    fused = m.joint_rnnt_loss(*inputs, *rest, blank=0, tile_bytes=tile_bytes)
    m.runs_on_gpu = lambda device, dtype: False
    plain = m.joint_rnnt_loss(*inputs, *rest, blank=0)
    m.runs_on_gpu = choose
    for a, b in zip(torch.autograd.grad(fused, inputs), torch.autograd.grad(plain, inputs)):
        assert (a - b).abs().max() < 1e-6
keep = torch.zeros(3, 4, 4, dtype=torch.bool)
keep[0, :2, :2] = keep[0, 1:, 1:] = keep[1:, :, :3] = keep[1, 1:] = keep[2] = True
simple = [torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
          for _ in range(2)]
seen = []
for gpu in (False, True):
    m.runs_on_gpu = lambda device, dtype: gpu
    pruned = m.joint_rnnt_loss(*inputs, *rest, blank=0, keep=keep, tile_bytes=1000)
    cost, nodes = m.simple_rnnt_loss(*simple, *rest, blank=0)
    band = m.prune_band(nodes, *rest[1:], 3)
    seen.append([pruned, *torch.autograd.grad(pruned, inputs), cost,
                 *torch.autograd.grad(cost, simple), nodes, band])
assert all(torch.allclose(a.double(), b.double(), atol=1e-6) for a, b in zip(*seen)), seen
assert pruned > fused and not band.all()
m.runs_on_gpu = choose
paths = []
for gpu in (False, True):
    m.runs_on_gpu = lambda device, dtype: gpu
    paths.append(m.rnnt_align(logits, *rest, blank=0))
    batch = m.check_arguments(logits, *rest, 0)
    for a, nothing in ((batch.frames, 0), (batch.counts, 0), (batch.y, m.PADDING)):
        a[1] = nothing                # as where a length is wrong and a GPU does not show it
    x = logits.clone().requires_grad_()
    costs = m._Loss.apply(x, batch, -1, True)
    grad, = torch.autograd.grad(costs[::2].sum(), x)
    assert costs[1].isnan() and costs[::2].isfinite().all(), (gpu, costs)
    assert grad[0].any() and not grad[1].any(), (gpu, costs)
assert torch.equal(*paths) and paths[0][0, 0] >= 0, paths
print("simulator agrees")
"""


def test_cuda_kernels_under_the_simulator():
    """Blocks of 2, 3 and 4 threads stand for U above LATTICE_THREADS; as many threads as labels are
    the usual case."""
    run = subprocess.run(
        [sys.executable, "-c", SIMULATED, str(ROOT)],
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0 and "simulator agrees" in run.stdout, run.stdout + run.stderr


def test_where_no_kernel_is_the_error_says_what_to_do(monkeypatch):
    for device, dtype in (("cuda", F64), ("mps", torch.float32)):
        with pytest.raises(
            ValueError, match=f"float64 logits on a CPU only, .* not {dtype} on {device}"
        ):
            module.runs_on_gpu(torch.device(device), dtype)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs numba-cuda: pip install 'numba-cuda"):
        module.runs_on_gpu(torch.device("cuda"), torch.float32)
    monkeypatch.setattr(module, "find_spec", lambda name: name)
    assert module.runs_on_gpu(torch.device("cuda"), torch.float32)
    assert not module.runs_on_gpu(torch.device("cpu"), torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("U", [4, 1500])
def test_cuda_equals_cpu(dtype, U):
    assert module.runs_on_gpu(torch.device("cuda"), dtype)
    logits, *rest = batch(T=9, U=U, V=33, dtype=dtype)
    costs = rnnt_loss(logits, *rest, blank=0, reduction="none")
    there = logits.detach().cuda().requires_grad_()
    theirs = rnnt_loss(there, *(a.cuda() for a in rest), blank=0, reduction="none")
    assert torch.allclose(costs, theirs.cpu(), rtol=1e-5)
    difference = grad_of(costs.sum(), logits) - grad_of(theirs.sum(), there).cpu()
    assert difference.double().abs().max() < (1e-5 if dtype == torch.float32 else 1e-2)
    assert torch.equal(rnnt_align(there, *rest, blank=0).cpu(), rnnt_align(logits, *rest, blank=0))
    rest[1][0] = 99  # on a GPU an error only where it may wait
    wrong = rnnt_loss(there, *(a.cuda() for a in rest), blank=0, reduction="none")
    assert wrong[0].isnan() and torch.equal(wrong[1:], theirs[1:])
    with pytest.raises(ValueError, match=r"logit_lengths\[0\] is 99"):
        rnnt_loss(there, *(a.cuda() for a in rest), blank=0, validate=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")
@pytest.mark.parametrize("tile_bytes", [3000, 1 << 20])
def test_cuda_fused_equals_cpu(tile_bytes):
    _, *rest = batch()
    inputs = joint_inputs(torch.float32)
    there = [a.detach().cuda().requires_grad_() for a in inputs]
    ours, theirs = (
        joint_rnnt_loss(*a, *rest, blank=0, tile_bytes=tile_bytes) for a in (inputs, there)
    )
    assert abs(ours - theirs.cpu()) < 1e-4
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, there)):
        assert (a - b.cpu()).abs().max() < 1e-4


def test_numbas_thread_count_is_given_back(monkeypatch):
    """Recorded, not run: so it holds on a machine of one core too."""
    counts = [3]
    monkeypatch.setattr(module.numba, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(module.numba, "set_num_threads", counts.append)
    monkeypatch.setattr(module.torch, "get_num_threads", lambda: 1)
    module._run_cpu(lambda: None)
    assert counts == [3, 1, 3]

    def fails():
        raise RuntimeError("in the kernel")
    with pytest.raises(RuntimeError, match="in the kernel"):
        module._run_cpu(fails)
    assert counts == [3, 1, 3, 1, 3]


def plain_of(logits, targets, frames, counts):
    """Costs and gradient by the plain numpy version, an utterance at a time."""
    costs, grad = [], torch.zeros_like(logits)
    for b in range(len(logits)):
        T, U = int(frames[b]), int(counts[b])
        own = logits[b, :T, :U + 1].detach().numpy()
        cost, of_logits = module.plain_rnnt_loss(own, targets[b, :U].tolist(), 0)
        costs.append(cost)
        grad[b, :T, :U + 1] = torch.from_numpy(of_logits)
    return torch.tensor(costs), grad


@pytest.mark.parametrize("seed", range(5))
def test_the_plain_numpy_steps_are_the_definition(seed):
    logits, *rest = batch(seed=seed)
    want = rnnt_loss_reference(logits, *rest, blank=0)
    costs, grad = plain_of(logits, *rest)
    assert (costs - want).abs().max() < 1e-12
    assert (grad - grad_of(want.sum(), logits)).abs().max() < 1e-13


def test_a_wrong_share_is_seen(monkeypatch):
    """Negative control: posteriors that forget from where a path came."""
    logits, *rest = batch()
    want = grad_of(rnnt_loss_reference(logits, *rest, blank=0).sum(), logits)
    lattice = module.plain_lattice

    def forgets(arcs):
        logp, posteriors = lattice(arcs)
        return logp, (posteriors > 0) * posteriors.sum(-1, keepdims=True) / 2
    monkeypatch.setattr(module, "plain_lattice", forgets)
    assert (plain_of(logits, *rest)[1] - want).abs().max() > 0.1


def test_plain_posteriors_are_those_of_the_enumerated_paths():
    logits, targets, *_ = batch(B=1, T=4, U=3)
    arcs = module.plain_log_probs(logits[0].detach().numpy(), targets[0].tolist(), 0)
    logp, posteriors = module.plain_lattice(arcs)
    log_softmax, found = logits[0].detach().log_softmax(-1), torch.zeros(4, 4, dtype=F64)
    for path in paths(4, 3):
        share = math.exp(path_logp(log_softmax, targets[0], path, 0) - logp)
        for t, u in nodes_of(4, 3, path):
            found[t, u] += share
    assert (torch.from_numpy(posteriors.sum(-1)) - found).abs().max() < 1e-12
    drawn = module.draw_lattice(posteriors, [7, 8, 9]).splitlines()
    for row, u in zip(drawn[0:7:2], (3, 2, 1, 0)):                       # rows of labels, top down
        percent = [int(word) for word in row[10:].replace("-->", "").split("--")]
        assert percent == [round(100 * float(found[t, u])) for t in range(4)]


def test_the_file_alone_in_an_empty_folder(tmp_path):
    shutil.copy(ROOT / "rnnt_loss.py", tmp_path)
    code = ("import torch, rnnt_loss as m; print(round(float(m.rnnt_loss_reference("
            "torch.zeros(1, 2, 2, 3), torch.tensor([[1]]), [2], [1], blank=0)), 4), m.__file__)")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True,
                          text=True)
    # Two paths of three arcs, each of probability 1/3: 3 ln 3 - ln 2.
    assert done.stdout.split() == ["2.6027", str(tmp_path / "rnnt_loss.py")], done.stderr


def test_every_version_shows_the_same_numbers():
    run = subprocess.run([sys.executable, str(ROOT / "rnnt_loss.py")], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line[:24].strip() for line in lines[:5]] == [
        "reference", "plain numpy", "kernels cpu float64", "kernels cpu float32",
        "fused with the joint"]
    assert all(line[24:32] == "4.495667" for line in lines[:4])
    costs = [[float(x) for x in line[33:].split()[:3]] for line in lines[:5]]
    assert max(abs(a - b) for row in costs for a, b in zip(row, costs[0])) < 2e-5
    assert [float(line.split()[-1]) < 1e-6 for line in lines[1:4]] == [True] * 3
    assert lines[-1].split()[0] == "t=0" and "100" in lines[-2]


# ---- what users of other implementations met -----------------------------------------------------

def test_lengths_and_targets_may_be_lists_and_arrays():
    logits, targets, frames, counts = batch()
    inputs = joint_inputs()
    simple = torch.randn(3, 6, 9, dtype=F64), torch.randn(3, 5, 9, dtype=F64)
    kinds = [
        (targets, frames, counts),
        (targets.tolist(), frames.tolist(), counts.tolist()),
        (targets.numpy(), frames.numpy().astype("uint8"), tuple(counts.tolist())),
        (targets.int(), frames.numpy().astype("int16"), counts.to(torch.uint8)),
    ]
    seen = []
    for rest in kinds:
        cost, posteriors = simple_rnnt_loss(*simple, *rest, blank=0)
        seen.append([
            rnnt_loss(logits, *rest, blank=0, reduction="none"),
            joint_rnnt_loss(*inputs, *rest, blank=0),
            joint_rnnt_loss(*inputs, *rest, blank=0, reduction="none"),
            rnnt_align(logits, *rest, blank=0),
            joint_rnnt_align(*inputs, *rest, blank=0),
            cost, posteriors,
            prune_band(posteriors, *rest[1:], 3)])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other))
    assert rnnt_loss(logits[:0], [], [], [], blank=0) == 0
    assert rnnt_loss(logits[:, :, :1], [[], [], []], frames.tolist(), [0, 0, 0], blank=0) > 0


@pytest.mark.parametrize("place,value,message", [
    (0, [[1, 2], [3]], "targets must be integers in a tensor, array or list: expected sequence"),
    (0, None, "targets must be integers in a tensor, array or list"),
    (1, [[], [], []], "logit_lengths must be 1-dimensional integers for 3 utterances"),
    (1, ["6", "1", "1"], "logit_lengths must be integers in a tensor, array or list"),
    (1, [6.0, 1.0, 1.0], "logit_lengths must be 1-dimensional integers for 3 utterances, not"),
    (1, 6, r"logit_lengths must be 1-dimensional integers .* of shape \(\)"),
    (1, [6, 1], r"logit_lengths must be 1-dimensional integers for 3 .* of shape \(2,\)"),
    (2, [True, False, True], "target_lengths must be .* not torch.bool"),
    (2, [4, 0, 9], r"target_lengths\[2\] is 9, not in 0..4"),
    (1, [6, 0, 1], r"logit_lengths\[1\] is 0, not in 1..6"),
    (0, [[1, 2, 3, 99]] * 3, r"targets\[0, 3\] is 99, not in 0..6 without the blank, 0")])
def test_what_is_no_length_is_named(place, value, message):
    logits, targets, frames, counts = batch()
    rest = [targets, frames, [4, 0, 0]]
    rest[place] = value
    with pytest.raises(ValueError, match=message):
        rnnt_loss(logits, *rest, blank=0)
    with pytest.raises(ValueError, match=message):
        joint_rnnt_loss(*joint_inputs(), *rest, blank=0, reduction="none")


IN_A_WORKER = """
import sys, torch
sys.path[:0] = sys.argv[1:2]
from rnnt_loss import rnnt_loss
class Costs(torch.utils.data.Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, k):
        return rnnt_loss(torch.zeros(1, 10, 3, 4), [[1, 1]], [10], [2], blank=0)
if __name__ == "__main__":
    mine = Costs()[0]                                      # the parent's threads are running now
    options = dict(num_workers=1, batch_size=None, multiprocessing_context=sys.argv[2])
    try:
        costs = torch.utils.data.DataLoader(Costs(), **options)
        print(*(cost.item() == mine.item() for cost in costs))
    except RuntimeError as error:
        print("RuntimeError", " ".join(str(error).split()))
"""


@pytest.mark.parametrize("context", ["spawn", "fork"])
def test_a_spawned_worker_computes_it_and_a_forked_one_says_why_not(context, tmp_path):
    """GNU's OpenMP would kill the forked one without a word; other layers survive a fork."""
    script = tmp_path / "worker.py"
    script.write_text(IN_A_WORKER)
    run = subprocess.run([sys.executable, str(script), str(ROOT), context], capture_output=True,
                         text=True)
    assert run.returncode == 0, run.stderr
    right = run.stdout.split() == ["True", "True"]
    if context == "spawn":
        assert right, run.stdout
    else:
        assert right or "spawn workers (multiprocessing_context='spawn')" in run.stdout


NOWHERE = """
import sys
import numba.core.caching as caching
caching.CacheImpl._locator_classes = []                    # as where nothing can be written
sys.path[:0] = sys.argv[1:2]
try:
    __import__(sys.argv[2])
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["rnnt_loss", "align", "train"])
def test_a_container_without_a_writable_folder_is_told_what_to_set(name):
    run = subprocess.run([sys.executable, "-c", NOWHERE, str(ROOT), name], capture_output=True,
                         text=True)
    assert "set NUMBA_CACHE_DIR to one that can be written" in run.stdout, run.stderr


def test_simple_loss_is_reduced_as_the_others_are():
    _, *rest = batch()
    am, lm = simple_inputs()
    costs, _ = simple_rnnt_loss(am, lm, *rest, blank=0, reduction="none")
    assert torch.isclose(simple_rnnt_loss(am, lm, *rest, blank=0)[0], costs.mean())
    total, _ = simple_rnnt_loss(am, lm, *rest, blank=0, reduction="sum")
    assert torch.isclose(total, costs.sum())
