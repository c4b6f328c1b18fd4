"""The metrics of files and jobs."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nybble.server.training.files import Files
from nybble.server.training.jobs import Jobs


class TrainingCollector(Collector):
    def __init__(self, jobs: Jobs, files: Files) -> None:
        self._jobs = jobs
        self._files = files

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
        count, size = self._files.totals()
        yield GaugeMetricFamily("nybble_files", "Files stored.", value=count)
        yield GaugeMetricFamily("nybble_file_bytes", "Bytes of the files stored.", value=size)
