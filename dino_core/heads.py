"""The projection head: embedding -> scores of K prototypes.

Reference: Caron et al. 2021, section 3.1 and appendices C and D, https://arxiv.org/abs/2104.14294; names and
initialisation are those of `DINOHead` in https://github.com/facebookresearch/dino, so that its states load
strictly.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional

from dino_core.products import product


class WeightNormLinear(nn.Module):
    """A linear layer without bias whose rows are `weight_g` times a direction, `weight_v`.

    With an input of length 1 and `weight_g` = 1, each output is the cosine between input and prototype.
    torch's own parametrisation has other state names than the published weights.

    Args:
        in_dim: Length of an input.
        num_prototypes: Number of rows, K.
        trainable_norm: Whether `weight_g` learns; it starts as ones.
    """

    def __init__(self, in_dim: int, num_prototypes: int, *, trainable_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=trainable_norm)
        # Only the direction matters; the bound is that of torch's nn.Linear.
        bound = in_dim**-0.5
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, in_dim).uniform_(-bound, bound))

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_dim] -> [..., K]."""
        if torch.is_autocast_enabled(inputs.device.type) or inputs.dtype != self.weight_v.dtype:
            scale_K1 = self.weight_g / torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
            return functional.linear(inputs, self.weight_v * scale_K1)
        logits_NK = _WeightNormProduct.apply(inputs.flatten(0, -2), self.weight_v, self.weight_g)
        return cast(Tensor, logits_NK).reshape(*inputs.shape[:-1], -1)


class _Kept(FunctionCtx):
    """What the backward pass is given, in names that a type checker can see; torch makes the object."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, bool, bool]


class _WeightNormProduct(torch.autograd.Function):
    """The layer without its normalised weights, which are as large as all other weights together.

        logits[n, k] = (x[n] . v[k]) * g[k] / |v[k]|

    Scaling the products in place of the weights leaves two tensors of K x D less to keep and three less to
    make on the way back, where memory is at its peak.
    """

    @staticmethod
    def forward(ctx: _Kept, inputs_ND: Tensor, directions_KD: Tensor, norms_K1: Tensor) -> Tensor:
        lengths_K = torch.linalg.vector_norm(directions_KD, dim=1)
        logits_NK = product(inputs_ND, directions_KD).mul_(norms_K1[:, 0] / lengths_K)
        ctx.save_for_backward(inputs_ND, directions_KD, norms_K1, lengths_K, logits_NK)
        return logits_NK

    @staticmethod
    @once_differentiable
    def backward(ctx: _Kept, gradient_NK: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs_ND, directions_KD, norms_K1, lengths_K, logits_NK = ctx.saved_tensors
        of_inputs, of_directions, of_norms = ctx.needs_input_grad
        scaled_NK = gradient_NK * (norms_K1[:, 0] / lengths_K)
        back_ND = back_KD = back_K1 = None
        if of_inputs:
            back_ND = product(scaled_NK, directions_KD.T)
        if of_directions or of_norms:
            along_K = torch.linalg.vecdot(gradient_NK, logits_NK, dim=0)
        if of_directions:
            back_KD = product(scaled_NK.T, inputs_ND.T)
            # A direction has no length to change: what points along it is taken out.
            back_KD.addcmul_(directions_KD, (along_K / lengths_K.square())[:, None], value=-1)
        if of_norms:
            back_K1 = (along_K / norms_K1[:, 0])[:, None]
        return back_ND, back_KD, back_K1


class ProjectionHead(nn.Module):
    """MLP to a narrow bottleneck, length 1, then a weight-normed layer of prototypes.

    The last layer of the MLP has no activation: a GELU there would confine the bottleneck to one orthant. The
    L2 bottleneck is what keeps deep heads from collapsing (appendix C).

    Args:
        in_dim: Length of an embedding.
        num_prototypes: K; 65536 for ImageNet, 1024 to 4096 for some ten thousand images.
        hidden_dim: Width of the MLP.
        bottleneck_dim: Width before the prototypes.
        num_layers: Linear layers of the MLP, at least 1.
        norm_last_layer: Keeps each prototype at length 1. More stable; DINO's longer ViT-S runs let them
            learn.
        batch_norm: Adds BatchNorm after each hidden layer, for convolutional backbones.

    Raises:
        ValueError: There is no layer.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_layers: int = 3,
        norm_last_layer: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers is {num_layers}: the head needs at least one layer")
        self.num_prototypes = num_prototypes
        widths = [in_dim] + [hidden_dim] * (num_layers - 1)
        layers: list[nn.Module] = []
        for width_in, width_out in zip(widths, widths[1:], strict=False):
            layers.append(_initialised_linear(width_in, width_out))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width_out))
            layers.append(nn.GELU())
        last = _initialised_linear(widths[-1], bottleneck_dim)
        # A head of one layer has no Sequential in the published states: its keys are mlp.weight and mlp.bias.
        self.mlp: nn.Module = nn.Sequential(*layers, last) if layers else last
        self.last_layer = WeightNormLinear(bottleneck_dim, num_prototypes, trainable_norm=not norm_last_layer)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Scores prototypes.

        Args:
            embeddings: [..., in_dim]. BatchNorm, if there is one, takes its statistics over all leading axes.

        Returns:
            Logits [..., K], before any temperature. The bottleneck is normalised in float32 at least,
            under autocast too.
        """
        bottleneck_ND = cast(Tensor, self.mlp(embeddings.flatten(0, -2)))
        precision = torch.promote_types(bottleneck_ND.dtype, torch.float32)
        directions_ND = functional.normalize(bottleneck_ND.to(precision), dim=-1)
        logits_NK = cast(Tensor, self.last_layer(directions_ND))
        return logits_NK.reshape(*embeddings.shape[:-1], -1)


def _initialised_linear(in_dim: int, out_dim: int) -> nn.Linear:
    linear = nn.Linear(in_dim, out_dim)
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear
