"""All mutants there are."""

from tests.mutants import of_data, of_exact, of_results, of_training

MUTANTS = (*of_data.MUTANTS, *of_training.MUTANTS, *of_results.MUTANTS, *of_exact.MUTANTS)
