"""The version of the package, apart, so that every room may read it and none has to import the package's top."""

__version__ = "0.1.0"
