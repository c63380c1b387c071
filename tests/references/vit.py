"""A small ViT as people write their own: a layer called `to_latent`, positions cut off for smaller images."""

import torch
from torch import Tensor, nn


class LatentViT(nn.Module):
    """Class token, learnt positions, one transformer block or more, `to_latent`, a classifier behind it.

    Args:
        image_size_px: Side of an image.
        patch_px: Side of a patch.
        width: Of the tokens.
        depth: Blocks.
        num_classes: Of the classifier.
        batched_table: Whether the table of positions has a leading axis of 1.
    """

    def __init__(
        self,
        *,
        image_size_px: int = 32,
        patch_px: int = 8,
        width: int = 24,
        depth: int = 1,
        num_classes: int = 10,
        batched_table: bool = True,
    ) -> None:
        super().__init__()
        num_patches = (image_size_px // patch_px) ** 2
        self.to_patches = nn.Conv2d(3, width, patch_px, stride=patch_px)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        table = torch.randn(1, num_patches + 1, width)
        self.pos_embedding = nn.Parameter(table if batched_table else table[0])
        self.transformer = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True), depth
        )
        self.to_latent = nn.Identity()
        self.mlp_head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.to_patches(images).flatten(2).movedim(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1)
        tokens = tokens + self.pos_embedding[..., : tokens.shape[1], :]
        latent: Tensor = self.to_latent(self.transformer(tokens)[:, 0])
        scores: Tensor = self.mlp_head(latent)
        return scores
