"""A bundle on disk: written at once, loaded exactly, read by timm as it is; every kind of damage refused."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from dino_core import bundle as bundle_module
from dino_core.backbones import make_backbone
from dino_core.bundle import Bundle, fingerprint_of, load_bundle, read_manifest, verify_files, write_bundle
from dino_core.embedding import EmbeddingModel
from dino_core.errors import BundleError
from dino_core.preprocess import Preprocessing, resize_and_crop

PREPROCESSING = Preprocessing(resize_px=37, crop_px=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3))
TINY_VIT = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def vit_model(**options: Any) -> EmbeddingModel:  # noqa: ANN401 - passed on
    torch.manual_seed(0)
    interpolation = options.pop("position_interpolation", "official")
    backbone = make_backbone(
        "vit_tiny_patch16_224", image_size_px=32, model_kwargs=TINY_VIT, position_interpolation=interpolation
    )
    return EmbeddingModel(backbone, **{"preprocessing": PREPROCESSING, "pooling": "cls", **options})


def resnet_model() -> EmbeddingModel:
    torch.manual_seed(0)
    return EmbeddingModel(make_backbone("resnet10t"), preprocessing=PREPROCESSING, pooling="mean")


def swin_model() -> EmbeddingModel:
    torch.manual_seed(0)
    small = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "window_size": 4}
    backbone = make_backbone("swin_tiny_patch4_window7_224", image_size_px=32, model_kwargs=small)
    return EmbeddingModel(backbone, preprocessing=PREPROCESSING, pooling="mean")


def write(path: Path, model: EmbeddingModel | None = None, **options: Any) -> Path:  # noqa: ANN401 - passed on
    write_bundle(path, model or vit_model(), **{"provenance": {"seed": 1}, "card": "# A card\n", **options})
    return path


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "intact")


@pytest.fixture
def bundle(intact: Path, tmp_path: Path) -> Path:
    """A bundle of one's own, to damage."""
    return Path(shutil.copytree(intact, tmp_path / "bundle"))


def pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)


def images(count: int, side_px: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(6))


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace_file(path: Path, name: str, content: bytes) -> None:
    """Changes a file and its hash in the manifest, as somebody would who wants it to go unnoticed."""
    (path / name).write_bytes(content)
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit_manifest(path, files={**files, name: hashlib.sha256(content).hexdigest()})


def edit_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(path / "model.safetensors")
    change(weights)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    replace_file(path, "model.safetensors", (path / "model.safetensors").read_bytes())


def refusal(path: Path) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(path)
    return str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("make", [vit_model, resnet_model, swin_model])
def test_a_loaded_model_embeds_as_the_written_one(make: Callable[[], EmbeddingModel], tmp_path: Path) -> None:
    model = make()
    manifest = write_bundle(tmp_path / "teacher", model, provenance={"recipe": "cpu"}, card="# Teacher")
    loaded = load_bundle(tmp_path / "teacher")
    assert isinstance(loaded, Bundle)
    assert torch.equal(loaded.model(pixels(3)), model(pixels(3)))
    assert loaded.manifest == manifest == read_manifest(tmp_path / "teacher")
    assert (manifest.id, manifest.embedding_dimension) == ("teacher", model.dimensions)
    assert manifest.provenance == {"recipe": "cpu"}
    assert manifest.preprocessing == PREPROCESSING
    assert manifest.fingerprint == fingerprint_of(model)
    assert not any(parameter.isnan().any() for parameter in loaded.model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("make", [vit_model, resnet_model, swin_model])
def test_timm_loads_a_bundle_with_no_code_of_ours(make: Callable[[], EmbeddingModel], tmp_path: Path) -> None:
    model = make()
    write(tmp_path / "teacher", model)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'teacher'}", pretrained=True).eval()
    torch.testing.assert_close(theirs(images(2)), model.backbone(images(2)), rtol=1e-5, atol=1e-5)
    assert torch.equal(theirs.forward_features(images(2)), model.backbone.network.forward_features(images(2)))  # type: ignore[operator]
    config = resolve_model_data_config(theirs)  # type: ignore[no-untyped-call]
    assert tuple(config["input_size"]) == (3, 32, 32)
    assert (tuple(config["mean"]), tuple(config["std"])) == (PREPROCESSING.mean, PREPROCESSING.std)


def test_timms_transform_prepares_images_as_we_do(intact: Path) -> None:
    theirs = timm.create_model(f"local-dir:{intact}", pretrained=True)
    config = resolve_model_data_config(theirs)  # type: ignore[no-untyped-call]
    transform = create_transform(**config, is_training=False)
    picture = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8).repeat(15, 0).repeat(15, 1)
    ours = resize_and_crop(torch.from_numpy(picture).permute(2, 0, 1), PREPROCESSING)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (PREPROCESSING.mean, PREPROCESSING.std))
    assert ((transform(Image.fromarray(picture)) * std + mean) * 255 - ours).abs().mean() < 1


@torch.no_grad()
def test_a_custom_vit_takes_other_sizes_after_loading_too(intact: Path) -> None:
    loaded = load_bundle(intact).model.backbone
    torch.testing.assert_close(loaded(images(2, 48)), vit_model().backbone(images(2, 48)))


def test_all_files_of_the_design_are_there_and_hashed(intact: Path) -> None:
    names = {file.name for file in intact.iterdir()}
    assert names == {
        "model.safetensors",
        "config.json",
        "manifest.json",
        "reference.safetensors",
        "README.md",
    }
    assert set(read_manifest(intact).files) == names - {"manifest.json"}
    verify_files(intact)


def test_further_files_of_the_card_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "teacher", assets={"loss.png": b"a plot"})
    assert (path / "loss.png").read_bytes() == b"a plot"
    (path / "loss.png").write_bytes(b"another")
    with pytest.raises(BundleError, match=r"loss\.png has changed"):
        verify_files(path)


@pytest.mark.parametrize(
    "name", ["../outside.png", "/etc/passwd", "manifest.json", "README.md", ".hidden", "a/b", ""]
)
def test_a_further_file_cannot_leave_the_bundle_or_stand_in_for_another(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot hold a further file"):
        write(tmp_path / "teacher", assets={name: b""})
    assert not (tmp_path / "teacher").exists()


def test_equal_models_have_equal_fingerprints_and_others_do_not() -> None:
    def nudged() -> EmbeddingModel:
        model = vit_model()
        with torch.no_grad():
            model.backbone.network.get_parameter("norm.bias")[0] += 1e-7
        return model

    variants = [
        vit_model(),
        nudged(),
        resnet_model(),
        vit_model(pooling="mean"),
        vit_model(normalise=False),
        vit_model(position_interpolation="antialias"),
        vit_model(preprocessing=replace(PREPROCESSING, resize_px=38)),
    ]
    fingerprints = [fingerprint_of(model) for model in variants]
    assert len(set(fingerprints)) == len(variants)
    assert fingerprint_of(vit_model()) == fingerprints[0]
    assert fingerprints[0].startswith("sha256:")
    assert len(fingerprints[0]) == len("sha256:") + 64


def test_a_bundle_replaces_another_only_when_told_so(tmp_path: Path) -> None:
    path = write(tmp_path / "teacher")
    with pytest.raises(BundleError, match="exists: choose another name"):
        write(path, resnet_model())
    write(path, resnet_model(), overwrite=True)
    assert read_manifest(path).architecture == "resnet10t"
    assert [file.name for file in tmp_path.iterdir()] == ["teacher"]  # nothing is left beside it


def test_what_is_no_bundle_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(BundleError, match="is not a bundle, and is not replaced"):
        write(tmp_path / "photos", overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_a_model_that_would_not_load_leaves_nothing_behind(tmp_path: Path) -> None:
    model = vit_model()
    with torch.no_grad():
        model.backbone.network.get_parameter("norm.weight")[3] = torch.nan
    with pytest.raises(BundleError, match=r"norm\.weight .* has NaN or infinite values"):
        write(tmp_path / "teacher", model)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_bundle_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "teacher")
    rename = Path.rename

    def failing_once(source: Path, target: Path) -> Path:
        if source.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", failing_once)
    with pytest.raises(BundleError, match=r"could not be put in place \(ENOSPC\)"):
        write(path, resnet_model(), overwrite=True)
    assert load_bundle(path).manifest.architecture == "vit_tiny_patch16_224"
    assert [file.name for file in tmp_path.iterdir()] == ["teacher"]


def test_somebody_elses_bundle_that_came_meanwhile_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = write(tmp_path / "first")
    real = bundle_module.load_bundle

    def as_another_writer_finishes(path: Path) -> Bundle:
        loaded = real(path)
        shutil.copytree(first, tmp_path / "teacher")
        return loaded

    monkeypatch.setattr(bundle_module, "load_bundle", as_another_writer_finishes)
    with pytest.raises(BundleError, match="could not be put in place"):
        write(tmp_path / "teacher", resnet_model())
    assert read_manifest(tmp_path / "teacher").architecture == "vit_tiny_patch16_224"


@pytest.mark.parametrize("name", [".hidden", "a b", "ünï", "x" * 200])
def test_a_bundle_needs_a_plain_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="cannot be called"):
        write(tmp_path / name)


@pytest.mark.parametrize("value", [object(), float("nan"), {1, 2}], ids=["object", "nan", "set"])
def test_provenance_must_be_json(value: object, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="the provenance cannot be written as JSON"):
        write(tmp_path / "teacher", provenance={"note": value})
    assert list(tmp_path.iterdir()) == []


def test_arguments_of_the_network_must_be_json(tmp_path: Path) -> None:
    backbone = make_backbone("resnet10t", model_kwargs={"act_layer": torch.nn.ReLU})
    with pytest.raises(BundleError, match="the model's arguments cannot be written as JSON"):
        write(tmp_path / "teacher", EmbeddingModel(backbone, preprocessing=PREPROCESSING, pooling="mean"))


def test_a_place_that_is_no_bundle_is_named(tmp_path: Path) -> None:
    assert "is no directory" in refusal(tmp_path / "nowhere")
    assert "manifest.json is missing: is " in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "reference.safetensors", "README.md"])
def test_a_missing_file_is_named(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    assert f"{name} is missing: restore the bundle" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "reference.safetensors", "README.md"])
def test_a_flipped_bit_is_found(name: str, bundle: Path) -> None:
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    assert f"{name} has changed: its SHA-256 is" in refusal(bundle)


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("not JSON", lambda path: (path / "manifest.json").write_text("{"), "is not JSON"),
    ("not text", lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\0"), "is not JSON"),
    ("nested too deep", lambda path: (path / "manifest.json").write_text("[" * 200_000), "is not JSON"),
    (
        "a list",
        lambda path: (path / "manifest.json").write_text("[]"),
        "holds a JSON list, expected an object",
    ),
    (
        "huge",
        lambda path: (path / "manifest.json").write_text(" " * 5_000_000),
        "5,000,000 bytes, at most 4,194,304",
    ),
    (
        "of a later version",
        lambda path: edit_manifest(path, format_version=2),
        "has format version 2, .* reads 1",
    ),
    ("of no version", lambda path: edit_manifest(path, format_version=None), "has format version None"),
    ("a field too many", lambda path: edit_manifest(path, colour="red"), r"unknown \['colour'\]"),
    ("a wrong type", lambda path: edit_manifest(path, normalise="yes"), "wrong kind of value in normalise"),
    ("a wrong pooling", lambda path: edit_manifest(path, pooling="max"), "wrong kind of value in pooling"),
    ("an unhashable pooling", lambda path: edit_manifest(path, pooling=[]), "wrong kind of value in pooling"),
    (
        "a wrong interpolation",
        lambda path: edit_manifest(path, position_interpolation="nearest"),
        "wrong kind of value in position_interpolation",
    ),
    (
        "a foreign preprocessing",
        lambda path: edit_manifest(path, preprocessing={}),
        "preprocessing that is not ours",
    ),
    (
        "files not listed",
        lambda path: edit_manifest(path, files={}),
        "does not list README.md, config.json, .* 1 more",
    ),
    ("a file elsewhere", lambda path: list_file(path, "../../etc/passwd"), "only plain names are allowed"),
    ("an absolute file", lambda path: list_file(path, "/etc/passwd"), "only plain names are allowed"),
    ("a foreign pooling", lambda path: edit_manifest(path, pooling="mean"), "has the fingerprint sha256:"),
    ("another length", lambda path: edit_manifest(path, normalise=False), "has the fingerprint sha256:"),
    (
        "a forged fingerprint",
        lambda path: edit_manifest(path, fingerprint="sha256:0"),
        "its manifest says sha256:0",
    ),
    (
        "another dimension",
        lambda path: edit_manifest(path, embedding_dimension=64),
        "promises 64 dimensions, .* has 48",
    ),
    (
        "no such network",
        lambda path: edit_manifest(path, architecture="vit_x"),
        "cannot be built here: timm .* no model",
    ),
    (
        "arguments unknown",
        lambda path: edit_manifest(path, model_args={"wheels": 4}),
        "cannot be built here: timm cannot build",
    ),
    (
        "a config of another model",
        lambda path: replace_file(path, "config.json", b'{"architecture": "resnet18"}'),
        "describes another model than manifest.json",
    ),
    (
        "a config that is no JSON",
        lambda path: replace_file(path, "config.json", b"resnet"),
        "config.json is not JSON",
    ),
    (
        "weights of another kind",
        lambda path: replace_file(path, "model.safetensors", b"\x80\x04pickle"),
        "is not in the safetensors format",
    ),
    ("a tensor missing", lambda path: edit_weights(path, lambda w: w.pop("norm.bias")), "lacks norm.bias"),
    (
        "a tensor too many",
        lambda path: edit_weights(path, lambda w: w.update(head=torch.zeros(1))),
        "has head, unknown to vit_tiny_patch16_224",
    ),
    (
        "a tensor of another shape",
        lambda path: edit_weights(path, lambda w: w.update({"norm.bias": torch.zeros(3)})),
        r"norm.bias .* is torch.float32 \[3\], expected torch.float32 \[48\]",
    ),
    (
        "a tensor of another type",
        lambda path: edit_weights(path, lambda w: w.update({"norm.bias": torch.zeros(48).half()})),
        r"is torch.float16 \[48\], expected torch.float32 \[48\]",
    ),
    (
        "weights not finite",
        lambda path: edit_weights(path, lambda w: w["norm.bias"].fill_(torch.inf)),
        "norm.bias .* has NaN or infinite values",
    ),
    (
        "a weight changed",
        lambda path: edit_weights(path, lambda w: w["norm.bias"].add_(1e-3)),
        "weights or settings were changed",
    ),
    (
        "references of another shape",
        lambda path: edit_reference(path, torch.zeros(2, 48)),
        r"has embeddings \[2, 48\], expected \[8, 48\]",
    ),
    (
        "references of another model",
        lambda path: edit_reference(path, torch.ones(8, 48)),
        "does not reproduce its reference embeddings: cosine",
    ),
    (
        "references not numbers",
        lambda path: edit_reference(path, torch.full((8, 48), torch.nan)),
        "cosine nan",
    ),
]


def list_file(path: Path, name: str) -> None:
    files = json.loads((path / "manifest.json").read_text())["files"]
    edit_manifest(path, files={**files, name: "0" * 64})


def edit_reference(path: Path, embeddings: torch.Tensor) -> None:
    save_file({"embeddings": embeddings}, path / "reference.safetensors")
    replace_file(path, "reference.safetensors", (path / "reference.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("damage", "message"), [pytest.param(damage, message, id=name) for name, damage, message in DAMAGES]
)
def test_each_damage_has_its_sentence(damage: Callable[[Path], object], message: str, bundle: Path) -> None:
    damage(bundle)
    with pytest.raises(BundleError, match=message):
        load_bundle(bundle)


def test_every_sentence_names_the_place(intact: Path, tmp_path: Path) -> None:
    sentences = []
    for index, (_, damage, _) in enumerate(DAMAGES):
        copy = Path(shutil.copytree(intact, tmp_path / str(index) / "bundle"))
        damage(copy)
        sentences.append(refusal(copy))
    assert all(len(sentence) > 40 for sentence in sentences)
    assert all(str(tmp_path) in sentence for sentence in sentences)


def test_a_file_of_references_without_embeddings_is_refused(bundle: Path) -> None:
    save_file({"other": torch.zeros(1)}, bundle / "reference.safetensors")
    replace_file(bundle, "reference.safetensors", (bundle / "reference.safetensors").read_bytes())
    assert "has embeddings [0], expected [8, 48]" in refusal(bundle)


def test_a_card_may_be_of_any_length_and_language(tmp_path: Path) -> None:
    path = write(tmp_path / "teacher", card="# Модель 模型\n" * 1000)
    assert (path / "README.md").read_text(encoding="utf-8").count("模型") == 1000


def test_writing_the_same_model_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a" / "teacher"), write(tmp_path / "b" / "teacher")
    for name in itertools.chain(read_manifest(first).files, ["manifest.json"]):
        assert (first / name).read_bytes() == (second / name).read_bytes()
