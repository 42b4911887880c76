"""One environment runs all of tests/oracle, torchvision among it."""

from tests.oracle.torchvision_shim import define_missing_operators

define_missing_operators()
