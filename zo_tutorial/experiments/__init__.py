"""Complete experiments: a config (`load_config`), the run (`run`), its record (`load_record`), and tables of runs."""

from zo_tutorial.experiments.config import load_config
from zo_tutorial.experiments.errors import ExperimentError
from zo_tutorial.experiments.record import load_record
from zo_tutorial.experiments.schema import Config
from zo_tutorial.experiments.tables import load_table, reproduce
from zo_tutorial.experiments.train import run

__all__ = ["Config", "ExperimentError", "load_config", "load_record", "load_table", "reproduce", "run"]
