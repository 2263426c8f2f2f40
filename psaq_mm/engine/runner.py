"""A Runner that knows what a ``quantization`` stanza means, for the ecosystem's own tools."""
from __future__ import annotations

import copy

from mmengine.runner import Runner

from ..registry import RUNNERS


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
