"""Run folders on disk: checkpoints, the run lock, rollback history, resumption, pretrained weights."""
