"""Weights that others made -> tensors under timm's names, all of them accounted for."""
