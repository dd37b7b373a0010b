"""The trainer's datasets serve here too."""

from tests.trainer.conftest import alone, datasets, root

__all__ = ["alone", "datasets", "root"]
