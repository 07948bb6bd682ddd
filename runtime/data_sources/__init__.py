"""Data sets by short name: readers of the user's files, and data that needs no download; map-style, one module each."""

from runtime.data_sources.arrays import Arrays
from runtime.data_sources.diabetes import diabetes
from runtime.data_sources.digits import digits
from runtime.data_sources.idx import Idx
from runtime.data_sources.images import ImageFolder
from runtime.data_sources.interactions import Candidates, Choices
from runtime.data_sources.questions import TrecQuestions
from runtime.data_sources.source_code import SourceCode
from runtime.data_sources.tables import Table
from runtime.data_sources.text import LabelledTexts, TextLines
from runtime.data_sources.token_file import TokenFile
from runtime.files import existing_folder

__all__ = [
    "Arrays",
    "Candidates",
    "Choices",
    "Idx",
    "ImageFolder",
    "LabelledTexts",
    "SourceCode",
    "Table",
    "TextLines",
    "TokenFile",
    "TrecQuestions",
    "diabetes",
    "digits",
    "existing_folder",
]
