"""Offline: self-distillation from a folder of unlabelled images to a teacher bundle."""
