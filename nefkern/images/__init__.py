"""From pictures to rows and graphs: frozen backbones, their weights, κ of patches (3.1, 3.3)."""
