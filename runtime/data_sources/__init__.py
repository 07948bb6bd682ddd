"""Data that needs no download: each source is one file and gives a map-style data set per split."""

from runtime.data_sources.diabetes import diabetes
from runtime.data_sources.digits import digits
from runtime.data_sources.source_code import SourceCode

__all__ = ["SourceCode", "diabetes", "digits"]
