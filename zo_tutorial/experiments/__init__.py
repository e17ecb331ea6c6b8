"""Complete experiments: a config (`load_config`), the run (`run`) and its record (`load_record`)."""

from zo_tutorial.experiments.config import Config, ExperimentError, load_config
from zo_tutorial.experiments.record import load_record
from zo_tutorial.experiments.train import run

__all__ = ["Config", "ExperimentError", "load_config", "load_record", "run"]
