"""Measurements and figures of the documentation; README.md lists them. Not part of the package that is installed."""
