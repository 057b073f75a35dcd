"""UnifyEdit on DiTs of Flux's kind: its maps, its gradients, and edits by every part of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import pytest
import small_dits
import small_models
import torch
from closeness import same
from dit_formula import Blocks, Positions
from host import Host, device
from live_bytes import LiveBytes
from unify_edit import Edit, box_mask, denoise, euler, tokenizer_only_clip

FAMILIES = tuple(small_dits.FAMILIES)


@pytest.fixture(scope="module")
def pack(host: Host) -> Any:
    """What is tested."""
    return SimpleNamespace(
        recorder=host.pack_module("patches.attention.recorder"),
        losses=host.pack_module("patches.unify.losses"),
        words=host.pack_module("patches.unify.words"),
        autograd=host.pack_module("patches.host.autograd"),
    )


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """The random networks that were made so far, with a damped prediction that an inversion can follow."""
    return {}


def _model(models: dict[str, Any], family: str) -> Any:
    if family not in models:
        models[family] = small_dits.small_dit(family)
        with torch.inference_mode():
            models[family].model.diffusion_model.final_layer.linear.weight.mul_(0.2)
    return models[family]


def _ready(models: dict[str, Any], family: str) -> Any:
    """The same, for calls outside of a sampling."""
    model = small_models.loaded(_model(models, family))
    model.pre_run()
    return model


def _edit(host: Host, model: Any, **more: Any) -> Edit:
    edit = Edit(host, model, **more)
    edit.cfg = 1.0
    edit.sampler_inputs["mask"] = box_mask(size=edit.inversion.scale * 16)
    return edit


def _tokens(host: Host) -> Any:
    tokens, _ = host.execute(
        "DescEditFindTokens",
        clip=tokenizer_only_clip(),
        source_description="a red circle",
        edit_description="a green circle",
    )
    return tokens


def _entry(model: Any, x: torch.Tensor, conditioning: Any) -> dict[str, Any]:
    """A conditioning as a sampling has it."""
    entries = comfy.samplers.process_conds(
        model.model, x, {"positive": comfy.sampler_helpers.convert_cond(conditioning)}, x.device
    )
    return entries["positive"][0]


def _record(
    pack: Any, model: Any, recorder: Any, x: torch.Tensor, conditioning: Any = None, sigma: float = 0.6
) -> Any:
    """One recorded call."""
    entry = _entry(model, x, conditioning or small_models.conditioning(2))
    options = pack.autograd.differentiable_options(model.model_options)
    pack.recorder.record(model.model, recorder, entry, x, x.new_full((len(x),), sigma), options)
    return entry


@pytest.mark.parametrize(("size", "side"), [((16, 16), 0), ((16, 16), 3), ((20, 12), 4)])
@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2", "Chroma"])
def test_maps(
    host: Host, pack: Any, models: dict[str, Any], family: str, side: int, size: tuple[int, int]
) -> None:
    """Protects: a map is a part of the one softmax that the network computes, at every layer of both kinds of
    block: from each place's middle token, to the sum of each place's tokens and to every token of the text.
    """
    model = _ready(models, family)
    network, positions = host.network(model), Positions(model)
    layers = [
        pack.recorder.AttentionLayer(**{**vars(layer), "side": side}) for layer in network.layers.values()
    ]
    recorder = pack.recorder.AttentionRecorder(network, layers, layers)
    with torch.inference_mode(), Blocks(model) as blocks:
        x = model.model.process_latent_in(small_models.latent(3, 2, size, model)).to(device())
        _record(pack, model, recorder, x)
    rows, columns = layers[0].grid(*size)
    down, across = layers[0].places(*size)
    assert (down, across) == {0: (rows, columns), 3: (3, 3), 4: expected_places(rows, columns)}[side]
    place = [
        (y * down // rows) * across + column * across // columns
        for y in range(rows)
        for column in range(columns)
    ]
    middles = [
        ((2 * y + 1) * rows // (2 * down)) * columns + (2 * column + 1) * columns // (2 * across)
        for y in range(down)
        for column in range(across)
    ]
    for key in network.layers:
        (call,) = blocks.calls[key]
        grid = positions.grid(rows, columns)
        where = torch.cat([positions.words(call.text, grid), grid])
        q, k = (positions.rotated(tensor, where) for tensor in (call.q, call.k))
        probabilities = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)[:, :, call.text :][:, :, middles]
        text, image = probabilities[..., : call.text], probabilities[..., call.text :]
        summed = torch.stack(
            [image[..., [p == n for p in place]].sum(-1) for n in range(down * across)], dim=-1
        )
        for found, expected in (
            (recorder.self_attention[key], summed),
            (recorder.cross_attention[key], text),
        ):
            torch.testing.assert_close(found.probabilities().double().cpu(), expected, rtol=1e-4, atol=1e-6)
            assert found.columns == expected.shape[-1]
            torch.testing.assert_close(found.mean().double().cpu(), expected.mean(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2", "Chroma"])
def test_gradients_of_the_losses(
    host: Host, pack: Any, models: dict[str, Any], family: str, again: bool
) -> None:
    """Protects: both losses' gradients at the latent are what finite differences of the losses say, with
    blocks kept and computed again, on coarse maps of both kinds of block.
    """
    model, conditioning = _ready(models, family), small_models.conditioning(2)
    network, checkpointed = host.network(model), host.pack_module("patches.host.checkpointing").checkpointed
    layers = network.structure_layers(16, 16, 4, "double_block.1, single_block.1")
    words = network.word_layers(16, 16, 3, "double_block.0, single_block.0")
    generator = torch.Generator().manual_seed(1)
    x, other, along = (torch.randn(model_shape(model), generator=generator).to(device()) for _ in range(3))
    entry = _entry(model, x, conditioning)
    tokens = pack.words.edit_words([_tokens(host)], entry["model_conds"]["c_crossattn"].cond.shape[1])
    masks = {layer.key: torch.ones(1, 9, device=device()) for layer in words}
    options = pack.autograd.differentiable_options(model.model_options)
    if again:
        options["transformer_options"] = checkpointed(options["transformer_options"], network.module)

    def record(x: torch.Tensor) -> Any:
        made = pack.recorder.AttentionRecorder(network, layers, words, stop=True, whole_layers=again)
        pack.recorder.record(model.model, made, entry, x, x.new_full((1,), 0.6), options)
        return made

    with pack.autograd.gradients():
        with torch.no_grad():
            source = {key: found.detach() for key, found in record(other).self_attention.items()}

        def losses(x: torch.Tensor) -> list[Any]:
            made = record(x)
            return [
                pack.losses.structure_loss(source, made.self_attention),
                pack.losses.alignment_loss(made.cross_attention, tokens.to(x.device), masks),
            ]

        leaf = x.clone().requires_grad_()
        taken = losses(leaf)
        found = [
            pack.recorder.loss_gradients([loss], [leaf], keep_graph=number == 0)[0]
            for number, loss in enumerate(taken)
        ]
        with torch.no_grad():
            high, low = ([float(loss.values) for loss in losses(x + step * along)] for step in (0.02, -0.02))
    for gradient, more, less in zip(found, high, low, strict=True):
        assert float((gradient * along).sum()) == pytest.approx((more - less) / 0.04, rel=0.02)


def expected_places(rows: int, columns: int) -> tuple[int, int]:
    """At most 4x4, in the image's proportions."""
    return {(10, 6): (5, 3), (20, 12): (5, 3)}.get((rows, columns), (4, 4))


def model_shape(model: Any) -> tuple[int, ...]:
    """Of a latent of 16x16."""
    return (1, model.model.latent_format.latent_channels, 16, 16)


@pytest.mark.parametrize("mode", ["ddim", "virtual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_edits(host: Host, models: dict[str, Any], family: str, mode: str) -> None:
    """Protects: every family is inverted and edited, without guidance too, both losses find their way back at
    every step and move the latent; a second run has the same bits and the model is as before; with no
    strength the source comes back.
    """
    edit = _edit(host, _model(models, family), mode=mode, refine=8)
    plain = edit.run(euler(host))
    before = small_models.fingerprint(edit.model)
    edited = edit.run()
    assert small_models.fingerprint(edit.model) == before
    assert edited.isfinite().all()
    assert bool((edit.trace().values > 0).all())
    assert bool(edit.trace().usable.all())
    assert not same(edited, plain)
    assert torch.equal(edit.run(), edited)
    edit.cfg = 3.0
    assert not same(edit.run(), edited)
    edit.positive, edit.cfg = small_models.conditioning(1), 1.0
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0, beta2=0.0)
    expected = edit.run(euler(host)) if mode == "ddim" else edit.latent["samples"]
    assert same(edit.run(), expected, 20)


@pytest.mark.parametrize("family", ["Flux.1 dev", "Chroma"])
def test_losses_fall(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: the gradient steps lead downhill: with structure alone the source's attention is closer than
    without, and with words alone the words have more.
    """
    edit = _edit(host, _model(models, family))
    edit.sampler_inputs.pop("mask")
    found = {}
    for name, weights in (("both off", (1e-6, 1e-6)), ("structure", (1.0, 1e-6)), ("words", (1e-6, 1.0))):
        edit.sampler_inputs["balance"] = edit.balance(beta1=weights[0], beta2=weights[1], combination="norm")
        edit.run()
        found[name] = edit.trace().values[-1, :2, 0].tolist()
    assert found["structure"][0] < found["both off"][0]
    assert found["words"][1] < found["both off"][1]


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2", "Chroma"])
def test_ways_of_computing(
    host: Host, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Protects: rows of a step joined or apart, blocks kept or computed again: the same edit to rounding, and
    for several images each as if alone.
    """
    model, memory = _model(models, family), host.pack_module("patches.unify.memory")
    edit = _edit(host, model, steps=2, batch=2)
    found = {}
    for joined in (True, False):
        monkeypatch.setattr(memory, "few_operations", lambda *_, joined=joined: joined)
        for again in (False, True):
            edit.sampler_inputs["checkpointing"] = again
            found[joined, again] = edit.run()
    for other in found.values():
        assert same(other, found[False, False], 20)
    for image in range(2):
        alone = _edit(host, model, steps=2)
        alone.latent = {"samples": edit.latent["samples"][image : image + 1]}
        alone.inversion, alone.noise, alone.path_noise = host.execute(
            "DescEditInvert",
            model=model,
            latent=alone.latent,
            source=small_models.conditioning(1),
            sigmas=alone.sigmas,
            refine=1,
        )
        assert same(alone.run(), found[True, False][image : image + 1], 20)


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2"])
def test_noise_mask(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: what a noise mask protects is the image's to the bit of the VAE's scale, and the rest is
    edited.
    """
    edit = _edit(host, _model(models, family))
    mask = torch.zeros(1, 16, 16)
    mask[:, :, :8] = 1
    edit.noise = {**edit.noise, "noise_mask": mask}
    edited, source = edit.run(), edit.latent["samples"]
    assert same(edited[..., 8:], source[..., 8:])
    assert not same(edited[..., :8], source[..., :8])


def test_of_flux_2s_text(host: Host, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects: Flux.2's texts are padded in front, to 512 tokens, and the words are found behind."""
    words, seen = host.pack_module("patches.unify.words"), []
    make = words._words

    def note(*args: Any) -> Any:
        seen.append(make(*args))
        return seen[-1]

    monkeypatch.setattr(words, "_words", note)
    edit = _edit(host, _model(models, "Flux.2"), steps=1)
    edit.run()
    (found,) = seen
    given = small_models.conditioning(2)[0][0].shape[1]
    (word,) = edit.tokens.words
    assert found.tokens.shape == (1, 1, 512)
    assert found.tokens[0, 0].nonzero().flatten().tolist() == [512 - given + token for token in word.tokens]
    first = 512 - given + 1
    assert found.description[0].nonzero().flatten().tolist() == [first, first + 1, first + 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_mask_and_maps(host: Host, models: dict[str, Any], family: str) -> None:
    """Protects: Find Edit Mask, a mask that UnifyEdit finds, and Attention Maps run on every family, and the
    node UnifyEdit gives the bits of its parts with the plot.
    """
    model = _model(models, family)
    texts = {"source": small_models.conditioning(1), "edit": small_models.conditioning(2)}
    latent, tokens = {"samples": small_models.latent(3, 2, model=model)}, _tokens(host)
    side = 16 * model.get_model_object("latent_format").spacial_downscale_ratio
    (mask,) = host.execute("DescEditFindMask", model=model, latent=latent, edit_tokens=tokens, **texts)
    assert mask.shape == (2, side, side)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    word_maps, structure = host.execute(
        "DescEditAttentionMaps",
        model=model,
        conditioning=texts["edit"],
        edit_tokens=tokens,
        latent=latent,
        cross_attn_res=4,
        self_attn_res=8,
    )
    assert word_maps.isfinite().all()
    assert word_maps.std() > 0
    assert structure.shape == (2, 256, 256, 3)
    (options,) = host.execute("DescEditUnifyOptions", auto_mask=True)
    edited, region, plot = host.execute(
        "DescEditUnify",
        model=model,
        latent=latent,
        edit_tokens=tokens,
        steps=2,
        cfg=1.0,
        options=options,
        **texts,
    )
    assert edited["samples"].isfinite().all()
    assert region.shape == (2, side, side)
    assert plot.isfinite().all()


@pytest.mark.parametrize("family", ["Flux.1 dev", "Flux.2"])
def test_memory(host: Host, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Protects: the estimate of a gradient's memory is what a step takes at its most, to a quarter, kept or
    computed again, and the host is asked for it.
    """
    memory, adapter = host.pack_module("patches.unify.memory"), host.pack_module("patches.attention.dit").DiT
    axes, side = ([8, 12, 12], 24) if family == "Flux.1 dev" else ([8, 8, 8, 8], 12)
    model = small_dits.small_dit(family, hidden_size=128, axes_dim=axes, depth=3)
    torch_attention = host.pack_module("lab.bench.measuring").torch_attention
    model.model_options["transformer_options"]["optimized_attention_override"] = torch_attention
    if family == "Flux.1 dev":  # whose texts are as long as they are
        monkeypatch.setattr(adapter, "joint_text", small_models.TEXT_TOKENS)
    monkeypatch.setattr(memory, "few_operations", lambda *_: False)
    network, asked = host.network(model), []
    load = comfy.model_management.load_models_gpu

    def note(models: Any, memory_required: float = 0, **more: Any) -> None:
        asked.append(memory_required)
        load(models, memory_required=memory_required, **more)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", note)
    names = {"structure_layers": "double_block", "word_layers": "double_block"}
    for again in (False, True):
        edit = Edit(host, model, steps=1, size=(side, side), mode="virtual")
        edit.cfg = 1.0
        edit.sampler_inputs.update(checkpointing=again, max_self_attn_res=6, cross_attn_res=6, **names)
        asked.clear()
        with LiveBytes() as found:
            edit.run()
        layers = (
            choose(side, side, 6, "double_block")
            for choose in (network.structure_layers, network.word_layers)
        )
        shape = (1, model.model.latent_format.latent_channels, side, side)
        expected = memory.backward_bytes(network, *layers, shape, 4, again)
        assert 0.8 < expected / found.peak < 1.25, again
        assert max(asked) > expected


def test_source_at_its_own_noise(host: Host, models: dict[str, Any]) -> None:
    """Protects: with the virtual inversion each step adds the error of the source's own prediction: one step
    from noise, by plain calls.
    """
    edit = _edit(host, _model(models, "Flux.1 dev"), steps=1, mode="virtual")
    edit.sampler_inputs["balance"] = edit.balance(beta1=0.0, beta2=0.0)
    start, clean = (edit.inversion.trajectory[index] for index in (0, 1))
    ours = denoise(edit.model, start, edit.sigmas[0], edit.positive)
    theirs = denoise(edit.model, start, edit.sigmas[0], small_models.conditioning(1))
    found = edit.model.model.process_latent_in(edit.run().cpu())
    assert same(found, ours + clean - theirs, 10)
