"""Break our own code on purpose, and see that a test notices: ``python -m tests.mutants``.

A mutant is one small error in a file that holds a law. It is applied to a copy of the tree, never in place; the tests that
should notice are run there with a time limit. A mutant that survives names a test that is missing.

    python -m tests.mutants --table benchmarks/mutants.md
    python -m tests.mutants --only order --only buffers
    python -m tests.mutants --list
"""
