"""diffmine: find what is visually typical of the labels of an image dataset."""

__version__ = "0.1.0"
