"""The viewers: attention maps against the UNet's own queries and keys, and contact sheets pixel by pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small_models
import torch
from host import Host, NodeError
from unify_edit import Edit, tokenizer_only_clip

SIDE = 8


@pytest.fixture(scope="module")
def model() -> Any:
    """A random UNet."""
    return small_models.small_unet()


@pytest.fixture
def view(host: Host) -> Any:
    """The module."""
    return host.pack_module("patches.attention.maps")


def attention(model: Any, name: str, run: Any) -> tuple[Any, torch.Tensor]:
    """What `run` gives, and the mean over heads and layers of `name`'s probabilities at the grid of SIDE,
    [images, places, keys], from the UNet's own projections, in float64.
    """
    seen: dict[tuple[str, str], torch.Tensor] = {}
    handles = []
    for path, module in model.model.diffusion_model.named_modules():
        if path.endswith((f"{name}.to_q", f"{name}.to_k")):
            layer, _, part = path.rpartition(".")

            def keep(module: Any, args: Any, output: torch.Tensor, key: Any = (layer, part)) -> None:
                seen[key] = output.double()

            handles.append(module.register_forward_hook(keep))
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    means = []
    for layer in {layer for layer, _ in seen}:
        q, k = (seen[layer, part].unflatten(-1, (4, -1)).transpose(1, 2) for part in ("to_q", "to_k"))
        if q.shape[2] == SIDE * SIDE:
            scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
            means.append(scores.softmax(dim=-1).mean(dim=1))
    return result, torch.stack(means).mean(dim=0)


def test_word_maps(host: Host, model: Any, view: Any) -> None:
    """Protects: a word's map is the mean over heads, layers of the chosen grid and its tokens of the
    probabilities that the UNet itself would compute; the model is left as it was.
    """
    edit = Edit(host, model, batch=2)
    tokens, _ = host.execute(
        "DescEditFindTokens",
        clip=tokenizer_only_clip(),
        source_description="a red circle",
        edit_description="a green and yellow circle",
        words="green, circle, and yellow",
    )
    before = small_models.fingerprint(model)
    place = view.LatentSource(0.4, edit.latent["samples"])
    with torch.inference_mode():
        found, expected = attention(
            model, "attn2", lambda: view.capture_attention(model, edit.positive, tokens, place, SIDE, SIDE)
        )
    assert list(found.words) == ["green", "circle", "and yellow"]
    for word in tokens.words:
        wanted = expected[..., list(word.tokens)].mean(dim=-1).reshape(2, SIDE, SIDE)
        torch.testing.assert_close(found.words[word.text].double(), wanted, rtol=1e-4, atol=0)
    assert small_models.fingerprint(model) == before


def test_structure(host: Host, model: Any, view: Any) -> None:
    """Protects: the colours are the three leading principal components of the UNet's self-attention, each
    scaled to 0..1 with the place farthest from the mean bright.
    """
    edit = Edit(host, model)
    place = view.LatentSource(0.4, edit.latent["samples"])
    with torch.inference_mode():
        found, expected = attention(
            model,
            "attn1",
            lambda: view.capture_attention(model, edit.positive, edit.tokens, place, SIDE, SIDE),
        )
    rows = expected[0].cpu().numpy()
    centred = rows - rows.mean(axis=0)
    values, vectors = np.linalg.eigh(centred.T @ centred)
    scores = centred @ vectors[:, np.argsort(values)[::-1][:3]]
    for component, score in enumerate(scores.T):
        score = score if score[np.abs(score).argmax()] > 0 else -score
        wanted = (score - score.min()) / (score.max() - score.min())
        np.testing.assert_allclose(found.structure[0, ..., component].flatten().cpu(), wanted, atol=2e-3)


def test_source(host: Host, model: Any, view: Any) -> None:
    """Protects: an inversion is looked at on its own path, a latent with the seed's noise at the noise level
    that percent names, and neither depends on what another run left.
    """
    edit = Edit(host, model, steps=5)
    seen: list[tuple[torch.Tensor, float]] = []

    def watch(apply_model: Any, call: dict[str, Any]) -> torch.Tensor:
        seen.append((call["input"].clone().cpu(), float(call["timestep"][0])))
        return apply_model(call["input"], call["timestep"], **call["c"])

    watched = model.clone()
    watched.set_model_unet_function_wrapper(watch)
    with torch.inference_mode():
        for place in (
            view.LatentSource(0.6, inversion=edit.inversion),
            view.LatentSource(0.6, edit.latent["samples"], seed=5),
        ):
            view.capture_attention(watched, edit.positive, edit.tokens, place, SIDE, SIDE)
    sampling = model.get_model_object("model_sampling")
    levels = sampling.timestep(edit.inversion.sigmas[:-1]).double()
    step = int((1 - levels / 999 - 0.6).abs().argmin())
    assert len(seen) == 2
    assert seen[0][1] == float(edit.inversion.sigmas[step])
    assert torch.equal(seen[0][0], edit.inversion.trajectory[step])
    sigma = float(sampling.sigma(torch.tensor(0.4 * 999)))
    noise = torch.randn(edit.latent["samples"].shape, generator=torch.manual_seed(5))
    assert seen[1][1] == pytest.approx(sigma, rel=1e-5)
    torch.testing.assert_close(
        seen[1][0], edit.latent["samples"] * 0.18215 + sigma * noise, rtol=1e-4, atol=1e-4
    )


def test_words_lie_where_they_are_drawn(host: Host) -> None:
    """Protects: on a drawn scene the object's colour is seen in the object, and the background around it."""
    model, clip, vae, *_ = host.execute("DescEditTinyStudio")
    source, _, mask, text, other = host.execute("DescEditTinyScene", edit_type="background", seed=1)
    tokens, _ = host.execute(
        "DescEditFindTokens",
        clip=clip,
        source_description=other,
        edit_description=text,
        words="yellow, background",
    )
    (conditioning,) = host.execute("CLIPTextEncode", clip=clip, text=text)
    (latent,) = host.execute("VAEEncode", pixels=source, vae=vae)
    inputs = {"model": model, "conditioning": conditioning, "edit_tokens": tokens, "latent": latent}
    sheet, structure = host.execute("DescEditAttentionMaps", **inputs, percent=0.6, image=source, side=128)
    assert structure.shape == (1, 128, 128, 3)
    assert sheet.shape[2] == 3 * (128 + 6) + 6
    pictures = [sheet[0, -134:-6, 6 + 134 * number : 134 * (number + 1)] for number in range(3)]
    torch.testing.assert_close(pictures[0], source[0], rtol=0, atol=1 / 255)
    around = mask[0] > 0.5
    red = [(picture - 0.4 * source[0])[..., 0] for picture in pictures[1:]]
    colour, background = (float(heat[~around].mean() - heat[around].mean()) for heat in red)
    assert colour > 0.1 > -0.1 > background


def test_a_word_that_stands_twice(host: Host, model: Any) -> None:
    """Protects: each place of a repeated word has its own map, and tokens without a word are named."""
    edit = Edit(host, model)
    tokens, _ = host.execute(
        "DescEditFindTokens",
        clip=tokenizer_only_clip(),
        source_description="a circle and a square",
        edit_description="a red circle and a red square",
    )
    inputs = {"model": model, "conditioning": edit.positive, "latent": edit.latent, "side": 64}
    sheet, _ = host.execute("DescEditAttentionMaps", edit_tokens=tokens, **inputs)
    assert sheet.shape[2] == 2 * (64 + 6) + 6
    assert not torch.equal(sheet[:, -70:, 6:70], sheet[:, -70:, 76:140])
    nothing = type(tokens)((), 3, 3, ())
    with pytest.raises(Exception, match="Attention Maps: edit_tokens has no words"):
        host.execute("DescEditAttentionMaps", edit_tokens=nothing, **inputs)


def test_overlay(view: Any) -> None:
    """Protects: a map goes from dark blue at its lowest to yellow at its highest, whatever its values."""
    maps = torch.linspace(3, 5, 16).reshape(1, 4, 4)
    painted = view.overlay(maps, torch.zeros(1, 32, 32, 3))
    assert painted[0, 0, 0].argmax() == 2
    assert painted[0, -1, -1, 0] > 0.5 > 0.3 > painted[0, -1, -1, 2]
    assert bool(view.overlay(torch.ones(1, 4, 4), torch.zeros(1, 8, 8, 3)).isfinite().all())


def test_maps_refuse(host: Host, model: Any) -> None:
    """Protects: inputs that do not belong together are named; none of them draws a map."""
    edit = Edit(host, model)
    inputs = {"model": model, "conditioning": edit.positive, "edit_tokens": edit.tokens}

    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(Exception, match=f"Attention Maps: {message}"):
            host.execute("DescEditAttentionMaps", **{**inputs, **changes})

    refused("connect either latent or inversion")
    refused("connect either latent or inversion", latent=edit.latent, inversion=edit.inversion)
    refused(r"latent has shape \[1, 16, 8, 8\]", latent={"samples": torch.ones(1, 16, 8, 8)})
    short = small_models.conditioning(2, tokens=2)
    refused("edit_tokens has token 2 but conditioning has 2 tokens", latent=edit.latent, conditioning=short)
    area = [[edit.positive[0][0], {"area": (4, 4, 0, 0), "strength": 1.0}]]
    refused("conditioning has no entry for the whole image", latent=edit.latent, conditioning=area)
    refused("the inversion was made with", inversion=edit.inversion, model=small_models.small_unet(seed=9))
    refused("image has 3 images but 1 are", latent=edit.latent, image=torch.zeros(3, 8, 8, 3))


def test_compare(host: Host) -> None:
    """Protects: every picture stands in its column and row, scaled as a whole, under a label; a single one is
    repeated.
    """
    draw = host.pack_module("pictures.contact_sheet").draw_sheet
    generator = torch.Generator().manual_seed(0)
    single = torch.rand(1, 64, 64, 3, generator=generator)
    batch = torch.rand(2, 64, 64, 3, generator=generator)
    wide = torch.full((2, 32, 128, 3), 0.25)
    sheet = draw([("source", single), ("a long label that needs two lines", batch), ("", wide)], 64)[0]
    assert sheet.shape[1] == 3 * 70 + 6
    for row in range(2):
        top = len(sheet) - 140 + 70 * row
        shown = [sheet[top : top + 64, 6 + 70 * column : 70 + 70 * column] for column in range(3)]
        torch.testing.assert_close(shown[0], single[0], rtol=0, atol=1 / 255)
        torch.testing.assert_close(shown[1], batch[row], rtol=0, atol=1 / 255)
        assert shown[2][:24].mean() == 1.0
        torch.testing.assert_close(shown[2][24:40], torch.full((16, 64, 3), 0.25), rtol=0, atol=1 / 255)
    head = sheet[: len(sheet) - 140]
    assert [bool((head[:, 6 + 70 * n : 70 + 70 * n] < 0.5).any()) for n in range(3)] == [True, True, False]


def test_captions_and_frames(host: Host) -> None:
    """Protects: a text stands below its own picture in a row that is high enough for it, and a red frame
    around the pictures that get one; without either a sheet is as before.
    """
    draw = host.pack_module("pictures.contact_sheet").draw_sheet
    grey = torch.full((2, 64, 64, 3), 0.5)
    plain = draw([("a", grey), ("b", grey)], 64)[0]
    captions = [["a text of several words, thus of several lines", ""], ["", "two"]]
    sheet = draw([("a", grey), ("b", grey)], 64, captions, [[False, True], [False, False]])[0]
    assert len(sheet) > len(plain)
    top = len(plain) - 140
    assert torch.equal(sheet[: top + 64, :76], plain[: top + 64, :76])
    frame = sheet[top : top + 64, 76:140]
    assert torch.equal(frame[0], torch.tensor([1.0, 0.0, 0.0]).expand(64, 3))
    torch.testing.assert_close(frame[3:-3, 3:-3], grey[0, 3:-3, 3:-3], rtol=0, atol=1 / 255)
    second = len(sheet) - (len(plain) - top - 70) - 14  # one line of text below the second row
    assert (sheet[top + 64 : second, 6:70] < 0.5).any()
    assert (sheet[top + 64 : second, 76:140] == 1).all()
    assert (sheet[second + 64 :, 76:140] < 0.5).any()
    assert (sheet[second + 64 :, 6:70] == 1).all()


def test_compare_in_a_graph(host: Host) -> None:
    """Protects: the growing inputs work in a queued prompt, and wrong labels and batches name the node."""
    graph = {
        "a": {
            "class_type": "EmptyImage",
            "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 255},
        },
        "b": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 0}},
        "sheet": {
            "class_type": "DescEditCompare",
            "inputs": {"images.image0": ["a", 0], "images.image1": ["b", 0], "labels": "one", "side": 64},
        },
        "save": {"class_type": "PreviewImage", "inputs": {"images": ["sheet", 0]}},
    }
    (sheet,) = host.run_graph(graph)["sheet"]
    assert sheet.shape[2] == 2 * 70 + 6
    assert sheet[0, -20, 20].tolist() == [0.0, 0.0, 1.0]
    graph["sheet"]["inputs"]["labels"] = "one\ntwo\nthree"
    with pytest.raises(NodeError, match=r"Contact Sheet \(labelled\): labels has 3 lines but 2 images"):
        host.run_graph(graph)
    graph["sheet"]["inputs"]["labels"] = "one"
    graph["a"]["inputs"]["batch_size"] = 3
    with pytest.raises(
        NodeError, match=r"Contact Sheet \(labelled\): one input has 3 images but input 2 has 2"
    ):
        host.run_graph(graph)
