"""Errors in checkpoints, resumption, the run folder, evaluation and metrics."""

from tests.mutants.mutant import Mutant, remembers

_CHECKPOINT, _RESUMPTION = "runtime/checkpoints/checkpoint.py", "runtime/checkpoints/run_state.py"
_FOLDER, _ATTEMPTS, _BEST = (
    "runtime/checkpoints/run_folder.py",
    "runtime/checkpoints/rollback_history.py",
    "runtime/checkpoints/best.py",
)
_METRIC_STATES = "runtime/evaluation/metric_states.py"
_METRICS, _EVALUATOR = "runtime/evaluation/metrics.py", "runtime/evaluation/evaluator.py"
_EVALUATIONS = "runtime/run/evaluations.py"

MUTANTS = (
    Mutant(
        "checkpoint: a damaged one is read",
        _CHECKPOINT,
        "            if damage is not None:\n                aside",
        "            if False:\n                aside",
        ("tests/test_checkpoint.py::test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used",),
    ),
    Mutant(
        "checkpoint: of several the oldest is gone on from",
        _CHECKPOINT,
        "for checkpoint in reversed(list(self._checkpoints())):",
        "for checkpoint in list(self._checkpoints()):",
        (
            "tests/test_checkpoint.py::test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used",
            "tests/test_checkpoint.py",
        ),
    ),
    Mutant(
        "checkpoint: the best are dropped with the old",
        _CHECKPOINT,
        "for best in self._best:\n            kept |=",
        "for best in ():\n            kept |=",
        ("tests/test_checkpoint.py::test_the_newest_and_the_best_of_each_metric_are_kept",),
    ),
    Mutant(
        "checkpoint: another job may have taken the folder before the rename",
        _CHECKPOINT,
        "            self._before_commit()\n",
        "",
        ("tests/test_saving.py::test_another_owner_of_the_folder_keeps_a_checkpoint_from_its_final_name",),
    ),
    Mutant(
        "checkpoint: a final name before the manifest is written",
        _CHECKPOINT,
        '    write_durably(folder / "manifest.json", json.dumps(manifest, indent=1).encode())\n',
        "",
        ("tests/test_checkpoint.py::test_the_newest_checkpoint_comes_back_bit_for_bit",),
    ),
    Mutant(
        "checkpoint: what a rollback abandoned is read again",
        _CHECKPOINT,
        "listed(self.folder, self.rollback_history) if not abandoned)",
        "listed(self.folder, self.rollback_history))",
        ("tests/test_saving.py::test_abandoned_checkpoints_are_not_read_and_go_with_the_next_save",),
    ),
    Mutant(
        "attempts: a rollback abandons its own target",
        _ATTEMPTS,
        "step > self.target_step",
        "step >= self.target_step",
        ("tests/test_divergence.py",),
    ),
    Mutant(
        "resumption: the objective's own parameters start anew",
        _RESUMPTION,
        '(module.model, "model.", model), (module.objective, "objective.", objective))',
        '(module.model, "model.", model),)',
        (remembers("an objective's own parameters"),),
    ),
    Mutant(
        "resumption: the optimizer's state starts anew",
        _RESUMPTION,
        "            state_io.load_optimizer_state(optimizer_state)\n",
        "",
        ("tests/test_resumption.py::test_stopping_after_any_step_changes_nothing",),
    ),
    Mutant(
        "resumption: early stopping waits anew",
        _RESUMPTION,
        'self.early_stopping.load_state_dict(training["early_stopping"])',
        "pass",
        (
            remembers("early stopping"),
            "tests/test_early_stopping.py::test_an_interrupted_run_ends_at_the_same_step_bit_for_bit",
        ),
    ),
    Mutant(
        "resumption: an average that is still to come is lost",
        _RESUMPTION,
        'if self.averaging is not None and training["averaging"] is not None:',
        'if self.averaging is not None and training["averaging"]["count"]:',
        (remembers("an average that begins late"),),
    ),
    Mutant(
        "resumption: a rollback that a state does not know of leaves the rate as it is",
        _RESUMPTION,
        "            self.schedule.lower(rollback.learning_rate_factor)\n",
        "            pass\n",
        ("tests/test_divergence.py::test_a_kill_during_a_rollback_changes_nothing",),
    ),
    Mutant(
        "resumption: a batch that a rollback goes round is trained on",
        _RESUMPTION,
        "            self.progress.skipped_batches += rollback.skipped\n",
        "            pass\n",
        ("tests/test_divergence.py::test_a_rollback_goes_round_the_batch_and_is_recorded",),
    ),
    Mutant(
        "resumption: a changed seed is accepted",
        _RESUMPTION,
        "if not _same(old.get(key), new.get(key)) and not _allowed(key, allowed)",
        'if key != "seed" and not _same(old.get(key), new.get(key)) and not _allowed(key, allowed)',
        (
            "tests/test_bad_input.py",
            "tests/test_resumption.py",
        ),
    ),
    Mutant(
        "run folder: the best result is forgotten on resumption",
        _FOLDER,
        'self._best = BestResults(self._section.best, reply["saved"])',
        "self._best = BestResults(self._section.best, [])",
        ("tests/test_whole_state.py::test_only_what_is_due_or_among_the_best_is_saved_and_so_after_a_stop",),
    ),
    Mutant(
        "run folder: results that are saved are not taken note of",
        _FOLDER,
        "self._best.add(results)",
        "pass",
        ("tests/test_whole_state.py::test_only_what_is_due_or_among_the_best_is_saved_and_so_after_a_stop",),
    ),
    Mutant(
        "run folder: a rollback returns to weights that are not finite",
        _FOLDER,
        "            return _non_finite(checkpoint)\n",
        "            return None\n",
        ("tests/test_divergence.py::test_a_poisoned_checkpoint_is_never_gone_back_to",),
    ),
    Mutant(
        "best: of two equal results the later one",
        _BEST,
        "return sorted(judged, key=value,",
        "return sorted(reversed(judged), key=value,",
        ("tests/test_best.py",),
    ),
    Mutant(
        "metrics: a rank's update count is taken for everybody's",
        _METRIC_STATES,
        "return MetricState(states, sum(each.updates[key] for each in held))",
        "return MetricState(states, next(iter(several)).updates[key])",
        (
            "tests/test_evaluation.py::test_fewer_samples_than_ranks_work_with_every_kind_of_state",
            "tests/test_metrics.py",
        ),
    ),
    Mutant(
        "metrics: ranks without data are merged, too",
        _METRIC_STATES,
        "held = [each for each in several if each.updates[key]]",
        "held = list(several)",
        (
            "tests/test_evaluation.py::test_fewer_samples_than_ranks_work_with_every_kind_of_state",
            "tests/test_metrics.py",
        ),
    ),
    Mutant(
        "metrics: merged states stay in the metric",
        _METRICS,
        "            for part, state in zip(parts, before, strict=True):\n                state.put_into(part)\n",
        "            pass\n",
        ("tests/test_metrics.py::test_a_look_at_the_figures_changes_nothing_and_an_evaluation_begins_anew",),
    ),
    Mutant(
        "metrics: an evaluation begins with the last one's states",
        _METRICS,
        "        for metric in self._metrics.values():\n            metric.reset()\n",
        "        pass\n",
        ("tests/test_metrics.py::test_a_look_at_the_figures_changes_nothing_and_an_evaluation_begins_anew",),
    ),
    Mutant(
        "evaluation: a mean of the microbatches' means",
        _EVALUATOR,
        "weight = objective.checked_weight(batch, count)\n                for place",
        "weight = 1.0 * self._micro_size\n                for place",
        ("tests/test_evaluation.py::test_masked_tokens_are_in_no_metric_and_in_no_loss",),
    ),
    Mutant(
        "evaluation: the results of a checkpoint are forgotten on resumption",
        _EVALUATIONS,
        "= dict(results), judged\n        self._step",
        "= {}, judged\n        self._step",
        (remembers("best results"),),
    ),
)
