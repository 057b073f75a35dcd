"""UnifyEdit's losses, masks and balance against plain float64 formulas."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from host import Host
from unify_edit import projections

LAYERS = (("input", 1, 0), ("output", 2, 0))


@pytest.fixture(scope="module")
def losses(host: Host) -> Any:
    """patches/unify/losses.py."""
    return host.pack_module("patches.unify.losses")


@pytest.fixture(scope="module")
def balance(host: Host) -> Any:
    """patches/unify/balance.py."""
    return host.pack_module("patches.unify.balance")


def maps(seed: int, keys: int, rows: int = 2, heads: int = 3) -> dict[Any, torch.Tensor]:
    """Random attention probabilities at two layers of 16 and 4 places."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(rows, heads, places, keys or places, generator=generator).softmax(dim=-1)
        for layer, places in zip(LAYERS, (16, 4), strict=True)
    }


def layers(host: Host, probabilities: dict[Any, torch.Tensor]) -> dict[Any, Any]:
    """Queries and keys with these probabilities at each layer."""
    return {layer: projections(host, values) for layer, values in probabilities.items()}


def test_structure_loss(host: Host, losses: Any) -> None:
    """Protects: L_SAP is the sum of squared differences, averaged over heads and layers, row by row."""
    source, target = maps(0, 0), maps(1, 0)
    expected = []
    for row in range(2):
        total = 0.0
        for layer, head in itertools.product(LAYERS, range(3)):
            pairs = zip(source[layer][row, head].flatten(), target[layer][row, head].flatten(), strict=True)
            total += sum((float(a) - float(b)) ** 2 for a, b in pairs) / 3
        expected.append(total / 2)
    source, target = layers(host, source), layers(host, target)
    found = losses.structure_loss(source, target).values
    torch.testing.assert_close(found.double(), torch.tensor(expected).double())
    assert losses.structure_loss(source, source).values.tolist() == [0, 0]


@pytest.mark.parametrize("rows", [1, 2])
def test_structure_loss_in_a_region(host: Host, losses: Any, rows: int) -> None:
    """Protects: with M^ = M M^T only pairs of places in the region count, each map weighted before the
    square.
    """
    source, target = maps(0, 0), maps(1, 0)
    generator = torch.Generator().manual_seed(5)
    regions = {
        layer: torch.rand(rows, places, generator=generator)
        for layer, places in zip(LAYERS, (16, 4), strict=True)
    }
    expected = []
    for row in range(2):
        total = 0.0
        for layer, head in itertools.product(LAYERS, range(3)):
            weights = regions[layer].expand(2, -1)[row].double()
            pair = weights[:, None] * weights[None, :]
            change = pair * source[layer][row, head].double() - pair * target[layer][row, head].double()
            total += float((change**2).sum()) / 3
        expected.append(total / 2)
    result = losses.structure_loss(layers(host, source), layers(host, target), regions).values
    torch.testing.assert_close(
        result.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


def edit_tokens(host: Host, length: int, *words: tuple[int, ...]) -> Any:
    """EDIT_TOKENS of a description of `length` tokens with the given words' positions."""
    tokens = host.pack_module("patches.unify.tokens")
    found = tuple(tokens.EditWord("word", word, tuple(token + 1 for token in word)) for word in words)
    return tokens.EditTokens(found, length, length + 1, ())


@pytest.mark.parametrize("form", ["token_ratio", "absolute", "spatial_ratio", "area_ratio"])
def test_alignment_loss(host: Host, losses: Any, form: str) -> None:
    """Protects: each form's formula, averaged over heads, layers and words, for rows with words and lengths
    of their own.
    """
    target = maps(2, 9)
    rows = [([(2,), (4, 5)], 6), ([(3,)], 4)]
    words = host.pack_module("patches.unify.words").edit_words(
        [edit_tokens(host, length, *found) for found, length in rows], 9
    )
    masks = {LAYERS[0]: torch.rand(2, 16), LAYERS[1]: torch.tensor([[0.0, 1.0, 0.5, 0.0]])}
    expected = []
    for row, (found, length) in enumerate(rows):
        terms = []
        for layer, word, head in itertools.product(LAYERS, found, range(3)):
            inside = masks[layer].expand(2, -1)[row].double()
            maps_here = target[layer][row, head].double()
            attention = maps_here[:, list(word)].sum(dim=1)
            if form == "token_ratio":
                share = attention / maps_here[:, 1 : length + 1].sum(dim=1)
                terms.append((1 - float((share * inside).sum() / inside.sum())) ** 2)
            elif form == "absolute":
                terms.append((1 - float((attention * inside).sum() / inside.sum())) ** 2)
            elif form == "spatial_ratio":
                terms.append(3 - 4 * float((attention * inside).sum() / attention.sum()))
            else:
                ratio = (attention * inside).sum() / inside.sum()
                ratio /= (attention * (1 - inside)).sum() / (1 - inside).sum()
                terms.append(-(float(ratio) ** 2))
        expected.append(sum(terms) / len(terms))
    result = losses.alignment_loss(layers(host, target), words, masks, form).values
    torch.testing.assert_close(
        result.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
    )


def test_alignment_loss_is_bounded(host: Host, losses: Any) -> None:
    """Protects: token_ratio is 0 when the word has all of the description's attention in the mask and 1 when
    it has none; spatial_ratio is -1 and 3 when all of its attention is inside and outside.
    """
    words = host.pack_module("patches.unify.words").edit_words([edit_tokens(host, 4, (2,))], 6)
    masks = {LAYERS[0]: torch.tensor([[1.0, 1.0, 0.0, 0.0]])}
    for token, expected in ((2, 0.0), (3, 1.0)):
        target = {LAYERS[0]: torch.zeros(1, 1, 4, 6)}
        target[LAYERS[0]][..., 0] = 0.7
        target[LAYERS[0]][..., token] = 0.3
        value = losses.alignment_loss(layers(host, target), words, masks).values.item()
        assert value == pytest.approx(expected)
    for places, expected in (((0, 1), -1.0), ((2, 3), 3.0)):
        target = {LAYERS[0]: torch.zeros(1, 1, 4, 6)}
        target[LAYERS[0]][..., 0] = 0.7
        target[LAYERS[0]][0, 0, places, 2] = 0.3
        value = losses.alignment_loss(layers(host, target), words, masks, "spatial_ratio").values.item()
        assert value == pytest.approx(expected)


def test_padded_words_leave_gradients_alone(host: Host, losses: Any) -> None:
    """Protects: a row with fewer words than its neighbour has the gradient it has alone, in every form."""
    make = host.pack_module("patches.unify.words").edit_words
    both = make([edit_tokens(host, 6, (2,)), edit_tokens(host, 6, (3,), (4,))], 9)
    alone = make([edit_tokens(host, 6, (2,))], 9)
    target = maps(2, 9)
    masks = {layer: torch.linspace(0, 1, target[layer].shape[2])[None] for layer in LAYERS}
    for form in losses.FORMS:
        found = []
        for words, rows in ((both, 2), (alone, 1)):
            ends = layers(host, {layer: value[:rows] for layer, value in target.items()})
            for end in ends.values():
                end.q.requires_grad_()
            found.append([grad[:1] for _, grad in losses.alignment_loss(ends, words, masks, form).parts])
            assert len(found[-1]) == len(LAYERS)
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize(("tokens", "context"), [((0,), 9), ((9,), 9), ((8, 9), 9)])
def test_tokens_out_of_range(host: Host, tokens: tuple[int, ...], context: int) -> None:
    """Protects: the start mark and positions beyond the context are refused, for both descriptions."""
    words = host.pack_module("patches.unify.words")
    with pytest.raises(ValueError, match=f"edit_tokens has token {tokens[-1]} but .* has 9 tokens"):
        words.edit_words([edit_tokens(host, 6, tokens)], context)
    shifted = edit_tokens(host, 6, tuple(token - 1 for token in tokens))
    with pytest.raises(ValueError, match=r"edit_tokens \(of the source description\) has token"):
        words.source_words([shifted], context)
    with pytest.raises(ValueError, match="edit_tokens has no words"):
        words.edit_words([edit_tokens(host, 6)], context)


def test_layer_masks(host: Host) -> None:
    """Protects: on each grid a place holds the covered part of its area; no mask covers everything."""
    layer = host.pack_module("patches.attention.layers").AttentionLayer
    layer_masks = host.pack_module("patches.attention.masks").layer_masks
    layers = [layer("input.1.0", 0, 32, 4, ""), layer("middle.0.0", 2, 64, 4, "")]
    mask = torch.zeros(1, 128, 128)
    mask[:, :32, :48] = 1
    fine, coarse = layer_masks(mask, layers, 16, 16, torch.device("cpu")).values()
    expected = torch.zeros(16, 16)
    expected[:4, :6] = 1
    torch.testing.assert_close(fine, expected.reshape(1, 256))
    expected = torch.zeros(4, 4)
    expected[0, :2] = torch.tensor([1.0, 0.5])
    torch.testing.assert_close(coarse, expected.reshape(1, 16))
    for whole in layer_masks(None, layers, 16, 16, torch.device("cpu")).values():
        assert bool((whole == 1).all())


def test_weights(balance: Any) -> None:
    """Protects: structure's weight grows and alignment's falls, by the documented exponentials."""
    made = balance.Balance("balanced", beta1=0.5, k1=3.0, beta2=2.0, k2=1.5)
    for progress in (0.0, 0.25, 1.0):
        first, second = made.weights(progress)
        assert first == pytest.approx(0.5 * math.exp(-3.0 * (1 - progress)))
        assert second == pytest.approx(2.0 * math.exp(-1.5 * progress))
    assert balance.Balance("norm", 0.5, 3.0, 2.0, 1.5).weights(0.2) == (0.5, 2.0)


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.55, 1.0])
def test_drawn_curves(balance: Any, progress: float) -> None:
    """Protects: drawn weights follow their points, times beta1 and beta2, and the k do not act."""
    made = balance.Balance(beta1=0.5, k1=2.0, beta2=2.0, k2=1.0, drawn=((0.0, 0.8, 0.8), (1.0, 0.0)))
    expected = (0.5 * min(0.8, 1.6 * progress), 2.0 * (1 - progress))
    assert made.weights(progress) == pytest.approx(expected, abs=1e-12)


def test_drawn_curves_of_the_node(host: Host) -> None:
    """Protects: a curve of the host's Curve Editor replaces the weight of its loss, and no other."""
    settings = {"combination": "balanced", "beta1": 2.0, "k1": 2.0, "beta2": 1.0, "k2": 2.0}
    points = {"structure": [[0.0, 0.0], [0.5, 1.0], [1.0, 1.0]], "words": [[0.0, 1.0], [1.0, 0.25]]}
    prompt = {
        name: {
            "class_type": "CurveEditor",
            "inputs": {"curve": {"points": some, "interpolation": "linear"}},
        }
        for name, some in points.items()
    }

    def made(*names: str) -> Any:
        curves = {f"{name}_curve": [name, 0] for name in names}
        node = {"class_type": "DescEditAdaptiveScheduler", "inputs": {**settings, **curves}}
        shown = {"class_type": "PreviewImage", "inputs": {"images": ["1", 1]}}
        return host.run_graph({**prompt, "1": node, "2": shown})["1"][0]

    assert made().drawn is None
    both = made("structure", "words")
    assert both.weights(0.0) == pytest.approx((0.0, 1.0))
    assert both.weights(0.5)[0] == pytest.approx(2.0)
    assert both.weights(1.0) == pytest.approx((2.0, 0.25))
    for name, at in (("structure", 0), ("words", 1)):
        one = made(name)
        for progress in (0.0, 0.3, 1.0):
            weights = list(one.weights(progress))
            assert weights.pop(at) == pytest.approx(both.weights(progress)[at])
            plain = (2.0 * math.exp(-2.0 * (1 - progress)), math.exp(-2.0 * progress))
            assert weights == pytest.approx([plain[1 - at]], rel=1e-3)


def test_direction(balance: Any) -> None:
    """Protects: the three combinations, each row normed by itself, in units of length for each loss, and no
    step longer than a linear loss needs to reach its least value.
    """
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(2, 4, 3, 3, generator=generator) * torch.tensor([1e-6, 5.0])[:, None, None, None]
    two = torch.randn(2, 4, 3, 3, generator=generator)
    first, second = 0.5 * math.exp(-3.0 * 0.75), 2.0 * math.exp(-1.5 * 0.25)
    for row in range(2):
        a, b = one[row].double(), two[row].double()
        expected = {
            "balanced": (first, second),
            "norm": (0.5, 2.0),
            "naive": (0.5, 2.0),
        }
        for name, weights in expected.items():
            made = balance.Balance(name, 0.5, 3.0, 2.0, 1.5)
            for excess in ((1e9, 1e9), (0.3, 1e9), (1e9, 0.2), (0.3, 0.2)):
                # Units of 3 and 0.7; the second row's are twice as long.
                units = torch.tensor([1.0, 2.0])[:, None, None, None]
                slopes = [
                    balance.Slope(gradient, torch.full((2,), left), unit * units)
                    for gradient, left, unit in zip((one, two), excess, (3.0, 0.7), strict=True)
                ]
                lengths = [
                    weight * unit * (row + 1) for weight, unit in zip(weights, (3.0, 0.7), strict=True)
                ]
                if name == "naive":
                    length = min(math.hypot(*lengths), sum(excess) / float((a + b).norm()))
                    value = length * (a + b) / (a + b).norm()
                else:
                    value = min(lengths[0], excess[0] / float(a.norm())) * a / a.norm()
                    value += min(lengths[1], excess[1] / float(b.norm())) * b / b.norm()
                result = made.move(*slopes, made.weights(0.25))[row]
                torch.testing.assert_close(result.double(), value, rtol=1e-5, atol=1e-7)


def test_useless_gradients(balance: Any) -> None:
    """Protects: a row whose gradient is zero or not finite adds nothing and spoils no other row."""
    gradient = torch.ones(3, 4)
    gradient[0], gradient[1, 2] = 0, math.nan
    excess, unit = torch.tensor([0.0, math.nan, math.inf]), torch.ones(3, 1)
    slopes = (
        balance.Slope(gradient, excess, unit),
        balance.Slope(0 * gradient[[0, 0, 0]], 0 * unit[:, 0], unit),
    )
    moved = balance.Balance("norm", beta1=1.0).move(*slopes, (1.0, 1.0))
    torch.testing.assert_close(moved, torch.tensor([[0.0] * 4, [0.0] * 4, [0.5] * 4]))


@pytest.mark.parametrize("form", ["token_ratio", "absolute", "spatial_ratio", "area_ratio"])
def test_least_values(host: Host, losses: Any, form: str) -> None:
    """Protects: the least value of each form, up to which a step may go, is what the loss is when all of the
    attention in the mask is the word's, and none outside.
    """
    words = host.pack_module("patches.unify.words").edit_words([edit_tokens(host, 4, (2,))], 6)
    target = {LAYERS[0]: torch.zeros(1, 1, 4, 6)}
    target[LAYERS[0]][:, :, 2:, 0] = target[LAYERS[0]][:, :, :2, 2] = 1.0
    masks = {LAYERS[0]: torch.tensor([[1.0, 1.0, 0.0, 0.0]])}
    value = losses.alignment_loss(layers(host, target), words, masks, form).values.item()
    if form == "area_ratio":
        assert value < -1e6
        assert losses.LEAST[form] == -math.inf
    else:
        assert value == pytest.approx(losses.LEAST[form], abs=1e-6)


@pytest.mark.parametrize("name", ["beta1", "k1", "beta2", "k2"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_bad_factors(host: Host, name: str, value: float) -> None:
    """Protects: negative and non-finite factors are refused with the node's and the factor's name."""
    with pytest.raises(
        Exception, match=f"Adaptive Scheduler .UnifyEdit.: {name} is .* but must be 0 or a positive"
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
