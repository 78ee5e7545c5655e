"""From clusters to named classes: names, annotation files, and the page on which they are given."""
