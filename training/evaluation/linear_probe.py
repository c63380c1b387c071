"""A linear classifier on frozen embeddings: what a user gets who has a few labels.

Dimension key: N training images · M test images · D embedding · C classes · S strengths
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

# Weight of the penalty, from none to one that leaves hardly a weight; the best is 1e-4 to 1e-2 as a rule.
STRENGTHS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
_MOST_ITERATIONS = 200


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a linear classifier reached.

    Attributes:
        right_M: Which test images it named.
        strength: The penalty that the held-out training images chose.
    """

    right_M: Tensor
    strength: float

    @property
    def percent(self) -> float:
        """Accuracy."""
        return 100 * float(self.right_M.float().mean())


def linear_probe(
    train_ND: Tensor,
    train_labels_N: Tensor,
    test_MD: Tensor,
    test_labels_M: Tensor,
    *,
    held_out_N: Tensor,
) -> Probe:
    """Fits multinomial logistic regression on embeddings, and tests it.

        minimise over W, b:  mean cross-entropy(W x + b, label) + strength * |W|²
        with x standardised by the training images, by L-BFGS from zeros

    The strength is the one that names most of the held-out training images after a fit on the others, of
    several the one with the least cross-entropy there; then all are fitted. The test images choose nothing.
    No randomness: the same embeddings give the same result. The papers train by SGD with augmented pictures
    (100 passes); this is their protocol without augmentation, solved to its end, as in Radford et al. 2021,
    appendix A.3.

    Args:
        train_ND: Embeddings.
        train_labels_N: int64, from 0; two classes at least.
        test_MD: Embeddings; one at least.
        test_labels_M: int64.
        held_out_N: bool, the training images that choose the strength; of all or none nothing is chosen, and
            there is no penalty.

    Reference: https://arxiv.org/abs/2103.00020
    """
    mean_D, scale_D = train_ND.mean(dim=0), train_ND.std(dim=0).clamp_min(1e-6)
    train, test = (train_ND - mean_D) / scale_D, (test_MD - mean_D) / scale_D
    classes = int(torch.maximum(train_labels_N.max(), test_labels_M.max())) + 1
    strength = STRENGTHS[0]
    if bool(held_out_N.any()) and not bool(held_out_N.all()):
        fits = [
            _judged(
                _fitted(train[~held_out_N], train_labels_N[~held_out_N], classes=classes, strength=candidate),
                train[held_out_N],
                train_labels_N[held_out_N],
            )
            for candidate in STRENGTHS
        ]
        strength = STRENGTHS[max(range(len(fits)), key=lambda place: fits[place])]
    layer = _fitted(train, train_labels_N, classes=classes, strength=strength)
    return Probe(right_M=_named(layer, test, test_labels_M), strength=strength)


def _fitted(inputs_ND: Tensor, labels_N: Tensor, *, classes: int, strength: float) -> nn.Linear:
    layer = nn.Linear(inputs_ND.shape[1], classes, device=inputs_ND.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(
        layer.parameters(), max_iter=_MOST_ITERATIONS, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    def objective() -> float:
        optimizer.zero_grad()
        loss = functional.cross_entropy(layer(inputs_ND), labels_N) + strength * layer.weight.square().sum()
        torch.autograd.backward(loss)
        return float(loss.detach())

    optimizer.step(objective)  # type: ignore[no-untyped-call]
    return layer


@torch.no_grad()
def _named(layer: nn.Linear, inputs_MD: Tensor, labels_M: Tensor) -> Tensor:
    named_M: Tensor = layer(inputs_MD).argmax(dim=1) == labels_M
    return named_M


@torch.no_grad()
def _judged(layer: nn.Linear, inputs_MD: Tensor, labels_M: Tensor) -> tuple[int, float]:
    """How many it names, and how sure it is of the truth: of few images many strengths name as many."""
    logits_MC = layer(inputs_MD)
    return int((logits_MC.argmax(dim=1) == labels_M).sum()), -float(
        functional.cross_entropy(logits_MC, labels_M)
    )
