"""Takes the configs of the installed zoos through the whole job, made small. On top of everything else."""
from .check import check_apart, check_config, is_transformer, shrink, zoo_configs

__all__ = ['check_apart', 'check_config', 'is_transformer', 'shrink', 'zoo_configs']
