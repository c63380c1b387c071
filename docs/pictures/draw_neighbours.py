"""Draws the README's picture: ten photographs of examples/ and their neighbours, by a bundle.

    python docs/pictures/draw_neighbours.py [models/default]

Every sixth picture is a query; its neighbours are the best of all the others.
"""

import io
import sys
from pathlib import Path

import torch
from PIL import Image

from dino_core.bundle import load_bundle
from dino_core.preprocess import decode, load_pixels
from training.data.folder import find_images
from training.pictures import neighbour_grid

ROOT = Path(__file__).parents[2]
NEIGHBOURS = 7


def main() -> None:
    """Embeds, ranks and draws."""
    bundle = load_bundle(ROOT / (sys.argv[1] if len(sys.argv) > 1 else "models/default"))
    images = find_images(ROOT / "examples/photos")
    contents = [path.read_bytes() for path in images.paths]
    pixels = torch.stack([load_pixels(content, bundle.model.preprocessing) for content in contents])
    with torch.inference_mode():
        embeddings_ND = bundle.model(pixels)
    cosines_NN = embeddings_ND @ embeddings_ND.T
    cosines_NN.fill_diagonal_(-1)
    scores_NK, nearest_NK = cosines_NN.topk(NEIGHBOURS)
    names = [name.split("/")[0] for name in images.names]
    queries = range(0, len(images), 6)
    picture = neighbour_grid(
        [decode(contents[query]) for query in queries],
        [[decode(contents[found]) for found in nearest_NK[query]] for query in queries],
        query_labels=[names[query] for query in queries],
        neighbour_labels=[[names[found] for found in nearest_NK[query]] for query in queries],
        scores=[scores_NK[query].tolist() for query in queries],
        cell_px=96,
    )
    # 256 colours: a quarter of the bytes, and no eye sees it at this size.
    small = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256)
    small.save(Path(__file__).parent / "neighbours.png", optimize=True)


if __name__ == "__main__":
    main()
