"""What is known of each recipe: data, time, result, source, and why it differs from the official run.

Times and results are those of the source where one is named: published single runs, of which (A), (B) and (C)
give the best epoch. `why` explains a setting, or with the name of a part all that differs in it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_OFFICIAL = "github.com/facebookresearch/dino: README, main_dino.py (Caron et al. 2021, arXiv 2104.14294)"
_LIGHTLY = "github.com/lightly-ai/lightly, docs/source/getting_started/benchmarks"
_PUBLISHED = "as the source has it"
_OURS: Mapping[str, str] = {
    "recipe": "the name",
    "steps": "the source's number of epochs, over these images",
    "batch_size": _PUBLISHED,
    "precision": "exact on every machine; on a GPU --precision bf16 is faster",
    "loading": "a canvas as large as the crops need; a small set is decoded once and kept on disk",
    "evaluation": "what is measured during the run; never seen by the training",
    "checkpoints": "how much is lost when a run is killed",
    "guard": "when a run counts as sick",
    "optimizer.peak_lr": "goes with the batch, in a straight line",
    "optimizer.warmup_steps": "the source's epochs, in steps of this run",
    "optimizer.freeze_last_layer_steps": "the source's epochs, in steps of this run",
}
_PUBLISHED_PARTS: Mapping[str, str] = {
    **_OURS,
    "backbone": _PUBLISHED,
    "head": _PUBLISHED,
    "crops": _PUBLISHED,
    "loss": _PUBLISHED,
    "teacher": _PUBLISHED,
    "optimizer": _PUBLISHED,
}


@dataclass(frozen=True, kw_only=True)
class About:
    """What is known of a recipe.

    Attributes:
        data: For which images, and how many.
        takes: How long it takes on what.
        result: What was measured, and by whom.
        source: Where its values come from.
        why: By the dotted name of a setting or part, why it is not the official run's.
    """

    data: str
    takes: str
    result: str
    source: str
    why: Mapping[str, str] = field(default_factory=lambda: _PUBLISHED_PARTS)

    def reason(self, setting: str) -> str | None:
        """Why a setting differs from the official run's, by its own name or that of its part."""
        return self.why.get(setting) or self.why.get(setting.partition(".")[0])


_SMALL: Mapping[str, str] = {
    **_OURS,
    "steps": "96,000 images, about an hour on two cores, however many there are to choose from",
    "batch_size": "small steps, many of them: the paper loses 2 points from batch 1024 to 128",
    "backbone": "a small convolutional network needs no data to learn that pictures are local",
    "head": "few images fill few prototypes; BatchNorm as published convolutional runs have it",
    "crops": "a tenth of the pixels of one 384-px picture; blur is in pixels and was made for 224 px",
    "loss": "on 10,000 images 0.04 leaves targets so flat that the student learns their mean "
    "(docs/lab-notes.md, 2026-11-24)",
    "teacher": "a step sees 1/150 of the images: the teacher averages the last 100 steps, then ever more",
    "optimizer": "a short run of small batches: higher rate, milder decay, the norm of all gradients clipped",
}

ABOUT: Mapping[str, About] = MappingProxyType(
    {
        "cpu": About(
            data="about 10,000 pictures of any size",
            takes="about an hour on two cores",
            result="k-NN (k = 20) on Imagenette's val 52.5 %, untrained 34.9 % (docs/lab-notes.md)",
            source="ours, after the published small runs",
            why=_SMALL,
        ),
        "small-data": About(
            data="your own pictures, thousands to hundreds of thousands",
            takes="about an hour on two cores; on a GPU `dino-train run --plan` measures it",
            result="depends on your pictures: the k-NN of the untrained network is measured first",
            source="ours; K, temperature and momentum by the documented table of lightly-train's DINO",
            why={
                **_SMALL,
                "steps": "100 passes on a GPU, an hour without one",
                "backbone": "belongs to the network, which the machine and the data decide",
                "batch_size": "the paper loses 2 points from batch 1024 to 128, and few images have no more",
            },
        ),
        "adapt": About(
            data="your own pictures, hundreds to hundreds of thousands, and weights that are good already",
            takes="30 passes on a GPU; on two cores an hour or two: `dino-train run --plan` measures it",
            result="depends on weights and pictures: the k-NN of the weights as they came is measured first",
            source="ours; layer-wise decay after BEiT (Bao et al. 2022) and DINOv2",
            why={
                **_OURS,
                "steps": "good features need a nudge, and few pictures are soon learnt",
                "batch_size": "few pictures, many steps",
                "backbone": "that of the weights",
                "head": "few images fill few prototypes; what the weights bring along goes on",
                "crops": "the input size, mean and standard deviation that the weights were made for",
                "crops.local_count": "an image takes fewer seconds, and the run is short",
                "crops.global_area": "as the recipe cpu",
                "crops.local_area": "as the recipe cpu",
                "crops.blur_sigma_px": "in pixels of the crop; 2 px were made for 224",
                "teacher": "the weights are a good teacher already: it moves slowly from the start",
                "optimizer": "gentle, and gentlest near the pixels, so that good weights are not lost",
            },
        ),
        "smoke": About(
            data="any few pictures",
            takes="a minute on anything",
            result="none: it proves the path, not the method",
            source="ours",
            why=dict.fromkeys(_PUBLISHED_PARTS, "so small that it ends in a minute"),
        ),
        "resnet18-imagenette": About(
            data="Imagenette-160: 9,469 pictures of 10 classes",
            takes="75.4 minutes and 6.6 GB on one A6000, published",
            result="published: k-NN 87.3 % (k = 200, T = 0.1, student, best epoch); 88.8 % after 800 epochs",
            source=f"{_LIGHTLY}/imagenette_benchmark.py",
        ),
        "vit-small-16-imagenette": About(
            data="Imagenette, full size: 9,469 pictures of 10 classes",
            takes="one A100, published without a time",
            result="published: k-NN 83.8 % (k = 20), linear 86.1 % (both online, teacher, best epoch)",
            source="github.com/galilai-group/stable-pretraining, benchmarks/imagenet10",
            why={
                **_PUBLISHED_PARTS,
                "crops.blur_probability": "every view is blurred alike there",
                "crops.solarise_probability": "every view is solarised alike there",
                "optimizer.warmup_steps": "10 epochs as in the official run: the source does not say",
                "optimizer.freeze_last_layer_steps": "the source freezes nothing",
                "optimizer.clip": "the source names none; the norm of all gradients is the steadier kind",
                "head": "the source's prototypes have no weight norm; ours keep it, as the paper",
            },
        ),
        "resnet18-cifar10": About(
            data="CIFAR-10: 50,000 pictures of 32 px, as PNG",
            takes="120.3 minutes and 1.6 GB on one A6000, published",
            result="published: k-NN 84.0 % (k = 200, T = 0.1, student, best epoch)",
            source=f"{_LIGHTLY}/cifar10_benchmark.py",
            why={
                **_PUBLISHED_PARTS,
                "backbone": "the source's first layer keeps the size of the picture (3x3, no pooling), which "
                "no setting of timm's ResNet does: pictures are drawn four times larger, and timm's first "
                "layer and pooling bring them back to 32 px",
                "crops": "32 px drawn at 128, see backbone; no local crops and no blur, as the source has it",
            },
        ),
        "vit-small-16-imagenet": About(
            data="ImageNet-1k: 1,281,167 pictures",
            takes="1.75 days on 8 V100, published",
            result="published: k-NN 69.3 %, linear 74.0 %",
            source=_OFFICIAL,
        ),
        "vit-small-16-imagenet-boost": About(
            data="ImageNet-1k: 1,281,167 pictures",
            takes="2.6 days on 16 V100, published",
            result="published: k-NN 73.3 %, linear 76.0 %",
            source=_OFFICIAL,
        ),
        "resnet50-imagenet": About(
            data="ImageNet-1k: 1,281,167 pictures",
            takes="8 GPUs, published without a time",
            result="published after 800 epochs: k-NN 67.5 %, linear 75.3 %",
            source=_OFFICIAL,
        ),
    }
)
