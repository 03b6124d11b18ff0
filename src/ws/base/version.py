"""The version of the package. Its own module, so that no module has to import the top of the package."""

__version__ = "0.1.0"
