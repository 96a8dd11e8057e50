"""Towers and rankers: tensors in, tensors out."""
