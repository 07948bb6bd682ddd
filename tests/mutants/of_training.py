"""Errors in a step: buffers, the loop, verdicts, divergence, the strategy, the schedule, averages."""

from tests.mutants.mutant import Mutant, remembers

_BUFFERS, _LOOP, _VERDICTS = (
    "runtime/training/buffers.py",
    "runtime/run/trainer.py",
    "runtime/training/step_outcomes.py",
)
_DIVERGENCE, _PROGRESS = "runtime/training/divergence.py", "runtime/training/progress.py"
_STRATEGY, _SCHEDULE = "runtime/strategies/ddp.py", "runtime/optimization/schedule.py"
_AVERAGING = "runtime/optimization/averaging.py"

MUTANTS = (
    Mutant(
        "buffers: fillers change the statistics",
        _BUFFERS,
        "            if slot >= 0:\n                self._sums.put(Node(0, slot), self._slot_change())\n",
        "            self._sums.put(Node(0, max(slot, self._reduction.own_slots.start)), self._slot_change())\n",
        (
            "tests/test_accumulation.py::test_dropout_and_batch_norm_give_the_same_run_for_any_world_size",
            "tests/test_accumulation.py",
        ),
    ),
    Mutant(
        "buffers: a slot begins with what the one before left",
        "runtime/training/buffer_group.py",
        "        self._write(self._start_values)\n",
        "        pass\n",
        ("tests/test_accumulation.py::test_batch_norm_statistics_are_the_mean_over_slots",),
    ),
    Mutant(
        "buffers: ranks keep statistics of their own",
        _BUFFERS,
        "            change = self._reduction.sum(self._sums.take(), self._change)\n",
        "            change = total(zip(self._sums.nodes, self._sums.take(), strict=True), Tensor.add_)\n",
        ("tests/test_accumulation.py::test_dropout_and_batch_norm_give_the_same_run_for_any_world_size",),
    ),
    Mutant(
        "buffers: a skipped update moves the statistics",
        _BUFFERS,
        "if skipped is True:",
        "if False:",
        (
            remembers("a skipped step"),
            "tests/test_strategies.py::test_skipped_steps_leave_weights_and_averages_and_buffers_as_they_are",
            "tests/test_divergence.py::test_a_skipped_update_leaves_everything_as_it_was_bit_for_bit",
        ),
    ),
    Mutant(
        "loop: every slot draws the random numbers of the first",
        _LOOP,
        "Purpose.SLOT, progress.step, microbatch.slot)",
        "Purpose.SLOT, progress.step, 0)",
        ("tests/test_accumulation.py::test_every_slot_of_every_step_draws_numbers_of_its_own",),
    ),
    Mutant(
        "loop: every step draws the random numbers of the first",
        _LOOP,
        "Purpose.SLOT, progress.step, microbatch.slot)",
        "Purpose.SLOT, 0, microbatch.slot)",
        ("tests/test_accumulation.py::test_every_slot_of_every_step_draws_numbers_of_its_own",),
    ),
    Mutant(
        "loop: a run that is stopped leaves without a save",
        _LOOP,
        "leaving = self._saver.is_best(), reason is not None and reason.before_limit",
        "leaving = self._saver.is_best(), reason is StopReason.EARLY_STOPPING",
        ("tests/test_whole_state.py::test_only_what_is_due_or_among_the_best_is_saved_and_so_after_a_stop",),
    ),
    Mutant(
        "loop: a batch without any weight is applied",
        _LOOP,
        "if window.weight == 0:",
        "if False:",
        ("tests/test_accumulation.py::test_a_window_without_any_target_updates_nothing",),
    ),
    Mutant(
        "loop: the plateau schedule hears of no evaluation",
        _LOOP,
        "                    self._schedule.after_evaluation(results)\n",
        "",
        (
            "tests/test_resumption.py::test_learning_rates_are_equal_on_all_ranks_at_every_step_also_over_a_resumption",
            "tests/test_schedule_runs.py",
        ),
    ),
    Mutant(
        "verdicts: the schedule advances on a skipped step",
        _VERDICTS,
        "        if applied:\n            self._schedule.after_update()\n            if self._averaging",
        "        self._schedule.after_update()\n        if applied:\n            if self._averaging",
        ("tests/test_divergence.py::test_a_skipped_update_leaves_everything_as_it_was_bit_for_bit",),
    ),
    Mutant(
        "verdicts: an average takes in what a skipped step left",
        _VERDICTS,
        "            if self._averaging is not None:\n                self._averaging.update()\n",
        "        if self._averaging is not None:\n            self._averaging.update()\n",
        (
            "tests/test_divergence.py::test_a_skipped_update_leaves_everything_as_it_was_bit_for_bit",
            "tests/test_strategies.py::test_skipped_steps_leave_weights_and_averages_and_buffers_as_they_are",
        ),
    ),
    Mutant(
        "verdicts: averages never hear of an epoch's end",
        _VERDICTS,
        "                self._averaging.after_epoch()\n",
        "                pass\n",
        ("tests/test_averaging.py::test_swa_is_torchs_loop_by_hand",),
    ),
    Mutant(
        "divergence: the row of skipped steps is lost on resumption",
        _DIVERGENCE,
        'list(state["skips"])',
        "[]",
        ("tests/test_whole_state.py::test_a_row_of_skipped_steps_goes_on_over_a_stop",),
    ),
    Mutant(
        "divergence: the losses that spikes are judged by are lost on resumption",
        _DIVERGENCE,
        '= list(state["losses"])',
        "= []",
        ("tests/test_divergence.py::test_the_losses_that_spikes_are_judged_by_survive_a_resumption",),
    ),
    Mutant(
        "divergence: a loss that jumped is taken in as accepted",
        _DIVERGENCE,
        "            mean = statistics.fmean(self._losses) if",
        "            self._losses = [*self._losses[1:], loss]\n            mean = statistics.fmean(self._losses) if",
        (
            "tests/test_divergence.py::test_a_loss_that_jumps_is_skipped_before_its_update",
            "tests/test_divergence.py",
        ),
    ),
    Mutant(
        "divergence: a row of skipped steps has no end",
        _DIVERGENCE,
        "if len(self._skips) > section.max_skips:",
        "if False:",
        ("tests/test_divergence.py::test_updates_that_are_skipped_without_end_stop_the_run",),
    ),
    Mutant(
        "progress: batches that were left out are forgotten on resumption",
        _PROGRESS,
        'self.skipped_batches = [Cursor(*cursor) for cursor in state["skipped_batches"]]',
        "self.skipped_batches = []",
        (
            remembers("a rollback that lowers the rate"),
            "tests/test_divergence.py",
        ),
    ),
    Mutant(
        "progress: a skipped step counts as an update",
        _PROGRESS,
        "        else:\n            self.skipped_steps.append(step)",
        "        else:\n            self.updates += 1\n            self.skipped_steps.append(step)",
        ("tests/test_divergence.py::test_a_skipped_update_leaves_everything_as_it_was_bit_for_bit",),
    ),
    Mutant(
        "strategy: the loss scale is forgotten on resumption",
        "runtime/strategies/whole_state.py",
        'self._scaler.load_state_dict(dict(state["scaler"]))',
        "pass",
        ("tests/test_strategies.py::test_fp16_skips_overflows_without_a_trace_and_resumes_bitwise",),
    ),
    Mutant(
        "strategy: the loss scale never grows or falls",
        _STRATEGY,
        "            self._scaler.update()\n",
        "",
        ("tests/test_strategies.py::test_fp16_skips_overflows_without_a_trace_and_resumes_bitwise",),
    ),
    Mutant(
        "strategy: no pass before the first step settles DDP's buckets",
        _STRATEGY,
        "        if self.world_size == 1:\n            return\n        preserved",
        "        if True:\n            return\n        preserved",
        ("tests/test_resumption.py::test_a_run_resumed_twice_is_bitwise_equal_to_the_uninterrupted_run",),
    ),
    Mutant(
        "strategy: the pass before the first step leaves its statistics",
        _STRATEGY,
        "with preserved[0], preserved[1], self.microbatch(slot=-1, last=True)",
        "with preserved[0], self.microbatch(slot=-1, last=True)",
        (
            "tests/test_accumulation.py::test_dropout_and_batch_norm_give_the_same_run_for_any_world_size",
            "tests/test_accumulation.py",
            "tests/test_resumption.py::test_a_run_may_go_on_with_any_number_of_processes",
        ),
    ),
    Mutant(
        "strategy: the gradient is not cleared",
        _STRATEGY,
        "            parameter.grad = None",
        "            pass",
        ("tests/test_accumulation.py::test_the_update_is_that_of_the_whole_batch_and_of_a_ragged_one",),
    ),
    Mutant(
        "schedule: the rate that a rollback lowered is lost on resumption",
        _SCHEDULE,
        'state["updates"], state["epochs"], state["lowered"]',
        'state["updates"], state["epochs"], 1.0',
        (remembers("a rollback that lowers the rate"),),
    ),
    Mutant(
        "schedule: the warm-up is a step late",
        _SCHEDULE,
        "factor *= (self._updates + 1) / self._warmup_steps",
        "factor *= self._updates / self._warmup_steps",
        (
            "tests/test_schedule.py::test_after_the_warm_up_rate_and_momentum_are_torchs_and_resume_at_every_step",
            "tests/test_schedule.py",
        ),
    ),
    Mutant(
        "schedule: the epochs that were counted are lost on resumption",
        _SCHEDULE,
        'state["updates"], state["epochs"], state["lowered"]',
        'state["updates"], 0, state["lowered"]',
        (
            remembers("SWA by epochs"),
            remembers("an epoch's schedule behind a warm-up"),
            "tests/test_averaging.py::test_swa_that_is_stopped_after_any_step_goes_on_bitwise",
        ),
    ),
    Mutant(
        "averaging: the statistics of SWA are not saved",
        _AVERAGING,
        '"statistics": dict(self._statistics),',
        '"statistics": {},',
        (
            "tests/test_averaging.py::test_swa_by_steps_is_torchs_loop_by_hand",
            "tests/test_averaging.py::test_swa_is_torchs_loop_by_hand",
        ),
    ),
    Mutant(
        "averaging: the statistics of SWA are lost on resumption",
        _AVERAGING,
        'self._on_device(state["statistics"])',
        "{}",
        ("tests/test_averaging.py::test_statistics_come_back_with_the_average_that_they_are_of",),
    ),
    Mutant(
        "averaging: how long the next intake waits is lost on resumption",
        _AVERAGING,
        'self._waited = state["waited"] if',
        "self._waited = 0 if",
        (
            remembers("an average that begins late"),
            "tests/test_averaging.py::test_an_average_warms_up_begins_and_waits_as_its_formula_says",
        ),
    ),
    Mutant(
        "averaging: the way to an average's start is lost on resumption",
        _AVERAGING,
        'self._updates, self._epochs = state["updates"], state["epochs"]\n        self._waited',
        "self._updates, self._epochs = 0, 0\n        self._waited",
        (remembers("an average that begins late"),),
    ),
    Mutant(
        "averaging: raw weights do not come back after an evaluation",
        _AVERAGING,
        "                    tensor.copy_(value)\n",
        "                    pass\n",
        ("tests/test_averaging.py::test_an_average_warms_up_begins_and_waits_as_its_formula_says",),
    ),
)
