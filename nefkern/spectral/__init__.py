"""The spectral core: eigenpairs of sparse graphs and their extension to new rows; no images."""
