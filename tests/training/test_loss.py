"""The loss against torch's own, what is masked, means over parts, and the unigram baseline."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training import loss


def parts(rows: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.nn.ModuleList, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    hidden = torch.randn(2, rows, 12, requires_grad=True)
    heads = torch.nn.ModuleList(torch.nn.Linear(12, 30, bias=False) for _ in range(4))
    return hidden, heads, torch.randint(0, 30, (2, 4, rows)), torch.rand(2, 4, rows) < 0.8


def plain(hidden: torch.Tensor, heads: torch.nn.ModuleList, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [
            F.cross_entropy(head(hidden[mask[:, k]]), targets[:, k][mask[:, k]], reduction="sum")
            for k, head in enumerate(heads)
        ]
    )


@pytest.mark.parametrize(("chunk", "select"), [(1024, True), (7, True), (7, False)])
def test_sums_and_gradients_are_those_of_torch(chunk: int, select: bool) -> None:
    hidden, heads, targets, mask = parts()
    weights = torch.tensor([0.1, 2.0, 0.5, 1.0])
    leaves = [hidden, *(h.weight for h in heads)]
    targets = targets.where(mask, 99)  # cells that do not count may hold the special id
    ours = loss.cross_entropy_sums(hidden, list(heads), targets, mask, select=select, rows=chunk)  # type: ignore[arg-type]
    theirs = plain(hidden, heads, targets, mask)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours @ weights, leaves), torch.autograd.grad(theirs @ weights, leaves)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_the_form_that_compiles_is_the_plain_one(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    hidden, weight = 3 * torch.randn(50, 12), torch.randn(30, 12)
    targets, scored = torch.randint(0, 30, (50,)), torch.rand(50) < 0.7 if masked else None
    if scored is not None:
        hidden[~scored] = torch.nan
    cells = hidden.to(dtype), weight.to(dtype), targets, scored
    plain, gradient = loss._chunk(*cells, True)
    total, other = loss._fusible_chunk(*cells, True)
    torch.testing.assert_close(total, plain)
    assert other is not None and gradient is not None and other.dtype == dtype
    torch.testing.assert_close(other, gradient, atol=1e-6, rtol=1e-5 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(loss._fusible_chunk(*cells, False), (total, None))
    torch.testing.assert_close(loss._compiled_chunk()(*cells, True), (total, other))


def test_a_cpu_stays_with_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, heads, targets, mask = parts()
    base = loss.cross_entropy_sums(hidden, list(heads), targets, mask)  # type: ignore[arg-type]
    monkeypatch.delattr(loss, "_compiled_chunk")
    assert torch.equal(loss.cross_entropy_sums(hidden, list(heads), targets, mask, compiled=True), base)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_the_loss_of_the_cpu(compiled: bool) -> None:
    hidden, heads, targets, mask = parts(rows=300)
    base = loss.cross_entropy_sums(hidden, list(heads), targets, mask)  # type: ignore[arg-type]
    base.sum().backward()
    there = hidden.detach().cuda().requires_grad_()
    options = {"rows": 128, "compiled": compiled}
    sums = loss.cross_entropy_sums(there, list(heads.cuda()), targets.cuda(), mask.cuda(), **options)  # type: ignore[arg-type]
    torch.testing.assert_close(sums.cpu(), base, rtol=1e-3, atol=1e-2)
    gradient = torch.autograd.grad(sums.sum(), there)[0]
    torch.testing.assert_close(gradient.cpu(), hidden.grad, rtol=1e-2, atol=1e-2)


def test_chunks_follow_the_device() -> None:
    assert loss.chunk_rows("cpu", 2048) == loss.CHUNK_ROWS
    assert loss.chunk_rows("cuda", 2048) == 16384 and loss.chunk_rows("cuda", 64) == 2**19


def test_under_autocast() -> None:
    hidden, heads, targets, mask = parts(rows=300)
    with torch.autocast("cpu", torch.bfloat16):
        low = loss.cross_entropy_sums(hidden, list(heads), targets, mask)  # type: ignore[arg-type]
    low.sum().backward()
    assert low.dtype == torch.float32 and heads[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(low, plain(hidden, heads, targets, mask), rtol=5e-3, atol=0.1)


def test_masked_cells_do_not_matter() -> None:
    hidden, heads, targets, mask = parts()
    base = loss.cross_entropy_sums(hidden, list(heads), targets, mask)  # type: ignore[arg-type]
    other = torch.where(mask, targets, (targets + 1) % 30)
    assert torch.equal(loss.cross_entropy_sums(hidden, list(heads), other, mask), base)  # type: ignore[arg-type]
    never = ~mask.any(dim=1)
    spoilt = torch.where(never[..., None], torch.nan, hidden)
    assert torch.equal(loss.cross_entropy_sums(spoilt, list(heads), targets, mask), base)  # type: ignore[arg-type]


def test_what_is_not_finite_is_seen() -> None:
    hidden, heads, targets, mask = parts()
    mask[:] = True
    spoilt = hidden.detach().clone()
    spoilt[0, 0, 0] = torch.inf
    assert not torch.isfinite(loss.cross_entropy_sums(spoilt, list(heads), targets, mask)).any()  # type: ignore[arg-type]


def test_codebooks_weigh_the_same_whatever_their_counts() -> None:
    sums, counts = torch.tensor([10.0, 6.0]), torch.tensor([5.0, 2.0])
    assert loss.mean_over_codebooks(sums, counts).item() == pytest.approx((2 + 3) / 2)
    named = loss.metrics([10.0, 6.0], [5, 2], "train")
    assert named["train/loss"] == 2.5 and named["train/loss_q2"] == 3.0
    assert named["train/ppl_q1"] == pytest.approx(np.exp(2))


def test_unigram_loss() -> None:
    uniform = loss.unigram_loss(np.full((1, 2048), 9), np.full((1, 2048), 9))
    assert uniform[0] == pytest.approx(np.log(2048))
    counts = loss.token_counts([np.array([[0, 0, 1]]), np.array([[3]])], 1, 4)
    assert counts.tolist() == [[2, 1, 0, 1]]
    p = np.array([3, 2, 1, 2]) / 8
    scored = loss.unigram_loss(counts, np.array([[0, 3, 1, 0]]))[0]
    assert scored == pytest.approx(-(0.75 * np.log(p[1]) + 0.25 * np.log(p[2])))
