"""Errors in the order, the cutting and sharing out of batches, and streams."""

from tests.mutants.mutant import Mutant, remembers

_ORDER, _BATCHES, _STREAM = "runtime/data/order.py", "runtime/data/batches.py", "runtime/data/stream_windows.py"

MUTANTS = (
    Mutant(
        "order: every epoch in the first one's order",
        _ORDER,
        "key = derive(self._seed, Purpose.ORDER, epoch)\n            self._permutation",
        "key = derive(self._seed, Purpose.ORDER, 0)\n            self._permutation",
        ("tests/test_order.py",),
    ),
    Mutant(
        "order: the seed has no say",
        _ORDER,
        "key = derive(self._seed, Purpose.ORDER, epoch)\n            self._permutation",
        "key = derive(0, Purpose.ORDER, epoch)\n            self._permutation",
        ("tests/test_order.py",),
    ),
    Mutant(
        "order: no walk for ids beyond the end",
        _ORDER,
        "while outside.size:",
        "while False:",
        ("tests/test_order.py",),
    ),
    Mutant(
        "order: a block that belongs to another epoch is used again",
        _ORDER,
        "if self._drawn is None or self._drawn[:2] != (epoch, block_start):",
        "if self._drawn is None or self._drawn[1] != block_start:",
        ("tests/test_order.py",),
    ),
    Mutant(
        "order: drop_last drops a whole batch",
        _ORDER,
        "whole if drop_last or not rest else whole + 1",
        "whole - drop_last if drop_last or not rest else whole + 1",
        ("tests/test_order.py",),
    ),
    Mutant(
        "order: a weighted draw reaches what has no weight",
        _ORDER,
        'side="right")',
        'side="left") * 0',
        ("tests/test_order.py",),
    ),
    Mutant(
        "order: every block of weighted draws is the first",
        _ORDER,
        "key = derive(self._seed, Purpose.DRAW, epoch, block)",
        "key = derive(self._seed, Purpose.DRAW, epoch, 0)",
        ("tests/test_order.py",),
    ),
    Mutant(
        "order: a sampler is drawn under the same seed in every epoch",
        _ORDER,
        "seed_everything(derive(self._seed, Purpose.ORDER, epoch), _CPU)",
        "seed_everything(derive(self._seed, Purpose.ORDER, 0), _CPU)",
        ("tests/test_order.py", "tests/test_batching.py"),
    ),
    Mutant(
        "batches: a slot begins one sample late",
        _BATCHES,
        "return ids[len(ids) * slot // slots : len(ids) * (slot + 1) // slots]",
        "return ids[-(-len(ids) * slot // slots) : len(ids) * (slot + 1) // slots]",
        ("tests/test_batches.py::test_slots_partition_a_batch_evenly_and_in_order",),
    ),
    Mutant(
        "batches: ranks without a filler where others have one slot more",
        _BATCHES,
        "fillers = [Microbatch(-1, 0, None)] * (rounds - len(real))",
        "fillers = [Microbatch(-1, 0, None)] * 0",
        (
            "tests/test_batches.py::test_a_rank_without_samples_gets_fillers_of_a_batch_that_exists",
            "tests/test_batches.py",
        ),
    ),
    Mutant(
        "batches: a batch that was left out comes back in the next epoch's place",
        _BATCHES,
        "elif cursor in skipped:",
        "elif cursor in skipped and cursor.epoch == 0:",
        ("tests/test_batches.py::test_batches_that_are_left_out_are_so_in_every_epoch_and_nothing_else_is",),
    ),
    Mutant(
        "batches: a skipped batch is not skipped within a run",
        _BATCHES,
        "next_cursor = upcoming(order, Cursor(cursor.epoch, cursor.batch + 1), skipped)",
        "next_cursor = upcoming(order, Cursor(cursor.epoch, cursor.batch + 1), ())",
        ("tests/test_batches.py::test_batches_that_are_left_out_are_so_in_every_epoch_and_nothing_else_is",),
    ),
    Mutant(
        "batches: empty slots count for the buffers' mean",
        _BATCHES,
        "return (*real, *fillers), sum(size > 0 for size in sizes)",
        "return (*real, *fillers), len(sizes)",
        (
            "tests/test_batches.py::test_the_ids_of_every_step_and_slot_are_equal_for_any_world_size",
            "tests/test_accumulation.py::test_batch_norm_statistics_are_the_mean_over_slots",
            "tests/test_accumulation.py",
        ),
    ),
    Mutant(
        "batches: the weights of a block shift by one step",
        _BATCHES,
        "zip(block, finish_sum().sum(dim=1).tolist(), strict=True)",
        "zip(block, finish_sum().sum(dim=1).roll(1, 0).tolist(), strict=True)",
        ("tests/test_batches.py::test_each_step_has_the_weight_of_its_own_samples",),
    ),
    Mutant(
        "streams: a reader's place is one batch behind",
        _STREAM,
        "self.reader_states[0] = ReaderState(epoch, batch + 1, ",
        "self.reader_states[0] = ReaderState(epoch, batch, ",
        (
            "tests/test_streams.py::test_a_stream_that_can_tell_its_place_is_not_read_again",
            remembers("a stream with a state"),
            "tests/test_stream_runs.py::test_a_resumed_run_is_bitwise_equal",
        ),
    ),
    Mutant(
        "streams: a reader's place is one batch ahead",
        _STREAM,
        "self.reader_states[0] = ReaderState(epoch, batch + 1, ",
        "self.reader_states[0] = ReaderState(epoch, batch + 2, ",
        (
            "tests/test_streams.py::test_a_stream_that_can_tell_its_place_is_not_read_again",
            remembers("a stream with a state"),
            "tests/test_stream_runs.py::test_a_resumed_run_is_bitwise_equal",
        ),
    ),
    Mutant(
        "streams: the place of a stream that shards itself is a turn off",
        _STREAM,
        "= ReaderState(epoch, number, ",
        "= ReaderState(epoch, number + 1, ",
        ("tests/test_streams.py::test_the_place_of_a_stream_that_shares_itself_out_is_that_of_its_next_turn",),
    ),
    Mutant(
        "streams: ranks that read different streams are not noticed",
        "runtime/data/stream_comparison.py",
        "sums = table[..., -COMPARED:]",
        "sums = 0 * table[..., -COMPARED:]",
        (
            "tests/test_stream_runs.py::test_a_stream_that_shares_itself_out_though_the_runtime_was_to_is_refused_on_all_ranks",
        ),
    ),
    Mutant(
        "streams: a batch that a rollback left out is trained on",
        _STREAM,
        "if row.cursor in self._skipped:",
        "if False:",
        ("tests/test_streams.py::test_skipped_batches_are_left_out_and_nothing_else",),
    ),
    Mutant(
        "streams: every epoch begins with the last one's batches",
        _STREAM,
        "cursor = Cursor(cursor.epoch + 1, 0)\n            if held",
        "cursor = Cursor(cursor.epoch, 0)\n            if held",
        ("tests/test_streams.py",),
    ),
)
