"""The metrics of jobs."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nybble.server.training.jobs import Jobs


class TrainingCollector(Collector):
    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def collect(self) -> Iterator[Metric]:
        jobs = GaugeMetricFamily(
            "nybble_fine_tuning_jobs", "Fine-tuning jobs by status.", labels=["status"]
        )
        for status, count in self._jobs.counts().items():
            jobs.add_metric([status], count)
        yield jobs
        step = steps = 0
        for job in self._jobs.with_status("running"):
            step, steps = job.step, job.steps
        yield GaugeMetricFamily(
            "nybble_fine_tuning_step", "Steps that the running job has made.", value=step
        )
        yield GaugeMetricFamily(
            "nybble_fine_tuning_steps", "Steps that the running job has to make.", value=steps
        )
