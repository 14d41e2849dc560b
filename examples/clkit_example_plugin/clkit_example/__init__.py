"""An example of a plug-in of clkit."""

from clkit_example.dimmed import DimmedDigits
from clkit_example.er_ace import ERACE

__all__ = ["ERACE", "DimmedDigits"]
