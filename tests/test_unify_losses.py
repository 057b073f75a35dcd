"""UnifyEdit's losses, masks and balance against plain float64 formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from host import Host

SITES = (("input", 1, 0), ("output", 2, 0))


@pytest.fixture(scope="module")
def losses(host: Host) -> Any:
    """patches/unify_losses.py."""
    return host.pack_module("patches.unify_losses")


@pytest.fixture(scope="module")
def balance(host: Host) -> Any:
    """patches/unify_balance.py."""
    return host.pack_module("patches.unify_balance")


def maps(seed: int, keys: int, rows: int = 2, heads: int = 3) -> dict[Any, torch.Tensor]:
    """Random attention probabilities at two sites of 16 and 4 places."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site: torch.randn(rows, heads, places, keys or places, generator=generator).softmax(dim=-1)
        for site, places in zip(SITES, (16, 4), strict=True)
    }


def test_structure_loss(losses: Any) -> None:
    """Protects: L_SAP is the sum of squared differences, averaged over heads and sites, row by row."""
    source, target = maps(0, 0), maps(1, 0)
    expected = []
    for row in range(2):
        total = 0.0
        for site, head in itertools.product(SITES, range(3)):
            pairs = zip(source[site][row, head].flatten(), target[site][row, head].flatten(), strict=True)
            total += sum((float(a) - float(b)) ** 2 for a, b in pairs) / 3
        expected.append(total / 2)
    torch.testing.assert_close(
        losses.structure_loss(source, target).double(), torch.tensor(expected).double()
    )
    assert losses.structure_loss(source, source).tolist() == [0, 0]


def test_alignment_loss(losses: Any) -> None:
    """Protects: L_CAA is (1 - share of the description's attention in the mask)^2, averaged over all there
    is.
    """
    target = maps(2, 9)
    words, length = [(2,), (4, 5)], 6
    masks = {SITES[0]: torch.rand(2, 16), SITES[1]: torch.tensor([[0.0, 1.0, 0.5, 0.0]])}
    expected = []
    for row in range(2):
        terms = []
        for site, word, head in itertools.product(SITES, words, range(3)):
            weights = masks[site].expand(2, -1)[row].double()
            ratio = 0.0
            for place, weight in enumerate(weights):
                places = target[site][row, head, place].double()
                ratio += float(weight * sum(places[i] for i in word) / places[1 : length + 1].sum())
            terms.append((1 - ratio / float(weights.sum())) ** 2)
        expected.append(sum(terms) / len(terms))
    result = losses.alignment_loss(target, words, length, masks)
    torch.testing.assert_close(result.double(), torch.tensor(expected, dtype=torch.float64))


def test_alignment_loss_is_bounded(losses: Any) -> None:
    """Protects: 0 when the word has all of the description's attention in the mask, 1 when it has none."""
    for token, expected in ((2, 0.0), (3, 1.0)):
        target = {SITES[0]: torch.zeros(1, 1, 4, 6)}
        target[SITES[0]][..., 0] = 0.7
        target[SITES[0]][..., token] = 0.3
        masks = {SITES[0]: torch.ones(1, 4)}
        assert losses.alignment_loss(target, [(2,)], 4, masks).item() == pytest.approx(expected)


def test_site_masks(host: Host) -> None:
    """Protects: on each grid a place holds the covered part of its area; no mask covers everything."""
    site, site_masks = host.pack_module("models.sites").Site, host.pack_module("patches.masks").site_masks
    sites = [site(("input", 1, 0), 0, 32, ""), site(("middle", 0, 0), 2, 64, "")]
    mask = torch.zeros(1, 128, 128)
    mask[:, :32, :48] = 1
    fine, coarse = site_masks(mask, sites, 16, 16, torch.device("cpu")).values()
    expected = torch.zeros(16, 16)
    expected[:4, :6] = 1
    torch.testing.assert_close(fine, expected.reshape(1, 256))
    expected = torch.zeros(4, 4)
    expected[0, :2] = torch.tensor([1.0, 0.5])
    torch.testing.assert_close(coarse, expected.reshape(1, 16))
    for whole in site_masks(None, sites, 16, 16, torch.device("cpu")).values():
        assert bool((whole == 1).all())


def test_weights(balance: Any) -> None:
    """Protects: structure's weight grows and alignment's falls, by the documented exponentials."""
    made = balance.Balance("balanced", beta1=0.5, k1=3.0, beta2=2.0, k2=1.5)
    for progress in (0.0, 0.25, 1.0):
        first, second = made.weights(progress)
        assert first == pytest.approx(0.5 * math.exp(-3.0 * (1 - progress)))
        assert second == pytest.approx(2.0 * math.exp(-1.5 * progress))
    assert balance.Balance("norm", 0.5, 3.0, 2.0, 1.5).weights(0.2) == (0.5, 2.0)


def test_direction(balance: Any) -> None:
    """Protects: the three combinations, each row normed by itself."""
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(2, 4, 3, 3, generator=generator) * torch.tensor([1e-6, 5.0])[:, None, None, None]
    two = torch.randn(2, 4, 3, 3, generator=generator)
    first, second = 0.5 * math.exp(-3.0 * 0.75), 2.0 * math.exp(-1.5 * 0.25)
    for row in range(2):
        a, b = one[row].double(), two[row].double()
        expected = {
            "balanced": first * a / a.norm() + second * b / b.norm(),
            "norm": 0.5 * a / a.norm() + 2.0 * b / b.norm(),
            "naive": math.hypot(0.5, 2.0) * (a + b) / (a + b).norm(),
        }
        for name, value in expected.items():
            result = balance.Balance(name, 0.5, 3.0, 2.0, 1.5).direction(one, two, 0.25)[row]
            torch.testing.assert_close(result.double(), value, rtol=1e-5, atol=1e-7)


def test_useless_gradients(balance: Any) -> None:
    """Protects: a row whose gradient is zero or not finite adds nothing and spoils no other row."""
    gradient = torch.ones(3, 4)
    gradient[0], gradient[1, 2] = 0, math.nan
    torch.testing.assert_close(balance.unit(gradient), torch.tensor([[0.0] * 4, [0.0] * 4, [0.5] * 4]))


@pytest.mark.parametrize("name", ["beta1", "k1", "beta2", "k2"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bad_factors(host: Host, name: str, value: float) -> None:
    """Protects: negative and non-finite factors are refused with the node's and the factor's name."""
    with pytest.raises(
        Exception, match=f"DescEditAdaptiveScheduler: {name} is .* but must be 0 or a positive"
    ):
        host.execute("DescEditAdaptiveScheduler", **{name: value})


def test_plot(host: Host) -> None:
    """Protects: the plot is an IMAGE that shows a rising and a falling curve."""
    _, plot = host.execute("DescEditAdaptiveScheduler", beta1=1.0, k1=3.0, beta2=1.0, k2=3.0)
    assert plot.shape[0] == 1
    assert plot.shape[3] == 3
    assert float(plot.min()) >= 0
    assert float(plot.max()) <= 1
    blue = (plot[0, 30:, :, 2] - plot[0, 30:, :, 0]) > 0.4
    red = (plot[0, 30:, :, 0] - plot[0, 30:, :, 2]) > 0.4
    for colour, rises in ((blue, True), (red, False)):
        rows, columns = colour.nonzero().unbind(dim=1)
        left = rows[columns == columns.min()].float().mean()
        right = rows[columns == columns.max()].float().mean()
        assert bool(left > right) is rises
