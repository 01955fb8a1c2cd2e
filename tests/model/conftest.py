"""The deployed model that the tests of ``deploy/`` use as well."""

from tests.deploy.conftest import trained

__all__ = ["trained"]
