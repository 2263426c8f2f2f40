"""psaq_mm's nodes in mmengine's registry tree: types are named ``psaq_mm.X`` in configs, no import needed."""
from mmengine.registry import DATA_SAMPLERS as MMENGINE_DATA_SAMPLERS
from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import METRICS as MMENGINE_METRICS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import OPTIM_WRAPPERS as MMENGINE_OPTIM_WRAPPERS
from mmengine.registry import OPTIMIZERS as MMENGINE_OPTIMIZERS
from mmengine.registry import RUNNERS as MMENGINE_RUNNERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

CLASSIFICATION = 'psaq_mm.classification'
MODELS = Registry('model', parent=MMENGINE_MODELS, scope='psaq_mm', locations=[
    'psaq_mm.models', CLASSIFICATION, 'psaq_mm.deploy'])
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='psaq_mm', locations=['psaq_mm.engine', CLASSIFICATION])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='psaq_mm', locations=[CLASSIFICATION])
METRICS = Registry('metric', parent=MMENGINE_METRICS, scope='psaq_mm', locations=[CLASSIFICATION])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='psaq_mm', locations=['psaq_mm.engine'])
LOOPS = Registry('loop', parent=MMENGINE_LOOPS, scope='psaq_mm', locations=['psaq_mm.engine'])
RUNNERS = Registry('runner', parent=MMENGINE_RUNNERS, scope='psaq_mm', locations=['psaq_mm.engine'])
# Nothing of ours is in these: with them, configs of scope psaq_mm find mmengine's without a warning.
DATA_SAMPLERS = Registry('data sampler', parent=MMENGINE_DATA_SAMPLERS, scope='psaq_mm')
OPTIMIZERS = Registry('optimizer', parent=MMENGINE_OPTIMIZERS, scope='psaq_mm')
OPTIM_WRAPPERS = Registry('optim wrapper', parent=MMENGINE_OPTIM_WRAPPERS, scope='psaq_mm')
OPTIM_WRAPPER_CONSTRUCTORS = Registry('optimizer wrapper constructor', parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
                                      scope='psaq_mm')
