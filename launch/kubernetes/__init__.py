"""Kubernetes: manifests of Jobs, JobSets and TrainJobs, and their submission."""
