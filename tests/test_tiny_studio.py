"""The small model that ships: it must mean what it is told, through the host's stock nodes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(scope="module")
def studio(host: Any) -> tuple[Any, Any, Any]:
    """MODEL, CLIP, VAE from the node."""
    return host.execute("DescEditTinyStudio")[:3]


@pytest.fixture(scope="module")
def scenes(host: Any) -> ModuleType:
    return host.pack_module("models.tiny_studio.scenes")


@pytest.fixture(scope="module")
def classifier(host: Any) -> Any:
    return host.pack_module("lab.tiny_studio.attribute_classifier").load()


def held_scenes(scenes: ModuleType, count: int, seed: int, kind: str | None = None) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, kind, held=True) for _ in range(count)]


def drawings(scenes: ModuleType, chosen: list[Any]) -> torch.Tensor:
    return torch.from_numpy(np.stack([scene.draw() for scene in chosen]))


def encode(host: Any, clip: Any, text: str) -> list[Any]:
    return host.execute("CLIPTextEncode", clip=clip, text=text)[0]


def sample(
    host: Any, model: Any, positive: Any, negative: Any, count: int = 1, steps: int = 4
) -> torch.Tensor:
    latent = {"samples": torch.zeros(count, 4, 16, 16)}
    settings = {"seed": 5, "steps": steps, "cfg": 3.0, "sampler_name": "euler", "scheduler": "normal"}
    return host.execute(
        "KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **settings
    )[0]["samples"]


def test_the_classifier_reads_held_out_drawings(scenes: ModuleType, classifier: Any) -> None:
    """Protects the measure: 99% of every attribute, on new drawings of the combinations that the model never
    saw.
    """
    chosen = held_scenes(scenes, 600, 41)
    read = classifier.read(drawings(scenes, chosen))
    for kind, attributes in scenes.ATTRIBUTES.items():
        for name in attributes:
            marks = [
                r.get(name) == s.values[name] for s, r in zip(chosen, read, strict=True) if s.kind == kind
            ]
            assert np.mean(marks) >= 0.99, (kind, name)


def test_the_classifier_reads_two_objects(scenes: ModuleType, classifier: Any) -> None:
    """Protects the measure of scenes of two objects: 99% of every attribute on new held-out drawings, and
    what is not there is not read: one object on the left alone has nothing on the right, one in the middle
    nothing on either side.
    """
    chosen = held_scenes(scenes, 400, 44, "two")
    read = classifier.read_two(drawings(scenes, chosen))
    assert all(found["kind"] == "two" for found in read)
    for name in scenes.TWO_OBJECTS:
        marks = [found.get(name) == scene.values[name] for scene, found in zip(chosen, read, strict=True)]
        assert np.mean(marks) >= 0.99, name
    large = [s for s in held_scenes(scenes, 200, 45, "object") if s.values["size"] == "large"]
    whole = [set(scenes.TWO_OBJECTS) <= set(found) for found in classifier.read_two(drawings(scenes, large))]
    assert np.mean(whole) < 0.1


def test_words_bind_to_their_object(host: Any, scenes: ModuleType) -> None:
    """Protects the study of two objects: a new value counts as asked on its own object only, and as leaked
    where the other object has it.
    """
    bound = host.pack_module("lab.tiny_studio.attribute_classifier").bound
    pairs = [scenes.sample_edit(scenes.TWO, number, held=True) for number in range(8)]
    made = []
    for pair in pairs:
        ((name, value),) = pair.changed.items()
        other = {"left": "right", "right": "left"}[name.partition("_")[0]] + "_" + name.partition("_")[2]
        both, wrong = (scene.changed(**{other: value}) for scene in (pair.target, pair.source))
        made.append([pair.source, pair.target, both, wrong, pair.target.values[other] == value])
    *pictures, same = zip(*made, strict=True)
    for column, asked, leaked in zip(
        pictures, (False, True, True, False), (False, False, True, True), strict=True
    ):
        found = bound(drawings(scenes, list(column)), pairs)
        assert found["asked"] == [asked] * len(pairs)
        assert found["leaked"] == [leaked and not alike for alike in same]


def test_edits_of_two_objects_are_measured(host: Any, scenes: ModuleType, classifier: Any) -> None:
    """Protects the studies and the benchmark on two objects: the true edit is a success, the source is none,
    nor is the edit of the other object; and pictures of both kinds can be read together.
    """
    shows = host.pack_module("lab.tiny_studio.attribute_classifier").shows
    pairs = [
        scenes.sample_edit(edit_type, number, held=True)
        for edit_type in ("colour", scenes.TWO)
        for number in range(10)
    ]
    targets = [pair.target for pair in pairs]
    assert all(shows(drawings(scenes, targets), targets))
    assert not any(shows(drawings(scenes, [pair.source for pair in pairs]), targets))
    values = {
        "left_shape": "circle",
        "left_colour": "red",
        "left_texture": "plain",
        "right_shape": "square",
        "right_colour": "blue",
        "right_texture": "plain",
        "background": "white",
        "style": "flat",
    }
    scene = scenes.Scene("two", values)
    other = scene.changed(left_colour="yellow", right_colour="red")
    pictures = drawings(scenes, [scene, other, scene.objects()[0]])
    assert classifier.read_as(["two", "two", "object"], pictures) == [
        {"kind": "two", **scene.values},
        {"kind": "two", **other.values},
        {"kind": "object", **scene.objects()[0].values},
    ]


def test_the_vae_keeps_held_out_scenes(host: Any, studio: Any, scenes: ModuleType) -> None:
    """Protects the VAE: reconstruction of held-out scenes and latents of about unit variance, through the
    stock nodes. The full measurement, 30 dB, is `dev.py studio --report`; this is a sample of it.
    """
    _, _, vae = studio
    pictures = drawings(scenes, held_scenes(scenes, 48, 42))
    (latent,) = host.execute("VAEEncode", vae=vae, pixels=pictures)
    assert latent["samples"].shape == (48, 4, 16, 16)
    assert 0.9 < (latent["samples"] * 0.18215).std() < 1.1
    (again,) = host.execute("VAEDecode", vae=vae, samples=latent)
    errors = (again.double() - pictures.double()).square().mean(dim=(1, 2, 3))
    assert np.mean([-10 * math.log10(error) for error in errors.tolist()]) >= 29.8


@pytest.mark.parametrize("kind", [None, "two"])
def test_prompts_come_out_as_written(
    host: Any, studio: Any, scenes: ModuleType, classifier: Any, kind: str | None
) -> None:
    """Protects the meaning of the model: on held-out combinations nearly every attribute that is asked for is
    drawn, of two objects each its own. `dev.py studio --report` measures it in full; this is a sample.
    """
    model, clip, vae = studio
    chosen = held_scenes(scenes, 12, 43, kind)
    positive = torch.cat([encode(host, clip, scenes.caption(scene))[0][0] for scene in chosen])
    latent = sample(host, model, [[positive, {}]], encode(host, clip, ""), len(chosen), steps=12)
    (pictures,) = host.execute("VAEDecode", vae=vae, samples={"samples": latent})
    found = classifier.read_as([scene.kind for scene in chosen], pictures)
    marks = [
        read.get(name) == value
        for scene, read in zip(chosen, found, strict=True)
        for name, value in scene.values.items()
    ]
    assert np.mean(marks) >= 0.9


def test_weights_and_unknown_words(host: Any, studio: Any) -> None:
    """Protects the text encoder's contract: (word:weight) scales the word, words never learned say nothing
    that breaks the encoding, and the end mark and padding are silent.
    """
    _, clip, _ = studio
    plain, heavy, odd = (
        encode(host, clip, text)[0][0]
        for text in ("a red circle", "a (red:1.5) circle", "a xylophone circle")
    )
    assert plain.shape == (1, 77, 128)
    torch.testing.assert_close(heavy[0, 2], plain[0, 2] * 1.5)
    torch.testing.assert_close(heavy[0, 3], plain[0, 3])
    assert torch.isfinite(odd).all()
    assert plain[0, 4:].abs().max() == 0
    assert plain[0, :4].abs().amax(dim=-1).min() > 0


def test_a_stock_lora_changes_it_and_leaves_it_alone(host: Any, studio: Any, tmp_path: Path) -> None:
    """Protects LoRA: the stock loader finds the UNet's and the text encoder's layers, and the unpatched model
    still gives the same bits.
    """
    import folder_paths
    from safetensors.torch import save_file

    model, clip, _ = studio
    generator = torch.Generator().manual_seed(1)
    weights = {}
    unet = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for name, width in ((unet, 64), ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 128)):
        weights[f"{name}.lora_down.weight"] = torch.randn(4, width, generator=generator)
        weights[f"{name}.lora_up.weight"] = torch.randn(width, 4, generator=generator)
    save_file(weights, tmp_path / "tiny.safetensors")
    folder_paths.add_model_folder_path("loras", str(tmp_path))
    empty = encode(host, clip, "")
    before = sample(host, model, encode(host, clip, "a red circle"), empty)
    patched, patched_clip = host.execute(
        "LoraLoader",
        model=model,
        clip=clip,
        lora_name="tiny.safetensors",
        strength_model=1.0,
        strength_clip=1.0,
    )
    text = encode(host, patched_clip, "a red circle")
    assert not torch.equal(text[0][0], encode(host, clip, "a red circle")[0][0])
    assert not torch.equal(sample(host, patched, encode(host, clip, "a red circle"), empty), before)
    assert torch.equal(sample(host, model, encode(host, clip, "a red circle"), empty), before)


def test_a_stock_controlnet_drives_it(host: Any, studio: Any, tmp_path: Path) -> None:
    """Protects ControlNet: a cldm file of the model's widths loads through the stock loader and steers it."""
    import folder_paths
    from comfy.cldm.cldm import ControlNet
    from comfy.ops import disable_weight_init
    from safetensors.torch import save_file

    model, clip, _ = studio
    networks = host.pack_module("models.tiny_studio.networks")
    config = {name: value for name, value in networks.UNET.items() if name not in ("out_channels", "legacy")}
    config.pop("transformer_depth_output")
    with torch.inference_mode(False):
        torch.manual_seed(3)
        net = networks.initialise(ControlNet(hint_channels=3, operations=disable_weight_init, **config))
        state = {name: value * 0.5 for name, value in net.state_dict().items()}
    save_file(
        {f"control_model.{name}": value for name, value in state.items()}, tmp_path / "tiny.safetensors"
    )
    folder_paths.add_model_folder_path("controlnet", str(tmp_path))
    (control,) = host.execute("ControlNetLoader", control_net_name="tiny.safetensors")
    positive, negative = encode(host, clip, "a red circle"), encode(host, clip, "")
    before = sample(host, model, positive, negative)
    hint = torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(4))
    positive, negative = host.execute(
        "ControlNetApplyAdvanced",
        positive=positive,
        negative=negative,
        control_net=control,
        image=hint,
        strength=1.0,
        start_percent=0.0,
        end_percent=1.0,
    )
    steered = sample(host, model, positive, negative)
    assert torch.isfinite(steered).all()
    assert not torch.equal(steered, before)


def test_the_same_seed_gives_the_same_bits_on_both_sampler_nodes(host: Any, studio: Any) -> None:
    """Protects the stock samplers: KSampler and SamplerCustomAdvanced agree, and a re-run repeats itself."""
    model, clip, _ = studio
    positive, negative = encode(host, clip, "a blue star"), encode(host, clip, "")
    first = sample(host, model, positive, negative)
    assert torch.equal(first, sample(host, model, positive, negative))
    (sigmas,) = host.execute("BasicScheduler", model=model, scheduler="normal", steps=4, denoise=1.0)
    (guider,) = host.execute("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0)
    (sampler,) = host.execute("KSamplerSelect", sampler_name="euler")
    (noise,) = host.execute("RandomNoise", noise_seed=5)
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    advanced = host.execute(
        "SamplerCustomAdvanced",
        noise=noise,
        guider=guider,
        sampler=sampler,
        sigmas=sigmas,
        latent_image=latent,
    )[0]["samples"]
    assert torch.equal(first, advanced)


def test_a_scene_node_gives_the_pair(host: Any, scenes: ModuleType) -> None:
    """Protects DescEditTinyScene: pictures, mask and texts of the pair that its widgets name."""
    source, edited, mask, source_text, edit_text = host.execute(
        "DescEditTinyScene", edit_type="colour", seed=3, wording="simple"
    )
    pair = scenes.sample_edit("colour", 3, "simple", held=True)
    assert np.array_equal(source[0].numpy(), pair.source.draw())
    assert np.array_equal(edited[0].numpy(), pair.target.draw())
    assert np.array_equal(mask[0].numpy(), pair.mask())
    assert (source_text, edit_text) == (pair.source_text, pair.edit_text)
    two = host.execute("DescEditTinyScene", edit_type="two objects", seed=3, wording="simple")
    assert " and " in two[4]
    assert 0 < two[2].mean() < 0.2
    style = host.execute("DescEditTinyScene", edit_type="style", seed=3, wording="simple")[2]
    assert style.shape == (1, 128, 128)
    assert style.min() == 1


def test_a_missing_file_is_named(host: Any, tmp_path: Path) -> None:
    """Protects the reader of the error: it says which file is missing and what to do."""
    studio = host.pack_module("models.tiny_studio.studio")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors is missing.*reinstall the pack"):
        studio.load_vae(tmp_path / "none.safetensors")


def test_two_objects_are_learned_from_the_shipped_weights_on(
    host: Any, scenes: ModuleType, tmp_path: Path
) -> None:
    """Protects what is known already: training continues from the shipped weights, with latents as the stock
    node gives them, and what is packed again before the first step is the shipped file.
    """
    from safetensors.torch import load_file, save_file

    train_two, studio = map(host.pack_module, ("lab.tiny_studio.train_two", "models.tiny_studio.studio"))
    pool = held_scenes(scenes, 3, 46) + held_scenes(scenes, 3, 47, "two")
    with torch.inference_mode(False):
        train_two.encode_pool(tmp_path / "latents.pt", pool, studio.FILE)
        (latent,) = host.execute("VAEEncode", vae=studio.load_vae(), pixels=drawings(scenes, pool))
        stored = torch.load(tmp_path / "latents.pt", weights_only=True)["latents"].float()
        assert (stored - latent["samples"] * 0.18215).abs().max() < 0.1
        packed, shipped = tmp_path / "packed.safetensors", load_file(studio.FILE)
        for steps, same in ((0, True), (1, False)):
            train_two.train_diffusion.train(tmp_path, pool, steps, studio.FILE, train_two.rate)
            train_two.pack(tmp_path, studio.FILE, packed)
            state = load_file(packed)
            assert list(state) == list(shipped)
            equal = {name: torch.equal(value, shipped[name]) for name, value in state.items()}
            assert all(equal.values()) == same
            assert all(equal[name] for name in equal if name.startswith("vae.") or name == "text.tokens")
    other = {name: value for name, value in shipped.items() if name != "text.tokens"}
    host_words = shipped["text.tokens"].clone()
    host_words[1] += 1
    save_file({**other, "text.tokens": host_words}, packed)
    with pytest.raises(ValueError, match="was trained on other words"):
        train_two.train_diffusion.packed(packed)


def test_a_bridge_learns_on_from_the_shipped_one(
    host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the bridge when the model itself has learned more: it starts as the shipped bridge, on pairs
    of two objects too.
    """
    from safetensors.torch import load_file

    train_bridge, studio = map(
        host.pack_module, ("lab.tiny_studio.train_bridge", "models.tiny_studio.studio")
    )
    shipped = load_file(studio.BRIDGE)
    file = tmp_path / "bridge.safetensors"
    file.write_bytes(studio.BRIDGE.read_bytes())
    monkeypatch.setattr(studio, "BRIDGE", file)
    monkeypatch.setattr(train_bridge, "PAIRS_A_TYPE", 1)
    assert {pair.name for pair in train_bridge.drawn_pairs()} >= {"two objects-0", "colour-0"}
    variant = train_bridge.VARIANTS[train_bridge.AGAIN]
    for steps, same in ((0, True), (2, False)):
        monkeypatch.setitem(train_bridge.VARIANTS, train_bridge.AGAIN, replace(variant, steps=steps))
        with torch.inference_mode(False):
            train_bridge.train(train_bridge.AGAIN, tmp_path)
        learned = load_file(file)
        assert all(torch.equal(learned[name], value) for name, value in shipped.items()) == same


def test_training_resumes_after_a_kill(host: Any, scenes: ModuleType, tmp_path: Path) -> None:
    """Protects long trainings: each stage continues from its last checkpoint and never leaves half a file."""
    train = host.pack_module("lab.tiny_studio.train")
    pool = train.pool_scenes()[:8]
    pictures = np.stack([np.round(scene.draw() * 255).astype(np.uint8) for scene in pool])
    torch.save({"latents": torch.randn(8, 4, 16, 16).half()}, tmp_path / "latents.pt")
    classifier = train.attribute_classifier
    stages = {
        "vae.pt": lambda steps: train.train_vae.train(tmp_path, pictures, steps),
        "refine.pt": lambda steps: train.train_vae.train(tmp_path, pictures, steps, refine=True),
        "diffusion.pt": lambda steps: train.train_diffusion.train(tmp_path, pool, steps),
        "attribute_classifier.pt": lambda steps: classifier.train(tmp_path, pictures, pool, steps, batch=4),
    }
    with torch.inference_mode(False):
        for file, run in stages.items():
            run(1)
            first = torch.load(tmp_path / file, weights_only=True)
            run(2)
            second = torch.load(tmp_path / file, weights_only=True)
            assert (first["step"], second["step"]) == (1, 2)
            moved = [not torch.equal(second["model"][k], v) for k, v in first["model"].items()]
            assert any(moved)
            run(2)
            again = torch.load(tmp_path / file, weights_only=True)["model"]
            assert all(torch.equal(again[k], v) for k, v in second["model"].items())
    assert not list(tmp_path.glob("*.part"))
