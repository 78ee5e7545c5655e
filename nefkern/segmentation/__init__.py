"""Segments and their scores: logits to clusters, classes, figures, pictures (section 3.6)."""
