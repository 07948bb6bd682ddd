"""Errors in sums that must not depend on the number of processes, and in the digest that proves it."""

from tests.mutants.mutant import Mutant

_TREE, _REDUCTION = "runtime/distributed/slot_tree.py", "runtime/distributed/slot_reduction.py"
_STRATEGY, _DIGEST = "runtime/strategies/exact_ddp.py", "runtime/state/digest.py"
_FSDP = "tests/test_exact_fsdp.py"
_RANDOM_RUNS = "tests/test_exact.py::test_random_runs_are_the_same_bits_on_1_to_4_processes"

MUTANTS = (
    Mutant(
        "exact: ranks are added in the order of the process group's algorithm",
        _REDUCTION,
        "elif any(len(nodes) > 1 for nodes in self._covers) or sum(map(len, self._covers)) > 2:",
        "elif any(len(nodes) > 1 for nodes in self._covers):",
        ("tests/test_slot_reduction.py",),
    ),
    Mutant(
        "exact: a rank joins nodes of which another rank has a part",
        _TREE,
        "above.start < self._slots.start or above.stop > before",
        "above.stop > before",
        ("tests/test_slot_tree.py",),
    ),
    Mutant(
        "exact: autograd adds slots that are no pair of the tree",
        _STRATEGY,
        "if held == Node(0, slot - 1) and slot % 2 and held is not None:",
        "if held == Node(0, slot - 1) and held is not None:",
        (f"{_RANDOM_RUNS}[0]",),
    ),
    Mutant(
        "exact: a parameter that no slot used gets a gradient",
        _STRATEGY,
        "torch.empty_like(parameter) if use else None",
        "torch.empty_like(parameter)",
        (_RANDOM_RUNS,),
    ),
    Mutant(
        "exact: a metric starts each slot from the state of the one before",
        "runtime/evaluation/metrics.py",
        "self._put(self._by_number.get(number) or self._carried_of(number) or self._fresh())",
        "pass",
        (f"{_RANDOM_RUNS}[0]",),
    ),
    Mutant(
        "exact: a gradient of -0.0 stays so with ddp, but not with fsdp",
        _STRATEGY,
        "torch._foreach_add_(self._gradients(), 0.0)",
        "pass",
        (f"{_FSDP}::test_a_gradient_of_negative_zero_is_the_same_with_ddp",),
    ),
    Mutant(
        "exact fsdp: FSDP2's reduce-scatter is not replaced",
        "runtime/strategies/exact_fsdp.py",
        "block.set_custom_reduce_scatter(cast(Any, reduction))",
        "pass",
        (_FSDP, _RANDOM_RUNS),
    ),
    Mutant(
        "exact fsdp: replicas add up the parts of others",
        "runtime/strategies/block_reduction.py",
        ".transpose(0, 1).reshape(-1)",
        ".reshape(-1)",
        (_RANDOM_RUNS,),
    ),
    Mutant(
        "exact fsdp: the norm is summed over shards in the order of the ranks",
        "runtime/strategies/exact_fsdp.py",
        "def _squares(self",
        "def _squares_of_rows(self",
        (_RANDOM_RUNS,),
    ),
    Mutant(
        "exact: kernels round the end of a shard in another way",
        "runtime/optimization/kernels.py",
        "    if elementwise:\n",
        "    if False:\n",
        ("tests/test_optimization.py", _RANDOM_RUNS),
    ),
    Mutant(
        "exact fsdp: an optimizer that mixes rows is accepted",
        "runtime/optimization/elementwise.py",
        "if not torch.equal(whole, cut):",
        "if False:",
        (_FSDP,),
    ),
    Mutant(
        "exact fsdp: the optimizer's state is not put back",
        "runtime/strategies/local_step.py",
        "if id(value) in self._sharded:",
        "if False:",
        (_FSDP, "tests/test_local_step.py"),
    ),
    Mutant(
        "exact sum: what an addition rounds away is lost",
        "runtime/exact_sum.py",
        "                if lost:\n",
        "                if False:\n",
        ("tests/test_exact_sum.py",),
    ),
    Mutant(
        "digest: the place of a block does not count",
        _DIGEST,
        "(_random(first, count) | np.uint64(1)).tolist()",
        "[1] * count",
        ("tests/test_state_digest.py",),
    ),
)
