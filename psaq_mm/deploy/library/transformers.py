"""DETR-like heads and mask classification."""
