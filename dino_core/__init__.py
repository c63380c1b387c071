"""The numerics of DINO self-distillation, from image bytes to loss and from checkpoint to bundle.

Import the module that you need (`from dino_core.losses import dino_loss`): nothing is imported here, so that
the service loads no training code.
"""
