"""Runners: one that knows what a ``quantization`` stanza means, for the ecosystem's own tools, and that of a run."""
from __future__ import annotations

import copy
import logging

from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmengine.visualization.vis_backend import BaseVisBackend

from ..errors import UserError
from ..registry import RUNNERS

KEY = 'visualizer.vis_backends'
WITHOUT = '--cfg-options visualizer=None'  # leaves mmengine's own, which writes files


@RUNNERS.register_module()
class QuantizationRunner(Runner):
    """Runner of configs that carry a stanza: adds :class:`QuantizationHook`.

    ``configs/_base_/dfq.py`` sets ``runner_type`` to it, a key that no zoo config defines, so that mmdet's
    ``tools/test.py`` evaluates a quantized checkpoint with the config it was made from.
    """

    @classmethod
    def from_cfg(cls, cfg):
        cfg = copy.deepcopy(cfg)
        hook = dict(type='psaq_mm.QuantizationHook', quantization=cfg['quantization'])
        hooks = [h for h in cfg.get('custom_hooks') or [] if h['type'] != hook['type']]
        cfg['custom_hooks'] = [*hooks, hook]
        return super().from_cfg(cfg)


class DataFreeRunner(Runner):
    """Runner of the data-free run: its experiment loggers start before the work, and none of them can end it."""

    def build_visualizer(self, visualizer=None) -> Visualizer:
        """Build the Visualizer with every backend in an :class:`ExperimentLogger`.

        Raises:
            UserError: If the Visualizer or one of its backends cannot be built.
        """
        try:
            built = super().build_visualizer(visualizer)
        except Exception as error:
            raise UserError(f'visualizer cannot be built ({type(error).__name__}: {error}): correct it in the config, '
                            f'or do without it: {WITHOUT}') from error
        # The Visualizer has no other door to its backends once it is built; mmdet's own hooks take this one, too.
        built._vis_backends = {name: ExperimentLogger(backend, name, self.logger)
                               for name, backend in built._vis_backends.items()}
        return built

    def close_visualizer(self) -> None:
        """End the experiments. mmengine would do so before the report has something to show."""
        for backend in self.visualizer._vis_backends.values():
            backend.finish()


class ExperimentLogger(BaseVisBackend):
    """Backend of a Visualizer around another one, such as Weights & Biases or TensorBoard.

    The other one must be able to start; the Runner starts it by ``add_config``, before the work. Whatever it raises
    later is one warning, and nothing more goes to it. It stays open until :meth:`finish`.

    Args:
        backend (BaseVisBackend): The other one.
        name (str): What messages call it.
        logger (logging.Logger): For the warning.
    """

    def __init__(self, backend: BaseVisBackend, name: str, logger: logging.Logger):
        super().__init__(None)
        self.backend, self.name, self.logger, self.alive = backend, name, logger, True

    def _init_env(self):
        """The other backend starts by itself."""

    @property
    def experiment(self):
        return self.backend.experiment

    def add_config(self, config, **kwargs) -> None:
        """Start the backend with the config of the run.

        Raises:
            UserError: If it cannot start, as without its package, a login or a project.
        """
        try:
            self.backend.add_config(config, **kwargs)
            if not getattr(self.backend, '_env_initialized', True):  # one that records no config
                _ = self.backend.experiment
        except (Exception, SystemExit) as error:
            raise UserError(f'{KEY}: {self.name} cannot start ({type(error).__name__}: {error}): install and configure '
                            f'it, or do without it: {WITHOUT}') from error

    def _tell(self, method: str, *args, **kwargs) -> None:
        if not self.alive:
            return
        try:
            getattr(self.backend, method)(*args, **kwargs)
        except (Exception, SystemExit) as error:
            self.alive = False
            self.logger.warning(f'{KEY}: nothing more goes to {self.name}, which fails in {method} '
                                f'({type(error).__name__}: {error})')

    def add_graph(self, *args, **kwargs) -> None:
        self._tell('add_graph', *args, **kwargs)

    def add_image(self, *args, **kwargs) -> None:
        self._tell('add_image', *args, **kwargs)

    def add_scalar(self, *args, **kwargs) -> None:
        self._tell('add_scalar', *args, **kwargs)

    def add_scalars(self, *args, **kwargs) -> None:
        self._tell('add_scalars', *args, **kwargs)

    def close(self) -> None:
        """Do nothing: mmengine closes a Visualizer at the end of training. See :meth:`finish`."""

    def finish(self) -> None:
        """Close the backend."""
        self._tell('close')
        self.alive = False
