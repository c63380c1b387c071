"""What an image costs the host before it is trained on: `python -m benchmarks.augmentation`.

    official, decode    Pillow, to RGB
    official, augment   2 x 224 + 8 x 96 crops of the decoded picture by PIL and torchvision, to tensors
    ours, host          decode and canvas: all that the host does where a device augments
    ours, augment       the same views by dino_core.augment with the CPU as the device

One thread, 500 x 375 JPEGs of the example photographs, in turns; medians. Nothing else may compute meanwhile.
"""

import io
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import PIL
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms

from dino_core.augment import augment, dino_views
from dino_core.preprocess import IMAGENET_MEAN, IMAGENET_STD
from training.data.canvases import canvas_of
from training.machine import keep_freed_memory

ROOT = Path(__file__).parents[1]
IMAGES, ROUNDS, CANVAS_PX = 32, 7, 288
RESULT = Path(__file__).with_suffix(".json")
BICUBIC = transforms.InterpolationMode.BICUBIC


def photographs() -> list[bytes]:
    """JPEGs of 500 x 375."""
    made = []
    for path in sorted((ROOT / "examples/photos").rglob("*.jpg"))[:IMAGES]:
        file = io.BytesIO()
        Image.open(path).convert("RGB").resize((500, 375)).save(file, "JPEG", quality=85)
        made.append(file.getvalue())
    return made


def official_views(*, global_px: int = 224, local_px: int = 96) -> list[Callable[[Image.Image], Tensor]]:
    """The published pipeline, one composition for each of 2 global and 8 local crops."""

    def view(size_px: int, area: tuple[float, float], *, blur: float, solarise: float) -> transforms.Compose:
        def blurred(image: Image.Image) -> Image.Image:
            if random.random() >= blur:
                return image
            return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

        def solarised(image: Image.Image) -> Image.Image:
            return ImageOps.solarize(image) if random.random() < solarise else image

        return transforms.Compose(
            [
                transforms.RandomResizedCrop(size_px, scale=area, interpolation=BICUBIC),
                transforms.RandomHorizontalFlip(),
                transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                transforms.RandomGrayscale(0.2),
                transforms.Lambda(blurred),
                transforms.Lambda(solarised),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    first = view(global_px, (0.4, 1.0), blur=1.0, solarise=0.0)
    second = view(global_px, (0.4, 1.0), blur=0.1, solarise=0.2)
    return [first, second, *[view(local_px, (0.05, 0.4), blur=0.5, solarise=0.0) for _ in range(8)]]


def main() -> None:
    """Measures in turns, prints the medians and writes them as JSON."""
    torch.set_num_threads(1)
    keep_freed_memory()
    files, views = photographs(), official_views()
    decoded = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
    canvases = torch.stack([canvas_of(file, canvas_px=CANVAS_PX).pixels_CHW for file in files])

    def ours() -> list[Tensor]:
        return augment(
            canvases,
            sizes_px_B2=torch.tensor([[375, 500]] * len(files)),
            views=dino_views(),
            seed=0,
            epoch=0,
            indices_B=torch.arange(len(files)),
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )

    work: dict[str, Callable[[], object]] = {
        "official_decode": lambda: [Image.open(io.BytesIO(file)).convert("RGB") for file in files],
        "official_augment": lambda: [view(image) for image in decoded for view in views],
        "ours_host": lambda: [canvas_of(file, canvas_px=CANVAS_PX) for file in files],
        "ours_augment": ours,
    }
    taken_s: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS + 1):
        for name, do in work.items():
            began = time.perf_counter()
            do()
            taken_s[name].append(time.perf_counter() - began)
    ms = {name: 1000 * statistics.median(taken[1:]) / len(files) for name, taken in taken_s.items()}
    official = ms["official_decode"] + ms["official_augment"]
    result = {
        "machine": f"{platform.processor() or platform.machine()}, one of {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "pillow": PIL.__version__,
        },
        "n": f"{ROUNDS} rounds of {len(files)} images, medians",
        "ms_per_image": ms,
        "host_ratio": ms["ours_host"] / official,
        "cpu_as_device_ratio": (ms["ours_host"] + ms["ours_augment"]) / official,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
